"""Before the first step: do the settings fit the model and the data, and the data as tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from minopt.checkpoint.save import named_tensors
from minopt.devices import has_bfloat16
from minopt.distributed import World
from minopt.evaluation.tasks import EvaluationConfig
from minopt.model import OPT
from minopt.progress import counted
from minopt.training.batches import Tokens
from minopt.training.config import TrainingConfig
from minopt.training.data import Example

logger = logging.getLogger(__name__)


def check_fit(model: OPT, config: EvaluationConfig, eval_data: Sequence[Example] | str | None) -> None:
    """Refuses settings that do not fit the model or the data, and a model that cannot be saved: ``ValueError``."""
    named_tensors(model)  # or it would be trained to the end and then not be saved
    positions, longest = model.config.max_position_embeddings, config.src_length + config.tgt_length
    if longest > positions:
        raise ValueError(
            f"--src_length {config.src_length} and --tgt_length {config.tgt_length}: expected at most {positions} "
            f"tokens together, the model's positions, got {longest}. Lower one or both."
        )
    if model.config.layerdrop > 0:
        raise ValueError(
            f"layerdrop: expected 0, got {model.config.layerdrop} (the model's config.json): each process would skip "
            "different layers, and they would wait for each other. Set it to 0 there."
        )
    if eval_data is None and config.evaluates:
        raise ValueError("--dev_file: expected one to evaluate on, got none. Name one, or leave evaluation out.")
    if config.max_eval_samples is not None and isinstance(eval_data, str):
        raise ValueError("--max_eval_samples: counts examples, and --dev_file is a text. Leave it out.")
    ids = [] if eval_data is None or isinstance(eval_data, str) else [example.id for example in eval_data]
    if len(set(ids)) < len(ids):
        raise ValueError("eval_data: expected a different id for each example, got some more than once.")


def check_precision(config: TrainingConfig, device: torch.device) -> None:
    """Refuses ``--bf16`` on a GPU that emulates bfloat16: ``ValueError``."""
    if config.bf16 and not has_bfloat16(device):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"--bf16: expected a GPU of compute capability 8.0 or more, got one of {capability}, which has no "
            "bfloat16. Use --fp16."
        )


def accumulation_of(config: TrainingConfig, world: World, batch_size: int) -> int:
    """Microbatches of a process in a step of so many examples; ``ValueError`` with the sizes that fit if none does.

    A run keeps the examples a step with which it began.
    """
    found, rest = divmod(batch_size, config.per_device_train_batch_size * world.size)
    if rest:
        fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ValueError(
            f"--per_device_train_batch_size: {config.per_device_train_batch_size} times "
            f"{counted(world.size, 'process', 'processes')} does not divide the {batch_size} examples of a step that "
            f"the run was begun with. Their product must be one of {', '.join(map(str, fits))}."
        )
    if found != config.gradient_accumulation_steps and world.is_first:
        logger.warning(
            "--gradient_accumulation_steps is %d: the run keeps the %d examples a step that it began with.",
            found, batch_size,
        )  # fmt: skip
    return found


def warn(config: EvaluationConfig, world: World, tokens: Mapping[str, Tokens | None], *, eval_is_text: bool) -> None:
    """Says once what of the data was cut, which settings are ignored, and which are likely a mistake.

    ``tokens`` are of the data of ``train_file`` and ``dev_file``, ``None`` where there are none.
    """
    if not world.is_first:
        return
    for option, of in tokens.items():
        if of is None:
            continue
        happened = {
            f"have their prompt cut to --src_length {config.src_length}": of.cut_prompts,
            f"have their completion cut to --tgt_length {config.tgt_length}": of.cut_completions,
            "are left out, for their prompt is too long and cannot be cut without its answer": of.dropped,
        }
        if said := "; ".join(f"{count} {what}" for what, count in happened.items() if count):
            logger.warning("--%s: of %d examples, %s.", option, len(of.rows) + of.dropped, said)
    for sentence in config.ignored(processes=world.size, eval_is_text=eval_is_text):
        logger.warning("%s.", sentence)
    if isinstance(config, TrainingConfig) and config.fp16 and world.device.type == "cpu":
        logger.warning("--fp16: float16 is slow on a CPU. --bf16 is several times faster, and scales no loss.")
    if tokens["dev_file"] is None or not config.evaluates:
        return
    completions = [ids[start:].tolist() for ids, start in tokens["dev_file"].rows]
    longest, n = max(map(len, completions)), config.no_repeat_ngram_size
    if config.min_tgt_length > longest:
        logger.warning(
            "--min_tgt_length %d: no completion of --dev_file has more than %d tokens, so no generated one can be "
            "exact. Leave it out.",
            config.min_tgt_length, longest,
        )  # fmt: skip
    if banned := sum(_repeats(ids, n) for ids in completions) if n else 0:
        logger.warning(
            "--no_repeat_ngram_size %d: %d of %d completions of --dev_file repeat an n-gram themselves and cannot be "
            "generated. Leave it out.",
            n, banned, len(completions),
        )  # fmt: skip


def _repeats(ids: list[int], n: int) -> bool:
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) < len(ngrams)

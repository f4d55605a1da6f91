"""EleutherAI's lm-evaluation-harness measures minopt's models: ``minopt evaluate --task lm_eval:piqa,lambada_openai``.

Or by the harness' own command, which has no place for plug-ins, so that this module starts it:
``python -m minopt.interop.lm_eval --model minopt --model_args pretrained=FOLDER,dtype=float32 --tasks piqa``.
Prompts, their truncation and the ends of texts are those of the harness' model ``hf``.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.distributed as dist
from torch import Tensor

import minopt
from minopt.checkpoint.errors import first_line, some
from minopt.distributed import World, processes
from minopt.errors import is_users
from minopt.generation.batches import cut_batches
from minopt.generation.continuous import Prompts
from minopt.generation.options import with_defaults
from minopt.generation.request import Request, prepare
from minopt.generation.scoring import SHARED, greedy_logprobs
from minopt.interop import need
from minopt.progress import bar
from minopt.stops import Pieces, StopStrings
from minopt.text import LanguageModel
from minopt.tokenizer import pad_left

try:
    harness = need("lm_eval", "lm-eval")
except ValueError as missing:
    if __name__ == "__main__":
        sys.exit(f"minopt: error: {missing}")
    raise
api, registry, models, tasks, utils = (
    import_module(f"lm_eval.{name}") for name in ("api.model", "api.registry", "models.utils", "tasks", "utils")
)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")

# Tokens of a batch on a CPU, where larger ones are slower (benchmarks/bench_lm_eval.py); and how many must be saved, as
# multiples of what a pass costs, before the answers to one question run apart from others.
_BATCH_ON_CPU, _WORTH, _WORTH_ON_GPU = 256, 2 * SHARED, 16 * SHARED


@registry.register_model("minopt")
class MinoptLM(api.TemplateLM):  # type: ignore[misc, name-defined]
    """The harness' view of a ``LanguageModel``: ``pretrained``, or what ``minopt.load`` opens with it and ``options``.

    Args:
        batch_size, max_batch_size: the most texts at once; 1 (the harness' default) and ``"auto"`` are any number.
        max_length: the most tokens that are read; ``None`` is the model's positions.
        add_bos_token: whether texts begin with the tokenizer's bos; ``None``: as its files say.
        prefix_token_id: what an empty context is; ``None`` is the bos.

    Raises:
        ValueError: if there is no tokenizer.
    """

    def __init__(
        self, pretrained: str | LanguageModel, *, batch_size: int | str = 1, max_batch_size: int | None = None,
        device: str | None = None, max_length: int | None = None, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if dist.is_initialized() or not torch.cuda.is_available():
            device = "cpu" if device == "cpu" else None  # the harness asks for "cuda:0" if its user asks for none
        lm = minopt.load(pretrained, device=device, **options) if isinstance(pretrained, str) else pretrained
        if lm.tokenizer is None:
            raise ValueError(f"tokenizer: expected one beside {pretrained}, got none. Give its folder (tokenizer=...).")
        self.lm, self.tokenizer, self._device = lm, lm.tokenizer, lm.decoder.device
        self.max_length = max_length or lm.decoder.config.max_position_embeddings
        size = int(batch_size) if str(batch_size).isdecimal() else max_batch_size
        self._most_rows = lm.decoder.max_batch if size in (None, 1) else size
        self._add_bos, self._prefix = add_bos_token, prefix_token_id
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._world = World(self._rank, self._world_size, self._device)

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return next(i for i in (eos, *self.lm.decoder.config.eos_token_ids, 0) if i is not None)

    @property
    def prefix_token_id(self) -> int:
        return next(i for i in (self._prefix, self.tokenizer.bos_token_id, self.eot_token_id) if i is not None)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; a beginning that is written out is not doubled."""
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id], False)):
            add = False
        return self.tokenizer.encode(string, add)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is what greedy decoding gives; any texts, as ids."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"continuation: {longest} tokens, the model reads {self.max_length}. Shorten it.")
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        starts = [len(row) - len(continuation) for row, (_, _, continuation) in zip(rows, requests, strict=True)]
        found: list[Any] = [None] * len(rows)
        with bar(len(rows), "text", shown=not disable_tqdm) as drawn:
            for batch in self._batches(rows, starts):
                scored = greedy_logprobs(self.lm.decoder, [rows[i] for i in batch], [starts[i] for i in batch])
                for i, (logprobs, are_best) in zip(batch, scored, strict=True):
                    found[i] = logprobs.sum().item(), bool(are_best.all())
                    if (texts := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[i])
                drawn.update(len(batch))
        return found

    def _batches(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Indices of rows that run together: answers to one long question, which is read once; else like lengths."""
        on_cpu, answers = self.device.type == "cpu", defaultdict[tuple[int, ...], list[int]](list)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            answers[tuple(row[:start])].append(i)
        worth = _WORTH if on_cpu else _WORTH_ON_GPU
        apart = [found for question, found in answers.items() if (len(found) - 1) * len(question) >= worth]
        rest = sorted({*range(len(rows))}.difference(*apart))
        groups = [(rest, _BATCH_ON_CPU if on_cpu else None), *((found, None) for found in apart)]
        return [[group[i] for i in batch] for group, most_tokens in groups
                for batch in cut_batches([len(rows[i]) for i in group], self._most_rows, most_tokens)]  # fmt: skip

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts of any length, in windows that do not overlap."""
        windows: list[Any] = []
        owners, totals = list[int](), [0.0] * len(requests)
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, each up to the first of its stop strings."""
        groups, found = defaultdict[str, list[int]](list), [""] * len(requests)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        with bar(len(requests), "text", shown=not disable_tqdm) as drawn:
            for indices in groups.values():
                for i, text in self._continued([requests[i].args[0] for i in indices], requests[indices[0]].args[1]):
                    found[indices[i]] = text
                    self.cache_hook.add_partial("generate_until", requests[indices[i]].args, text)
                    drawn.update()
        return found

    def _continued(self, contexts: list[str], asked: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Each context's index and continuation, of contexts for which the harness asks the same."""
        options, decoder, eos = models.normalize_gen_kwargs(asked), self.lm.decoder, self.eot_token_id
        until = models.handle_stop_sequences(options.pop("until", None), self.tokenizer.decode([eos], False))
        count = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in _SAMPLING}
        if (room := self.max_length - count) < 1:
            raise ValueError(f"max_gen_toks: expected less than the {self.max_length} tokens that the model reads, got "
                             f"{count}. Lower it (--gen_kwargs max_gen_toks=...).")  # fmt: skip
        config = with_defaults(self.lm.generation_defaults, {"max_new_tokens": count, **options})
        rows, pieces = [self.tok_encode(c)[-room:] for c in contexts], Pieces(self.tokenizer, skip_special_tokens=True)

        def request_of(batch: list[int]) -> Request:
            input_ids, mask = pad_left([rows[i] for i in batch], decoder.config.pad_token_id)
            stops = StopStrings(pieces, [text for text in until if text], input_ids.shape[1])
            return prepare(decoder, input_ids, mask, config, stopping_criteria=stops)

        for batch, request, output in Prompts(decoder, config, [*map(len, rows)], request_of, self._most_rows).run():
            new = output.sequences[:, request.input_ids.shape[1] :]
            for i, ids, length in zip(batch, new, output.lengths, strict=True):
                yield i, models.postprocess_generated_text(self.tokenizer.decode(ids[:length]), until, None)

    # How the processes of a run exchange results.

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.tensor(self._world.gather(tensor.tolist()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = self._world.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        self._world.wait()


def evaluate(lm: LanguageModel, names: str, include_path: str | None, **options: Any) -> dict[str, float]:
    """Measures a model on tasks of the harness. All processes of a run call it, and share the examples.

    Args:
        lm: one with a tokenizer.
        names: of tasks and groups, with commas between; ``include_path`` is a folder with more tasks (YAML).
        **options: ``limit``, ``num_fewshot`` and others of the harness' ``simple_evaluate``.

    Returns:
        Values by ``task metric,filter``; in the first process alone.

    Raises:
        ValueError, ConnectionError: if there is no such task, or its data cannot be downloaded.
    """
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path: expected a folder of tasks, there is none ({include_path}). Check the "
                                "path.")  # fmt: skip
    asked, manager = names.split(","), tasks.TaskManager(include_path=include_path, include_defaults=not include_path)
    if include_path and not {*asked} <= {*manager.all_tasks}:
        manager = tasks.TaskManager(include_path=include_path)  # reads thousands of files
    if unknown := [name for name in asked if name not in manager.all_tasks]:
        raise ValueError(f"task: lm-evaluation-harness has no task {some(unknown)}. lm_eval ls tasks lists them; those "
                         "of your own need include_path, their folder.")  # fmt: skip
    try:
        with _cached_data_alone_if_offline():
            found = harness.simple_evaluate(
                MinoptLM(lm), tasks=asked, task_manager=manager, log_samples=False, **options
            )
    except OSError as error:
        raise ConnectionError(f"task: the data of {names} cannot be downloaded ({first_line(error)}). Run it once with "
                              "internet: the cache of Hugging Face's datasets keeps it.") from None  # fmt: skip
    if found is None:
        return {}
    counts = {f"{task} examples": count["effective"] for task, count in found["n-samples"].items()}
    return counts | {f"{task} {metric}": value for task, metrics in found["results"].items()
                     for metric, value in metrics.items() if isinstance(value, float)}  # fmt: skip


@contextmanager
def _cached_data_alone_if_offline() -> Iterator[None]:
    """Where not even the hub's name is found, no download is tried: its client would try for half a minute."""
    hub: Any = import_module("huggingface_hub.constants")
    data: Any = import_module("datasets.config")
    was = hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE
    try:
        if not getproxies():  # which find names themselves
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        hub.HF_HUB_OFFLINE = data.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE = was


def main() -> None:
    """The harness' own command, which then knows minopt; under torchrun the processes share the examples."""
    try:
        with processes(None):
            import_module("lm_eval.__main__").cli_evaluate()
    except Exception as error:
        if not is_users(error):
            raise
        sys.exit(f"minopt: error: {error}")


if __name__ == "__main__":
    main()

"""Fine-tuning of classifiers and of reward models: ``finetune --task classification`` and ``--task reward``.

The reward of a chosen text is to exceed that of a rejected one: the loss is ``-log sigmoid(chosen - rejected)``
(Ouyang et al. 2022, arXiv 2203.02155, equation 1), which is the cross-entropy of both rewards as logits.

Shapes: N texts, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import some
from minopt.checkpoint.find import find_files
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.save import Head
from minopt.config import is_int
from minopt.distributed import World
from minopt.evaluation.answers import EvaluationResult
from minopt.evaluation.tasks import seed_of
from minopt.generation.batches import cut_batches
from minopt.masks import Packed
from minopt.methods.heads import SINGLE_LABEL, SequenceClassifier, check_head, label_names, label_settings, labels_of
from minopt.model import OPT
from minopt.tokenizer import Tokenizer
from minopt.training import method, weights
from minopt.training.batches import Batch, Row, Tokens
from minopt.training.checks import logger
from minopt.training.config import TrainingConfig
from minopt.training.data import parse, read_text


@dataclass(frozen=True)
class LabelledText:
    """An example of ``--task classification``."""

    text: str
    label: str | int  # its name, or its number from 0 on
    id: str = ""  # differs between the examples to evaluate on


@dataclass(frozen=True)
class Preference:
    """An example of ``--task reward``: of two texts, or of two answers to a prompt, the first is better."""

    chosen: str
    rejected: str
    prompt: str = ""  # stands before both
    id: str = ""


_KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "classification": (LabelledText, {"text": str}, "text and label (a name, or a whole number from 0 on)"),
    "reward": (Preference, {"chosen": str, "rejected": str, "prompt?": str}, "chosen, rejected and perhaps prompt"),
}


class LabelLoss(nn.Module):
    """A decoder with a head, whose forward gives the sum of the losses of a batch, in nats."""

    def __init__(self, model: OPT, score: nn.Linear) -> None:
        super().__init__()
        self.model, self.score = model, score

    def forward(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        h = self.model.hidden_states(batch.input_ids, None if batch.lengths is None else Packed(batch.lengths))
        logits = _logits(self.score(h.flatten(0, 1)[batch.at]))
        return F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)


def _logits(scores: Tensor) -> Tensor:
    """Scores ``[N, K]`` in float32; of a reward model ``[N, 1]`` as pairs ``[N / 2, 2]``, whose first is chosen."""
    return scores.float() if scores.shape[1] > 1 else scores.float().view(-1, 2)


class Texts(Tokens):
    """Rows that are one text, or a chosen and a rejected one. Each counts once in the loss."""

    rows: list[Any]  # of tuples of `Row`: a text, and its label in place of a next token

    def texts(self, indices: Sequence[int]) -> list[Row]:
        """The texts of some rows."""
        return [text for i in indices for text in self.rows[i]]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [sum(len(text.ids) for text in row) for row in self.rows]

    def learned(self, indices: Sequence[int]) -> int:
        """How many of some rows count in the loss."""
        return len(indices)

    def digest(self) -> str:
        """See ``Tokens``."""
        return Tokens(self.texts(range(len(self.rows)))).digest()


class Method(method.Method):
    """Trains the decoder and its head: a label is what comes after the last token of a text."""

    @classmethod
    def read(cls, config: TrainingConfig, split: Literal["train", "dev"]) -> Any:
        return list(read_examples(Path(getattr(config, f"{split}_file")), f"--{split}_file", config.task))

    @staticmethod
    def find(
        name_or_path: str | Path, tokenizer: Tokenizer | None, world: World, ignore: Sequence[str] = ()
    ) -> tuple[Checkpoint, Tokenizer]:
        path = world.first_then_all(lambda: find_model(name_or_path))
        stored = world.each(lambda: SequenceClassifier.stored(find_files(path)))
        checkpoint, reader = weights.find(path, tokenizer, world, [*ignore, *(t.name for t in stored.values())])
        architectures = [SequenceClassifier.ARCHITECTURE if stored else "OPTForCausalLM"]
        config = replace(checkpoint.config, extra={**checkpoint.config.extra, "architectures": architectures})
        return replace(checkpoint, config=config), reader

    def tokenise(self, data: Any, *, training: bool) -> Tokens:
        extra, task = self.model.config.extra, self.config.task
        if training and extra.get("architectures") == [SequenceClassifier.ARCHITECTURE]:
            self.labels = known_labels(labels_of(self.model.config, "model"), extra.get("problem_type"), task)
        elif training:  # what a language model's config.json says of labels means nothing
            self.labels = label_names(1) if task == "reward" else new_labels(data)
        option = "--train_file" if training else "--dev_file"
        return encode(data, self.tokenizer, self.config, self.labels, option, self.world)

    def warn(self) -> None:
        warn_of_ignored(self.config.replace(do_train=True), self.world)

    def build(self) -> nn.Module:
        config, labels = self.model.config, self.labels
        settings = label_settings(labels, SINGLE_LABEL if len(labels) > 1 else None)
        self.model.config = replace(config, extra={**config.extra, **settings})  # that of checkpoints
        generator = torch.Generator().manual_seed(seed_of(self.config.seed))
        self.drawn = config.init_std * torch.randn(len(labels), config.embed_dim, generator=generator)
        self.head = nn.Linear(config.embed_dim, len(labels), bias=False, dtype=self.model.dtype).to(self.world.device)
        self._fill_head(self.drawn)
        return LabelLoss(self.model, self.head)

    def fill(self, checkpoint: Checkpoint) -> None:
        super().fill(checkpoint)
        if stored := SequenceClassifier.stored(checkpoint.found):
            check_head(stored, {"weight": self.drawn.shape}, checkpoint.found.where)
        self._fill_head(stored["weight"].read(torch.float32) if stored else self.drawn)

    @torch.no_grad()
    def _fill_head(self, numbers: Tensor) -> None:
        own, numbers = weights.local(self.head.weight, numbers)
        own.copy_(numbers)

    def collate(self, rows: Sequence[Any]) -> Batch:
        batch = super().collate([text for row in rows for text in row])
        return batch if len(self.labels) > 1 else replace(batch, targets=batch.targets[::2])

    def measure(self) -> EvaluationResult | None:
        classifier = SequenceClassifier(self.whole(), self.labels)
        classifier.score.weight = nn.Parameter(weights.whole(self.head.weight).to(classifier.model.dtype))
        tokens: Any = self.eval_tokens
        return measured(classifier, tokens, self.eval_data, self.config, self.world, lambda: self.signals.received != 0)

    def score(self, metrics: Mapping[str, float]) -> float:
        return metrics["accuracy"]

    def save(self, folder: Path) -> None:
        head = Head(SequenceClassifier.ARCHITECTURE, {"score.weight": self.head.weight.detach()}, {})
        weights.save(self.model, folder, self.tokenizer, self.world, head)

    @classmethod
    def evaluate(cls, name: str, data: Any, config: TrainingConfig, world: World) -> EvaluationResult | None:
        model = world.first_then_all(lambda: SequenceClassifier.load(name, device=world.device, dtype="float32"))
        if (reader := model.tokenizer) is None:
            raise ValueError(weights.NO_TOKENIZER.format(name))
        data, labels = data[: config.max_eval_samples], known_labels(model.labels, model.problem_type, config.task)
        tokens = world.each(lambda: encode(data, reader, config, labels, "--dev_file", world))
        warn_of_ignored(config, world)
        return measured(model, tokens, data, config, world)


def read_examples(path: Path, option: str, task: str) -> Iterator[LabelledText | Preference]:
    """Reads JSON lines; ``ValueError`` names the line that is wrong."""
    kind, shape, names = _KINDS[task]
    wanted = f"For --task {task}, a .jsonl or .ndjson holds one object a line with {names}."
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ValueError(f"{option}: expected a .jsonl, got {path}. {wanted}")
    for number, line in enumerate(read_text(path, option[2:]).split("\n"), 1):
        if not line.strip():
            continue
        at = f"{path}: line {number}: "
        record = parse(line, shape | {"id?": str}, at, wanted)
        given = {name: record[name] for name in (field.strip("?") for field in shape) if name in record}
        if empty := [name for name, text in given.items() if not text.strip() and name != "prompt"]:
            raise ValueError(f"{at}{empty[0]}: expected words, got an empty text. {wanted}")
        if task == "classification":
            label = given["label"] = record.get("label")
            if not (is_int(label) or (isinstance(label, str) and label.strip())):
                raise ValueError(f"{at}label: expected a name or a whole number, got {label!r}. {wanted}")
        yield kind(**given, id=record.get("id", str(number)))


def known_labels(labels: tuple[str, ...], problem_type: str | None, task: str) -> tuple[str, ...]:
    """The labels of a classifier or a reward model, which the task has to fit."""
    fits = len(labels) == 1 if task == "reward" else len(labels) > 1 and problem_type in (None, SINGLE_LABEL)
    if not fits:
        wanted = "one output," if task == "reward" else "two labels or more, one of which holds,"
        raise ValueError(f"--task {task}: expected a model of {wanted} got one of {some(labels)}, problem_type "
                         f"{problem_type}. Use another task, or begin with a language model.")  # fmt: skip
    return labels


def new_labels(examples: Sequence[Any]) -> tuple[str, ...]:
    """The labels of examples: their names in alphabetical order, or numbers from 0 on, of which each occurs."""
    given = {getattr(example, "label", None) for example in examples}
    names = sorted(label for label in given if isinstance(label, str))
    if len(given) < 2 or not (len(names) == len(given) or given == {*range(len(given))}):
        got = some(sorted(map(repr, given))) or "none"
        raise ValueError(f"--train_file: expected two labels or more, all names or all numbers from 0 on without gaps, "
                         f"got {got}. Change them, or begin with a classifier that has these labels.")  # fmt: skip
    return label_names(names or len(given))


def encode(
    examples: Sequence[Any], tokenizer: Tokenizer, config: TrainingConfig, labels: Sequence[str], option: str,
    world: World,
) -> Texts:  # fmt: skip
    """Examples as rows. Beyond ``src_length + tgt_length`` tokens a text loses its end, one of a pair its beginning."""
    kind, most, tokens = _KINDS[config.task][0], config.src_length + config.tgt_length, Texts([])
    if wrong := [type(example).__name__ for example in examples if not isinstance(example, kind)]:
        raise ValueError(f"{option}: expected a list of minopt.{kind.__name__}, got {wrong[0]}. Make such a list.")
    numbers: dict[Any, int] = {name: i for i, name in enumerate(labels)} | {i: i for i in range(len(labels))}
    is_pair = kind is Preference
    if not is_pair and (unknown := [f"{e.label!r} ({n})" for n, e in enumerate(examples, 1) if e.label not in numbers]):
        raise ValueError(f"{option}: expected labels {some(labels)}, or 0 to {len(labels) - 1}, got {some(unknown)}, "
                         "with the example's number. Correct them, or begin with a language model.")  # fmt: skip
    texts = [(e.prompt + e.chosen, e.prompt + e.rejected) if is_pair else (e.text,) for e in examples]
    encoded = iter(tokenizer.encode_each([text for row in texts for text in row]))
    for example, row in zip(examples, texts, strict=True):
        made, target = [], 0 if is_pair else numbers[example.label]
        for ids in (next(encoded) for _ in row):
            if len(ids) > most:
                tokens.cut_prompts += 1
                bos = ids[: ids[0] == tokenizer.bos_token_id]
                ids = bos + ids[len(ids) - most + len(bos) :] if is_pair else ids[:most]
            made.append(Row(torch.tensor([*ids, target], dtype=torch.int32), len(ids)))
        tokens.rows.append(tuple(made))
    if tokens.cut_prompts and world.is_first:
        logger.warning(
            "%s: %d texts are cut to %d tokens (--src_length, --tgt_length).", option, tokens.cut_prompts, most
        )
    return tokens


def warn_of_ignored(config: TrainingConfig, world: World) -> None:
    """Says which settings do nothing."""
    for sentence in config.ignored(processes=world.size, eval_is_text=True) if world.is_first else ():
        logger.warning("%s.", sentence)


@torch.inference_mode()
def measured(
    classifier: SequenceClassifier, tokens: Texts, examples: Sequence[Any], config: TrainingConfig, world: World,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:  # fmt: skip
    """The mean loss, and the part of texts whose label is right, or of pairs whose chosen text has the higher reward.

    Each process takes a share of the rows; once ``stop`` says yes in any, the result is ``None``.
    """
    loss = right = 0.0
    said: dict[str, str] = {}
    mine, lengths, is_pair = range(world.rank, len(tokens.rows), world.size), tokens.lengths, config.task == "reward"
    for found in cut_batches([lengths[i] for i in mine], config.per_device_eval_batch_size):
        if stop():
            break
        batch = [mine[i] for i in found]
        scores = _logits(classifier.scores_of([text.ids[:-1].tolist() for text in tokens.texts(batch)]))
        targets = torch.tensor([int(tokens.rows[i][0].ids[-1]) for i in batch])
        loss += F.cross_entropy(scores, targets, reduction="sum").item()
        best = (scores[:, 0] <= scores[:, 1]).long() if is_pair else scores.argmax(1)
        right += int((best == targets).sum())
        names = ("chosen", "rejected") if is_pair else classifier.labels
        said |= {examples[i].id: names[n] for i, n in zip(batch, best.tolist(), strict=True)}
    loss, right, stopped = world.sum(loss, right, float(stop()))
    if stopped:
        return None
    everyone, count = {key: name for part in world.gather(said) for key, name in part.items()}, len(tokens.rows)
    metrics = {"loss": loss / count, "accuracy": right / count, "examples": float(count)}
    return EvaluationResult(metrics, {e.id: everyone[e.id] for e in examples})

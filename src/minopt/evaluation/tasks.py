"""Tasks: how a question on a text becomes a prompt and a completion, and how generated texts are scored. No torch.

Names of settings and their meanings are those of PaddleNLP's OPT example and of transformers' TrainingArguments.
"""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, TypeVar

from minopt.checkpoint.errors import some
from minopt.config import is_int, is_number
from minopt.evaluation.squad import Scores, rouge_scores, score
from minopt.generation.options import GenerationConfig
from minopt.settings import option, problems

_C = TypeVar("_C", bound="EvaluationConfig")

_FIELDS = ("context", "question", "answer")
_GENERATION = ("num_beams", "min_tgt_length", "no_repeat_ngram_size", "select_topk", "top_k", "top_p")


@dataclass(frozen=True)
class Task:
    """How a question becomes a prompt and a completion, and how generated texts are scored; else ``ValueError``."""

    # Fields are {context}, {question} and {answer}, the first and the last at most once each; {{ and }} are braces.
    prompt: str
    completion: str  # with one field, which the prompt does not have
    scores: Scores = score
    best: str = "f1"  # the metric by which checkpoints are compared; higher is better

    def __post_init__(self) -> None:
        prompt, completion = _fields("prompt_template", self.prompt), _fields("completion_template", self.completion)
        if not prompt or prompt.count("context") > 1 or prompt.count("answer") > 1:
            raise ValueError(
                "--prompt_template: expected one field or more, {context} and {answer} at most once each, got "
                f"{_named(prompt)} (in {self.prompt!r}). The fields are {_named(_FIELDS)}."
            )
        if len(completion) != 1:
            raise ValueError(
                f"--completion_template: expected one field, got {_named(completion)} (in {self.completion!r}). "
                f"The fields are {_named(_FIELDS)}."
            )
        if completion[0] in prompt:
            raise ValueError(
                f"--completion_template: expected a field that is not in --prompt_template, got "
                f"{_named(completion)} (in {self.completion!r} and {self.prompt!r}). Take it out of one of the two."
            )


def _fields(option: str, template: str) -> list[str]:
    """The names of a template's fields, in order."""
    names = []
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            if name is not None and (name not in _FIELDS or spec or conversion):
                inside = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise ValueError(f"{{{inside}}}")
            names += [] if name is None else [name]
    except ValueError as error:
        raise ValueError(
            f"--{option}: expected no fields but {_named(_FIELDS)}, got {error} (in {template!r}). "
            "Write {{ and }} for braces."
        ) from None
    return names


def _named(fields: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in fields) or "none"


TASKS: dict[str, Task] = {
    "squad": Task("{context}\nQuestion: {question}\nAnswer:", " {answer}"),
    # The words that PaddleNLP's OPT example trains on: a question is asked for, from its answer and the text.
    "squad-question": Task(
        "answer: {answer} context: {context} question:", " {question}", scores=rouge_scores, best="rouge_l"
    ),
}
"""The tasks that have a name, which ``--task`` takes."""

# Of fine-tuning alone, whose examples have labels instead of completions.
LABEL_TASKS: dict[str, Any] = {"classification": None, "reward": None}


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """A template with its values, which are taken literally, and where each begins (the last time)."""
    text, starts = "", dict[str, int]()
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            starts[name] = len(text)
            text += values[name]
    return text, starts


@dataclass(frozen=True)
class EvaluationConfig:
    """A task, the data that measures it, and how texts are generated. Values that make no sense: ``ValueError``."""

    task: str = option(
        "squad",
        "how data becomes prompts and completions, and how generated texts are scored; classification and reward train "
        "on labels and on pairs",
        choices=ChainMap(LABEL_TASKS, TASKS),
    )
    prompt_template: str | None = option(
        None, "the prompt instead of the task's, with the fields {context}, {question} and {answer}"
    )
    completion_template: str | None = option(None, "the completion for --prompt_template, such as ' {answer}'")
    src_length: int = option(608, "the most tokens of a prompt; longer contexts are cut", least=1)
    tgt_length: int = option(160, "the most tokens of a completion, in the loss and when generated", least=1)
    seed: int = option(42, "seed of the order of examples, of dropout, and of drawn texts", least=0)
    dev_file: str = option("squad", "data to evaluate on: .json, .jsonl, .txt, .raw, or a download: squad, squad-v2")
    max_eval_samples: int | None = option(None, "evaluate on the first N examples only (all)", least=1)
    per_device_eval_batch_size: int = option(8, "examples that a process evaluates at once", least=1)
    num_beams: int = option(1, "beams (1: greedy)", least=1)
    min_tgt_length: int = option(0, "the fewest tokens of a generated text (0)", least=0)
    length_penalty: float = option(1.0, "with beams: above 0 favours long texts")
    no_repeat_ngram_size: int = option(0, "no N tokens in a row occur twice in a generated text (0: no limit)", least=0)
    select_topk: bool = option(True, "take the most probable tokens; false: draw tokens")
    top_k: int = option(0, "draw from the N most probable tokens (0: from all)", least=0)
    top_p: float = option(  # 0 is off, as in PaddleNLP; GenerationConfig's 1 draws from all tokens too
        0.0, "draw from the fewest tokens that together have probability X (0: from all)", least=0, most=1
    )

    # Settings that act only with others: which, when (given the settings, the number of processes, and whether the data
    # to evaluate on is a text), and how the warning says it.
    acts_only: ClassVar[tuple[tuple[tuple[str, ...], Callable[[Any, int, bool], bool], str], ...]] = (
        (("dev_file", "max_eval_samples", "per_device_eval_batch_size", *_GENERATION), lambda c, *_: c.evaluates,
         "with --do_eval or --evaluation_strategy"),
        (_GENERATION, lambda c, _, is_text: not (c.evaluates and is_text),
         "where answers are generated, and for --dev_file none are"),
        (("length_penalty",), lambda c, *_: c.num_beams > 1, "with --num_beams of 2 or more"),
        (("top_k", "top_p"), lambda c, *_: not c.select_topk, "where tokens are drawn, with --select_topk false"),
        (("task",), lambda c, *_: c.prompt_template is None, "without --prompt_template"),
        (("prompt_template",), lambda c, *_: any(
            Path(file).suffix not in (".jsonl", ".ndjson", ".txt", ".raw")
            for file in ([c.train_file] if c.trains else []) + [c.dev_file] * c.evaluates
        ), "on SQuAD's files"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Path):
                object.__setattr__(self, f.name, str(value))
            elif "float" in f.type and is_int(value) and is_number(value):
                object.__setattr__(self, f.name, float(value))
        if wrong := problems(self) or self._contradictions():
            raise ValueError("; ".join(wrong) + ".")

    def _contradictions(self) -> list[str]:
        problems = []
        if self.min_tgt_length > self.tgt_length:
            problems.append(f"--min_tgt_length: {self.min_tgt_length} exceeds --tgt_length {self.tgt_length}. Lower it")
        if (self.prompt_template is None) != (self.completion_template is None):
            problems.append("--prompt_template and --completion_template: expected both or none. Give the other too")
        return problems

    @property
    def trains(self) -> bool:
        return False

    @property
    def evaluates(self) -> bool:
        return True

    def resolved_task(self) -> Task:
        """The task that is named, or given by two templates, which may break a rule of ``Task``: ``ValueError``."""
        if self.prompt_template is None or self.completion_template is None:
            return TASKS[self.task]
        return Task(self.prompt_template, self.completion_template)

    def generation(self, first: int = 0) -> GenerationConfig:
        """How the texts of a batch are generated; each batch, named by its ``first`` example, draws other tokens."""
        options: dict[str, Any] = {}
        if self.num_beams > 1:
            options = {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        if not self.select_topk:
            options |= {"do_sample": True, "seed": seed_of(self.seed, first), "top_k": self.top_k,
                        "top_p": self.top_p or 1.0}  # fmt: skip
        if self.no_repeat_ngram_size:
            options |= {"no_repeat_ngram_size": self.no_repeat_ngram_size, "no_repeat_ngram_include_prompt": False}
        return GenerationConfig(max_new_tokens=self.tgt_length, min_new_tokens=self.min_tgt_length, **options)

    def default(self, name: str) -> Any:
        return type(self).__dataclass_fields__[name].default

    def ignored(self, *, processes: int, eval_is_text: bool) -> list[str]:
        """Settings that are set and have no effect, one sentence for each reason."""
        asked = {f.name for f in fields(self) if getattr(self, f.name) != self.default(f.name)}
        sentences = []
        for names, acts, when in self.acts_only:
            given = [f"--{name}" for name in names if name in asked]
            if given and not acts(self, processes, eval_is_text):
                sentences.append(f"{some(given)}: ignored, {'acts' if len(given) == 1 else 'act'} only {when}")
        return sentences

    def replace(self: _C, **changes: Any) -> _C:
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """All fields, a line each."""
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{name:{width}}  {json.dumps(value)}" for name, value in self.to_dict().items())


def seed_of(*parts: int) -> int:
    """A seed that follows from some numbers; close numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(",".join(map(str, parts)).encode()).digest()[:8], "little") >> 1

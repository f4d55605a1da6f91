"""How to fine-tune: one frozen, checked record, whose fields are the flags of ``minopt finetune``.

Names and meanings are those of PaddleNLP's OPT example and of transformers' TrainingArguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minopt.checkpoint.errors import some
from minopt.config import is_int, is_number, read_json
from minopt.settings import expected
from minopt.settings import option as _option

# PaddleNLP's OPT example: the command in its README, and what its script takes where the command says nothing.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paddlenlp": {
        "train_file": "squad-v2", "dev_file": "squad-v2", "task": "squad-question", "src_length": 608,
        "tgt_length": 160, "num_train_epochs": 4.0, "per_device_train_batch_size": 2, "learning_rate": 3e-5,
        "lr_scheduler_type": "linear", "warmup_ratio": 0.06, "lr_decay_ratio": 0.1, "weight_decay": 0.1,
        "max_grad_norm": 1.0, "label_smoothing": 0.1, "per_device_eval_batch_size": 2, "num_beams": 5,
        "min_tgt_length": 55, "length_penalty": 0.7, "no_repeat_ngram_size": 3,
    },
}  # fmt: skip


def with_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and those of the recipe among them that are not given beside it."""
    recipe = settings.get("recipe")
    return {**(RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}), **settings}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a fine-tuning run. ``minopt finetune --help`` describes each field; so does its ``metadata``.

    A recipe gives the values of fields that the call does not name.

    Raises:
        ValueError: naming each field whose value makes no sense.
    """

    # What
    output_dir: str = _option("", "folder of the run: its checkpoints, metrics and model", changes_run=False)
    model_name_or_path: str | None = _option(None, "the model to start from: a folder, any one file of a checkpoint, "
                                             "or a name such as facebook/opt-125m")  # fmt: skip
    do_train: bool = _option(False, "train; this is the default if --do_eval is not given", changes_run=False)
    do_eval: bool = _option(
        False, "evaluate after the training; without --do_train, evaluate the model as it is", changes_run=False
    )

    recipe: str | None = _option(None, "settings of a published example, which other flags replace", choices=(
                                 *RECIPES,), changes_run=False)  # fmt: skip

    # Data
    train_file: str = _option("squad", "data to train on: SQuAD (.json), prompts and completions (.jsonl), or a text "
                              "(.txt, .raw); squad and squad-v2 download the official files")  # fmt: skip
    dev_file: str = _option(
        "squad",
        "data to evaluate on: SQuAD (.json), prompts and completions (.jsonl), or a text (.txt, "
        ".raw); squad and squad-v2 download the official files",
        changes_run=False,
    )
    task: str = _option(
        "squad",
        "what the model writes for SQuAD data. squad: the answer, from context and "
        "question; squad-question: the question, from answer and context",
        choices=("squad", "squad-question"),
    )
    prompt_template: str | None = _option(
        None, "the prompt instead of that of --task, with the fields {context}, {question} and {answer}"
    )
    completion_template: str | None = _option(
        None, "the completion that belongs to --prompt_template, such as ' {answer}'"
    )
    src_length: int = _option(608, "the most tokens of a prompt; longer contexts are cut", least=1)
    tgt_length: int = _option(160, "the most tokens of a completion, in the loss and when generated", least=1)
    batching: str = _option(
        "packed",
        "packed: the examples of a batch in one row without padding; grouped: examples of "
        "similar length, padded; padded: padded to the longest",
        choices=("packed", "grouped", "padded"),
    )

    # Optimisation
    num_train_epochs: float = _option(3.0, "passes over the data", least=0)
    max_steps: int = _option(
        -1, "train this many steps; --num_train_epochs is ignored then (-1: train by epochs)", least=-1
    )
    per_device_train_batch_size: int = _option(8, "examples in a microbatch of one process", least=1, changes_run=False)
    gradient_accumulation_steps: int = _option(1, "microbatches of one process in a step", least=1, changes_run=False)
    learning_rate: float = _option(5e-5, "the highest learning rate", least=0)
    lr_scheduler_type: str = _option(
        "linear", "how the learning rate falls after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = _option(
        0.0, "the learning rate rises from 0 in this part of all steps (0: at once)", least=0, most=1
    )
    warmup_steps: int = _option(0, "the learning rate rises from 0 in this many steps (0: --warmup_ratio)", least=0)
    lr_decay_ratio: float = _option(
        0.0, "the learning rate falls to this part of the highest (0: to zero)", least=0, most=1
    )
    weight_decay: float = _option(0.0, "weight decay of AdamW, on matrices only (0: none)", least=0)
    adam_beta1: float = _option(0.9, "beta 1 of AdamW", least=0, below=1)
    adam_beta2: float = _option(0.999, "beta 2 of AdamW", least=0, below=1)
    adam_epsilon: float = _option(1e-8, "epsilon of AdamW", least=0)
    max_grad_norm: float = _option(1.0, "scale gradients down to this global norm (1.0; 0: never)", least=0)
    label_smoothing: float = _option(
        0.0, "probability that the target gives to all tokens alike (0: none)", least=0, most=1
    )
    dropout: float | None = _option(
        None, "dropout instead of the model's own; attention_dropout stays (the model's)", least=0, below=1
    )
    seed: int = _option(42, "seed of the order of examples, of dropout, and of drawn answers", least=0)

    # How it runs
    fp16: bool = _option(False, "compute products in float16 with a scaled loss; weights stay float32")
    bf16: bool = _option(False, "compute products in bfloat16; weights stay float32")
    recompute: bool = _option(
        False, "compute the layers again in the backward pass: less memory, about a third more time", changes_run=False
    )
    compile: bool = _option(False, "compile the layers with torch.compile", changes_run=False)
    parallel: str = _option(
        "ddp",
        "ddp: each process holds the whole model; fsdp: each holds a share of it",
        choices=("ddp", "fsdp"),
        changes_run=False,
    )
    device: str | None = _option(None, "cpu or cuda (the GPU if there is one)", changes_run=False)

    # Evaluation
    evaluation_strategy: str = _option(
        "no",
        "evaluate while training: every --eval_steps steps, after each epoch, or not",
        choices=("no", "steps", "epoch"),
        changes_run=False,
    )
    eval_steps: int = _option(
        500, "steps between evaluations, with --evaluation_strategy steps", least=1, changes_run=False
    )
    max_eval_samples: int | None = _option(
        None, "evaluate on the first N examples only (all)", least=1, changes_run=False
    )
    per_device_eval_batch_size: int = _option(
        8, "examples that one process evaluates at once", least=1, changes_run=False
    )
    num_beams: int = _option(1, "beams for generated texts (1: greedy)", least=1, changes_run=False)
    min_tgt_length: int = _option(0, "the fewest tokens of a generated text (0)", least=0, changes_run=False)
    length_penalty: float = _option(1.0, "with beams: above 0 favours long texts", changes_run=False)
    no_repeat_ngram_size: int = _option(
        0, "no N tokens in a row occur twice in a generated text (0: no limit)", least=0, changes_run=False
    )
    select_topk: bool = _option(
        True, "true: generated texts have the most probable tokens; false: tokens are drawn", changes_run=False
    )
    top_k: int = _option(0, "draw from the N most probable tokens (0: from all)", least=0, changes_run=False)
    top_p: float = _option(
        0.0, "draw from the fewest tokens that together have this probability (0: from all)", least=0, most=1,
        changes_run=False,
    )  # fmt: skip

    # What is written
    logging_steps: int = _option(10, "steps between lines of metrics.jsonl", least=1, changes_run=False)
    save_steps: int = _option(500, "steps between checkpoints", least=1, changes_run=False)
    keep_last: int = _option(
        2,
        "how many checkpoints to keep, beside the best one; with 0 a finished run keeps the model alone",
        least=0,
        changes_run=False,
    )
    overwrite_output_dir: bool = _option(
        False, "start again, and remove the run or the model that is in --output_dir", changes_run=False
    )
    resume: str = _option(
        "auto",
        "auto: continue from the latest checkpoint of this run; never: start again; or the path "
        "of a checkpoint to continue from",
        changes_run=False,
    )

    def __new__(cls, *args: Any, **settings: Any) -> TrainingConfig:
        """Notes which fields a call names: a recipe gives the others."""
        self = super().__new__(cls)
        self.__dict__["_named"] = {f.name for f in fields(cls)[: len(args)]} | settings.keys()
        return self

    def __post_init__(self) -> None:
        named = self.__dict__.pop("_named")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in named:
                value = self._default(f)
                object.__setattr__(self, f.name, value)
            if isinstance(value, Path):
                object.__setattr__(self, f.name, str(value))
            elif "float" in f.type and is_int(value) and is_number(value):
                object.__setattr__(self, f.name, float(value))
        problems = [problem for f in fields(self) if (problem := _problem(f, getattr(self, f.name)))]
        if problems := problems or self._contradictions():
            raise ValueError("; ".join(problems) + ".")

    def _default(self, f: Field[Any]) -> Any:
        """The value of a field that is not named."""
        return (RECIPES.get(self.recipe, {}) if isinstance(self.recipe, str) else {}).get(f.name, f.default)

    def _contradictions(self) -> list[str]:
        problems = []
        if not self.output_dir and self.trains:
            problems.append("--output_dir: expected a folder for the run, got none. Name one")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16: expected one of them, got both. Leave one out")
        if self.overwrite_output_dir and self.resume not in ("auto", "never"):
            problems.append(f"--overwrite_output_dir and --resume {self.resume}: expected one, got both. Leave one out")
        if self.min_tgt_length > self.tgt_length:
            problems.append(f"--min_tgt_length: {self.min_tgt_length} exceeds --tgt_length {self.tgt_length}. Lower it")
        if (self.prompt_template is None) != (self.completion_template is None):
            problems.append("--prompt_template and --completion_template: expected both or none. Give the other too")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            problems.append("--num_train_epochs: expected more than 0, got 0.0. Or give --max_steps")
        if self.max_steps == 0:
            problems.append(
                "--max_steps: expected -1 or at least 1, got 0. To evaluate alone, use --do_eval without --do_train"
            )
        return problems

    @property
    def trains(self) -> bool:
        """Whether there is training to do: with ``do_train``, or without any of the two."""
        return self.do_train or not self.do_eval

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate, at the end or on the way."""
        return self.do_eval or self.evaluation_strategy != "no"

    def ignored(self, *, processes: int, eval_is_text: bool) -> list[str]:
        """Settings that are set and have no effect, a sentence for each reason."""
        asked = {f.name for f in fields(self) if getattr(self, f.name) != self._default(f)}
        found = [([name for name in names if name in asked], when)
                 for names, acts, when in _ACTS_ONLY if not acts(self, processes, eval_is_text)]  # fmt: skip
        return [
            f"{some([f'--{name}' for name in names])}: ignored, {'acts' if len(names) == 1 else 'act'} only {when}"
            for names, when in found
            if names
        ]

    @classmethod
    def from_file(cls, path: str | Path) -> dict[str, Any]:
        """Reads settings from JSON: an object whose keys are fields.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such JSON, or has keys that are no fields.
        """
        if not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "nothing of that name"
            raise FileNotFoundError(f"--config: expected a JSON file, got {what} ({path}). Check the path.")
        values = {key.replace("-", "_"): value for key, value in read_json(Path(path)).items()}
        if "model" in values:  # as the flag is called
            values.setdefault("model_name_or_path", values.pop("model"))
        if isinstance(values.get("settings"), dict):  # a run.json
            values = values["settings"]
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"{path}: no such settings: {', '.join(unknown)}. See minopt finetune --help.")
        return values

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some values changed, checked again."""
        return replace(self, **with_recipe(changes))

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)

    def to_text(self) -> str:
        """All fields, a line each."""
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{name:{width}}  {json.dumps(value)}" for name, value in self.to_dict().items())


def _reads_squad(config: TrainingConfig) -> bool:
    files = [config.train_file] * config.trains + [config.dev_file] * config.evaluates
    return any(Path(file).suffix not in (".jsonl", ".ndjson", ".txt", ".raw") for file in files)


# Settings that act only with others: which, when (of the settings, the number of processes, and whether what is
# evaluated on is a text), and how that reads in a warning.
_ACTS_ONLY: tuple[tuple[tuple[str, ...], Callable[[TrainingConfig, int, bool], bool], str], ...] = (
    (("output_dir", "train_file", "batching", "num_train_epochs", "max_steps", "per_device_train_batch_size",
      "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
      "lr_decay_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing",
      "dropout", "fp16", "bf16", "recompute", "compile", "parallel", "evaluation_strategy", "logging_steps",
      "save_steps", "keep_last", "overwrite_output_dir", "resume"), lambda c, *_: c.trains,
     "while training, and --do_eval alone trains nothing"),
    (("num_train_epochs",), lambda c, *_: c.max_steps < 0 or not c.trains, "without --max_steps"),
    (("warmup_ratio",), lambda c, *_: not c.warmup_steps or not c.trains, "without --warmup_steps"),
    (("lr_decay_ratio",), lambda c, *_: c.lr_scheduler_type != "constant" or not c.trains,
     "with a learning rate that falls, and --lr_scheduler_type is constant"),
    (("parallel",), lambda c, processes, _: processes > 1 or not c.trains, "in several processes (torchrun)"),
    (("eval_steps",), lambda c, *_: c.evaluation_strategy == "steps", "with --evaluation_strategy steps"),
    (("dev_file", "max_eval_samples", "per_device_eval_batch_size", "num_beams", "min_tgt_length",
      "no_repeat_ngram_size", "select_topk", "top_k", "top_p"), lambda c, *_: c.evaluates,
     "with --do_eval or --evaluation_strategy"),
    (("num_beams", "min_tgt_length", "no_repeat_ngram_size", "select_topk", "top_k", "top_p"),
     lambda c, _, is_text: not (c.evaluates and is_text), "where answers are generated, and --dev_file is a text"),
    (("length_penalty",), lambda c, *_: c.num_beams > 1, "with --num_beams of 2 or more"),
    (("top_k", "top_p"), lambda c, *_: not c.select_topk, "where tokens are drawn, with --select_topk false"),
    (("task",), lambda c, *_: c.prompt_template is None, "without --prompt_template"),
    (("prompt_template",), lambda c, *_: _reads_squad(c), "on SQuAD's files"),
)  # fmt: skip


def _problem(f: Field[Any], value: Any) -> str | None:
    """What is wrong with the value of one field, if anything."""
    wanted = expected(f, value)
    return None if wanted is None else f"--{f.name}: expected {wanted}, got {value!r}"


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ that make two runs of them, each as ``name: theirs there, mine here``."""
    names = [f.name for f in fields(TrainingConfig) if f.metadata.get("changes_run", True)]
    return [
        f"{name} is {json.dumps(theirs.get(name))} there and {json.dumps(mine.get(name))} here"
        for name in names if mine.get(name) != theirs.get(name)
    ]  # fmt: skip

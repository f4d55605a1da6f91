"""How to fine-tune: one frozen, checked record, whose fields are the flags of ``minopt finetune``. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minopt.config import read_json
from minopt.evaluation.tasks import LABEL_TASKS, EvaluationConfig
from minopt.settings import option

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
    """Settings, completed by those of the recipe that they name."""
    recipe = settings.get("recipe")
    return {**(RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}), **settings}


@dataclass(frozen=True)
class TrainingConfig(EvaluationConfig):
    """Settings of a fine-tuning run, and of its evaluation. ``minopt finetune --help`` describes each field.

    A recipe gives the values of fields that the call does not name. Values that make no sense are a ``ValueError``.
    """

    output_dir: str = option("", "folder of the run: its checkpoints, metrics and model")
    model_name_or_path: str | None = option(
        None, "the model to start from: a folder, any file of a checkpoint, or a name such as facebook/opt-125m"
    )
    do_train: bool = option(False, "train; this is the default if --do_eval is not given")
    do_eval: bool = option(False, "evaluate after training; without --do_train, evaluate the model as it is")
    recipe: str | None = option(None, "settings of a published example, which other flags replace", choices=(*RECIPES,))
    train_file: str = option(
        "squad",
        "data to train on: .json (SQuAD), .jsonl (prompt, completion; or text, label; or chosen, rejected), .txt, "
        ".raw, or a download: squad, squad-v2",
    )
    batching: str = option(
        "packed",
        "packed: one row without padding; grouped: similar lengths, padded; padded: to the longest",
        choices=("packed", "grouped", "padded"),
    )

    # Optimisation
    num_train_epochs: float = option(3.0, "passes over the data", least=0)
    max_steps: int = option(-1, "steps to train, instead of --num_train_epochs (-1: train by epochs)", least=-1)
    per_device_train_batch_size: int = option(8, "examples in a microbatch of one process", least=1)
    gradient_accumulation_steps: int = option(1, "microbatches of one process in a step", least=1)
    learning_rate: float = option(5e-5, "the highest learning rate", least=0)
    lr_scheduler_type: str = option(
        "linear", "how the learning rate falls after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = option(0.0, "part of all steps in which the learning rate rises from 0", least=0, most=1)
    warmup_steps: int = option(0, "steps in which the learning rate rises from 0 (0: --warmup_ratio)", least=0)
    lr_decay_ratio: float = option(
        0.0, "the learning rate falls to this part of the highest (0: to zero)", least=0, most=1
    )
    weight_decay: float = option(0.0, "weight decay of AdamW, on matrices only (0: none)", least=0)
    adam_beta1: float = option(0.9, "beta 1 of AdamW", least=0, below=1)
    adam_beta2: float = option(0.999, "beta 2 of AdamW", least=0, below=1)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", least=0)
    max_grad_norm: float = option(1.0, "scale gradients down to this global norm (1.0; 0: never)", least=0)
    label_smoothing: float = option(
        0.0, "probability that the target spreads over all tokens (0: none)", least=0, most=1
    )
    dropout: float | None = option(
        None, "dropout instead of the model's own; attention_dropout stays (the model's)", least=0, below=1
    )
    optimizer: str = option(
        "adamw", "adamw: by gradients; mezo: by forward passes alone, in place", choices=("adamw", "mezo")
    )
    mezo_eps: float = option(1e-3, "how far mezo moves the weights to measure the slope of the loss", above=0)
    lora_rank: int = option(
        0, "rank of the adapters that train instead of the weights, by LoRA (0: no adapters)", least=0
    )
    lora_alpha: float = option(16.0, "adapters are multiplied by this over their rank", above=0)
    lora_dropout: float = option(0.0, "dropout before adapters", least=0, below=1)
    lora_target_modules: str = option("q_proj,v_proj", "linear modules that get adapters, with commas between")
    base_dtype: str = option(
        "float32", "dtype of weights that LoRA freezes or mezo moves", choices=("float32", "bfloat16", "float16")
    )

    # How it runs
    fp16: bool = option(False, "compute products in float16 with a scaled loss; weights stay float32")
    bf16: bool = option(False, "compute products in bfloat16; weights stay float32")
    tf32: bool = option(True, "on GPUs that have it, compute float32 products in TF32, which has 10 bits of fraction")
    recompute: bool = option(False, "compute layers again in the backward pass: less memory, about a third more time")
    compile: bool = option(False, "compile the layers with torch.compile")
    parallel: str = option(
        "ddp", "ddp: each process holds the whole model; fsdp: each holds a share of it", choices=("ddp", "fsdp")
    )
    device: str | None = option(None, "cpu or cuda (the GPU if there is one)")

    # Evaluation while training
    evaluation_strategy: str = option(
        "no",
        "evaluate while training: every --eval_steps steps, after each epoch, or not",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int = option(500, "steps between evaluations, with --evaluation_strategy steps", least=1)

    # What is written
    logging_steps: int = option(10, "steps between lines of metrics.jsonl", least=1)
    save_steps: int = option(500, "steps between checkpoints", least=1)
    keep_last: int = option(
        2, "checkpoints to keep beside the best one; with 0 a finished run keeps only its model", least=0
    )
    merge: bool = option(False, "write a whole model with the adapters of --lora_rank merged, instead of the adapters")
    overwrite_output_dir: bool = option(False, "start again, and remove the run or the model that is in --output_dir")
    resume: str = option(
        "auto", "auto: continue from the latest checkpoint; never: start again; or the path of a checkpoint"
    )

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """Notes which fields the call names: a recipe gives the others."""
        self = super().__new__(cls)
        self.__dict__["_named"] = {f.name for f in fields(cls)[: len(args)]} | settings.keys()
        return self

    def __post_init__(self) -> None:
        named = self.__dict__.pop("_named")
        for f in fields(self):
            if f.name not in named:
                object.__setattr__(self, f.name, self.default(f.name))
        super().__post_init__()

    def default(self, name: str) -> Any:
        return with_recipe({"recipe": self.recipe}).get(name, super().default(name))

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if not self.output_dir and self.trains:
            problems.append("--output_dir: expected a folder for the run, got none. Name one")
        if self.fp16 and self.bf16:
            problems.append("--fp16 and --bf16: expected one of them, got both. Leave one out")
        if self.task in LABEL_TASKS and (
            other := "lora_rank" if self.lora_rank else self.prompt_template and "prompt_template"
        ):
            problems.append(f"--task {self.task} and --{other}: expected one of them, got both. Leave one out")
        for names, acts, other in _TOGETHER:
            given = [f"--{name}" for name in names if getattr(self, name) != self.default(name)]
            if given and self.trains and not acts(self):
                problems.append(f"{' and '.join(given)}: expected {other} as well, got none. Add it, or leave that out")
        if self.overwrite_output_dir and self.resume not in ("auto", "never"):
            problems.append(f"--overwrite_output_dir and --resume {self.resume}: expected one, got both. Leave one out")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            problems.append("--num_train_epochs: expected more than 0, got 0.0. Or give --max_steps")
        if self.max_steps == 0:
            problems.append(
                "--max_steps: expected -1 or at least 1, got 0. To evaluate alone, use --do_eval without --do_train"
            )
        return problems

    @property
    def trains(self) -> bool:
        return self.do_train or not self.do_eval

    @property
    def evaluates(self) -> bool:
        return self.do_eval or self.evaluation_strategy != "no"

    @classmethod
    def from_file(cls, path: str | Path) -> dict[str, Any]:
        """Reads settings from JSON: an object whose keys are fields, or a run's ``run.json``; else ``ValueError``."""
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
        return replace(self, **with_recipe(changes))


# Settings that make no sense without others: which, whether these are there, and what they are.
_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[TrainingConfig], bool], str], ...] = (
    (("lora_alpha", "lora_dropout", "lora_target_modules", "merge"), lambda c: c.lora_rank > 0, "--lora_rank"),
    (("mezo_eps",), lambda c: c.optimizer == "mezo", "--optimizer mezo"),
    (("base_dtype",), lambda c: c.lora_rank > 0 or c.optimizer == "mezo", "--lora_rank or --optimizer mezo"),
)

# Settings with which a run may go on from a checkpoint whatever their values were before.
_SAME_RUN = {
    "dev_file", "max_eval_samples", "per_device_eval_batch_size", "num_beams", "min_tgt_length", "length_penalty",
    "no_repeat_ngram_size", "select_topk", "top_k", "top_p", "output_dir", "do_train", "do_eval", "recipe",
    "per_device_train_batch_size", "gradient_accumulation_steps", "recompute", "compile", "parallel", "device",
    "evaluation_strategy", "eval_steps", "logging_steps", "save_steps", "keep_last", "overwrite_output_dir", "resume",
    "merge",
}  # fmt: skip

_TRAINING = tuple(
    f.name for f in fields(TrainingConfig)[len(fields(EvaluationConfig)) :]
    if f.name not in ("model_name_or_path", "do_train", "do_eval", "recipe", "device", "eval_steps")
)  # fmt: skip

TrainingConfig.acts_only = (
    (_TRAINING, lambda c, *_: c.trains, "while training, and --do_eval alone trains nothing"),
    (("num_train_epochs",), lambda c, *_: c.max_steps < 0 or not c.trains, "without --max_steps"),
    (("warmup_ratio",), lambda c, *_: not c.warmup_steps or not c.trains, "without --warmup_steps"),
    (("lr_decay_ratio",), lambda c, *_: c.lr_scheduler_type != "constant" or not c.trains,
     "with a learning rate that falls, and --lr_scheduler_type is constant"),
    (("dropout", "max_grad_norm", "recompute", "adam_beta1", "adam_beta2", "adam_epsilon"),
     lambda c, *_: c.optimizer == "adamw" or not c.trains, "with --optimizer adamw"),
    (("parallel",), lambda c, processes, _: processes > 1 or not c.trains, "in several processes (torchrun)"),
    (("eval_steps",), lambda c, *_: c.evaluation_strategy == "steps", "with --evaluation_strategy steps"),
    *EvaluationConfig.acts_only,
)  # fmt: skip


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings that make two runs different runs, each as ``name is VALUE there and VALUE here``.

    One that is missing there, as in a run of an earlier version, has its default.
    """
    return [
        f"{f.name} is {json.dumps(theirs.get(f.name, f.default))} there and {json.dumps(mine.get(f.name))} here"
        for f in fields(TrainingConfig) if f.name not in _SAME_RUN and mine.get(f.name) != theirs.get(f.name, f.default)
    ]  # fmt: skip

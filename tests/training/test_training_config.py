"""The settings of a run: each value checked, by the flag's name, and the same after a file."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from minopt.training.config import TrainingConfig, differences, with_recipe

# A value of each setting that is not its default. The first ones are what a run must keep to be the same run: the data,
# the model, and every number on the way to the weights.
CHANGES_RUN: dict[str, Any] = {
    "model_name_or_path": "m", "train_file": "t.json", "task": "squad-question", "prompt_template": "{context}",
    "completion_template": "{answer}", "src_length": 9, "tgt_length": 8, "batching": "padded", "num_train_epochs": 1.5,
    "max_steps": 4, "learning_rate": 1e-7, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "warmup_steps": 3,
    "lr_decay_ratio": 0.2, "weight_decay": 0.3, "adam_beta1": 0.4, "adam_beta2": 0.5, "adam_epsilon": 0.6,
    "max_grad_norm": 0.7, "label_smoothing": 0.8, "dropout": 0.9, "seed": 0, "fp16": True, "bf16": True,
    "tf32": False, "optimizer": "mezo", "mezo_eps": 0.1, "lora_rank": 2, "lora_alpha": 3.0, "lora_dropout": 0.4,
    "lora_target_modules": "fc1", "base_dtype": "bfloat16",
}  # fmt: skip
OTHER: dict[str, Any] = CHANGES_RUN | {
    "output_dir": "out", "do_train": True, "do_eval": True, "recipe": "paddlenlp", "dev_file": "d.json",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "recompute": True, "compile": True,
    "parallel": "fsdp", "device": "cpu", "evaluation_strategy": "epoch", "eval_steps": 1, "max_eval_samples": 2,
    "per_device_eval_batch_size": 3, "num_beams": 4, "min_tgt_length": 5, "length_penalty": 6.0,
    "no_repeat_ngram_size": 7, "select_topk": False, "top_k": 11, "top_p": 0.12, "logging_steps": 8, "save_steps": 9,
    "keep_last": 10, "overwrite_output_dir": True, "resume": "never",
    "merge": True,
}  # fmt: skip
TOGETHER = OTHER | {"bf16": False}  # which contradicts fp16

# What is expected of each setting: for integers the least value, for numbers the bounds with values beside and on them.
INTEGERS = {"max_steps": -1} | dict.fromkeys(
    ("seed", "warmup_steps", "min_tgt_length", "no_repeat_ngram_size", "top_k", "keep_last", "lora_rank"), 0
) | dict.fromkeys(
    ("src_length", "tgt_length", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps",
     "per_device_eval_batch_size", "num_beams", "logging_steps", "save_steps", "max_eval_samples"), 1
)  # fmt: skip
SHARE = ("of at least 0 and at most 1", (-1e-9, 1.1), (0, 1))
FROM_0 = ("of at least 0", (-1e-9, -1.0), (0, 7.5))
PART = ("of at least 0 and below 1", (-1e-9, 1.0), (0, 0.999))
NUMBERS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = (
    dict.fromkeys(("warmup_ratio", "lr_decay_ratio", "label_smoothing", "top_p"), SHARE)
    | dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), FROM_0)
    | dict.fromkeys(("adam_beta1", "adam_beta2", "dropout", "lora_dropout"), PART)
    | dict.fromkeys(("mezo_eps", "lora_alpha"), ("above 0", (0.0, -1.0), (1e-9, 7.5)))
    | {"num_train_epochs": ("of at least 0", (-0.5,), (0.01, 4)), "length_penalty": ("", (), (-1.5, 0))}
)
CHOICES = {
    "recipe": ("paddlenlp",), "task": ("squad", "squad-question", "classification", "reward"),
    "batching": ("packed", "grouped", "padded"),
    "lr_scheduler_type": ("linear", "cosine", "constant"), "parallel": ("ddp", "fsdp"),
    "evaluation_strategy": ("no", "steps", "epoch"), "optimizer": ("adamw", "mezo"),
    "base_dtype": ("float32", "bfloat16", "float16"),
}  # fmt: skip
TYPES = {f.name: f.type for f in fields(TrainingConfig)}
NOT_NUMBERS = ["2", True, math.nan, math.inf, -math.inf, [2]]


def bounds_of(name: str) -> tuple[str, list[Any], list[Any]]:
    """What a message expects, values that are none, and values that are."""
    if name in INTEGERS:
        least = INTEGERS[name]
        return f"an integer of at least {least}", [least - 1, 1.5, 2.0, *NOT_NUMBERS], [least or 0, 7]
    if name in NUMBERS:
        bounds, bad, good = NUMBERS[name]
        return f"a number {bounds}".strip(), [*bad, *NOT_NUMBERS, 10**400, -(10**400)], [*good, *map(float, good)]
    if name in CHOICES:
        return " or ".join(CHOICES[name]), ["", 1, CHOICES[name][0].upper(), ["x"]], [*CHOICES[name]]
    if TYPES[name] == "bool":
        return "true or false", [0, 1, "true"], [True, False]
    return "a text", [3, True, ["x"]], ["other"]


def config_of(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"output_dir": "x"} | changes))


def test_there_is_another_value_of_each_field() -> None:
    assert set(OTHER) == set(TYPES)
    assert not [name for name, value in OTHER.items() if getattr(config_of(), name) == value]
    assert all(f.metadata["help"] for f in fields(TrainingConfig))
    assert {name for name, kind in TYPES.items() if "int" in kind or "float" in kind} == {*INTEGERS, *NUMBERS}


@pytest.mark.parametrize("name", OTHER)
def test_values_within_the_bounds_are_taken_and_others_are_named_by_their_flag(name: str) -> None:
    expected, bad, good = bounds_of(name)
    is_optional = " | None" in TYPES[name]
    for value in bad if is_optional else [*bad, None]:
        with pytest.raises(ValueError, match=f"^{re.escape(f'--{name}: expected {expected}, got {value!r}.')}$"):
            config_of(**{name: value})
    partners: dict[str, Any] = {"tgt_length": 10**9} if name == "min_tgt_length" else {}
    if name.endswith("_template"):
        partners = {"prompt_template": "{context}", "completion_template": "{answer}"}
    if name in ("lora_alpha", "lora_dropout", "lora_target_modules", "merge", "mezo_eps", "base_dtype"):
        partners = {"lora_rank": 1, "optimizer": "mezo"}
    for value in good:
        if (name, value) == ("max_steps", 0):
            continue
        taken = getattr(config_of(**(partners | {name: value})), name)
        assert taken == value
        assert TYPES[name].startswith(type(taken).__name__)
    assert not is_optional or getattr(config_of(**{name: None}), name) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "x", "num_beams": 0, "resume": None},
         "--task: expected squad or squad-question or classification or reward, got 'x'; "
         "--num_beams: expected an integer of at least 1, got 0; --resume: expected a text, got None."),
        ({"output_dir": ""}, "--output_dir: expected a folder for the run, got none. Name one."),
        ({"fp16": True, "bf16": True}, "--fp16 and --bf16: expected one of them, got both. Leave one out."),
        ({"min_tgt_length": 161}, "--min_tgt_length: 161 exceeds --tgt_length 160. Lower it."),
        ({"prompt_template": "{context}"},
         "--prompt_template and --completion_template: expected both or none. Give the other too."),
        ({"completion_template": ""},
         "--prompt_template and --completion_template: expected both or none. Give the other too."),
        ({"num_train_epochs": 0}, "--num_train_epochs: expected more than 0, got 0.0. Or give --max_steps."),
        ({"overwrite_output_dir": True, "resume": "r/step-1"},
         "--overwrite_output_dir and --resume r/step-1: expected one, got both. Leave one out."),
        ({"max_steps": 0, "output_dir": ""},
         "--output_dir: expected a folder for the run, got none. Name one; --max_steps: expected -1 or at least 1, got "
         "0. To evaluate alone, use --do_eval without --do_train."),
    ],
)  # fmt: skip
def test_wrong_and_contradicting_values_are_named_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config_of(**values)


# Settings that act only with others, and with which they do.
IGNORED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"eval_steps": 4}, "--eval_steps: ignored, acts only with --evaluation_strategy steps",
     {"evaluation_strategy": "steps"}),
    ({"do_eval": True, "do_train": True, "length_penalty": 0.7}, "--length_penalty: ignored, acts only with "
     "--num_beams of 2 or more", {"num_beams": 2}),
    ({"do_eval": True, "do_train": True, "top_k": 3, "top_p": 0.5}, "--top_k, --top_p: ignored, act only where "
     "tokens are drawn, with --select_topk false", {"select_topk": False}),
    ({"warmup_steps": 3, "warmup_ratio": 0.1}, "--warmup_ratio: ignored, acts only without --warmup_steps",
     {"warmup_steps": 0}),
    ({"num_beams": 2, "dev_file": "x.json", "max_eval_samples": 3}, "--dev_file, --max_eval_samples, --num_beams: "
     "ignored, act only with --do_eval or --evaluation_strategy", {"evaluation_strategy": "epoch"}),
    ({"lr_decay_ratio": 0.1, "lr_scheduler_type": "constant"}, "--lr_decay_ratio: ignored, acts only with a learning "
     "rate that falls, and --lr_scheduler_type is constant", {"lr_scheduler_type": "cosine"}),
    ({"num_train_epochs": 4, "max_steps": 6}, "--num_train_epochs: ignored, acts only without --max_steps",
     {"max_steps": -1}),
    ({"parallel": "fsdp"}, "--parallel: ignored, acts only in several processes (torchrun)", {"processes": 2}),
    ({"do_eval": True, "min_tgt_length": 3, "eval_is_text": True, "do_train": True}, "--min_tgt_length: ignored, acts "
     "only where answers are generated, and for --dev_file none are", {"eval_is_text": False}),
    ({"do_eval": True, "learning_rate": 1e-3, "save_steps": 4}, "--output_dir, --learning_rate, --save_steps: ignored, "
     "act only while training, and --do_eval alone trains nothing", {"do_train": True}),
    ({"task": "squad-question", "prompt_template": "{context}", "completion_template": "{answer}"},
     "--task: ignored, acts only without --prompt_template", {"task": "squad"}),
    ({"train_file": "x.jsonl", "prompt_template": "{context}", "completion_template": "{answer}"},
     "--prompt_template: ignored, acts only on SQuAD's files", {"train_file": "x.json"}),
    ({"recipe": "paddlenlp", "num_beams": 1, "max_steps": 4, "do_train": True, "do_eval": True, "length_penalty": 2},
     "--length_penalty: ignored, acts only with --num_beams of 2 or more", {"length_penalty": 0.7}),  # the recipe's
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence", "needed"), IGNORED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_what_is_ignored_is_said_unless_what_it_acts_with_is_there(
    given: dict[str, Any], sentence: str, needed: dict[str, Any]
) -> None:
    for values, expected in ((given, [sentence]), (given | needed, [])):
        values = {"processes": 1, "eval_is_text": False} | values
        world = {name: values.pop(name) for name in ("processes", "eval_is_text")}
        assert config_of(**values).ignored(**world) == expected


PADDLENLP = {
    "train_file": "squad-v2", "dev_file": "squad-v2", "task": "squad-question", "lr_decay_ratio": 0.1,
    "label_smoothing": 0.1, "min_tgt_length": 55, "num_beams": 5, "length_penalty": 0.7, "no_repeat_ngram_size": 3,
    "select_topk": True, "top_k": 0, "top_p": 0.0, "src_length": 608, "tgt_length": 160, "num_train_epochs": 4,
    "learning_rate": 3e-5, "warmup_ratio": 0.06, "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "seed": 42,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
}  # fmt: skip


def test_a_recipe_gives_what_is_not_named_however_a_config_is_made() -> None:
    made = [
        config_of(recipe="paddlenlp"),
        config_of().replace(recipe="paddlenlp"),
        TrainingConfig(**with_recipe({"recipe": "paddlenlp", "output_dir": "x"})),
        pickle.loads(pickle.dumps(config_of(recipe="paddlenlp"))),
        copy.deepcopy(config_of(recipe="paddlenlp")),
        TrainingConfig(**config_of(recipe="paddlenlp").to_dict()),
    ]
    assert {name: getattr(made[0], name) for name in PADDLENLP} == PADDLENLP
    assert all(config == made[0] for config in made)
    assert differences(made[0].to_dict(), config_of(**PADDLENLP).to_dict()) == []


@pytest.mark.parametrize("name", ["learning_rate", "task", "num_beams", "seed"])
def test_what_is_named_beside_a_recipe_replaces_its_value_even_by_a_default(name: str) -> None:
    default = getattr(config_of(), name)
    named = config_of(recipe="paddlenlp", **{name: default})
    replaced = config_of().replace(recipe="paddlenlp", **{name: default})
    assert named == replaced == named.replace(save_steps=500)
    assert {n: getattr(named, n) for n in PADDLENLP} == PADDLENLP | {name: default}


@pytest.mark.parametrize(("do_train", "do_eval"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_run_trains_unless_it_is_told_to_evaluate_alone(do_train: bool, do_eval: bool) -> None:
    assert config_of(do_train=do_train, do_eval=do_eval).trains == ((do_train, do_eval) != (False, True))


def test_a_config_is_frozen_and_a_copy_is_checked_again() -> None:
    config = config_of(output_dir=Path("a"))  # a path is text
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert (config.replace(seed=3).seed, config.seed, config.output_dir) == (3, 42, "a")
    with pytest.raises(ValueError, match=r"^--seed: expected an integer of at least 0, got -1\.$"):
        config.replace(seed=-1)


# --- files


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize("in_run", [False, True])
def test_settings_come_back_from_a_file_and_are_shown_as_one_would_have_them(
    tmp_path: Path, hyphens: bool, in_run: bool
) -> None:
    config, path = TrainingConfig(**TOGETHER), tmp_path / "c.json"
    settings = {name.replace("_", "-") if hyphens and not in_run else name: v for name, v in config.to_dict().items()}
    path.write_text(json.dumps({"settings": settings, "version": "1", "data": {"train": "d"}} if in_run else settings))
    assert TrainingConfig.from_file(path) == TrainingConfig.from_file(str(path)) == TOGETHER
    lines = [line.split(None, 1) for line in config.to_text().splitlines()]
    assert {name: json.loads(value) for name, value in lines} == TOGETHER


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"seed": 1, "num_beam": 5, "a-b": 1}', "no such settings: a_b, num_beam. See minopt finetune --help."),
     ('{"settings": {"zeal": 1}, "version": "1"}', "no such settings: zeal. See minopt finetune --help."),
     ("[1]", "expected a JSON object, got list. Fetch the file again."),
     ('{"settings": 3}', "no such settings: settings. "), ("{", "expected JSON, ")],
)  # fmt: skip
def test_a_file_of_something_else_or_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    for name, what in (("c.json", "nothing of that name"), (".", "a folder")):
        line = f"--config: expected a JSON file, got {what} ({tmp_path / name}). Check the path."
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(line)}$"):
            TrainingConfig.from_file(tmp_path / name)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        TrainingConfig.from_file(path)


# --- two runs


@pytest.mark.parametrize("name", OTHER)
def test_two_runs_differ_in_what_changes_a_run(name: str) -> None:
    mine = config_of().to_dict()
    expected = [f"{name} is {json.dumps(OTHER[name])} there and {json.dumps(mine[name])} here"]
    assert differences(mine, mine | {name: OTHER[name]}) == (expected if name in CHANGES_RUN else [])


def test_differences_are_all_named_and_a_setting_that_is_not_there_has_its_default() -> None:
    mine = config_of(seed=3, learning_rate=1).to_dict()
    assert differences(mine, json.loads(json.dumps(mine | {"learning_rate": 1}))) == []
    theirs = mine | {"seed": 4, "dropout": 0.5, "keep_last": 7}
    del theirs["task"]
    assert differences(mine, theirs) == [
        "seed is 4 there and 3 here", "dropout is 0.5 there and null here"
    ]  # fmt: skip

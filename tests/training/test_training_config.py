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

# For each field: what a message expects, values that are none, and values that are, each unlike the default.
TEXT = ("a text", [None, 3, True, ["x"]], ["other"])
TEXT_OR_NONE = ("a text", [3, 1.5, False, ["x"]], ["other"])
BOOL = ("true or false", [None, 0, 1, "true", "False"], [])


def choice(*names: str) -> tuple[str, list[Any], list[Any]]:
    return " or ".join(names), [None, "", 1, names[0].upper(), [names[0]]], list(names)


def integer(least: int, *good: int) -> tuple[str, list[Any], list[Any]]:
    bad = [None, least - 1, 1.5, 2.0, "2", True, math.nan, math.inf, [2]]
    return f"an integer of at least {least}", bad, [least, *good]


def number(bounds: str, bad: list[Any], good: list[Any]) -> tuple[str, list[Any], list[Any]]:
    return f"a number {bounds}".strip(), [*bad, "2", True, math.nan, math.inf, -math.inf, [0.5]], good


SHARE = number("of at least 0 and at most 1", [None, -1e-9, 1.1], [0, 0.0, 0.5, 1, 1.0])
FROM_0 = number("of at least 0", [None, -1e-9, -1.0], [0, 0.0, 3, 1e-3, 7.5])
PART = number("of at least 0 and below 1", [None, -1e-9, 1.0, 2.0], [0, 0.0, 0.5, 0.999])

INTEGERS = {  # the least value of each
    "max_steps": -1, "seed": 0, "warmup_steps": 0, "min_tgt_length": 0, "no_repeat_ngram_size": 0, "top_k": 0,
    "keep_last": 0,
} | dict.fromkeys((
    "src_length", "tgt_length", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps",
    "per_device_eval_batch_size", "num_beams", "logging_steps", "save_steps"), 1)  # fmt: skip
FIELDS: dict[str, tuple[str, list[Any], list[Any]]] = (
    dict.fromkeys(("output_dir", "resume"), TEXT)
    | dict.fromkeys(("model_name_or_path", "train_file", "dev_file", "prompt_template", "completion_template",
                     "device"), TEXT_OR_NONE)
    | dict.fromkeys(("do_train", "do_eval", "fp16", "bf16", "recompute", "compile", "select_topk",
                     "overwrite_output_dir"), BOOL)
    | {name: integer(least, 7 if name != "max_steps" else 1) for name, least in INTEGERS.items()}
    | dict.fromkeys(("warmup_ratio", "lr_decay_ratio", "label_smoothing", "top_p"), SHARE)
    | dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), FROM_0)
    | dict.fromkeys(("adam_beta1", "adam_beta2"), PART)
    | {
        "recipe": ("paddlenlp", ["PaddleNLP", "", 1], ["paddlenlp"]),
        "task": choice("squad", "squad-question"),
        "batching": choice("packed", "grouped", "padded"),
        "lr_scheduler_type": choice("linear", "cosine", "constant"),
        "parallel": choice("ddp", "fsdp"),
        "evaluation_strategy": choice("no", "steps", "epoch"),
        "num_train_epochs": number("of at least 0", [None, -0.5], [0.01, 1, 4.0]),
        "dropout": number("of at least 0 and below 1", [-0.1, 1.0, 1.5], [0, 0.0, 0.5]),
        "max_eval_samples": ("an integer of at least 1", [0, -1, 1.5, "2", True], [1, 9]),
        "length_penalty": number("", [None], [-1.5, 0, 0.7]),
    }
)  # fmt: skip

# What a run must keep to be the same run: the data, the model, and every number on the way to the weights.
CHANGES_RUN = {
    "model_name_or_path", "train_file", "task", "prompt_template", "completion_template", "src_length", "tgt_length",
    "batching", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "lr_decay_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing", "dropout", "seed", "fp16", "bf16",
}  # fmt: skip

# No setting has its default.
OTHER: dict[str, Any] = {
    "output_dir": "out", "model_name_or_path": "m", "do_train": True, "do_eval": True, "recipe": "paddlenlp",
    "train_file": "t.json",
    "dev_file": "d.json", "task": "squad-question", "prompt_template": "{context}", "completion_template": "{answer}",
    "src_length": 9, "tgt_length": 8, "batching": "padded", "num_train_epochs": 1.5, "max_steps": 4,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-7,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "warmup_steps": 3, "lr_decay_ratio": 0.2,
    "weight_decay": 0.3, "adam_beta1": 0.4,
    "adam_beta2": 0.5, "adam_epsilon": 0.6, "max_grad_norm": 0.7, "label_smoothing": 0.8, "dropout": 0.9, "seed": 0,
    "fp16": True, "bf16": False, "recompute": True, "compile": True, "parallel": "fsdp", "device": "cpu",
    "evaluation_strategy": "epoch", "eval_steps": 1, "max_eval_samples": 2, "per_device_eval_batch_size": 3,
    "num_beams": 4, "min_tgt_length": 5, "length_penalty": 6.0, "no_repeat_ngram_size": 7, "select_topk": False,
    "top_k": 11, "top_p": 0.12, "logging_steps": 8, "save_steps": 9, "keep_last": 10, "overwrite_output_dir": True,
    "resume": "never",
}  # fmt: skip


def config_of(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"output_dir": "x"} | changes))


def partners(name: str, value: Any) -> dict[str, Any]:
    """What a value needs beside it."""
    if name.endswith("_template") and value is not None:
        return {"prompt_template": "{context}", "completion_template": "{answer}"}
    return {"tgt_length": 10**9} if name == "min_tgt_length" else {}


def test_every_field_is_checked_below() -> None:
    assert set(FIELDS) == {f.name for f in fields(TrainingConfig)} == set(OTHER)
    default = config_of()
    same = {name for name, value in OTHER.items() if getattr(default, name) == value}
    assert same == {"bf16"}  # which contradicts fp16
    assert all(f.metadata["help"] for f in fields(TrainingConfig))


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_that_makes_no_sense_is_named_by_its_flag(name: str) -> None:
    expected, bad, _ = FIELDS[name]
    for value in [*bad, *([10**400, -(10**400), 10**305] if "a number" in expected else [])]:  # which no float holds
        with pytest.raises(ValueError, match=f"^{re.escape(f'--{name}: expected {expected}, got {value!r}.')}$"):
            config_of(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_values_up_to_the_bounds_are_taken_and_numbers_are_of_the_type_of_their_field(name: str) -> None:
    annotation = {f.name: f.type for f in fields(TrainingConfig)}[name]
    good = FIELDS[name][2] or [True, False]
    for value in [*good, None] if " | None" in str(annotation) else good:
        taken = getattr(config_of(**(partners(name, value) | {name: value})), name)
        assert taken == value
        assert str(annotation).startswith(type(taken).__name__) or value is None
        assert not isinstance(taken, bool) or annotation == "bool"


def test_several_wrong_values_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"^--task: .* got 'x'; --num_beams: .* got 0; --resume: .* got None\.$"):
        config_of(task="x", num_beams=0, resume=None)
    assert config_of(output_dir=Path("a")).output_dir == "a"  # a path is text


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"output_dir": ""}, "--output_dir: expected a folder for the run, got none. Name one."),
    ({"fp16": True, "bf16": True}, "--fp16 and --bf16: expected one of them, got both. Leave one out."),
    ({"min_tgt_length": 161}, "--min_tgt_length: 161 exceeds --tgt_length 160. Lower it."),
    ({"prompt_template": "{context}"},
     "--prompt_template and --completion_template: expected both or none. Give the other too."),
    ({"completion_template": ""},
     "--prompt_template and --completion_template: expected both or none. Give the other too."),
    ({"num_train_epochs": 0}, "--num_train_epochs: expected more than 0, got 0.0. Or give --max_steps."),
    ({"max_steps": 0},
     "--max_steps: expected -1 or at least 1, got 0. To evaluate alone, use --do_eval without --do_train."),
    ({"overwrite_output_dir": True, "resume": "r/step-1"},
     "--overwrite_output_dir and --resume r/step-1: expected one, got both. Leave one out."),
    ({"max_steps": 0, "output_dir": ""},
     "--output_dir: expected a folder for the run, got none. Name one; --max_steps: expected -1 or at least 1, got 0. "
     "To evaluate alone, use --do_eval without --do_train."),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS, ids=lambda v: None if isinstance(v, str) else str(v))
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
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
     "only where answers are generated, and --dev_file is a text", {"eval_is_text": False}),
    ({"do_eval": True, "learning_rate": 1e-3, "save_steps": 4}, "--output_dir, --learning_rate, --save_steps: ignored, "
     "act only while training, and --do_eval alone trains nothing", {"do_train": True}),
    ({"task": "squad-question", "prompt_template": "{context}", "completion_template": "{answer}"},
     "--task: ignored, acts only without --prompt_template", {"task": "squad"}),
    ({"train_file": "x.jsonl", "prompt_template": "{context}", "completion_template": "{answer}"},
     "--prompt_template: ignored, acts only on SQuAD's files", {"train_file": "x.json"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence", "needed"), IGNORED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_what_is_ignored_is_said_unless_what_it_acts_with_is_there(
    given: dict[str, Any], sentence: str, needed: dict[str, Any]
) -> None:
    def said(values: dict[str, Any]) -> list[str]:
        values = {"processes": 1, "eval_is_text": False} | values
        world = {name: values.pop(name) for name in ("processes", "eval_is_text")}
        return config_of(**values).ignored(**world)

    assert said(given) == [sentence]
    assert said(given | needed) == []
    assert config_of(seed=7, bf16=True).ignored(processes=1, eval_is_text=False) == []


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
    assert {name for name in PADDLENLP if getattr(config_of(), name) != PADDLENLP[name]} >= set(PADDLENLP) - {
        "select_topk", "top_k", "top_p", "src_length", "tgt_length", "warmup_steps", "max_grad_norm",
        "lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
    }  # fmt: skip


@pytest.mark.parametrize("name", PADDLENLP)
def test_what_is_named_beside_a_recipe_replaces_its_value_even_by_a_default(name: str) -> None:
    default = getattr(config_of(), name)
    named, replaced = (
        config_of(recipe="paddlenlp", **{name: default}), config_of().replace(recipe="paddlenlp", **{name: default})
    )  # fmt: skip
    assert named == replaced == named.replace(save_steps=500)
    assert {n: getattr(named, n) for n in PADDLENLP} == PADDLENLP | {name: default}


def test_a_recipe_is_not_said_to_be_ignored_and_is_no_other_run() -> None:
    config = config_of(recipe="paddlenlp", num_beams=1, max_steps=4, do_train=True, do_eval=True, warmup_steps=2)
    assert config.ignored(processes=1, eval_is_text=False) == []
    assert config.replace(task="squad", length_penalty=2).ignored(processes=1, eval_is_text=False) == [
        "--length_penalty: ignored, acts only with --num_beams of 2 or more"
    ]
    by_hand = config_of(**PADDLENLP).to_dict()
    assert differences(config_of(recipe="paddlenlp").to_dict(), by_hand) == []


@pytest.mark.parametrize(("do_train", "do_eval", "trains"), [(False, False, True), (True, False, True),
                                                             (False, True, False), (True, True, True)])  # fmt: skip
def test_a_run_trains_unless_it_is_told_to_evaluate_alone(do_train: bool, do_eval: bool, trains: bool) -> None:
    assert config_of(do_train=do_train, do_eval=do_eval).trains == trains


def test_a_config_is_frozen_and_a_copy_is_checked_again() -> None:
    config = config_of()
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert (config.replace(seed=3).seed, config.seed) == (3, 42)
    with pytest.raises(ValueError, match=r"^--seed: expected an integer of at least 0, got -1\.$"):
        config.replace(seed=-1)


# --- files


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize("in_run", [False, True])
def test_settings_come_back_from_a_file(tmp_path: Path, hyphens: bool, in_run: bool) -> None:
    config, path = TrainingConfig(**OTHER), tmp_path / "c.json"
    settings = {name.replace("_", "-") if hyphens and not in_run else name: v for name, v in config.to_dict().items()}
    path.write_text(json.dumps({"settings": settings, "version": "1", "data": {"train": "d"}} if in_run else settings))
    for given in (path, str(path)):
        assert TrainingConfig.from_file(given) == OTHER
    assert TrainingConfig(**TrainingConfig.from_file(path)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"seed": 1, "num_beam": 5, "a-b": 1}', "no such settings: a_b, num_beam. See minopt finetune --help."),
     ('{"settings": {"zeal": 1}, "version": "1"}', "no such settings: zeal. See minopt finetune --help."),
     ("[1]", "expected a JSON object, got list. Fetch the file again."),
     ('{"settings": 3}', "no such settings: settings. "), ("{", "expected JSON, "), ("", "expected JSON, ")],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        TrainingConfig.from_file(path)


@pytest.mark.parametrize(("name", "what"), [("none.json", "nothing of that name"), (".", "a folder")])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str, what: str) -> None:
    message = f"--config: expected a JSON file, got {what} ({tmp_path / name}). Check the path."
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        TrainingConfig.from_file(tmp_path / name)


def test_a_line_a_setting_is_shown_as_a_file_would_have_it() -> None:
    lines = [line.split(None, 1) for line in TrainingConfig(**OTHER).to_text().splitlines()]
    assert {name: json.loads(value) for name, value in lines} == OTHER


# --- two runs


@pytest.mark.parametrize("name", FIELDS)
def test_two_runs_differ_in_what_changes_a_run(name: str) -> None:
    mine = config_of().to_dict()
    value = True if name == "bf16" else OTHER[name]
    expected = [f"{name} is {json.dumps(value)} there and {json.dumps(mine[name])} here"]
    assert differences(mine, mine | {name: value}) == (expected if name in CHANGES_RUN else [])


def test_differences_are_all_named_and_a_setting_that_is_not_there_is_null() -> None:
    mine = config_of(seed=3, learning_rate=1).to_dict()
    assert differences(mine, mine) == []
    assert differences(mine, json.loads(json.dumps(mine | {"learning_rate": 1}))) == []
    theirs = mine | {"seed": 4, "dropout": 0.5, "keep_last": 7}
    del theirs["task"]
    assert differences(mine, theirs) == [
        'task is null there and "squad" here', "seed is 4 there and 3 here", "dropout is 0.5 there and null here"
    ]  # fmt: skip

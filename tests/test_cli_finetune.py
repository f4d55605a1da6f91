"""``minopt finetune`` as users start it: PaddleNLP's recipe under torchrun, each flag, one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import minopt
from minopt import DEMO
from minopt.cli import COMMANDS, main
from minopt.cli.flags import parse
from minopt.evaluation.tasks import EvaluationConfig
from minopt.training.config import TrainingConfig

Capture = pytest.CaptureFixture[str]

# As the issue has it, but for the launcher, the paths and the last line, which makes it short.
RECIPE = """--model_name_or_path {model} --num_train_epochs 4 --learning_rate 3e-5 --warmup_ratio 0.06
--weight_decay 0.1 --label_smoothing 0.1 --save_steps 10000 --logging_steps 1 --eval_steps 4 --output_dir {out}
--src_length 608 --tgt_length 160 --min_tgt_length 55 --length_penalty 0.7 --no_repeat_ngram_size 3 --num_beams 5
--select_topk True --per_device_eval_batch_size 2 --per_device_train_batch_size 2 --max_grad_norm 1.0
--lr_scheduler_type linear --fp16 --recompute --do_train --do_eval
--train_file {data}/train.json --dev_file {data}/dev.json --max_steps 6 --max_eval_samples 2"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "home"))


def squad(questions: int, answer: str = "Rome") -> dict[str, Any]:
    """SQuAD v1.1, a paragraph a question."""
    texts = [f"{answer} was the capital in year {i}, and all roads led there." for i in range(questions)]
    return {"version": "1.1", "data": [{"title": "capitals", "paragraphs": [
        {"context": text, "qas": [{"id": f"q{i}", "question": f"Which town was the capital in year {i}?",
                                   "answers": [{"text": answer, "answer_start": 0}]}]}
        for i, text in enumerate(texts)]}]}  # fmt: skip


def write_data(folder: Path) -> Path:
    """Small files of each kind."""
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(squad(12)))
    (folder / "dev.json").write_text(json.dumps(squad(3, "Dodoma")))
    pairs = [{"prompt": f"{i} and {i} are", "completion": f" {2 * i}"} for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "book.txt").write_text("The old house stood at the end of the road.\n" * 40)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("finetune") / "data")


def launch(*arguments: object, processes: int, **env: str) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node N -m minopt ...``, without torchrun's own reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port,
               "-m", "minopt", *arguments]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=100,
                          env=environment)  # fmt: skip


def shown_settings(stderr: str) -> dict[str, Any]:
    """What is printed of the settings."""
    names = {f.name for f in fields(TrainingConfig)}
    found = (re.fullmatch(r"(\w+) +(\S.*)", line) for line in stderr.splitlines())
    return {match[1]: json.loads(match[2]) for match in found if match and match[1] in names}


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The recipe's run in two processes."""
    out, home = data.parent / "checkpoints" / "opt", tmp_path_factory.mktemp("home")
    words = [word.format(model=DEMO, out=out, data=data) for word in RECIPE.split()]  # paths may hold spaces
    result = launch("finetune", *words, processes=2, MINOPT_HOME=str(home))
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(out=out, stdout=result.stdout, stderr=result.stderr)


# --- the recipe ---


def test_the_recipe_runs_to_its_end_and_writes_what_it_measured(recipe: SimpleNamespace) -> None:
    records = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    (evaluation,) = [record for record in records if "eval_loss" in record]  # no strategy: at the end alone
    assert (evaluation["step"], evaluation["eval_examples"]) == (6, 2)
    predictions = json.loads((recipe.out / "predictions.json").read_text())
    assert predictions.keys() == {"q0", "q1"}
    assert all(len(text) > 55 for text in predictions.values())  # --min-tgt-length, in tokens of a letter or more
    assert recipe.stdout == ""


def test_the_recipe_says_each_thing_once_and_its_settings_are_those_of_run_json(recipe: SimpleNamespace) -> None:
    lines = recipe.stderr.splitlines()
    for said in ("--fp16: float16 is slow on a CPU. --bf16 is", "--min-tgt-length 55: no completion of --dev-file",
                 "--eval-steps: ignored, acts only with --evaluation-strategy steps.", "12 examples, ",
                 "4 examples a step: 2 processes x ", "step 1/6  loss ", "step 6/6  loss ",
                 "evaluation after step 6: loss ", f"The model is in {recipe.out}"):  # fmt: skip
        assert sum(said in line for line in lines) == 1, said
    assert not any("--no-repeat-ngram-size" in line for line in lines)  # bans none of these answers
    assert "Traceback" not in recipe.stderr
    assert "Warning" not in recipe.stderr
    settings = json.loads((recipe.out / "run.json").read_text())["settings"]
    assert shown_settings(recipe.stderr) == settings
    assert settings.keys() == {f.name for f in fields(TrainingConfig)}
    wanted = {"learning_rate": 3e-5, "num_beams": 5, "select_topk": True, "fp16": True, "evaluation_strategy": "no"}
    assert settings.items() >= wanted.items()


def test_the_model_is_one_to_generate_with_and_transformers_opens_it(recipe: SimpleNamespace, capsys: Capture) -> None:
    lm = minopt.load(recipe.out, device="cpu", optimize=False)
    prompt = "Rome was the capital.\nQuestion: Which town was the capital?\nAnswer:"
    for model in (recipe.out, recipe.out / "best"):
        assert main(["generate", prompt, "--model", str(model), "--max-new-tokens", "5", "--device", "cpu"]) == 0
        assert capsys.readouterr().out == lm.generate(prompt, max_new_tokens=5) + "\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(recipe.out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.out)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert lm.tokenizer is not None
    assert ids[0].tolist() == lm.tokenizer.encode(prompt)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    before = minopt.load(DEMO, device="cpu").model
    assert not torch.equal(lm.model.embed_tokens.weight, before.embed_tokens.weight)


# --- flags ---


def finetune(data: Path, out: Path, flags: str = "", **settings: object) -> int:
    """A run of one step in this process."""
    base = {"model_name_or_path": DEMO, "train_file": data / "train.json", "output_dir": out, "max_steps": 1,
            "src_length": 96, "tgt_length": 8, "device": "cpu"}  # fmt: skip
    words = [word for name, value in (base | settings).items() if value is not None
             for word in (f"--{name}", str(value))]  # fmt: skip
    return main(["finetune", *words, *shlex.split(flags)])


def settings_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["settings"]


def given(*arguments: str) -> Mapping[str, Any]:
    """What a parsed command line sets."""
    return parse(COMMANDS["finetune"], arguments)


def test_each_field_has_a_flag_with_help_and_no_other_flags_are_there(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    own = fields(TrainingConfig)[len(fields(EvaluationConfig)) :]
    flags = re.findall(r"^  (?:-h, )?--([\w-]+)(.*(?:\n {20,}\S.*)*)", text, re.MULTILINE)
    assert [name.replace("-", "_") for name, _ in flags] == [
        "help",
        "debug",
        "config",
        *(f.name.removesuffix("_name_or_path") for f in own),
        *(f.name for f in fields(EvaluationConfig)),
    ]
    for name, said in flags:
        assert re.search(r"  [a-zA-Z]\w+", said) or "\n" in said, f"--{name} has no help"


@pytest.mark.parametrize("f", fields(TrainingConfig), ids=lambda f: f.name)
def test_a_flag_sets_its_field(f: Any) -> None:
    value: Any = {"int": 3, "float": 0.25, "bool": not f.default, "str": "x"}[f.type.removesuffix(" | None")]
    if f.metadata["choices"]:
        value = [*f.metadata["choices"]][-1]
    flag = f"--{f.name.removesuffix('_name_or_path').replace('_', '-')}"
    assert given(flag, str(value))[f.name] == value
    assert f.name not in given()
    if isinstance(value, bool):
        assert [given(flag, word)[f.name] for word in ("true", "True", "false", "False")] == [True, True, False, False]
        assert given(flag)[f.name] is True


def test_either_spelling_and_each_way_to_say_true_make_one_run(data: Path, tmp_path: Path, capsys: Capture) -> None:
    for number, flags in enumerate(("--bf16 --lr_scheduler_type cosine", "--bf16 True --lr-scheduler-type cosine",
                                    "--bf16=true --lr-scheduler_type=cosine")):  # fmt: skip
        assert finetune(data, tmp_path / "run", flags) == 0
        assert ("going on from" in capsys.readouterr().err) == (number > 0)  # other settings would be refused


def test_flags_come_before_a_recipe_and_that_before_a_file(data: Path, tmp_path: Path, capsys: Capture) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    config = tmp_path / "config.json"
    written = {
        "model-name-or-path": DEMO,
        "train_file": str(data / "train.json"),
        "max_steps": 2,
        "src_length": 96,
        "tgt_length": 8,
        "learning_rate": 1,
        "recompute": True,
        "label_smoothing": 0.3,
        "device": "cpu",
    }
    config.write_text(json.dumps(written))
    words = ["finetune", "--learning-rate", "0.5", "--max-steps", "1", "--recompute", "false", "--output-dir"]
    assert main([*words, str(first), "--config", str(config)]) == 0
    settings = settings_in(first)
    assert (
        settings.items()
        >= {
            "learning_rate": 0.5,
            "max_steps": 1,
            "recompute": False,
            "src_length": 96,
            "model_name_or_path": DEMO,
            "label_smoothing": 0.3,
            "task": "squad",
        }.items()
    )
    capsys.readouterr()
    assert main(["finetune", "--config", str(first / "run.json"), "--output-dir", str(second)]) == 0
    assert shown_settings(capsys.readouterr().err) == settings_in(second) == settings | {"output_dir": str(second)}
    losses = [(folder / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0] for folder in (first, second)]
    assert losses[0] == losses[1]
    recipe = ["--config", str(config), "--recipe", "paddlenlp", "--min-tgt-length", "4"]
    assert main([*words, str(third), *recipe, "--train-file", str(data / "train.json")]) == 0
    assert settings_in(third).items() >= {"label_smoothing": 0.1, "learning_rate": 0.5, "num_beams": 5}.items()
    config.write_text(json.dumps(written | {"recipe": "paddlenlp", "num_beams": 1}))
    assert main([*words, str(tmp_path / "fourth"), "--config", str(config), "--min-tgt-length", "4"]) == 0
    assert (
        settings_in(tmp_path / "fourth").items()
        >= {"label_smoothing": 0.3, "num_beams": 1, "warmup_ratio": 0.06}.items()
    )


@pytest.mark.parametrize(
    ("file", "flags", "rows"),
    [
        ("pairs.jsonl", "", "6 examples"),
        ("book.txt", "--src-length 20 --tgt-length 12", None),
        ("train.json", "--task squad-question", "12 examples"),
        ("train.json", "--prompt-template 'Q: {question} A:' --completion-template ' {answer}'", "12 examples"),
    ],
    ids=["pairs", "text", "squad-question", "templates"],
)
def test_each_kind_of_data_is_trained_and_evaluated_on(
    file: str, flags: str, rows: str | None, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert finetune(data, out, f"--do-train --do-eval {flags}", train_file=data / file, dev_file=data / file) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert rows is None or rows in captured.err
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = {"eval_loss", "eval_perplexity", "eval_examples"}
    if "question" in flags and "template" not in flags:
        metrics |= {"eval_rouge_1", "eval_rouge_2", "eval_rouge_l"}
    elif file != "book.txt":
        metrics |= {"eval_exact_match", "eval_f1"}
    assert last.keys() - {"step", "time"} == metrics
    assert (out / "predictions.json").is_file() == (file != "book.txt")


def test_do_eval_alone_evaluates_and_writes_no_run(data: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert finetune(data, out, "--do-eval --max-eval-samples 2", train_file=None, dev_file=data / "dev.json") == 0
    captured = capsys.readouterr()
    values = dict(line.split() for line in captured.out.splitlines())
    assert values.keys() == {"loss", "perplexity", "examples", "exact_match", "f1"}
    assert values["examples"] == "2"
    assert not out.exists()


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"dev_file": "nope.json"}, "--do-train --do-eval", "--dev-file: expected squad, squad-v2 or a file"),
        ({"src_length": 1020}, "", "--src-length 1020 and --tgt-length 8: expected at most 1024 tokens together, the "
         "model's positions, got 1028. Lower one or both."),
        ({"src_length": 1}, "", "--train-file: expected at least one example, got none (12 cannot be cut to "),
        ({"output_dir": None}, "", "--output-dir: expected a folder for the run, got none. Name one."),
        ({"model_name_or_path": None}, "", "--model: expected a folder, any one file of a checkpoint, or"),
        ({"device": "nonsense"}, "", "--device: 'nonsense' is not available here"),
        ({}, "--prompt-template Why --completion-template ' {answer}'", "--prompt-template: expected one field or mor"),
        ({"model_name_or_path": "/nowhere"}, "", "/nowhere: no such folder"),
        ({"model_name_or_path": "{model}"}, "", "--model: expected a model with a tokenizer, {model} has none. Add it"),
        ({}, "--config nope.json", "--config: expected a JSON file, got nothing of that name (nope.json)."),
        ({}, "--resume nowhere", "--resume: expected auto, never or the folder of a checkpoint, got nowhere."),
        ({}, "--learning-rate -1", "--learning-rate: expected a number of at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    settings: dict[str, Any], flags: str, message: str, data: Path, tmp_path: Path, capsys: Capture,
    write_checkpoint: Callable[..., Path],
) -> None:  # fmt: skip
    if settings.get("model_name_or_path") == "{model}":
        settings, message = {"model_name_or_path": write_checkpoint()}, message.format(model=tmp_path / "model")
        capsys.readouterr()  # what transformers says while it writes
    status = finetune(data, **({"out": tmp_path / "run", "flags": flags} | settings))
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    *warnings, line = captured.err.splitlines()
    assert all(warning.startswith("minopt: warning: ") for warning in warnings)
    assert line.startswith("minopt: error: ")
    assert message in line
    assert not (tmp_path / "run" / "run.json").exists()


def test_many_processes_say_it_once_and_all_end(data: Path, recipe: SimpleNamespace) -> None:
    base = {"model_name_or_path": DEMO, "train_file": data / "train.json", "output_dir": recipe.out,
            "src_length": 96, "tgt_length": 8, "max_steps": 1, "device": "cpu"}  # fmt: skip
    result = launch("finetune", *(word for name, value in base.items() for word in (f"--{name}", value)), processes=2)
    assert result.returncode == 1  # torchrun's own
    (line,) = [line for line in result.stderr.splitlines() if "minopt: error:" in line]
    assert "holds a run with other settings: " in line
    codes = re.findall(r"exitcode +: (-?\d+)", result.stderr)
    assert len(codes) == 2
    assert "0" not in codes
    assert "src/minopt" not in result.stderr  # no traceback but torchrun's
    assert result.stdout == ""

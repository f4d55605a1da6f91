"""``minopt evaluate`` on questions and on texts; tests of ``--task reference`` are in test_cli_checkpoints.py."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import minopt
from minopt import DEMO
from minopt.cli import main
from minopt.evaluation.perplexity import wikitext_text, window_perplexity
from minopt.evaluation.squad import score
from minopt.text import LanguageModel

Capture = pytest.CaptureFixture[str]

CONTEXT = "Dodoma was a small town until 1973. The sea is far away from it, and so is Dar es Salaam."
QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a": ("Which town was small?", ("Dodoma", "small town")),
    "b": ("Until when?", ("1973",)),
    "c": ("What is far away?", ("The sea", "sea")),
    "d": ("Who lives there?", ()),
    "e": ("What else is far away?", ("Dar es Salaam",)),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def dev_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQuAD v2.0 with one question that has no answer."""
    asked = [{"id": key, "question": question, "is_impossible": not answers,
              "answers": [{"text": text, "answer_start": CONTEXT.index(text)} for text in answers]}
             for key, (question, answers) in QUESTIONS.items()]  # fmt: skip
    path = tmp_path_factory.mktemp("dev") / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    return path


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return minopt.load(DEMO, device="cpu")


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "--model", DEMO, "--device", "cpu", *map(str, arguments)])


def mean_loss(lm: LanguageModel, pairs: list[tuple[str, str]]) -> float:
    """The mean over the tokens of all completions and their </s>, a text at a time."""
    assert lm.tokenizer is not None
    total, count = 0.0, 0
    for prompt, completion in pairs:
        first, then = lm.tokenizer.encode(prompt), [*lm.tokenizer.encode(completion, add_bos=False), 2]
        with torch.no_grad():
            logits = lm.model(torch.tensor([first + then]))[0]
        total += F.cross_entropy(logits[len(first) - 1 : -1], torch.tensor(then), reduction="sum").item()
        count += len(then)
    return total / count


# --- questions ---


def test_answers_are_scored_as_squad_does(dev_file: Path, lm: LanguageModel, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "predictions.json"
    assert evaluate("--task", "squad", "--dev-file", dev_file, "--tgt-length", 14, "--json", "--output", output) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    prompts = {key: f"{CONTEXT}\nQuestion: {question}\nAnswer:" for key, (question, _) in QUESTIONS.items()}
    predictions = {key: lm.generate(prompt, max_new_tokens=14).strip() for key, prompt in prompts.items()}
    assert json.loads(output.read_text(encoding="utf-8")) == predictions  # the official format: id and text
    expected = score(predictions, {key: answers or ("",) for key, (_, answers) in QUESTIONS.items()})
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert {"has_answer_f1", "no_answer_exact_match"} <= values.keys()
    completions = [(prompts[key], " " + (*answers, "unanswerable")[0]) for key, (_, answers) in QUESTIONS.items()]
    loss = mean_loss(lm, completions)
    assert (values["loss"], values["examples"]) == (pytest.approx(loss, rel=1e-4), 5)
    assert captured.err == ""
    before = output.read_bytes()
    assert evaluate("--task", "squad", "--dev-file", dev_file, "--output", output) == 2
    assert "is there already. Name another file, or replace it with --force." in capsys.readouterr().err
    assert output.read_bytes() == before


def test_the_first_samples_alone_and_how_to_generate(
    dev_file: Path, lm: LanguageModel, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "predictions.json"
    template = ("--prompt-template", "{question} Here: {context}", "--completion-template", "\n{answer}")
    flags = ("--num-beams", 2, "--min-tgt-length", 5, "--tgt-length", 7, "--length-penalty", 2,
             "--no-repeat-ngram-size", 2, "--max-eval-samples", 2)  # fmt: skip
    assert evaluate("--task", "squad", "--dev-file", dev_file, "--output", output, *template, *flags) == 0
    assert "examples     2\n" in capsys.readouterr().out
    options: dict[str, Any] = {"num_beams": 2, "min_new_tokens": 5, "max_new_tokens": 7, "length_penalty": 2.0,
                               "no_repeat_ngram_size": 2, "no_repeat_ngram_include_prompt": False}  # fmt: skip
    expected = {key: lm.generate(f"{QUESTIONS[key][0]} Here: {CONTEXT}", **options).strip() for key in ("a", "b")}
    assert json.loads(output.read_text(encoding="utf-8")) == expected


def test_two_processes_find_what_one_does_and_say_it_once(dev_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """Five questions: one more in a process than in the other."""
    flags = ["--task", "squad", "--dev-file", str(dev_file), "--tgt-length", "4", "--json"]
    assert evaluate(*flags, "--output", tmp_path / "one.json") == 0
    expected = json.loads(capsys.readouterr().out)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m",
               "minopt", "evaluate", "--model", DEMO, "--device", "cpu", *flags]  # fmt: skip
    result = subprocess.run([*command, "--output", str(tmp_path / "two.json")], capture_output=True, text=True,
                            check=False, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == pytest.approx(expected, rel=1e-6)
    assert evaluate(*flags[:-1], "--per-device-eval-batch-size", 2) == 0  # the table says what the JSON says
    table = {name: float(text) for name, text in (line.split() for line in capsys.readouterr().out.splitlines())}
    assert list(table) == list(expected)
    assert table == pytest.approx(expected, abs=2e-3)
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


ADD_A_TASK = """
import sys
from minopt.evaluation.squad import rouge_scores
from minopt.evaluation.tasks import TASKS, Task

TASKS["summary"] = Task("{context}\\nIn short:", " {answer}", scores=rouge_scores, best="rouge_l")
from minopt.cli import main

sys.exit(main())
"""


@pytest.mark.parametrize("command", ["evaluate --json", "finetune --do-eval --output-dir {run}"])
def test_a_row_in_the_table_of_tasks_is_all_that_a_new_one_needs(command: str, tmp_path: Path) -> None:
    """The row is added in a process of its own: flags and help are made from the table when they are imported."""
    (tmp_path / "dev.jsonl").write_text('{"prompt": "The sea is far away. In short:", "completion": " no sea"}\n')
    words = [*command.format(run=tmp_path / "run").split(), "--model", DEMO, "--device", "cpu", "--task", "summary",
             "--dev-file", str(tmp_path / "dev.jsonl"), "--tgt-length", "4"]  # fmt: skip
    result, page = (
        subprocess.run([sys.executable, "-c", ADD_A_TASK, *given], capture_output=True, text=True, check=False)
        for given in (words, [words[0], "--help"])
    )
    assert result.returncode == 0, result.stderr
    assert "rouge_l" in result.stdout
    assert "squad|squad-question|summary" in page.stdout


# --- texts ---


@pytest.mark.parametrize("name", ["wiki.test.txt", "wiki.test.raw"])
def test_perplexity_is_that_of_the_library(name: str, lm: LanguageModel, tmp_path: Path, capsys: Capture) -> None:
    text = " = Dodoma = \n \n Dodoma was a small town .\n \n" + " The sea is far away from it .\n" * 30
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert lm.tokenizer is not None
    joined = wikitext_text(io.StringIO(text)) if name.endswith(".raw") else text
    expected = window_perplexity(lm.model, lm.tokenizer.encode(joined), 64)
    assert evaluate("--task", "perplexity", "--data", tmp_path / name, "--window", 64, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values == {"perplexity": pytest.approx(expected.perplexity), "tokens": expected.tokens,
                      "windows": expected.windows}  # fmt: skip
    other = window_perplexity(lm.model, lm.tokenizer.encode(text), 64)  # a .txt file is taken as it is
    assert (values["perplexity"] == pytest.approx(other.perplexity, rel=1e-3)) == name.endswith(".txt")
    assert evaluate("--task", "perplexity", "--data", tmp_path / name, "--window", 64) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["perplexity", f"{expected.perplexity:.4f}"], ["tokens", f"{expected.tokens:,}"],
                     ["windows", f"{expected.windows}"]]  # fmt: skip


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task squad --dev-file {dev} --data x.txt", "--data: goes with --task perplexity, got --task squad. Leave"),
        ("--task perplexity --data x.txt --num-beams 2", "--num-beams: goes with --task squad or squad-question, got"),
        ("--task reference --output x.json", "--output: goes with --task squad or squad-question, got"),
        ("--task reference --quantize int8", "--quantize: published numbers are float32's, got int8. Leave it out."),
        ("--task reference --dtype bfloat16", "--dtype: published numbers are float32's, got bfloat16. Leave it out."),
        ("--task squad --dev-file {dev} --output {tmp}/nowhere/x.json", "--output: there is no folder"),
        ("--task squad --dev-file {dev} --output {tmp}", "--output: expected a file, got a folder"),
        ("--task squad --dev-file {dev} --src-length 1020 --tgt-length 8", "--src-length 1020 and --tgt-length 8: exp"),
        ("--task squad --dev-file {dev} --tgt-length 0", "--tgt-length: expected an integer of at least 1, got 0"),
        ("--task perplexity", "--data: expected a text (.txt, .raw) such as WikiText-2's wiki.test.raw, got none."),
        ("--task perplexity --data nope.txt", "wiki.test.raw, got nope.txt, which is no file. Name one."),
        ("--task perplexity --data {tmp}", "--data: expected a text (.txt, .raw) such as "),
        ("--task perplexity --data {tmp}/empty.txt", "--data: expected data, got an empty file"),
        ("--task perplexity --data {tmp}/latin.txt", "--data: expected UTF-8, got "),
        ("--task perplexity --data {dev}", "--data: expected a text (.txt, .raw) such as "),
        ("--task perplexity --data {tmp}/short.txt --window 2 --stride 3", "stride: expected 1 to the window's 2 "),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    arguments: str, message: str, dev_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "short.txt").write_text("Yes.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    words = [word.format(dev=dev_file, tmp=tmp_path) for word in shlex.split(arguments)]
    status = evaluate(*words)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("minopt: error: ")
    assert message in line


def test_a_model_is_needed_and_it_needs_a_tokenizer(
    dev_file: Path, write_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.txt").write_text("Yes.")
    model = write_checkpoint()
    for task in (["squad", "--dev-file", str(dev_file), "--src-length", "40", "--tgt-length", "4"],
                 ["perplexity", "--data", str(tmp_path / "text.txt")]):  # fmt: skip
        capsys.readouterr()
        assert main(["evaluate", "--task", *task]) == 2
        assert capsys.readouterr().err == (
            "minopt: error: --model: expected a checkpoint to measure, got none. Name one.\n"
        )
        assert main(["evaluate", "--task", *task, "--model", str(model), "--device", "cpu"]) == 2
        assert capsys.readouterr().err == (
            "minopt: error: --model: expected one with a tokenizer, got one without. "
            "Name its folder with --tokenizer.\n"
        )

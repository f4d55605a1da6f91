"""The command line, in process and as a program: results on stdout, one clear line for what a user can mend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import minopt
from minopt.cli import main

Write = Callable[..., Path]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


def test_the_program_streams_the_text_to_stdout_and_all_else_to_stderr() -> None:
    result = run("generate", "The old house", "--max-new-tokens", "12", "--device", "cpu")
    expected = minopt.load(minopt.DEMO, device="cpu").generate("The old house", max_new_tokens=12)
    assert result.returncode == 0
    assert result.stdout == expected + "\n"
    assert result.stderr == "minopt: no --model given, using the small demo model (see minopt generate --help)\n"


def test_the_installed_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("minopt")
    if not script.exists():
        pytest.skip("minopt is on the path, not installed")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert result.stdout == f"minopt {minopt.__version__}\n"


@pytest.mark.parametrize("flag", ["--max-new-tokens=4", "--max_new_tokens=4"])
def test_hyphens_and_underscores_are_alike(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "The old house", flag, "--local_files_only", "--device", "cpu"]) == 0
    expected = minopt.load(minopt.DEMO, device="cpu").generate("The old house", max_new_tokens=4)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("arguments", [["a_b"], ["--", "--a_b=c_d"]])
def test_an_underscore_in_the_prompt_stays(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--echo", "--max_new_tokens", "1", *arguments]) == 0
    assert capsys.readouterr().out.startswith(arguments[-1])


def test_each_option_reaches_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--do-sample --temperature 0.7 --top-k 20 --top-p 0.9 --seed 5 --max-new-tokens 9 --min-new-tokens 2"
    assert (
        main(["generate", "The sea", "--model", minopt.DEMO, "--dtype", "bfloat16", "--device", "cpu", *flags.split()])
        == 0
    )
    lm = minopt.load(minopt.DEMO, dtype=torch.bfloat16, device="cpu")
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5, "max_new_tokens": 9, "min_new_tokens": 2}
    captured = capsys.readouterr()
    assert captured.out == lm.generate("The sea", do_sample=True, **options) + "\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: expected one, or --input with a file of them"),
        (["x", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["x", "--temperature", "0", "--do-sample"], "temperature must be from 1e-6 to 1e6"),
        (["x", "--seed", "1"], "seed acts on sampling only, and do_sample is off"),
        (["x", "--temperature", "0.5"], "temperature acts on sampling only, and do_sample is off"),
        (["x", "--top-p", "2", "--do-sample"], "top_p must be above 0 and at most 1, got 2.0"),
        (["x", "--max-new-tokens", "-1"], "max_new_tokens must be an integer of at least 1, got -1"),
        (["x", "--max-new-tokens", "1024"], "positions, the model has 1024. Shorten the prompt, or ask for at most"),
        (["x " * 2000], "tokens + max_new_tokens 30 = "),
        (["x", "--device", "cuda:99"], "device: 'cuda:99' is not available here"),
        (["x", "--dtype", "int4"], "dtype: expected auto, float32"),
        (["x", "--revision", "main"], "--revision needs --model"),
        (["\udcff"], "text: not valid Unicode at character 0"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notes, line = captured.err.splitlines()
    assert line.startswith("minopt: error: ")
    assert message in line
    assert all(note.startswith("minopt: no --model given") for note in notes)


def test_a_model_of_another_tokenizer_is_one_line_too(
    write_checkpoint: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint()
    minopt.load(minopt.DEMO).tokenizer.save(folder)  # type: ignore[union-attr]
    assert main(["generate", "something long", "--model", str(folder)]) == 2
    assert "expected ids from 0 to 95" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "x", "--max-new-tokens", "many"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: minopt" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m minopt generate 'The sea' --max-new-tokens 200 --device cpu | head -c 5"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert len(result.stdout) == 5
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_a_terminal_without_unicode_shows_question_marks() -> None:
    result = run("generate", "“Naïve”", "--echo", "--max-new-tokens", "1", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.startswith("?Na?ve?")


def test_without_stderr_nothing_but_the_text_is_on_stdout() -> None:
    command = f"{sys.executable} -m minopt generate 'The sea' --max-new-tokens 2 --device cpu 2>&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "minopt:" not in result.stdout

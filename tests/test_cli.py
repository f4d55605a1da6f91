"""The command line, in process and as a program: results on stdout, one clear line for what a user can mend."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import minopt
from minopt.cli import COMMANDS, main
from minopt.cli.flags import fields_of, flag_of, parse

Write = Callable[..., Path]


MINOPT = f"{shlex.quote(sys.executable)} -m minopt"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


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
    assert shell(f"{shlex.quote(str(script))} --version").stdout == f"minopt {minopt.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: expected a prompt or --input, got neither"),
        (["x", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["x", "--temperature", "0", "--do-sample"], "--temperature must be from 1e-6 to 1e6"),
        (["x", "--seed", "1"], "--seed acts on sampling only, and --do-sample is off"),
        (["x", "--temperature", "0.5"], "--temperature acts on sampling only, and --do-sample is off"),
        (["x", "--top-p", "2", "--do-sample"], "--top-p must be a number above 0 and at most 1, got 2.0"),
        (["x", "--max-new-tokens", "-1"], "--max-new-tokens must be an integer of at least 1, got -1"),
        (["x", "--max-new-tokens", "1024"], "positions, the model has 1024. Shorten the prompt, or ask for at most"),
        (["x " * 2000], "tokens + --max-new-tokens 30 = "),
        (["x", "--device", "cuda:99"], "--device: 'cuda:99' is not available here"),
        (["x", "--dtype", "int4"], "--dtype: expected auto, float32"),
        (["x", "--revision", "main"], "--revision: goes with --model"),
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("genrate x", "genrate: no such command. Did you mean generate? See minopt --help."),
        ("nonsense", "nonsense: no such command. See minopt --help."),
        ("--model x generate", "--model: expected a command before its flags: generate, convert, export, inspect, pl"),
        ("generate x --max_tokns 3", "--max-tokns: no such flag. Did you mean --max-new-tokens? See minopt generate "),
        ("generate x --max-length 3", "--max-length: no such flag. Did you mean --max-new-tokens?"),
        ("generate x --src_length 9", "--src-length: no such flag. Did you mean --truncate-prompt?"),
        ("generate x --temp=3", "--temp: no such flag. Did you mean --temperature?"),
        ("generate --promt x", "--promt: no such flag. Did you mean --prompt?"),
        ("generate x --no-do-sampl", "--no-do-sampl: no such flag. Did you mean --no-do-sample?"),
        ("generate x -q", "-q: no such flag. See minopt generate --help."),
        ("generate x --save_total_limit 1", "--save-total-limit: no such flag"),
        ("generate x --suppress-tokens=a,b", "--suppress-tokens: expected ids such as 5 or 5,6, got 'a,b'"),
        ("generate x --bad-words-ids=[[5", "--bad-words-ids: expected JSON, got '[[5'"),
        ("generate x --early-stopping=maybe", "--early-stopping: expected true or false or never, got 'maybe'"),
        ("generate x --no-repeat-ngram-include-prompt=1", "--no-repeat-ngram-include-prompt: expected true or false"),
        ("generate x --stop-strings=", "--stop-strings: expected a text of at least one character, got ''"),
        ("evaluate --tsk squad", "--tsk: no such flag. Did you mean --task?"),
        ("finetune --lerning_rate 1", "--lerning-rate: no such flag. Did you mean --learning-rate?"),
        ("inspect --modle x", "--modle: no such flag. Did you mean --model?"),
        ("evaluate", "--task: expected a value, got none. See minopt evaluate --help."),
        ("evaluate --task=squat", "--task: expected reference or perplexity or squad or squad-question or lm_eval:..., "
         "got 'squat'. Did you mean squad? See"),
        ("finetune --parallel pipeline", "--parallel: expected ddp or fsdp, got 'pipeline'. See minopt finetune"),
        ("convert", "source, destination: expected a value, got none. See minopt convert --help."),
        ("inspect a b", "b: unexpected word. Put a text in quotes; if it begins with a hyphen, write -- before it."),
        ("generate x --max-new-tokens many", "--max-new-tokens: expected an integer, got 'many'. See"),
        ("generate x --top_p", "--top-p: expected a value, got none. See"),
        ("generate x --top-p much", "--top-p: expected a number, got 'much'. See"),
        ("generate x --echo=5", "--echo: expected true or false, got '5'. See"),
        ("plan opt-125m --memory 16", "--memory: expected a size above 0 with its unit, such as"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_in_one_line_with_the_nearest_right_one(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minopt: error: {message}")


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [([], 2, "generate  continue a text"), (["help"], 0, "generate  continue a text"),
     (["--help"], 0, "generate  continue a text"), (["help", "plan"], 0, "usage: minopt plan model [flags]\n"),
     (["plan", "--help"], 0, "usage: minopt plan model [flags]\n"), (["plan", "-h"], 0, "--devices N")],
)  # fmt: skip
def test_help_is_asked_for_in_either_order(
    words: list[str], code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert shown in (err if code else out)


@pytest.mark.parametrize("columns", ["80", "0", "20"])
def test_each_flag_is_explained_in_a_few_words(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        page = capsys.readouterr().out
        assert columns != "80" or max(map(len, page.splitlines())) <= 80
        assert all(f"  {flag_of(f)}" in page for f in fields_of(command).values())


@pytest.mark.parametrize(
    "command",
    ["generate x --model m", "generate x --model_name_or_path=m", "generate --prompt x --model m", "inspect --model m",
     "plan --model_name_or_path m", "export m new", "export --model_name_or_path m --output_path new",
     "export --output_path=new --model_name_or_path=m", "export --output_path new m", "export new --model m",
     "generate x --model_dir m", "evaluate --task reference --model-name-or-path m", "finetune --model m",
     "finetune --model-name-or-path m"],
)  # fmt: skip
def test_a_model_is_named_alike_everywhere(command: str) -> None:
    verb, *words = command.split()
    given = parse(COMMANDS[verb], words)
    assert given.get("model", given.get("model_name_or_path")) == "m"
    assert given.get("destination", "new") == "new"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("generate x --tgt_length 3 --model_dir m", "generate x --max-new-tokens 3 --model m"),
        ("finetune --tgt_length 3 --save_total_limit 1 --resume_from_checkpoint r --eval_strategy epoch",
         "finetune --tgt-length 3 --keep-last 1 --resume r --evaluation-strategy epoch"),
        ("finetune --label_smoothing_factor 0.1", "finetune --label-smoothing 0.1"),
        ("export --output_path=o --model_dir m --dtype fp32", "export m o --dtype fp32"),
        ("generate --prompt= --seed 1", "generate  --seed 1"),
        ("generate --max_new_tokens=4 a_b --local_files_only", "generate --max-new-tokens 4 --local-files-only -- a_b"),
        ("generate -- --a_b=c_d", "generate --prompt=--a_b=c_d"),
        ("generate --echo --do-sample x --no-skip-special-tokens",
         "generate x --echo true --do_sample=True --skip_special_tokens false"),
        ("generate --length-penalty -1e-1 --stop-strings --- x", "generate --length-penalty=-0.1 x --stop-strings=---"),
    ],
)  # fmt: skip
def test_flags_of_other_programs_that_mean_the_same_are_taken(theirs: str, ours: str) -> None:
    first, second = (parse(COMMANDS[verb], words) for verb, *words in (theirs.split(" "), ours.split(" ")))
    assert first == second


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "torch.float16": torch.float16, "half": torch.float16,
          "fp32": torch.float32, "float": torch.float32, "fp64": torch.float64, "double": torch.float64}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_has_a_short_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert minopt.load_model(minopt.DEMO, dtype=name, device="cpu").embed_tokens.weight.dtype == DTYPES[name]
    assert main(["plan", "opt-125m", "--dtype", name, "--memory", "100GB", "--device", "cpu"]) == 0
    assert f"opt-125m as {str(DTYPES[name]).removeprefix('torch.')}," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "reader"),
    [("generate 'The sea' --max-new-tokens 200 --device cpu", "head -c 5"), ("--help", "true"),
     ("generate --help", "true"), ("inspect {demo} --tensors", "true"), ("inspect {demo} --json", "true")],
)  # fmt: skip
def test_a_pipe_that_is_closed_is_no_error(command: str, reader: str) -> None:
    result = shell(f"set -o pipefail; {MINOPT} {command.format(demo=shlex.quote(minopt.DEMO))} | {reader}")
    notes = [line for line in result.stderr.splitlines() if not line.startswith("minopt: no --model given")]
    assert (result.returncode, len(result.stdout), notes) == (0, 5 if "head" in reader else 0, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_one_line() -> None:
    result = shell(f"{MINOPT} inspect {shlex.quote(minopt.DEMO)} > /dev/full")
    assert result.returncode == 2
    assert result.stderr == "minopt: error: the disk is full. Free some space, or name another path.\n"


def test_a_terminal_without_unicode_shows_question_marks() -> None:
    text = os.fsdecode("“Naïve”".encode())  # as a shell gives it, whatever the locale
    result = run("generate", text, "--echo", "--max-new-tokens", "1", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.startswith("?Na?ve?")


def test_without_stderr_nothing_but_the_text_is_on_stdout() -> None:
    result = shell(f"{MINOPT} generate 'The sea' --max-new-tokens 2 --device cpu 2>&-")
    assert result.returncode == 0
    assert "minopt:" not in result.stdout

"""`minopt convert`, `minopt inspect` and `minopt evaluate`: exit codes, results on stdout, one line for the rest."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import minopt
from minopt import inspect_checkpoint
from minopt.checkpoint import convert as converting
from minopt.checkpoint.files import TensorFile
from minopt.cli import main
from tests.checkpoint.sources import (
    change_tensor,
    content,
    expected_tensors,
    reference,
    write_source,
)
from tests.conftest import copy_of

DEMO = Path(minopt.DEMO)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A checkpoint of metaseq in two parts."""
    return write_source("2 parts", tmp_path / "parts")


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Inside, stderr is a terminal; the function that is given tells what it has shown since."""
    end, device = os.openpty()
    os.set_blocking(end, False)

    def shown() -> str:
        pieces = []
        with suppress(BlockingIOError):
            while True:
                pieces.append(os.read(end, 4096))
        return b"".join(pieces).decode()

    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # lines and columns
    with os.fdopen(device, "w") as stderr, mock.patch.object(sys, "stderr", stderr):
        yield shown
    os.close(end)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


NO_TOKENIZER = "no tokenizer's files beside the weights, so none are written."


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with 2, after warnings."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *warnings, line = captured.err.splitlines(keepends=True)
    assert all(warning.startswith("minopt: warning: ") for warning in warnings)
    assert line.startswith("minopt: error: ")
    assert line.endswith("\n")
    return line


# --- torchrun ---


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minopt"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=100)


def test_under_torchrun_the_first_process_works_alone(tmp_path: Path) -> None:
    result = torchrun("convert", str(DEMO), str(tmp_path / "new"))
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.count("minopt: wrote") == 1
    assert inspect_checkpoint(tmp_path / "new").is_sound


def test_under_torchrun_the_error_is_the_last_line_that_one_reads() -> None:
    result = torchrun("inspect", "/no/such/folder")
    assert (result.returncode, result.stdout) == (1, "")  # torchrun's own
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("minopt: error: ")]
    last = result.stderr.rstrip("=\n").splitlines()[-1]
    assert line.removeprefix("minopt: error: ") in last


# --- convert ---


def test_the_program_converts_and_says_where_to_and_transformers_opens_it(tmp_path: Path) -> None:
    result = run("convert", str(DEMO), str(tmp_path / "new"))
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == f"minopt: wrote {tmp_path / 'new'}\n"
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")("The old house", return_tensors="pt")
    expected = transformers.AutoModelForCausalLM.from_pretrained(DEMO)
    with torch.no_grad():
        assert torch.equal(opened(ids.input_ids).logits, expected(ids.input_ids).logits)


def test_each_option_reaches_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(converting, "convert", lambda *args, **options: asked.append((args, options)))
    flags = "--format metaseq --parts 4 --dtype bfloat16 --max-shard-size 1.5MB --model-config opt-125m --force"
    hub = ["--revision", "v1", "--local-files-only", "--ignore", "a.*"]
    assert main(["convert", "a", "b", *flags.split(), "--tokenizer", "c", *hub]) == 0
    assert main(["convert", "a", "b", "--quantize", "int8"]) == 0
    given = {"format": "metaseq", "parts": 4, "dtype": "bfloat16", "max_shard_bytes": 1_500_000, "tokenizer": "c",
             "model_config": "opt-125m", "force": True, "show_progress": True, "revision": "v1",
             "local_files_only": True, "quantize": None, "ignore": ("a.*",)}  # fmt: skip
    default = {"format": "hf", "parts": 1, "dtype": "auto", "max_shard_bytes": 2_000_000_000, "tokenizer": None,
               "model_config": None, "force": False, "show_progress": True, "revision": None,
               "local_files_only": False, "quantize": "int8", "ignore": ()}  # fmt: skip
    assert asked == [(("a", "b"), given), (("a", "b"), default)]


@pytest.mark.parametrize(
    ("text", "count"),
    [("20 kb", 20_000), ("0.5GB", 500_000_000), ("16g", 16 * 10**9), ("2GiB", 2**31), ("10 bytes", 10)],
)
def test_sizes_are_in_decimal_or_binary_units(text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(converting, "convert", lambda *args, **options: asked.append(options["max_shard_bytes"]))
    assert main(["convert", "a", "b", "--max-shard-size", text]) == 0
    assert asked == [count]


@pytest.mark.parametrize(
    "text", ["", "GB", "16", "0", "0GB", "1.5.5MB", "-1MB", "1e9", "inf", "two", "2 M B", "²GB", "9" * 400 + "GB"]
)
def test_sizes_that_are_none_are_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", "a", "b", f"--max-shard-size={text}"])
    assert caught.value.code == 2
    assert f"expected a size above 0 with its unit, such as 16GB or 500MB, got {text[:80]!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", "{tmp}/new"], "/nowhere: no such folder, and not the name of a model on the hub"),
        (["{parts}", "{tmp}/new", "--parts", "2"], "only metaseq's format has parts, got 2 with hf. Add --format "),
        (["{parts}", "{tmp}/new", "--model-config", "opt-9b"], "--model-config: opt-9b: no such file, and "),
        (["{parts}", "{tmp}/new", "--tokenizer", "{tmp}"], "expected tokenizer.json, or vocab.json and merges.txt"),
        (["{parts}", "{tmp}/old"], "is there already. Name another folder, or replace it with --force."),
        (["{parts}", "{tmp}/old/notes.txt/new"], "{tmp}/old/notes.txt"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of(DEMO, tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    places = {"tmp": tmp_path, "parts": parts}
    line = error_of(["convert", *(a.format(**places) for a in arguments)], capsys)
    assert message.format(**places) in line
    assert "Errno" not in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"], ["a", "b", "--format", "gguf"],
                                       ["a", "b", "--parts", "two"], ["a", "b", "--forc"]])  # fmt: skip
def test_wrong_usage_of_convert_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("minopt: error: ")
    assert error.endswith(" See minopt convert --help.\n")


def test_an_interrupt_ends_with_130_and_leaves_nothing(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, calls = TensorFile.read_into, []

    def interrupted(self: TensorFile, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        read(self, *args)

    monkeypatch.setattr(TensorFile, "read_into", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        assert main(["convert", str(parts), str(tmp_path / "new")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", f"minopt: warning: {parts}: {NO_TOKENIZER}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["parts"]


def test_a_bar_is_drawn_on_a_terminal(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(expected_tensors())
    with terminal() as shown:
        assert main(["convert", str(parts), str(tmp_path / "new")]) == 0
        text = shown()
        assert f"{count}/{count} [" in text
        assert text.endswith(f"minopt: wrote {tmp_path / 'new'}\r\n")
        assert main(["inspect", str(parts), "--check"]) == 0
        assert f"/{count} [" in shown()
    assert f"/{count}" not in capsys.readouterr().out
    assert main(["inspect", str(parts), "--check", "--hash"]) == 0
    assert capsys.readouterr().err == ""


# --- inspect ---


def test_the_program_inspects(tmp_path: Path) -> None:
    result = run("inspect", str(DEMO), "--check", "--hash", "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert report == json.loads(json.dumps(inspect_checkpoint(DEMO, check=True, digest=True).to_dict()))
    assert (report["is_sound"], report["parameters"], len(report["digest"])) == (True, 3_946_496, 64)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--check"], {"check": True}),
        (["--hash"], {"digest": True}),
        (["--check", "--hash"], {"check": True, "digest": True}),
        (["--model-config", "{config}"], {"model_config": "{config}"}),
    ],
)
def test_each_flag_asks_for_its_part(
    flags: list[str], options: dict[str, Any], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference().config.save_pretrained(tmp_path / "config")
    config = str(tmp_path / "config")
    flags = [flag.format(config=config) for flag in flags]
    if "model_config" in options:
        options = {"model_config": config}
    expected = inspect_checkpoint(parts, **options)
    for more, text in (
        ([], expected.to_text()),
        (["--tensors"], expected.to_text(tensors=True)),
        (["--json"], json.dumps(expected.to_dict(), indent=2)),
    ):
        assert main(["inspect", str(parts), *flags, *more]) == 0
        assert capsys.readouterr() == (text + "\n", "")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_check_finds_is_on_stdout_and_exit_code_1(
    flags: list[str], parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensor(
        parts / "reshard-model_part-1.pt", "decoder.layers.1.fc1.bias", lambda tensor: tensor[3].fill_(float("nan"))
    )
    assert main(["inspect", str(parts)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(parts), "--check", *flags]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    place = "1 not finite, first at reshard-model_part-1.pt: decoder.layers.1.fc1.bias[3]"
    if flags:
        report = json.loads(out)
        assert {t["name"]: t["findings"] for t in report["tensors"] if t["findings"]} == {"layers.1.fc1.bias": [place]}
        assert report["is_sound"] is False
        assert report["problem"] is None
    else:
        assert out.endswith(f"\n\nlayers.1.fc1.bias: {place}\n")


@pytest.mark.parametrize("flags", [[], ["--json"], ["--check", "--hash", "--tensors"]])
def test_what_cannot_be_loaded_is_described_with_exit_code_1(
    flags: list[str], parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source("2 parts", parts).joinpath("reshard-model_part-0.pt").unlink()
    assert main(["inspect", str(parts), *flags]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    if "--json" in flags:
        report = json.loads(out)
        assert report["missing"] == ["reshard-model_part-0.pt"]
        assert "missing: reshard-model_part-0.pt. Fetch them again." in report["problem"]
    else:
        assert "\nmissing         1: reshard-model_part-0.pt\n" in out
        assert out.splitlines()[-1].startswith("problem: ")


def test_what_is_no_checkpoint_is_one_line(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere: no such folder" in error_of(["inspect", str(tmp_path / "nowhere")], capsys)
    (tmp_path / "empty").mkdir()
    assert "empty: expected weights (" in error_of(["inspect", str(tmp_path / "empty"), "--json"], capsys)
    write_source("singleton", parts)
    line = error_of(["inspect", str(parts)], capsys)
    assert "holds 2 checkpoints (reshard-model_part-0.pt, reshard.pt). Name the file of one." in line
    assert "opt-9b: no such file" in error_of(["inspect", str(DEMO), "--model-config", "opt-9b"], capsys)


# --- evaluate ---


def test_published_numbers_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(["evaluate", "--task", "reference"], capsys)
    assert line == ("minopt: error: --model: expected a checkpoint to measure, got none. Name one.\n")


def test_a_model_of_another_size_has_no_published_numbers(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (DEMO, parts):
        line = error_of(["evaluate", "--task", "reference", "--model", str(model), "--device", "cpu"], capsys)
        assert "expected the shape of opt-125m or opt-350m" in line
    assert "no such folder" in error_of(["evaluate", "--task", "reference", "--model", "/nowhere"], capsys)

"""`minopt convert` and `minopt inspect`: options that reach the library, exit codes, one line for what is wrong."""

from __future__ import annotations

import fcntl
import json
import math
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

import minopt
from minopt import inspect_checkpoint
from minopt.checkpoint import convert as converting
from minopt.checkpoint.files import TensorFile
from minopt.cli import COMMANDS, main
from minopt.cli.flags import parse
from tests.checkpoint.sources import change_tensor, content, expected_tensors, reference, write_source
from tests.conftest import copy_of

DEMO = Path(minopt.DEMO)
NO_TOKENIZER = "no tokenizer's files beside the weights, so none are written."
Capture = pytest.CaptureFixture[str]


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


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minopt"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=100)


def test_under_torchrun_the_first_process_works_alone(tmp_path: Path) -> None:
    result = torchrun("convert", str(DEMO), str(tmp_path / "new"))
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.count(f"minopt: wrote {tmp_path / 'new'}\n") == 1
    assert inspect_checkpoint(tmp_path / "new").is_sound


def test_under_torchrun_the_error_is_the_last_line_that_one_reads() -> None:
    result = torchrun("inspect", "/no/such/folder")
    assert (result.returncode, result.stdout) == (1, "")  # torchrun's own
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("minopt: error: ")]
    assert line.removeprefix("minopt: error: ") in result.stderr.rstrip("=\n").splitlines()[-1]


# --- convert ---


def test_each_option_reaches_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(converting, "convert", lambda *args, **options: asked.append((args, options)))
    flags = "--format metaseq --parts 4 --dtype bfloat16 --max-shard-size 1.5MB --model-config opt-125m --force"
    hub = ["--revision", "v1", "--local-files-only", "--ignore", "a.*"]
    assert main(["convert", "a", "b", *flags.split(), "--tokenizer", "c", *hub]) == 0
    assert main(["convert", "a", "b", "--quantize", "int8"]) == 0
    assert capsys.readouterr() == ("", "minopt: wrote b\n" * 2)
    given = {"format": "metaseq", "parts": 4, "dtype": "bfloat16", "max_shard_bytes": 1_500_000, "tokenizer": "c",
             "model_config": "opt-125m", "force": True, "show_progress": True, "revision": "v1",
             "local_files_only": True, "quantize": None, "ignore": ("a.*",), "calibration": None, "smooth": None,
             "device": None, "adapter": None}  # fmt: skip
    default = {"format": "hf", "parts": 1, "dtype": "auto", "max_shard_bytes": 2_000_000_000, "tokenizer": None,
               "model_config": None, "force": False, "show_progress": True, "revision": None,
               "local_files_only": False, "quantize": "int8", "ignore": (), "calibration": None, "smooth": None,
               "device": None, "adapter": None}  # fmt: skip
    assert asked == [(("a", "b"), given), (("a", "b"), default)]


@pytest.mark.parametrize(
    ("text", "count"),
    [("20 kb", 20_000), ("0.5GB", 500_000_000), ("16g", 16 * 10**9), ("2GiB", 2**31), ("10 bytes", 10)]
    + [(text, None) for text in ("", "GB", "16", "0", "0GB", "1.5.5MB", "-1MB", "1e9", "inf", "two", "2 M B", "²GB",
                                 "9" * 400 + "GB")],
)  # fmt: skip
def test_sizes_are_in_decimal_or_binary_units(text: str, count: int | None) -> None:
    words = ["a", "b", f"--max-shard-size={text}"]
    if count is not None:
        assert parse(COMMANDS["convert"], words)["max_shard_size"] == count
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse(COMMANDS["convert"], words)
    wanted = "a size above 0 with its unit, such as 16GB or 500MB"
    assert str(error.value) == f"--max-shard-size: expected {wanted}, got {text[:80]!r}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", "{tmp}/new"], "/nowhere: no such folder, and not the name of a model on the hub"),
        (["{parts}", "{tmp}/new", "--parts", "2"], "only metaseq's format has parts, got 2 with hf. Add --format "),
        (["{parts}", "{tmp}/new", "--model-config", "opt-9b"], "--model-config: opt-9b: no such file, and "),
        (["{parts}", "{tmp}/old"], "is there already. Name another folder, or replace it with --force."),
        (["{parts}", "{tmp}/old/notes.txt/new"], "{tmp}/old/notes.txt"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, parts: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy_of(DEMO, tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    before, places = content(tmp_path), {"tmp": tmp_path, "parts": parts}
    assert main(["convert", *(a.format(**places) for a in arguments)]) == 2
    captured = capsys.readouterr()
    *warnings, line = captured.err.splitlines()
    assert captured.out == ""
    assert all(warning.startswith("minopt: warning: ") for warning in warnings)
    assert line.startswith("minopt: error: ")
    assert message.format(**places) in line
    assert "Errno" not in line
    assert content(tmp_path) == before


def test_an_interrupt_ends_with_130_and_leaves_nothing(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    read, calls = TensorFile.read_into, []

    def interrupted(self: TensorFile, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        read(self, *args)

    monkeypatch.setattr(TensorFile, "read_into", interrupted)
    assert main(["convert", str(parts), str(tmp_path / "new")]) == 130
    assert capsys.readouterr() == ("", f"minopt: warning: {parts}: {NO_TOKENIZER}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["parts"]


def test_a_bar_is_drawn_on_a_terminal(parts: Path, tmp_path: Path, capsys: Capture) -> None:
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


@pytest.mark.parametrize("state", ["sound", "not finite", "incomplete"])
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--check"], {"check": True}),
        (["--hash"], {"digest": True}),
        (["--model-config", "{config}"], {"model_config": "{config}"}),
    ],
)
def test_each_flag_asks_for_its_part_and_the_exit_code_says_whether_all_is_well(
    flags: list[str], options: dict[str, Any], state: str, parts: Path, tmp_path: Path, capsys: Capture
) -> None:
    reference().config.save_pretrained(tmp_path / "config")
    config = str(tmp_path / "config")
    flags = [flag.format(config=config) for flag in flags]
    options = {name: config if name == "model_config" else value for name, value in options.items()}
    if state == "not finite":
        change_tensor(parts / "reshard-model_part-1.pt", "decoder.layers.1.fc1.bias", lambda t: t[3].fill_(math.nan))
    if state == "incomplete":
        (parts / "reshard-model_part-0.pt").unlink()
    expected = inspect_checkpoint(parts, **options)
    is_well = state == "sound" or (state == "not finite" and "check" not in options)
    assert expected.is_sound == is_well
    for more, text in (
        ([], expected.to_text()),
        (["--tensors"], expected.to_text(tensors=True)),
        (["--json"], json.dumps(expected.to_dict(), indent=2)),
    ):
        assert main(["inspect", str(parts), *flags, *more]) == 1 - is_well
        assert capsys.readouterr() == (text + "\n", "")


def test_what_is_no_checkpoint_is_one_line(parts: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    write_source("singleton", parts)
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "/nowhere: no such folder"),
        ([str(tmp_path / "empty"), "--json"], "empty: expected weights ("),
        ([str(parts)], "holds 2 checkpoints (reshard-model_part-0.pt, reshard.pt). Name the file of one."),
        ([str(DEMO), "--model-config", "opt-9b"], "opt-9b: no such file"),
    ):
        assert main(["inspect", *arguments]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert (out, line.startswith("minopt: error: "), message in line) == ("", True, True)


def test_only_two_sizes_have_published_numbers(capsys: Capture) -> None:
    assert main(["evaluate", "--task", "reference", "--device", "cpu", "--model", str(DEMO)]) == 2
    assert "expected the shape of opt-125m or opt-350m" in capsys.readouterr().err

"""Whose an error is: a line for what the user can mend, a traceback for a bug of minopt's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import minopt
from minopt.cli import main
from minopt.errors import is_connection_lost, is_out_of_memory, is_users

Capture = pytest.CaptureFixture[str]


def raised_by(code: str, module: str) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        exec(code, {"__name__": module, "torch": torch})
    return caught.value


@pytest.mark.parametrize(
    ("code", "module", "expected"),
    [
        ("raise ValueError('x')", "minopt.cli", True),
        ("try:\n    int('x')\nexcept ValueError:\n    raise ValueError('x') from None", "minopt", True),
        ("raise ValueError('x')", "minoptics", False),
        ("raise TypeError('x')", "minopt.cli", False),
        ("int('x')", "minopt.cli", False),
        ("a, b = [1]", "minopt.cli", False),
        ("list(zip([1], [], strict=True))", "minopt.cli", False),
        ("torch.nn.functional.dropout(torch.ones(1), p=3.0)", "minopt.cli", False),
        ("open('/nowhere')", "minopt.cli", True),
    ],
)  # fmt: skip
def test_only_what_minopt_raises_is_the_users_and_what_the_system_does(code: str, module: str, expected: bool) -> None:
    assert is_users(raised_by(code, module)) is expected


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA out of memory. Tried to"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_full_memory_is_known_in_all_its_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(str(error)))


@pytest.mark.parametrize(("size", "expected"), [("1", False), ("2", True)])
def test_one_process_alone_has_lost_no_other(size: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert is_connection_lost(RuntimeError("a compiler timed out")) is expected


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minopt.LanguageModel, "stream", lambda *_, **__: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["generate", "x", "--device", "cpu"])


@pytest.mark.parametrize(("flags", "variable"), [(["--debug"], None), ([], "1"), ([], "0"), ([], None)])
def test_debug_shows_the_traceback_of_all(
    flags: list[str], variable: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if variable is not None:
        monkeypatch.setenv("MINOPT_DEBUG", variable)
    assert main(["generate", "x", "--model", "/nowhere", *flags]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("minopt: error: /nowhere: no such folder")
    assert bool(before) == (bool(flags) or variable == "1")
    assert not before or before[0] == "Traceback (most recent call last):"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full. Free some space, or name another path."),
        (errno.EIO, f"{os.strerror(errno.EIO)}."),
    ],
)
def test_what_the_system_says_is_a_line_that_names_the_flag(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "p.txt").write_text("The sea")
    output = str(tmp_path / "out.jsonl")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), output)

    monkeypatch.setattr(minopt.LanguageModel, "generate_each", full)
    flags = ["--model", minopt.DEMO, "--device", "cpu", "--input", str(tmp_path / "p.txt"), "--output", output]
    assert main(["generate", *flags]) == 2
    assert capsys.readouterr().err == f"minopt: error: --output: {output}: {said}\n"

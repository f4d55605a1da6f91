"""Bars and lines on stderr: on a terminal that has room, at most ten frames a second, and nowhere else."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from minopt import load_model
from minopt.progress import bar, on_terminal
from minopt.training.trainer import train
from tests.checkpoint.sources import write_source
from tests.training.small import examples, model_of, settings, tokenizer


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Callable[[], str]]]:
    """Makes stderr a terminal of so many columns; what that returns tells what it shows."""
    end, device = os.openpty()
    os.set_blocking(end, False)
    with open(device, "w", closefd=False) as stderr:

        def of(columns: int) -> Callable[[], str]:
            fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            monkeypatch.setattr(sys, "stderr", stderr)

            def shown() -> str:
                stderr.flush()
                pieces = []
                with suppress(BlockingIOError):
                    while True:
                        pieces.append(os.read(end, 4096))
                return b"".join(pieces).decode()

            return shown

        yield of
    os.close(device)
    os.close(end)


def test_a_bar_is_drawn_on_a_terminal_with_room_by_the_first_process(
    terminal: Callable[[int], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, rank, expected in ((80, "0", True), (80, "1", False), (0, "0", False)):
        monkeypatch.setenv("RANK", rank)
        shown = terminal(columns)
        with bar(3, "step") as drawn:
            drawn.update(3)
        assert ("3/3" in shown()) == expected
    monkeypatch.setenv("RANK", "0")
    for stderr in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert not on_terminal()
        bar(3, "step").close()
        assert stderr is None or stderr.getvalue() == ""


def test_many_fast_steps_are_few_frames(terminal: Callable[[int], Callable[[], str]]) -> None:
    shown, began = terminal(80), time.perf_counter()
    with bar(20_000, "step", leave=False) as drawn:
        for _ in range(20_000):
            drawn.update()
    assert shown().count("step/s]") <= 3 + 10 * (time.perf_counter() - began)


def test_a_terminal_of_no_columns_shows_a_line_for_each_step(
    terminal: Callable[[int], Callable[[], str]], tmp_path: Path
) -> None:
    shown = terminal(0)
    train(model_of(), examples(4), settings(tmp_path, max_steps=2), tokenizer=tokenizer())
    steps = [line.split("  ") for line in shown().splitlines() if line.startswith("step ")]
    assert [(first, loss[:5]) for first, loss, *_ in steps] == [("step 1/2", "loss "), ("step 2/2", "loss ")]


def test_loading_shows_a_bar_once_it_takes_a_second(
    terminal: Callable[[int], Callable[[], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("safetensors", tmp_path / "model")
    shown = terminal(30)
    load_model(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert shown() == ""
    calls = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: next(calls) / 8)
    load_model(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert "loading: " in shown()

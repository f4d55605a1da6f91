"""benchmarks/gpu_acceptance.py rehearses on the CPU, so that its first run on a GPU is not its first run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu_acceptance")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_each_check_passes_in_a_rehearsal_or_says_what_only_cuda_has(script: Any) -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    command = [sys.executable, str(BENCHMARKS / "gpu_acceptance.py"), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["check"] for row in rows} == {*script.CHECKS}
    for row in rows:
        assert row["state"] in ("passed", "measured") or "CUDA" in row["reason"] or "not installed" in row["reason"], (
            row
        )
    for name, (_, bounds) in script.CHECKS.items():
        assert bounds.keys() <= {row["figure"] for row in rows if row["check"] == name}, name
    assert sorted((BENCHMARKS / "results").iterdir()) == before


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("pass", None),
        ("import time; time.sleep(60)", "was ended after 2 seconds"),
        ("raise MemoryError('all of it')", "ended with 1: MemoryError: all of it"),
        ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
    ],
)
def test_what_a_check_reported_before_it_broke_counts(script: Any, code: str, problem: str | None) -> None:
    figure = {"figure": "speed", "case": "", "value": 2.0, "reason": ""}
    command = [sys.executable, "-c", f"print({json.dumps(figure)!r}, flush=True); print('noise'); {code}"]
    reported, found = script.run_child(command, 2, os.environ)
    assert (reported, found) == ([figure], problem)
    bounds = {"speed": script.Bound(least=1), "size": script.Bound(most=1)}
    rows = [(row["figure"], row["state"]) for row in script.judged(reported, bounds, found, rehearse=False)]
    assert rows == [("speed", "passed"), *[("", "failed")] * (problem is not None), ("size", "failed")]


@pytest.mark.parametrize(("value", "state"), [(1.0, "passed"), (1.1, "failed"), (None, "failed")])
def test_a_figure_beyond_its_bound_fails(script: Any, value: float | None, state: str) -> None:
    figure = {"figure": "size", "case": "", "value": value, "reason": ""}
    (row,) = script.judged([figure], {"size": script.Bound(most=1)}, None, rehearse=False)
    assert (row["state"], row["bound"]) == (state, "<= 1")

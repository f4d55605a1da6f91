"""Generation, scoring and training on a GPU that is not there: devices, kernels, waits of the host, attention, graphs.

A tensor on the wrong device fails in these runs as it does on a GPU; numbers there are none (see fake.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.cases import OPTIONS, STEPS, L, N, cases

# How often the host may wait for the GPU: a few times at the ends, and then.
READS = {"beams": N, "drafts": 2 * N, "scoring": 0, "streaming": N + N // 8}
OTHERS = N // 8
# What a captured step may launch.
A_LAYER, OUTSIDE = 11, 13


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What came of each case; all of them run in one process."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    done = subprocess.run([sys.executable, "-m", "tests.gpu.cases"], cwd=Path(__file__).parents[2], check=True,
                          capture_output=True, text=True)  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", cases())
def test_each_way_runs_with_few_waits_and_without_cudnn_attention(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    found = results[name]
    assert not found.get("error")
    assert found["attention"] or "_varlen_attn" in found["kernels"]
    assert "cudnn" not in found["attention"]
    if name not in ("again", "second GPU"):
        assert found["reads"] <= READS.get(name.split(", ")[-1], OTHERS) + 5


def test_a_training_step_waits_once_and_packs_texts_into_one_kernel(results: dict[str, dict[str, Any]]) -> None:
    """In 16 bits, on Ampere and newer, with heads of 8 numbers times n; elsewhere each text has a kernel of its own."""
    apart = ("tf32", "grouped", "T4", "heads of 4")
    for name, found in results.items():
        if name.startswith("training"):
            assert found["reads"] == STEPS, name
            assert ("_varlen_attn" in found["kernels"]) == all(of not in name for of in apart), name


def test_a_captured_step_launches_few_kernels(results: dict[str, dict[str, Any]]) -> None:
    for name, found in results.items():
        if name.startswith("graphed, 125m") and "scoring" not in name:
            assert len(found["captured"]) <= A_LAYER * L + OUTSIDE, name
    assert results["graphed, 125m, greedy"]["captured"].count("index_copy_") == 2 * L


def test_graphs_are_captured_on_the_models_own_gpu_and_used_again(results: dict[str, dict[str, Any]]) -> None:
    """For several continuations of a prompt too."""
    assert results["second GPU"]["graphs"] == ["cuda:1"]
    assert results["again"]["graphs"] == ["cuda:0"]
    assert OPTIONS["sampling"]["num_return_sequences"] == 2

"""How processes end together: one error, the same in all of them and as in a single one, whoever met it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minopt import DEMO, CheckpointError
from minopt.distributed import World

AGREED = """
import json, sys
import torch
from minopt import CheckpointError
from minopt.distributed import processes

ERRORS = [CheckpointError("torn"), FileNotFoundError(2, "No such file or directory", "a"), PermissionError("locked"),
          IsADirectoryError("a folder"), ConnectionError("no hub"), ValueError("odd")]
MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")]

def fail(error):
    raise error

with processes("cpu") as world:
    found = []
    for error in (*ERRORS, *MEMORY):
        try:
            world.each(lambda: fail(error) if world.rank == 1 else 0)
        except Exception as e:
            found.append([type(e).__name__, str(e), e.process])
    for everyone in world.gather(found):
        assert everyone == found
    if world.rank == 0:
        print(json.dumps(found))
"""

# What runs out of memory in the second process alone, in its second call.
ALONE = """
import os, sys
import torch
import {module} as module
from minopt.cli import main

whole, calls = module.{function}, []

def full(*args, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return whole(*args, **options)

module.{function} = full
code = main(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


def launch(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, script,
               *arguments]  # fmt: skip
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=100,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MINOPT_HOME": str(script.parent)})  # fmt: skip


def test_an_error_of_one_process_is_of_the_same_type_in_all(tmp_path: Path) -> None:
    (tmp_path / "agreed.py").write_text(AGREED)
    result = launch(tmp_path / "agreed.py")
    assert result.returncode == 0, result.stderr
    *found, first, second, third = json.loads(result.stdout)
    assert found == [
        ["CheckpointError", "torn", 1],
        ["FileNotFoundError", "[Errno 2] No such file or directory: 'a'", 1],
        ["PermissionError", "locked", 1],
        ["IsADirectoryError", "a folder", 1],
        ["ConnectionError", "no hub", 1],
        ["ValueError", "odd", 1],
    ]
    assert {kind for kind, *_ in (first, second, third)} == {"OutOfMemoryError"}
    assert first[1:] == ["process 1: CUDA out of memory. Tried to allocate", 1]
    assert second[1:] == ["process 1: MemoryError", 1]


@pytest.mark.parametrize("error", [CheckpointError("torn"), PermissionError("locked"), torch.OutOfMemoryError("full")])
def test_one_process_raises_what_it_met(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        World(0, 1, torch.device("cpu")).each(fail)
    assert caught.value is error


@pytest.mark.parametrize(
    ("module", "function", "command"),
    [
        ("minopt.training.method", "collate", "finetune --do-train --max-steps 4"),
        ("minopt.evaluation.answers", "token_logprobs", "finetune --do-eval --per-device-eval-batch-size 1"),
        ("minopt.inference.tensor_parallel", "_Summed.__call__", "generate"),
    ],
    ids=["training", "evaluation", "generation"],
)
def test_memory_that_is_full_in_one_process_ends_all_with_one_line(
    module: str, function: str, command: str, tmp_path: Path
) -> None:
    """The others wait for it in the middle of a step, and are told by the store that all share."""
    (tmp_path / "alone.py").write_text(ALONE.format(module=module, function=function))
    pairs = [{"prompt": f"{i} and {i} are", "completion": f" {2 * i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ["--model", DEMO, "--device", "cpu"]
    if command.startswith("finetune"):
        files = {"train-file": "pairs.jsonl", "dev-file": "pairs.jsonl", "output-dir": "run"}
        flags += [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
        flags += ["--src-length", "32", "--tgt-length", "4"]
        advice = "a smaller --per-device-train-batch-size, or --recompute"
    else:
        flags += ["The sea"]
        advice = "--dtype bfloat16, or with --input a smaller --max-batch-tokens"
    result = launch(tmp_path / "alone.py", *command.split(), *flags)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "minopt: error:" in line]
    assert line == f"minopt: error: process 1: not enough memory. Try {advice}."
    assert "OutOfMemoryError" not in result.stderr

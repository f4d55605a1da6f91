"""How tensors get their memory, and how much there is."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minopt import memory
from minopt.inference.linear import OneDNN
from minopt.memory import in_large_pages, kept_when_freed

SIZE = 2**26


def in_pages_of_2_mb(address: int) -> int:
    """Bytes of the area of memory that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")[0].partition("-")
        if rest and not first.endswith(":"):
            inside = int(first, 16) <= address < int(rest, 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("nothing lies there")


def linux_can() -> bool:
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return sys.platform == "linux" and release is not None and (int(release[1]), int(release[2])) >= (6, 1)


@pytest.mark.skipif(not linux_can(), reason="needs Linux 6.1")
def test_what_is_allocated_within_lies_in_large_pages_and_is_the_same() -> None:
    before = torch.arange(SIZE, dtype=torch.uint8)
    with in_large_pages():
        numbers = torch.arange(SIZE, dtype=torch.uint8)
    assert torch.equal(numbers, before)
    assert in_pages_of_2_mb(numbers.data_ptr()) >= SIZE - 2**22
    with pytest.raises(KeyError), in_large_pages():
        raise KeyError


@pytest.mark.skipif(not linux_can(), reason="needs Linux 6.1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_lie_in_large_pages(dtype: torch.dtype) -> None:
    weight = torch.randn(3000, 4000, dtype=dtype)
    product = OneDNN(weight, None)
    address = torch.ops.mkldnn.data_ptr(product._weight)
    assert in_pages_of_2_mb(address) >= weight.nbytes - 2**22
    assert torch.equal(product.weight()[0], weight)


def faults_of(work: Callable[[], object]) -> int:
    """How often Linux had to give memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        assert torch.ones(SIZE, dtype=torch.uint8)[-1] == 1

    device = torch.device("cpu")
    for key in [key for key in os.environ if "MALLOC_" in key or "TUNABLES" in key]:
        monkeypatch.delenv(key)
    with kept_when_freed(device):
        step()
        assert faults_of(step) < SIZE // 2**12 // 10
    called: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", called.append)
    with kept_when_freed(torch.device("cuda")):
        assert not called
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with kept_when_freed(device):  # a library without any function would have raised
        assert called == [None]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
@pytest.mark.parametrize("keep", ["", "keep_activations()", "with kept_when_freed(torch.device('cpu')): step()"])
def test_activations_stay_for_the_next_operator_also_after_training(keep: str) -> None:
    """In a process whose malloc nothing has changed yet."""
    setup = """import torch; from minopt.memory import *; from tests.test_memory import faults_of
def step(): torch.ones(2**24, dtype=torch.uint8), torch.ones(2**24, dtype=torch.uint8)"""
    environment = {key: value for key, value in os.environ.items() if "MALLOC_" not in key and "TUNABLES" not in key}
    code = "\n".join([setup, keep, "step()", "print(min(faults_of(step) for _ in range(5)))"])
    assert (int(subprocess.check_output([sys.executable, "-c", code], env=environment)) < 800) == bool(keep)


def test_what_a_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions of Linux' control groups, with page cache that gives way, and no limit at all."""
    free = memory.available_memory(torch.device("cpu"))
    assert free is None or free > 2**28
    for version, names in ((1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")),
                           (2, ("memory.max", "memory.current", "file"))):  # fmt: skip
        group = tmp_path / str(version) / ("memory" if version == 1 else "") / "box"
        group.mkdir(parents=True)
        for name, text in zip(names[:2], ("5000000", "3000000"), strict=True):
            (group / name).write_text(text)
        (group / "memory.stat").write_text(f"anon 1\n{names[2]} 1000000\n")
        groups = tmp_path / f"{version}.groups"
        groups.write_text("9:cpu:/box\n4:memory:/box\n" if version == 1 else "0::/box\n")
        monkeypatch.setattr(memory, "_GROUPS", groups)
        monkeypatch.setattr(memory, "_GROUP_ROOT", tmp_path / str(version))
        assert list(memory._free_in_cgroup()) == [3_000_000]
        (group / "memory.stat").write_text(f"{names[2]} 1000000\n{'total_' if version == 1 else ''}shmem 400000\n")
        assert list(memory._free_in_cgroup()) == [2_600_000]  # files in memory stay
        for name, text in zip(names[:2], ("4000000", "3500000"), strict=True):  # of the group around it
            (group.parent / name).write_text(text)
        (group.parent / "memory.stat").write_text(f"{names[2]} 0\n")
        assert list(memory._free_in_cgroup()) == [2_600_000, 500_000]
        for folder in (group, group.parent):
            (folder / names[0]).write_text("max")
        assert list(memory._free_in_cgroup()) == []


def test_large_tensors_have_pages_of_their_own() -> None:
    for shape, dtype in (((3, 5), torch.int8), ((700, 1000), torch.float32), ((3_000_001,), torch.int8)):
        tensor = memory.empty(shape, dtype)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        tensor.fill_(1)
        assert tensor.sum() == tensor.numel()
        assert tensor.numel() < 10**5 or tensor.data_ptr() % 2**21 == 0

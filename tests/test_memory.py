"""Memory that others allocate, in large pages."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minopt.memory import in_large_pages

SIZE = 2**26


def in_pages_of_2_mb(tensor: Tensor) -> int:
    """Bytes of the area of memory that a tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")[0].partition("-")
        if rest and not first.endswith(":"):
            inside = int(first, 16) <= tensor.data_ptr() < int(rest, 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor lies nowhere")


def can_collapse() -> bool:
    """Whether Linux does it when it is asked for memory whose place is known."""
    numbers = torch.ones(SIZE, dtype=torch.uint8)
    first = -(-numbers.data_ptr() // 2**21) * 2**21
    size = (numbers.data_ptr() + SIZE - first) // 2**21 * 2**21
    try:
        return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), 25) == 0
    except (AttributeError, OSError, TypeError):
        return False


def test_what_is_allocated_within_lies_in_large_pages_and_is_the_same() -> None:
    before = torch.arange(SIZE, dtype=torch.uint8)
    with in_large_pages():
        numbers = torch.arange(SIZE, dtype=torch.uint8)
    assert torch.equal(numbers, before)
    assert in_pages_of_2_mb(numbers) >= SIZE - 2**22
    with pytest.raises(KeyError), in_large_pages():
        raise KeyError

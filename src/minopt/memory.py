"""Memory: how tensors get theirs, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

CHUNK_NUMBERS = 4_000_000  # that are in memory at a time where a tensor is not wanted whole

_PAGE = 2**21
_LARGE = 2**25  # bytes from which on the C library gives memory an area of its own
_MADV_COLLAPSE = 25  # from Linux 6.1 on
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # options of glibc's mallopt
_GROUPS, _GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# Of each version of Linux' control groups: the files of limit and use; in memory.stat, page cache and files in memory.
_GROUP_FILES = {
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    False: ("memory.max", "memory.current", "file", "shmem"),
}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor, not filled; on a CPU (``None``) in pages of its own if it is large.

    They go back as soon as it is let go, which the C library does not see to below 32 MB; and they are of 2 MB where
    Linux has such, which are read a tenth faster than small ones.
    """
    size, device = math.prod(shape) * dtype.itemsize, device or torch.device("cpu")
    if size < _PAGE or device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE  # where a large page may begin
        memory.madvise(mmap.MADV_HUGEPAGE, first, size // _PAGE * _PAGE)  # what is left over lies in small ones
    except (AttributeError, OSError):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=first).view(tuple(shape))


@contextlib.contextmanager
def in_large_pages() -> Iterator[None]:
    """Moves large memory that is allocated within to pages of 2 MB, where Linux can: a second a GB."""
    before = set(_areas())
    yield
    for first, end in set(_areas()) - before:
        to_large_pages(first, end - first)


def to_large_pages(address: int, size: int) -> None:
    """Moves memory that is in use to pages of 2 MB, as far as it fills such, where Linux can."""
    first, end = -(-address // _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
    if end > first and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_COLLAPSE)


def keep_activations() -> None:
    """Lets glibc keep up to 64 MB of memory that is freed, as it does once any area of nearly 32 MB was.

    Else it gives the activations of a prompt back after each operator, and Linux clears as many pages for the next.
    """
    torch.empty(_LARGE - _PAGE, dtype=torch.uint8, device="cpu")


@contextlib.contextmanager
def kept_when_freed(device: torch.device) -> Iterator[None]:
    """Until the block ends, glibc keeps memory that is freed, for what comes next, in pages of 2 MB where Linux can.

    Else it returns the memory of activations after each step of training, and Linux clears as many pages in the next.
    Does nothing for a GPU, without glibc, or where the environment has settings of malloc.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and os.name == "posix" else None
    if not hasattr(libc, "gnu_get_libc_version") or any("MALLOC_" in key or "TUNABLES" in key for key in os.environ):
        yield
        return
    assert libc is not None
    libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.mallopt(_MMAP_MAX, 0)
    libc.malloc.restype = ctypes.c_void_p
    # Addresses alone, in one area that asks for large pages: malloc goes on from here.
    size = (available_memory(device) or 0) // 2 // _PAGE * _PAGE
    if size and not _is_strict() and (at := libc.malloc(ctypes.c_size_t(size))):
        libc.madvise(ctypes.c_void_p(-(-at // _PAGE) * _PAGE), ctypes.c_size_t(size - _PAGE), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(at))
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65536)  # glibc's own numbers, and its own limits
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)


def _is_strict() -> bool:
    """Whether Linux counts addresses as memory, used or not."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True


def _areas() -> Iterator[tuple[int, int]]:
    """First and last address of each large area of memory that belongs to no file; none but on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            match line.split():
                case [addresses, "rw-p", _, _, "0"]:
                    first, end = (int(address, 16) for address in addresses.split("-"))
                    if end - first >= _LARGE:
                        yield first, end


def available_memory(device: torch.device) -> int | None:
    """Bytes that a device has for more: what is free of a GPU; of a machine what Linux can give to this process."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free = fields["MemAvailable"] + fields["SwapFree"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([free, *_free_in_cgroup()])


def _free_in_cgroup() -> Iterator[int]:
    """What the limits of a container, and of those around it, leave: page cache counts against them, and gives way."""
    lines = _GROUPS.read_text().splitlines() if _GROUPS.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers not in ("", "memory"):
            continue
        root, (limit, used, cache, shared) = _GROUP_ROOT / controllers, _GROUP_FILES[bool(controllers)]
        own = root / path.lstrip("/")  # not there where it is a path of the host's
        for folder in dict.fromkeys((own, *own.parents[: len(own.relative_to(root).parts)], root)):
            with contextlib.suppress(OSError, ValueError, KeyError):
                most = int((folder / limit).read_text())  # "max" is none
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                kept = int(stat[cache]) - int(stat.get(shared, 0))  # files in memory (tmpfs) do not give way
                yield most - int((folder / used).read_text()) + kept

"""A model's tensors as they lie in files: read, sliced, joined and cast when asked, and not before.

A ``SourceTensor`` is the model's. It has a ``Slice`` for each model parallel part, and a slice has a ``Run`` of numbers
for each file that holds some of it: FSDP shards, or one file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.errors import CheckpointError
from minopt.checkpoint.files import TensorFile
from minopt.memory import CHUNK_NUMBERS, empty

# What model parallel parts hold alike may differ by so much: metaseq's scripts/reshard_mp.py.
_TOLERANCE = {"rtol": 0.0, "atol": 1e-8}

# A cast to bfloat16 changes a number by at most 2^-8 of itself, one to float16 before that by 2^-11 more. What lies
# below float16's smallest normal number is rounded to multiples of 2^-24.
_ROUNDING = {"rtol": 2.0**-8 + 2.0**-11, "atol": 2.0**-24}


@dataclass(frozen=True)
class Run:
    """Numbers ``start`` to ``stop``, in row-major order, of one tensor in a file."""

    file: TensorFile
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Slice:
    """A tensor made of runs, one after another in row-major order: a model's tensor, or one part's share of it.

    Attributes:
        shape, dtype: the tensor's; the dtype is ``None`` for one that no OPT has, such as int64.
        runs: the places of its numbers.
        scale: float32 ``[out, 1]``, where the runs are int8 and stand for their products with it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    runs: tuple[Run, ...]
    scale: Tensor | None = None

    @classmethod
    def whole(cls, file: TensorFile, key: str) -> Slice:
        """A tensor of a file as it is."""
        shape = file.shapes[key]
        return cls(shape, file.dtypes[key], (Run(file, key, 0, math.prod(shape)),))

    def part(self, start: int, shape: tuple[int, ...]) -> Slice:
        """The tensor of ``shape`` whose numbers begin at number ``start`` of this one, as they are stored."""
        runs, begin, stop = [], 0, start + math.prod(shape)
        for run in self.runs:
            end = begin + run.stop - run.start
            low, high = max(start, begin), min(stop, end)
            if low < high:
                runs.append(replace(run, start=run.start + low - begin, stop=run.start + high - begin))
            begin = end
        return Slice(shape, self.dtype, tuple(runs))

    def rows(self, start: int, stop: int) -> Slice:
        """Some rows, as a tensor of their own."""
        rows = self.part(start * math.prod(self.shape[1:]), (stop - start, *self.shape[1:]))
        return rows if self.scale is None else replace(rows, scale=self.scale[start:stop])

    @property
    def place(self) -> tuple[Path, int, int] | None:
        """File, first byte and count of the numbers where they all lie in order, else ``None``."""
        begin = self.runs[0].file.begins_at(self.runs[0].key) if len(self.runs) == 1 else None
        if begin is None or self.dtype is None or self.scale is not None:
            return None
        run = self.runs[0]
        return run.file.path, begin + run.start * self.dtype.itemsize, run.stop - run.start

    def map(self, apart: bool = False) -> Tensor | None:
        """The tensor in its file's pages; ``None`` if it lies in several runs, or has to be computed."""
        if len(self.runs) != 1 or self.scale is not None:
            return None
        run = self.runs[0]
        tensor = run.file.map(run.key, apart=apart)
        if tensor.shape == self.shape:
            return tensor
        return tensor.reshape(-1)[run.start : run.stop].view(self.shape)

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """Fills ``out`` (one dim) with numbers from number ``start`` on, cast to its dtype."""
        if self.scale is not None:
            self._dequantize_into(out, start, self.scale)
            return
        filled = 0
        for run in self.part(start, (out.numel(),)).runs:
            count = run.stop - run.start
            run.file.read_into(out[filled : filled + count], run.key, run.start)
            filled += count

    def _dequantize_into(self, out: Tensor, start: int, scale: Tensor) -> None:
        """Reads whole rows, as a scale belongs to each, and takes what is wanted of them."""
        width, stop, stored = self.shape[1], start + out.numel(), replace(self, scale=None)
        last, step = -(-stop // width), max(1, CHUNK_NUMBERS // width)
        for row in range(start // width, last, step):
            rows = torch.empty(min(step, last - row), width, dtype=torch.int8)
            first, end = row * width, row * width + rows.numel()
            stored.read_into(rows.view(-1), first)
            low, high = max(start, first), min(stop, end)
            numbers = int8.dequantize(rows, scale[row : row + len(rows)]).view(-1)
            out[low - start : high - start] = numbers[low - first : high - first]

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(str(run.file.path) for run in self.runs))


@dataclass(frozen=True)
class Share:
    """One process' part of what several divide: heads, inner units and the vocabulary (arXiv 1909.08053).

    Attributes:
        index: this process's number, from 0.
        count: the number of processes.
    """

    index: int
    count: int

    def of(self, size: int) -> tuple[int, int]:
        """This share of ``size`` rows or columns: the first, and the one after the last. Last shares may be shorter."""
        width = -(-size // self.count)
        return min(self.index * width, size), min((self.index + 1) * width, size)


@dataclass(frozen=True)
class SourceTensor:
    """A model's tensor in a checkpoint.

    Attributes:
        name: the model's.
        shape: the whole tensor's.
        dtype: the stored one (for an int8 weight, that of the other tensors); ``None`` for one that no OPT has.
        slices: one for each model parallel part.
        dim: along which the slices follow one another; ``None`` where each holds the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    slices: tuple[Slice, ...]
    dim: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scale(self) -> Tensor | None:
        """The scale of an int8 weight, float32 ``[out, 1]``; ``None`` for any other tensor."""
        return self.slices[0].scale if self.slices else None

    @property
    def stored(self) -> SourceTensor:
        """The tensor as it lies in files: itself, or its int8 numbers."""
        if self.scale is None:
            return self
        numbers = replace(self.slices[0], dtype=torch.int8, scale=None)
        return replace(self, dtype=torch.int8, slices=(numbers,))

    def map(self, apart: bool = False) -> Tensor | None:
        """The tensor in its file's pages, where nothing is read until it is used; ``None`` if it has to be computed.

        Args:
            apart: from other tensors of the file: its pages go with it. Such a one holds an open file.
        """
        return self.slices[0].map(apart) if len(self.slices) == 1 else None

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, on the CPU, cast to a dtype while reading; ``None`` keeps the stored one."""
        assert self.dtype is not None
        out = empty(self.shape, dtype or self.dtype)
        self.fill(out)
        return out

    def read_int8(self) -> tuple[Tensor, Tensor]:
        """A weight as int8 ``[out, in]`` with its scale: as stored, or made of the stored numbers."""
        if self.scale is not None:
            mapped = self.stored.map()
            return self.stored.read() if mapped is None else mapped.contiguous(), self.scale
        try:
            return int8.quantize(self.read())
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from None

    def fill(self, out: Tensor) -> None:
        """Reads the tensor into one of its shape, contiguous and on the CPU, casting to its dtype."""
        if self.dim == 1:
            self._read_columns(out, 0)
        else:
            self.read_into(out.view(-1))
        self.check_copies()

    def rows(self, start: int, stop: int) -> SourceTensor:
        """Some rows of it, as a tensor of their own."""
        slices, begin = [], 0
        for piece in self.slices:
            low, high = max(start, begin), min(stop, begin + piece.shape[0])
            if low < high:
                slices.append(piece.rows(low - begin, high - begin))
            if self.dim == 0:  # else every slice has all rows
                begin += piece.shape[0]
        return replace(self, shape=(stop - start, *self.shape[1:]), slices=tuple(slices))

    def columns(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Some columns of it, read: pieces of all rows pass through memory, and nothing else does."""
        assert self.dtype is not None
        out = empty((self.shape[0], stop - start), dtype or self.dtype)
        self._read_columns(out, start)
        return out

    def _read_columns(self, out: Tensor, first: int) -> None:
        """Fills ``out``, as high as the tensor, with its columns from column ``first`` on, cast to its dtype."""
        begin = 0
        for piece in self.slices if self.dim == 1 else self.slices[:1]:
            height, width = piece.shape
            low, high = max(first, begin), min(first + out.shape[1], begin + width)
            if out.shape[1] == width and low == first == begin:
                piece.read_into(out.view(-1))
                return
            step = max(1, CHUNK_NUMBERS // max(1, width))
            for row in range(0, height if low < high else 0, step):
                rows = empty((min(step, height - row), width), out.dtype)
                piece.read_into(rows.view(-1), row * width)
                out[row : row + len(rows), low - first : high - first] = rows[:, low - begin : high - begin]
            begin += width

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """Fills ``out`` (one dim) with numbers from number ``start`` on; not for tensors joined along dim 1."""
        slices = self.slices if self.dim == 0 else self.slices[:1]
        assert self.dim != 1 or len(self.slices) == 1
        begins = [0, *accumulate(math.prod(s.shape) for s in slices)]
        for begin, end, piece in zip(begins, begins[1:], slices, strict=False):
            low, high = max(start, begin), min(start + out.numel(), end)
            if low < high:
                piece.read_into(out[low - start : high - start], low - begin)

    def check_copies(self) -> None:
        """Refuses parts that hold different numbers where each should hold the same."""
        for other in self.slices[1:] if self.dim is None else ():
            if not same_numbers(self.slices[0], other):
                raise CheckpointError(
                    f"{self.name}: every model parallel part holds it, and {self.slices[0]} and {other} hold different "
                    "numbers. Are the parts of one model?"
                )


def same_numbers(one: Slice | SourceTensor, other: Slice, *, rounded: bool = False) -> bool:
    """Whether two tensors of one shape hold the same numbers, up to 1e-8.

    Args:
        rounded: or up to what casts between float32, float16 and bfloat16 do to a number.
    """
    numel = math.prod(other.shape)
    for begin in range(0, numel, CHUNK_NUMBERS):
        a, b = (torch.empty(min(CHUNK_NUMBERS, numel - begin), dtype=t.dtype) for t in (one, other))
        one.read_into(a, begin)
        other.read_into(b, begin)
        if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        if not torch.allclose(a.double(), b.double(), equal_nan=True, **(_ROUNDING if rounded else _TOLERANCE)):
            return False
    return True


def main_dtype(tensors: Iterable[SourceTensor]) -> torch.dtype:
    """The floating dtype that most numbers are stored in (norms may be kept in float32 beside float16)."""
    numbers: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype is not None and tensor.dtype.is_floating_point:
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)

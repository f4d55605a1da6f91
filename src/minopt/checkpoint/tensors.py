"""A model's tensors as they lie in files: read, sliced, joined and cast when asked, and not before.

A ``SourceTensor`` is made of ``Run``s, one after another in row-major order: one file's, those of FSDP shards, or those
of model parallel parts that have some rows each. Parts that have some columns each are tensors side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minopt import int4, int8
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.keys import own_keys
from minopt.checkpoint.names import HF_HEAD
from minopt.memory import CHUNK_NUMBERS, empty
from minopt.progress import counted

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
class Share:
    """What one of ``count`` processes has of what all divide: heads, units and the vocabulary (arXiv 1909.08053)."""

    index: int
    count: int

    def of(self, size: int) -> tuple[int, int]:
        """This share of ``size`` rows or columns: the first, and the one after the last. Last shares may be shorter."""
        width = -(-size // self.count)
        return min(self.index * width, size), min((self.index + 1) * width, size)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a checkpoint.

    Attributes:
        name: the model's, or the file's as long as it has no other.
        shape: the whole tensor's.
        dtype: the stored one (for an int8 or int4 weight, that of the other tensors); ``None`` for one that no OPT
            has, such as int64.
        runs: the places of its numbers.
        beside: instead of runs, tensors that have some of its columns each.
        copies: the same tensor as other model parallel parts hold it.
        packed: instead of runs, int4 numbers, eight in an int32.
        scale: float32 ``[out, 1]``, where the runs are int8 and stand for their products with it; of int4 numbers
            ``[out, groups]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    runs: tuple[Run, ...] = ()
    beside: tuple[SourceTensor, ...] = ()
    copies: tuple[SourceTensor, ...] = ()
    packed: SourceTensor | None = None
    scale: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> SourceTensor:
        """The tensor as it lies in files: itself, its int8 numbers, or its packed ones."""
        if self.packed is not None:
            return self.packed
        return self if self.scale is None else replace(self, dtype=torch.int8, scale=None)

    @property
    def kind(self) -> str:
        """``"int4"``, or the dtype that its numbers are stored in."""
        return "int4" if self.packed is not None else str(self.stored.dtype).removeprefix("torch.")

    @property
    def place(self) -> tuple[Path, int, int] | None:
        """File, first byte and count of the numbers where they all lie in order, else ``None``."""
        begin = self.runs[0].file.begins_at(self.runs[0].key) if len(self.runs) == 1 else None
        if begin is None or self.dtype is None or self.scale is not None:
            return None
        run = self.runs[0]
        return run.file.path, begin + run.start * self.dtype.itemsize, run.stop - run.start

    def runs_of(self, start: int, stop: int) -> Iterator[Run]:
        """The places of numbers ``start`` to ``stop``."""
        begin = 0
        for run in self.runs:
            low, high = max(start - begin, 0), min(stop - begin, run.stop - run.start)
            if low < high:
                yield replace(run, start=run.start + low, stop=run.start + high)
            begin += run.stop - run.start

    def rows(self, start: int, stop: int) -> SourceTensor:
        """Some rows of it, as a tensor of their own."""
        width = math.prod(self.shape[1:])
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            runs=tuple(self.runs_of(start * width, stop * width)),
            beside=tuple(tensor.rows(start, stop) for tensor in self.beside),
            copies=tuple(tensor.rows(start, stop) for tensor in self.copies),
            packed=None if self.packed is None else self.packed.rows(start, stop),
            scale=None if self.scale is None else self.scale[start:stop],
        )

    def columns(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Some columns of it, read: pieces of all rows pass through memory, and nothing else does."""
        assert self.dtype is not None
        out = empty((self.shape[0], stop - start), dtype or self.dtype)
        self._read_columns(out, start)
        return out

    def map(self, apart: bool = False) -> Tensor | None:
        """The tensor in its file's pages, see ``TensorFile.map``; ``None`` if it has to be computed."""
        if len(self.runs) != 1 or self.copies or self.scale is not None:
            return None
        run = self.runs[0]
        tensor = run.file.map(run.key, apart=apart)
        return tensor if tensor.shape == self.shape else tensor.reshape(-1)[run.start : run.stop].view(self.shape)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, on the CPU, cast to a dtype while reading; ``None`` keeps the stored one."""
        assert self.dtype is not None
        out = empty(self.shape, dtype or self.dtype)
        self.fill(out)
        return out

    def read_int8(self) -> tuple[Tensor, Tensor]:
        """A weight as int8 ``[out, in]`` with its scale: as stored, or made of the stored numbers."""
        if self.scale is not None and self.packed is None:
            mapped = self.stored.map()
            return self.stored.read() if mapped is None else mapped.contiguous(), self.scale
        try:
            return int8.quantize(self.read())
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from None

    def read_int4(self, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A weight packed, with its scales in a dtype: as stored, or made of the stored numbers."""
        if self.packed is not None and self.scale is not None and self.scale.shape[1] * group == self.shape[1]:
            return self.packed.read(), self.scale.to(dtype)
        try:
            return int4.quantize(self.read(), group, dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from None

    def fill(self, out: Tensor) -> None:
        """Reads the tensor into one of its shape, contiguous and on the CPU, casting to its dtype."""
        if self.beside:
            self._read_columns(out, 0)
        else:
            self.read_into(out.view(-1))
        self.check_copies()

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """Fills ``out`` (one dim) with numbers from number ``start`` on, in row-major order, cast to its dtype."""
        if self.beside or self.scale is not None:
            self._read_by_rows(out, start)
            return
        filled = 0
        for run in self.runs_of(start, start + out.numel()):
            count = run.stop - run.start
            run.file.read_into(out[filled : filled + count], run.key, run.start)
            filled += count

    def _read_by_rows(self, out: Tensor, start: int) -> None:
        """``read_into`` of what is known by whole rows: takes what is wanted of some rows at a time."""
        width, stop = max(1, math.prod(self.shape[1:])), start + out.numel()
        last, step = -(-stop // width), max(1, CHUNK_NUMBERS // width)
        for row in range(start // width, last, step):
            numbers, first = self.rows(row, min(row + step, last))._computed(out.dtype), row * width
            low, high = max(start, first), min(stop, first + numbers.numel())
            out[low - start : high - start] = numbers.view(-1)[low - first : high - first]

    def _computed(self, dtype: torch.dtype) -> Tensor:
        """All numbers of one that has no runs of them, in a dtype or a more exact one."""
        if self.scale is None:
            return self.columns(0, self.shape[1], dtype)
        dequantize = int8.dequantize if self.packed is None else int4.dequantize
        return dequantize(self.stored.read(), self.scale)

    def _read_columns(self, out: Tensor, first: int) -> None:
        """Fills ``out``, as high as the tensor, with its columns from column ``first`` on, cast to its dtype."""
        begin = 0
        for piece in self.beside or (self,):
            height, width = piece.shape
            low, high = max(first, begin), min(first + out.shape[1], begin + width)
            step = max(1, CHUNK_NUMBERS // max(1, width))
            for row in range(0, height if low < high else 0, step):
                rows = empty((min(step, height - row), width), out.dtype)
                piece.read_into(rows.view(-1), row * width)
                out[row : row + len(rows), low - first : high - first] = rows[:, low - begin : high - begin]
            begin += width

    def check_copies(self) -> None:
        """Refuses parts that hold different numbers where each should hold the same."""
        for other in self.copies:
            if not same_numbers(self, other):
                raise CheckpointError(f"{self.name}: every model parallel part holds it, and {self} and {other} hold "
                                      "different numbers. Are the parts of one model?")  # fmt: skip

    def __str__(self) -> str:
        """The files of its own runs."""
        return ", ".join(dict.fromkeys(str(run.file.path) for run in self.runs))


class Contents(NamedTuple):
    """What the files of one checkpoint hold.

    Attributes:
        tensors: by minopt's names.
        heads: the stored head of each part, if it has one.
        told: what they say of the model beside their tensors, as fields of a configuration.
    """

    tensors: dict[str, SourceTensor]
    heads: tuple[SourceTensor | None, ...] = ()
    told: Mapping[str, Any] = {}


def stored_tensor(file: TensorFile, key: str) -> SourceTensor:
    """A tensor of a file as it is."""
    shape = file.shapes[key]
    return SourceTensor(key, shape, file.dtypes[key], (Run(file, key, 0, math.prod(shape)),))


def own_tensors(
    stored: Mapping[str, SourceTensor], names_of: Callable[[str], tuple[str, ...]], ignore: Sequence[str],
    where: object, *, say: bool = True,
) -> dict[str, SourceTensor]:  # fmt: skip
    """The tensors of a checkpoint, or of one part of it, by minopt's names; fused projections are taken apart.

    ``names_of`` gives the names of what a key holds, see ``from_metaseq``; for all else see ``own_keys``.
    """
    named: dict[str, SourceTensor] = {}
    key_of: dict[str, str] = {}
    twice: list[str] = []
    for key, plain in own_keys(stored, ignore, where, say=say).items():
        names, whole = names_of(plain), stored[key]
        count = len(names)
        if count > 1 and (not whole.shape or whole.shape[0] % count):
            raise CheckpointError(f"{where}: {key} holds {count} tensors, so its first dim must be divisible by "
                                  f"{count}; its shape is {list(whole.shape)}.")  # fmt: skip
        for i, name in enumerate(names):
            twice += [f"{key_of[name]} and {key}"] if name in named else []
            share = whole.rows(*Share(i, count).of(whole.shape[0])) if count > 1 else whole
            named[name], key_of[name] = replace(share, name=name), key
    if twice:
        raise CheckpointError(f"{where}: {counted(len(twice), 'tensor')} stored twice ({some(twice)}). Keep one of "
                              "each.")  # fmt: skip
    if "embed_tokens.weight" not in named and HF_HEAD in named:  # tied, written once under the head's name
        named["embed_tokens.weight"] = replace(named.pop(HF_HEAD), name="embed_tokens.weight")
    return named


def same_numbers(one: SourceTensor, other: SourceTensor, *, rounded: bool = False) -> bool:
    """Whether two tensors of one shape hold the same numbers, up to 1e-8, or to the rounding of casts."""
    for begin in range(0, other.numel, CHUNK_NUMBERS):
        a, b = (torch.empty(min(CHUNK_NUMBERS, other.numel - begin), dtype=t.dtype) for t in (one, other))
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

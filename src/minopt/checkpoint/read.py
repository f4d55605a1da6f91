"""Reads tensors out of files, whole or in part, into memory of their own or mapped. Nothing in a file is executed."""

from __future__ import annotations

import json
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from minopt.checkpoint.container import open_container
from minopt.checkpoint.errors import CheckpointError, first_line, some
from minopt.checkpoint.names import is_decoders
from minopt.checkpoint.unpickle import NOT_TEXT, OtherNumbersError, Placeholder, StoredTensor, UnpickleError
from minopt.config import MOST_TEXT_BYTES
from minopt.files import what_it_is

_NUMBERS_IN_CACHE = 2**20
_PIECE_BYTES = 64_000_000

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


class TensorFile:
    """The tensors of one file; opening reads their names and shapes only.

    Attributes:
        path: the file.
        shapes: by key.
        dtypes: by key; ``None`` for one that no OPT has (integers but int8).
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]

    def _identify(self) -> None:
        """Remembers which file it is, wherever the process goes and whatever takes the file's place."""
        self._where, stat = self.path.absolute(), self.path.stat()
        self._identity = stat.st_dev, stat.st_ino

    def _open(self) -> Any:
        """The file as it was when its names were read.

        Raises:
            CheckpointError: if there is another one in its place now, or none.
        """
        try:
            file = self._where.open("rb", buffering=0)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: is gone since it was opened. Load the model anew.") from None
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino) != self._identity:
            file.close()
            raise CheckpointError(f"{self.path}: was replaced since it was opened. Load the model anew.")
        return file

    def begins_at(self, key: str) -> int | None:
        """The byte of the file at which a tensor begins, ``None`` where its numbers do not lie in order."""
        raise NotImplementedError

    def map(self, key: str) -> Tensor:
        """A tensor in the file's own pages: nothing is read until it is used."""
        raise NotImplementedError

    def read_into(self, out: Tensor, key: str, start: int = 0) -> None:
        """Fills ``out`` with numbers of a tensor, cast to its dtype.

        Args:
            out: one dim, contiguous, on the CPU.
            key: one of ``shapes``.
            start: the first number to read, counted in row-major order.

        Raises:
            CheckpointError: if the file has become shorter.
        """
        stored, begin = self.dtypes[key], self.begins_at(key)
        assert stored is not None
        if begin is None:
            out.copy_(self.map(key).reshape(-1)[start : start + out.numel()])
            return
        begin += start * stored.itemsize
        with self._open() as file:
            if stored == out.dtype or begin % stored.itemsize:
                file.seek(begin)
                numbers = out if stored == out.dtype else torch.empty(out.numel(), dtype=stored)
                self._fill(file, numbers)
                if numbers is not out:
                    out.copy_(numbers)
                return
            # Cast from the file's pages: a mapping of a piece at a time, whose pages go with it.
            # Between the two formats of 16 bits by way of float32: torch casts them directly at half the speed.
            direct = stored.itemsize != 2 or out.dtype.itemsize != 2
            step = _PIECE_BYTES // stored.itemsize if direct else _NUMBERS_IN_CACHE
            for first in range(0, out.numel(), step):
                piece = out[first : first + step]
                numbers = self._mapped(file, begin + first * stored.itemsize, piece.numel(), stored)
                piece.copy_(numbers if direct else numbers.float())

    def map_apart(self, key: str, start: int, count: int) -> Tensor | None:
        """Some numbers of a tensor in pages of their own, which go with it; ``None`` where they cannot be mapped.

        Each holds an open file: for what is soon let go.
        """
        stored, begin = self.dtypes[key], self.begins_at(key)
        if stored is None or begin is None or begin % stored.itemsize or count == 0:
            return None
        with self._open() as file:
            return self._mapped(file, begin + start * stored.itemsize, count, stored)

    def _mapped(self, file: Any, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """Numbers from a byte on, which is a multiple of their size."""
        if begin + count * dtype.itemsize > os.fstat(file.fileno()).st_size:
            raise CheckpointError(self._cut_short)
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - page + count * dtype.itemsize
        pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin - page)

    @property
    def _cut_short(self) -> str:
        return f"{self.path}: ends in the middle of its tensors. Fetch the file again."

    def _fill(self, file: Any, out: Tensor) -> None:
        numbers: Any = out.view(torch.uint8).numpy()
        view = memoryview(numbers)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise CheckpointError(self._cut_short)
            view = view[count:]


class SafetensorsFile(TensorFile):
    """A .safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._identify()
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if MOST_TEXT_BYTES < header_bytes < path.stat().st_size:  # beyond its end it is said to be cut short
                    raise ValueError(f"its header has {header_bytes:,} bytes, at most {MOST_TEXT_BYTES:,} are expected")
                self._handle: Any = safetensors.safe_open(path, framework="pt")  # checks the header
                header = json.loads(file.read(header_bytes))
            handle: Any = self._handle
            slices: dict[str, Any] = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, "safetensors", error) from None
        self.shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        self.dtypes = {key: DTYPES.get(s.get_dtype()) for key, s in slices.items()}
        self._begin = {key: 8 + header_bytes + header[key]["data_offsets"][0] for key in self.shapes}

    def begins_at(self, key: str) -> int | None:
        return self._begin[key]

    def map(self, key: str) -> Tensor:
        return self._handle.get_tensor(key)


class TorchFile(TensorFile):
    """A file by ``torch.save``, of either of its containers.

    Attributes:
        wrapped: whether the tensors lay in ``content["model"]``, as metaseq writes them.
        content: all else that such a file holds, by key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identify()
        try:
            content, self._begin = open_container(path)
            tensors = _state_dict(content, path)
            _check_overlaps(tensors)
        except (FileNotFoundError, PermissionError):
            raise
        except (UnpickleError, OSError) as error:
            raise _unreadable(path, "a checkpoint", error) from None
        self.content: dict[str, Any] = {}
        self.wrapped = isinstance(content, dict) and tensors is content.get("model")
        if self.wrapped:
            self.content = {key: value for key, value in content.items() if key != "model"}
        strange = [f"{str(key)[:80]}: {_kind(t)}" for key, t in tensors.items()
                   if key.endswith(NOT_TEXT) or not isinstance(t, StoredTensor)]  # fmt: skip
        if strange or not tensors:
            found = some(strange) or _kind(content)
            raise CheckpointError(
                f"{path}: expected a dict from names to ordinary tensors, got {found}. Is it a state dict? What a file "
                "holds beside tensors is not loaded and never run."
            )
        self._tensors: dict[str, StoredTensor] = tensors
        self._mapping: mmap.mmap | None = None
        self.shapes = {key: tensor.shape for key, tensor in tensors.items()}
        self.dtypes = {
            key: t.storage.dtype if t.storage.dtype in DTYPES.values() else None for key, t in tensors.items()
        }

    def begins_at(self, key: str) -> int | None:
        tensor = self._tensors[key]
        if not tensor.is_contiguous:
            return None
        return self._begin[tensor.storage.key] + tensor.offset * tensor.storage.dtype.itemsize

    def map(self, key: str) -> Tensor:
        tensor, dtype = self._tensors[key], self._tensors[key].storage.dtype
        if tensor.numel == 0:
            return torch.empty(tensor.shape, dtype=dtype)
        begin = self._begin[tensor.storage.key] + tensor.offset * dtype.itemsize
        if begin % dtype.itemsize:  # as old containers may have it; processors want numbers aligned
            span = torch.empty(tensor.end - tensor.offset, dtype=dtype)
            with self._open() as file:
                file.seek(begin)
                self._fill(file, span)
        else:
            if self._mapping is None:
                with self._open() as file:  # a private mapping: what is written to it stays in memory
                    self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if begin + (tensor.end - tensor.offset) * dtype.itemsize > len(self._mapping):
                raise CheckpointError(self._cut_short)
            span = torch.frombuffer(self._mapping, dtype=dtype, count=tensor.end - tensor.offset, offset=begin)
        return span.as_strided(tensor.shape, tensor.stride)


def _unreadable(path: Path, wanted: str, error: Exception) -> CheckpointError:
    if (what := what_it_is(path)) is not None:
        return CheckpointError(f"{path}: expected {wanted}, got {what}")
    if isinstance(error, OtherNumbersError):
        return CheckpointError(f"{path}: expected tensors of {', '.join(DTYPES)}, got {error}. Cast them first.")
    return CheckpointError(f"{path}: cut short or not {wanted} ({first_line(error)}). Fetch the file again.")


def _kind(value: object) -> str:
    """What a value of a pickle is, in a word: the class that a placeholder stands for."""
    if isinstance(value, Placeholder):
        return value.name[:80]
    return "nothing" if value == {} else type(value).__name__


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """The one dict of a model's tensors in what a file holds: all of it, or a part, as in training's checkpoints.

    Raises:
        CheckpointError: if there are several.
    """
    if not isinstance(content, dict):
        return {}
    places, seen, found = [("", content)], {id(content)}, {}
    for place, values in places:  # grows: a dict's own dicts are looked at after it
        if any(isinstance(t, StoredTensor) and is_decoders(key) for key, t in values.items()):
            found[place] = values
            continue
        inner = {id(v): (f"{place[:200]}.{k}", v) for k, v in values.items() if isinstance(v, dict)}
        places += [inner[number] for number in inner if number not in seen]  # one may hold itself
        seen |= inner.keys()
    if len(found) > 1:
        names = some([place.removeprefix(".") for place in found])
        raise CheckpointError(f"{path}: expected one model's tensors, got {len(found)} dicts of them ({names}). "
                              "Save the one that you want as a file of its own.")  # fmt: skip
    model = content.get("model")
    return next(iter(found.values()), model if isinstance(model, dict) else content)


def _check_overlaps(tensors: dict[str, Any]) -> None:
    """Two names for one tensor are fine (a tied head); two tensors that share some of their numbers are not."""
    spans: dict[str, set[tuple[int, int]]] = {}
    for tensor in tensors.values():
        if isinstance(tensor, StoredTensor) and tensor.numel:
            spans.setdefault(tensor.storage.key, set()).add((tensor.offset, tensor.end))
    for ranges in spans.values():
        ordered = sorted(ranges)
        if any(end > begin for (_, end), (begin, _) in pairwise(ordered)):
            raise UnpickleError("two of its tensors overlap")

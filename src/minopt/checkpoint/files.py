"""Tensors of any weight file: mapped, or read in slices. Opening reads names and shapes, and runs nothing."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from minopt.checkpoint.errors import CheckpointError, first_line, some
from minopt.checkpoint.keys import is_decoders
from minopt.checkpoint.pickles import OtherDtypeError, Placeholder, Storage, StoredTensor, UnpickleError, read_torch
from minopt.config import MOST_TEXT_BYTES
from minopt.strangers import what_it_is

_NUMBERS_IN_CACHE = 2**20
_PIECE_BYTES = 64_000_000

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
          "I32": torch.int32}  # fmt: skip


class TensorFile:
    """The tensors of one file. Their names and shapes are read when it is opened, their numbers when asked for.

    Attributes:
        path: the file.
        shapes: the tensors' shapes by key.
        dtypes: their dtypes by key; ``None`` for one that no OPT has (integers but int8, and int32 of packed int4).
        is_wrapped: whether the tensors lie in a dict under "model", as metaseq writes them.
        content: if so, all that the file holds, by key.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, StoredTensor], content: Mapping[Any, Any] | None = None
    ) -> None:
        self.path, self._tensors = path, tensors
        self.is_wrapped, self.content = content is not None, content or {}
        self.shapes = {key: tensor.shape for key, tensor in tensors.items()}
        self.dtypes = {key: t.dtype if t.dtype in DTYPES.values() else None for key, t in tensors.items()}
        self._where, stat = path.absolute(), path.stat()
        self._identity = stat.st_dev, stat.st_ino
        self._mapping: mmap.mmap | None = None

    def begins_at(self, key: str) -> int | None:
        """The byte of the file at which a tensor begins, ``None`` if its numbers do not lie in order."""
        tensor = self._tensors[key]
        return tensor.begin if tensor.is_contiguous else None

    def map(self, key: str, *, apart: bool = False) -> Tensor:
        """A tensor in the file's own pages: nothing is read until it is used. Writing to it leaves the file alone.

        ``apart``: in pages that are freed with it. Such a tensor holds an open file.
        """
        tensor = self._tensors[key]
        if apart or tensor.span == 0 or tensor.begin % tensor.dtype.itemsize:
            with self._open() as file:
                numbers = self._pages(file, tensor.begin, tensor.span, tensor.dtype)
        else:
            if self._mapping is None:
                with self._open() as file:
                    self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if tensor.begin + tensor.span * tensor.dtype.itemsize > len(self._mapping):
                raise CheckpointError(self._cut_short)
            numbers = torch.frombuffer(self._mapping, dtype=tensor.dtype, count=tensor.span, offset=tensor.begin)
        return numbers.as_strided(tensor.shape, tensor.stride)

    def read_into(self, out: Tensor, key: str, start: int = 0) -> None:
        """Fills ``out`` (one dim, on the CPU) with numbers from number ``start`` on, cast to its dtype."""
        stored, begin = self.dtypes[key], self.begins_at(key)
        assert stored is not None
        if begin is None:
            out.copy_(self.map(key).reshape(-1)[start : start + out.numel()])
            return
        begin += start * stored.itemsize
        with self._open() as file:
            if stored == out.dtype:
                self._fill(file, begin, out)
                return
            # Cast from the file's pages: a mapping of a piece at a time, whose pages go with it.
            # Between the two formats of 16 bits by way of float32: torch casts them directly at half the speed.
            direct = stored.itemsize != 2 or out.dtype.itemsize != 2
            step = _PIECE_BYTES // stored.itemsize if direct else _NUMBERS_IN_CACHE
            for first in range(0, out.numel(), step):
                piece = out[first : first + step]
                numbers = self._pages(file, begin + first * stored.itemsize, piece.numel(), stored)
                piece.copy_(numbers if direct else numbers.float())

    def _open(self) -> Any:
        """The file as it was when its names were read, wherever the process has gone since."""
        try:
            file = self._where.open("rb", buffering=0)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: is gone since it was opened. Load the model anew.") from None
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino) != self._identity:
            file.close()
            raise CheckpointError(f"{self.path}: was replaced since it was opened. Load the model anew.")
        return file

    def _pages(self, file: Any, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """Numbers from a byte on, in a mapping of their own."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - page + count * dtype.itemsize
        if page + length > os.fstat(file.fileno()).st_size:
            raise CheckpointError(self._cut_short)
        pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        if begin % dtype.itemsize == 0:
            return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin - page)
        numbers = torch.frombuffer(pages, dtype=torch.uint8, count=count * dtype.itemsize, offset=begin - page)
        return numbers.clone().view(dtype)  # processors want numbers aligned

    def _fill(self, file: Any, begin: int, out: Tensor) -> None:
        file.seek(begin)
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(view):
            count = file.readinto(view)
            if not count:
                raise CheckpointError(self._cut_short)
            view = view[count:]

    @property
    def _cut_short(self) -> str:
        return f"{self.path}: ends in the middle of its tensors. Fetch the file again."


def open_file(path: Path) -> TensorFile:
    """Opens a .safetensors file, or one of ``torch.save``; ``CheckpointError`` if it is damaged or something else."""
    is_safetensors = path.suffix == ".safetensors"
    wanted = "safetensors" if is_safetensors else "a checkpoint"
    try:
        content = _read_safetensors(path) if is_safetensors else read_torch(path)
    except (FileNotFoundError, PermissionError):
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if (what := what_it_is(path)) is not None:
            raise CheckpointError(f"{path}: expected {wanted}, got {what}") from None
        if isinstance(error, OtherDtypeError):
            dtypes = ", ".join(DTYPES)
            raise CheckpointError(f"{path}: expected tensors of {dtypes}, got {error}. Cast them first.") from None
        raise CheckpointError(f"{path}: cut short or not {wanted} ({first_line(error)}). Fetch the file again."
                              ) from None  # fmt: skip
    if is_safetensors:
        return TensorFile(path, content)
    tensors = _state_dict(content, path)
    strange = [
        f"{key[:80] if isinstance(key, str) else f'({_kind(key)} as a key)'}: {_kind(tensor)}"
        for key, tensor in tensors.items()
        if not (isinstance(key, str) and isinstance(tensor, StoredTensor))
    ]
    if strange or not tensors:
        raise CheckpointError(
            f"{path}: expected a dict from names to ordinary tensors, got {some(strange) or _kind(content)}. Is it a "
            "state dict? What a file holds beside tensors is not loaded and never run."
        )
    is_wrapped = isinstance(content, dict) and tensors is content.get("model")
    return TensorFile(path, tensors, content if is_wrapped else None)


def open_pieces(path: Path, places: Mapping[str, tuple[int, int]]) -> TensorFile:
    """Opens a file of several archives by ``torch.save`` of one tensor each, as torch.distributed.checkpoint has it.

    ``places``: the first byte of each archive and its length, by the key of its tensor.
    """
    tensors = {}
    for key, (start, length) in places.items():
        try:
            tensor = read_torch(path, start, length)
        except (UnpickleError, ValueError) as error:
            raise CheckpointError(f"{path}: cut short or damaged at {key} ({error}). Use another checkpoint.") from None
        if not isinstance(tensor, StoredTensor) or not tensor.is_contiguous:
            raise CheckpointError(f"{path}: expected an ordinary tensor at {key}, got another kind.")
        tensors[key] = tensor
    return TensorFile(path, tensors)


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if MOST_TEXT_BYTES < header_bytes < path.stat().st_size:  # beyond its end it is said to be cut short
            raise ValueError(f"its header has {header_bytes:,} bytes, at most {MOST_TEXT_BYTES:,} are expected")
        with safetensors.safe_open(path, framework="pt"):  # checks the header
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"], torch.uint8)
        storage = Storage(key, dtype, (end - begin) // dtype.itemsize, 8 + header_bytes + begin)
        tensors[key] = StoredTensor(storage, 0, shape, torch.empty(shape, device="meta").stride())
    return tensors


def _kind(value: object) -> str:
    """The kind of a value of a pickle, in a word: the class that a placeholder stands for."""
    if isinstance(value, Placeholder):
        return value.name[:80]
    return "nothing" if value == {} else type(value).__name__


def _state_dict(content: Any, path: Path) -> dict[Any, Any]:
    """The one dict of a model's tensors in what a file holds: all of it, or a part, as in training's checkpoints."""
    if not isinstance(content, dict):
        return {}
    places, seen, found = [("", content)], {id(content)}, {}
    for place, values in places:  # grows: a dict's own dicts are looked at after it
        if any(isinstance(t, StoredTensor) and isinstance(key, str) and is_decoders(key) for key, t in values.items()):
            found[place] = values
            continue
        inner = {id(v): (f"{place[:200]}.{k}", v) for k, v in values.items() if isinstance(v, dict)}
        places += [inner[number] for number in inner if number not in seen]  # one may hold itself
        seen |= inner.keys()
    if len(found) > 1:
        names = some([place.removeprefix(".") for place in found])
        raise CheckpointError(f"{path}: expected one model's tensors, got {len(found)} dicts of them ({names}). "
                              "Save the one that you want in a separate file.")  # fmt: skip
    model = content.get("model")
    return next(iter(found.values()), model if isinstance(model, dict) else content)

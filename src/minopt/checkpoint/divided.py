"""Checkpoints of torch.distributed.checkpoint, as training writes them: tensors in pieces, one file a process.

A ``.metadata``, which is a pickle and here is read as data, says of each piece where in which file it lies.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt.checkpoint.container import open_piece
from minopt.checkpoint.errors import CheckpointError, MissingFileError
from minopt.checkpoint.pieces import Run, Slice
from minopt.checkpoint.read import TensorFile
from minopt.checkpoint.unpickle import Placeholder, StoredTensor, UnpickleError, read_pickle
from minopt.config import is_int

METADATA = ".metadata"

_MOST_BYTES = 256_000_000  # of the metadata; that of 175B, with its optimizer, takes some megabytes

_OTHERS = ("optimizer.", "optim.")  # what training keeps beside the model


_Piece = tuple[tuple[int, ...], str, int, int]  # where it begins in the tensor; its file, and where it lies there


class PieceFile(TensorFile):
    """A file of one tensor: a run of bytes of a larger file, into which ``torch.save`` wrote it."""

    def __init__(self, path: Path, key: str, start: int, length: int) -> None:
        self.path = path
        self._identify()
        try:
            tensor, begin = open_piece(path, start, length)
        except UnpickleError as error:
            raise CheckpointError(f"{path}: cut short or damaged at {key} ({error}). Use another checkpoint.") from None
        if not isinstance(tensor, StoredTensor) or not tensor.is_contiguous:
            raise CheckpointError(f"{path}: expected an ordinary tensor at {key}, got another kind.")
        dtype = tensor.storage.dtype
        self.shapes = {key: tensor.shape}
        self.dtypes = {key: dtype if dtype.is_floating_point or dtype == torch.int8 else None}
        self._begin = begin[tensor.storage.key] + tensor.offset * tensor.storage.dtype.itemsize

    def begins_at(self, key: str) -> int | None:
        return self._begin

    def map(self, key: str) -> Tensor:
        count = math.prod(self.shapes[key])
        numbers = self.map_apart(key, 0, count)
        if numbers is None:  # its first byte lies at no multiple of its numbers' size
            numbers = torch.empty(count, dtype=self.dtypes[key])
            self.read_into(numbers, key)
        return numbers.view(self.shapes[key])


def open_divided(folder: Path) -> dict[str, Slice]:
    """The model's tensors in a checkpoint, by their keys; no numbers are read.

    Raises:
        MissingFileError: naming a file that is not there.
        CheckpointError: if the files are damaged, or tensors are divided otherwise than by rows.
    """
    path = folder / METADATA
    pairs: list[tuple[Placeholder, Any]] = []
    pieces: dict[str, list[_Piece]] = {}
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UnpickleError("it is too large")
        with path.open("rb") as file:
            sizes = read_pickle(file, pairs=pairs).state["state_dict_metadata"]
        for index, place in pairs:
            key, state = index.state["fqn"], place.state
            offset, start, length = index.state.get("offset") or (), state["offset"], state["length"]
            are_places = all(is_int(n) and 0 <= n < 2**48 for n in (*offset, start, length))
            if not are_places or state.get("transform_descriptors"):
                raise UnpickleError(f"a place that is none, of {str(key)[:80]}")
            if not str(key).startswith(_OTHERS) and "size" in (sizes[key].state or {}):
                pieces.setdefault(str(key), []).append((offset, state["relative_path"], start, length))
        front = "model." if all(key.startswith("model.") for key in pieces) else ""  # beside which training has others
        return {
            key.removeprefix(front): _joined(folder, key, tuple(sizes[key].state["size"]), own)
            for key, own in sorted(pieces.items())
        }
    except (UnpickleError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cut short or no checkpoint's ({error}). Use another checkpoint.") from None


def _joined(folder: Path, key: str, shape: tuple[int, ...], pieces: list[_Piece]) -> Slice:
    """A tensor from its pieces, which follow one another along dim 0."""
    runs: list[Run] = []
    rows, dtype = 0, None
    for offset, name, start, length in sorted(pieces):
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / METADATA}: files must lie in the folder itself, got {str(name)[:80]}.")
        if not (folder / name).is_file():
            raise MissingFileError(
                f"{folder / name}: expected this file of the checkpoint, found none. Fetch it again."
            )
        file = PieceFile(folder / name, key, start, length)
        own, dtype = file.shapes[key], dtype or file.dtypes[key]
        if own[1:] != shape[1:] or (offset or (0,)) != (rows, *(0 for _ in shape[1:])) or file.dtypes[key] != dtype:
            raise CheckpointError(f"{folder}: {key}: expected pieces that follow one another by rows, got one of shape "
                                  f"{list(own)} at {list(offset)} of {list(shape)}.")  # fmt: skip
        rows += own[0] if own else 1
        runs.append(Run(file, key, 0, math.prod(own)))
    if rows != (shape[0] if shape else 1):
        raise CheckpointError(f"{folder}: {key}: expected {shape[0]} rows, got {rows}. Is a process' file missing?")
    return Slice(shape, dtype, tuple(runs))

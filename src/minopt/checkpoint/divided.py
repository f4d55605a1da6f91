"""Checkpoints of torch.distributed.checkpoint, as training writes them: tensors in pieces, one file a process.

The file ``.metadata``, a pickle that is read as data here, says in which file each piece lies, and where.
"""

from __future__ import annotations

import math
from pathlib import Path

from minopt.checkpoint.errors import CheckpointError, MissingFileError
from minopt.checkpoint.files import TensorFile, open_pieces
from minopt.checkpoint.pickles import UnpickleError, read_pickle
from minopt.checkpoint.tensors import Run, SourceTensor
from minopt.config import is_int

METADATA = ".metadata"

_OTHERS = ("optimizer.", "optim.")  # what training keeps beside the model

_Piece = tuple[tuple[int, ...], str, int, int]  # its beginning in the tensor; file, first byte there, and length


def open_divided(folder: Path) -> dict[str, SourceTensor]:
    """The model's tensors in a checkpoint, by their keys; no numbers are read."""
    path = folder / METADATA
    try:
        shapes, pieces = _read_metadata(path)
    except (UnpickleError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: cut short or no checkpoint's ({error}). Use another checkpoint.") from None
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for key, own in pieces.items():
        for _, name, start, length in own:
            places.setdefault(name, {})[key] = (start, length)
    for name in places:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: files must lie in the folder itself, got {name[:80]}.")
        if not (folder / name).is_file():
            raise MissingFileError(
                f"{folder / name}: expected this file of the checkpoint, found none. Fetch it again."
            )
    files = {name: open_pieces(folder / name, own) for name, own in places.items()}
    front = "model." if all(key.startswith("model.") for key in pieces) else ""  # beside which training has others
    return {
        key.removeprefix(front): _joined(folder, key, shapes[key], sorted(own), files)
        for key, own in sorted(pieces.items())
    }


def _read_metadata(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Piece]]]:
    """The shape of each of the model's tensors, and its pieces."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[_Piece]] = {}
    with path.open("rb") as file:
        metadata = read_pickle(file)[0].state
    for index, place in metadata["storage_data"].items():
        key, offset = index.state["fqn"], tuple(index.state.get("offset") or ())
        name, start, length = (place.state[field] for field in ("relative_path", "offset", "length"))
        are_sizes = all(is_int(n) and 0 <= n < 2**48 for n in (*offset, start, length))
        if not are_sizes or place.state.get("transform_descriptors"):
            raise UnpickleError(f"a place that is none, of {str(key)[:80]}")
        about = metadata["state_dict_metadata"][key].state or {}
        if not key.startswith(_OTHERS) and "size" in about:
            shapes[key] = tuple(about["size"])
            pieces.setdefault(key, []).append((offset, str(name), start, length))
    return shapes, pieces


def _joined(
    folder: Path, key: str, shape: tuple[int, ...], pieces: list[_Piece], files: dict[str, TensorFile]
) -> SourceTensor:
    """A tensor from its pieces, which must follow one another along dim 0, each in a file of its own."""
    rows, dtype = 0, files[pieces[0][1]].dtypes[key]
    for offset, name, _, _ in pieces:
        own = files[name].shapes[key]
        is_next = own[1:] == shape[1:] and (offset or (0,)) == (rows, *(0 for _ in shape[1:]))
        if not is_next or files[name].dtypes[key] != dtype or len({piece[1] for piece in pieces}) < len(pieces):
            raise CheckpointError(f"{folder}: {key}: expected pieces that follow one another by rows, got one of shape "
                                  f"{list(own)} at {list(offset)} of {list(shape)}.")  # fmt: skip
        rows += own[0] if own else 1
    if rows != (shape[0] if shape else 1):
        raise CheckpointError(f"{folder}: {key}: expected {shape[0]} rows, got {rows}. Is a process' file missing?")
    runs = [Run(files[name], key, 0, math.prod(files[name].shapes[key])) for _, name, _, _ in pieces]
    return SourceTensor(key, shape, dtype, tuple(runs))

"""Finds the weight files of a Hugging Face folder and reads tensors out of them, one at a time.

Nothing in a file is executed: safetensors holds plain data, and pickles go through torch's ``weights_only`` loader.
"""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from minopt.config import read_json

# Every name that weights have: what is downloaded, and what a save replaces.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

# In the order of preference where a folder holds several.
LAYOUTS = (*SAFETENSORS[:2], *PICKLES[:2])

# Pages that were read stay in memory as long as their mapping, so that is renewed after so much was copied out of it.
_REMAP_BYTES = 64_000_000

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: the message names the file, what was expected and what to do."""


class SafetensorsFile:
    """The tensors of a .safetensors file, memory-mapped; opening reads its header only.

    Attributes:
        shapes: by key.
        dtypes: by key; ``None`` for one that no OPT has (integers).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = self._open()
        self._bytes_read = 0
        slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118 (no mapping)
        self.shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        self.dtypes = {key: _DTYPES.get(s.get_dtype()) for key, s in slices.items()}

    def _open(self) -> Any:
        try:
            return safetensors.safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: cut short or not safetensors ({error}). Fetch the file again."
            ) from None

    def read(self, key: str, *, keep: bool) -> Tensor:
        """One tensor on the CPU, in the file's own pages.

        Args:
            key: one of ``shapes``.
            keep: True for a tensor that stays: nothing is read until it is used. False for one that is copied and
                dropped at once: the memory it took goes with it, or soon after.
        """
        if not keep and self._bytes_read > _REMAP_BYTES:
            self._handle = None
            self._handle = self._open()
            self._bytes_read = 0
        tensor = self._handle.get_tensor(key)
        self._bytes_read += tensor.nbytes
        return tensor


class PickleFile:
    """The tensors of a pytorch_model.bin, as ``SafetensorsFile`` has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._is_zip = file.read(2) == b"PK"  # files from before torch 1.6 are not, and cannot be mapped
        self._tensors = self._load()
        self._bytes_read = 0
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in self._tensors.items()}

    def _load(self) -> dict[str, Tensor]:
        try:
            content = torch.load(self.path, map_location="cpu", mmap=self._is_zip, weights_only=True)
        except pickle.UnpicklingError as error:
            lines = (line.strip() for line in str(error).splitlines())
            reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), "")
            raise CheckpointError(
                f"{self.path}: the pickle holds more than tensors, and loading it could run code, so it was not "
                f"loaded. {reason} Use a safetensors file, or save the tensors alone."
            ) from None
        except Exception as error:  # a damaged pickle fails in whatever way its bytes happen to spell
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.path}: cut short or not a torch file ({reason}). Fetch it again.") from None
        if not isinstance(content, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in content.items()):
            raise CheckpointError(
                f"{self.path}: expected a dict from names to ordinary tensors, got something else. Is it a state dict?"
            )
        return content

    def read(self, key: str, *, keep: bool) -> Tensor:
        """One tensor on the CPU, as ``SafetensorsFile.read`` gives it."""
        if not keep and self._is_zip and self._bytes_read > _REMAP_BYTES:
            self._tensors = {}
            self._tensors = self._load()
            self._bytes_read = 0
        tensor = self._tensors[key]
        self._bytes_read += tensor.nbytes
        return tensor


class WeightFiles:
    """All the tensors of a folder's checkpoint.

    Attributes:
        shapes, dtypes: by key, of all files together.

    Raises:
        FileNotFoundError: if the folder holds no layout that is known, or a file of it is missing.
        CheckpointError: if a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.files = [_open_file(path) for path in find_weight_files(folder)]
        counts = Counter(key for file in self.files for key in file.shapes)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise CheckpointError(f"{folder}: stored in several of its files: {some(twice)}. Fetch the files again.")
        self.shapes = {key: shape for file in self.files for key, shape in file.shapes.items()}
        self.dtypes = {key: dtype for file in self.files for key, dtype in file.dtypes.items()}
        self._file_of = {key: file for file in self.files for key in file.shapes}

    def read(self, key: str, *, keep: bool) -> Tensor:
        """One tensor on the CPU; see ``SafetensorsFile.read``."""
        return self._file_of[key].read(key, keep=keep)

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating dtype that most numbers are stored in (norms may be kept in float32 beside float16)."""
        numbers: dict[torch.dtype, int] = {}
        for key, dtype in self.dtypes.items():
            if dtype is not None and dtype.is_floating_point:
                numbers[dtype] = numbers.get(dtype, 0) + torch.Size(self.shapes[key]).numel()
        return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)


def find_weight_files(folder: Path) -> list[Path]:
    """The files of the first of ``LAYOUTS`` that ``folder`` holds, all present.

    Raises:
        FileNotFoundError: if there is none, or some shards of it are missing; up to five are named.
        CheckpointError: if the index is not one, or names files outside of the folder.
    """
    layout = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder}: expected weights ({', '.join(LAYOUTS)}), found {some(found) or 'nothing'}. "
            "Is this a model's folder, and did its download finish?"
        )
    if not layout.endswith(".index.json"):
        return [folder / layout]
    names = _shard_names(folder / layout)
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{folder / layout}: shards must lie in the folder itself, got {some(outside)}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the {len(names)} files in {layout} are missing: {some(missing)}. "
            "Fetch them again."
        )
    return [folder / name for name in names]


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected a weight_map from keys to files. Fetch it again.")
    return sorted({str(name) for name in weight_map.values()})


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor that holds its numbers, one by one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_nested or value.is_quantized)
    )


def _open_file(path: Path) -> SafetensorsFile | PickleFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def some(names: list[str], most: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

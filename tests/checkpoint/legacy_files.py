"""Writes torch's container from before 1.6, byte for byte the same each time.

``torch.save`` names storages by their addresses in memory and orders them by these names, so that no two files of its
are alike; here they are counted. The rest is as in torch/serialization.py, ``_legacy_save``.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_SYSTEM = {"protocol_version": _VERSION, "little_endian": sys.byteorder == "little",
           "type_sizes": {"short": 2, "int": 4, "long": 4}}  # fmt: skip


class _Pickler(pickle.Pickler):
    """Leaves the numbers out, and remembers the storages that they are in, by address."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, tuple[str, Any]] = {}

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, torch.storage.TypedStorage):
            return None
        count = len(self.storages)
        key, _ = self.storages.setdefault(thing._data_ptr(), (str(94_000_000_000_000 + 64 * count), thing))
        return "storage", getattr(torch, thing._pickle_storage_type()), key, "cpu", thing._size(), None


def save_legacy(content: Any, path: Path) -> None:
    """Writes an object with its tensors, which are on the CPU and not empty."""
    with path.open("wb") as file:
        for value in (_MAGIC, _VERSION, _SYSTEM):
            pickle.dump(value, file, protocol=2)
        pickler = _Pickler(file)
        pickler.dump(content)
        pickle.dump([key for key, _ in pickler.storages.values()], file, protocol=2)
        for _, storage in pickler.storages.values():
            file.write(storage._size().to_bytes(8, "little"))
            file.write(bytes(storage._untyped_storage))

"""The same weights in every kind of checkpoint, and what transformers says that they are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minopt.checkpoint.checkpoint import open_checkpoint
from tests.checkpoint import metaseq_files
from tests.checkpoint.test_load import LAYOUTS
from tests.conftest import KINDS, build_reference

# Options of ``write_metaseq``.
METASEQ: dict[str, dict[str, Any]] = {
    "singleton": {},
    "singleton, unfused": {"fused": False, "head": "whole", "config": "dict", "views": True},
    "singleton, legacy": {"legacy": True, "config": "omegaconf"},
    "2 parts": {"parts": 2, "head": "slice"},
    "4 parts": {"parts": 4, "config": "class", "metadata": False},
    "3 shards": {"shards": 3, "wrap": False},
    "2 parts x 3 shards": {"parts": 2, "shards": 3},
}

SOURCES = (*LAYOUTS, *METASEQ)


def fits(kind: str, source: str) -> bool:
    """Whether there is such a checkpoint: metaseq keeps a model with projections in one part."""
    return kind != "350m" or METASEQ.get(source, {}).get("parts", 1) == 1


KINDS_AND_SOURCES = [(kind, source) for kind in KINDS for source in SOURCES if fits(kind, source)]


@functools.cache
def reference(kind: str = "125m", dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a kind, the same one on every call: nobody may change it."""
    return build_reference(kind) if dtype == torch.float32 else copy.deepcopy(reference(kind)).to(dtype)


def expected_tensors(kind: str = "125m", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The reference's tensors under the keys of its file; the head is the token table, and in no file."""
    state = reference(kind, dtype).state_dict()
    return {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}


def write_source(
    source: str, folder: Path, kind: str = "125m", dtype: torch.dtype = torch.float32, model: Any = None
) -> Path:
    """Writes the reference, or another model, as one of ``SOURCES``, and returns its folder."""
    model = model or reference(kind, dtype)
    if source in METASEQ:
        metaseq_files.write_metaseq(folder, model, **METASEQ[source])
    else:
        model.save_pretrained(folder)
        LAYOUTS[source](folder)
    return folder


def place_of(folder: Path, name: str, index: int) -> tuple[Path, str, int]:
    """The file, key and index there of one number of a tensor; of the last part's own, or the last copy."""
    tensor = open_checkpoint(folder).tensors[name]
    piece = [tensor, *tensor.beside, *tensor.copies][-1]
    (run,) = piece.runs_of(index, index + 1)
    return run.file.path, run.key, run.start


def change_tensor(path: Path, key: str, change: Callable[[Tensor], object]) -> None:
    """Lets a function change one tensor of any kind of file in place."""
    if path.suffix == ".pt":
        change_file(path, lambda model: change(model[key]))
    elif path.suffix == ".bin":
        tensors = torch.load(path)
        change(tensors[key])
        torch.save(tensors, path)
    else:
        tensors = load_file(path)
        change(tensors[key])
        save_file(tensors, path, metadata={"format": "pt"})


def change_file(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Lets a function change the ``model`` of a metaseq file in place."""
    # As written, it holds an object whose state only a class of metaseq's could take.
    taking = mock.patch.object(metaseq_files._LockingArray, "__setstate__", create=True, return_value=None)
    with metaseq_files.foreign_modules(), taking:
        content = torch.load(path, weights_only=False)
        change(content["model"])
        torch.save(content, path)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

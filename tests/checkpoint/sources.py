"""The same weights in every kind of checkpoint, and what transformers says that they are."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def place_of(source: str, folder: Path, name: str, index: int) -> tuple[Path, str, int]:
    """Where number ``index`` of the last part's share of a tensor of the 125m style lies.

    Args:
        source: one of ``SOURCES``.
        folder: that it was written to.
        name: minopt's.
        index: in row-major order.

    Returns:
        The file, the key in it, and the index there.
    """
    if source not in METASEQ:
        key = f"model.decoder.{name}"
        indices = list(folder.glob("*.index.json"))
        if indices:
            return folder / json.loads(indices[0].read_text())["weight_map"][key], key, index
        return next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")), key, index
    options = METASEQ[source]
    parts, shards = options.get("parts", 1), options.get("shards", 0)
    whole = metaseq_files.metaseq_state(reference(), fused=options.get("fused", True))
    state = metaseq_files.split_into_parts(whole, parts)[-1]
    key = f"decoder.{name}"
    if key not in state:
        projection = key.split(".")[-2]
        key = key.replace(f".{projection}.", ".qkv_proj.")
        index += "kvq".index(projection[0]) * state[key].numel() // 3
    if not shards:
        return folder / ("reshard.pt" if parts == 1 else f"reshard-model_part-{parts - 1}.pt"), key, index
    unit = ".".join(key.split(".")[:3]) if options.get("wrap", True) else ""
    inside = [other for other in state if other.startswith(unit) and other != metaseq_files.VERSION]
    index += sum(state[other].numel() for other in inside[: inside.index(key)])
    shard, index = divmod(index, -(-sum(state[other].numel() for other in inside) // shards))
    file = f"checkpoint_last-model_part-{parts - 1}-shard{shard}.pt"
    return folder / file, f"{unit}.flat_param_0".lstrip("."), index


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

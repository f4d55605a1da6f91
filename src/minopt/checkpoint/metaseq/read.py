"""metaseq's checkpoints: one file, model parallel parts, or FSDP shards of parts, as tensors under minopt's names.

The layouts are those that metaseq's scripts/reshard_mp.py and reshard_fsdp.py read and write. A model parallel part has
the rows or columns of its own heads and units. An FSDP shard has a run of each layer's numbers, flattened one tensor
after another; ``shard_metadata`` says which tensors those are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minopt.checkpoint.errors import CheckpointError, MissingFileError, some
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.find import Found, name_of, stem_of
from minopt.checkpoint.metaseq.config import settings_of
from minopt.checkpoint.names import (
    HF_HEAD,
    MOST_LAYERS,
    from_metaseq,
    fused_key,
    parameter_shapes,
    shard_dim,
    to_metaseq,
)
from minopt.checkpoint.tensors import Contents, Run, SourceTensor, own_tensors, stored_tensor
from minopt.config import PRESETS, OPTConfig, is_int

_FLAT = re.compile(r"(?:.*\.)?flat_param_\d+")
_TOKENS = "decoder.embed_tokens.weight"

# What a shard has of one flat tensor: keys and shapes of the tensors in it, over all shards, and its own padding.
_Flat = tuple[tuple[tuple[str, tuple[int, ...]], ...], int]


def read_metaseq(found: Found, known: OPTConfig | None, ignore: Sequence[str]) -> Contents:
    """The tensors of metaseq's files; a sample of each file's numbers is read."""
    files = found.open()
    parts = [files[i : i + found.shards] for i in range(0, len(files), found.shards)]
    told = settings_of(files[0].content)
    named: list[dict[str, SourceTensor]] = []
    for shards in parts:
        stored = _unflattened(shards, told, known, len(parts))
        named.append(own_tensors(stored, from_metaseq, ignore, shards[0].path, say=not named))
    heads = [part.pop(HF_HEAD, None) for part in named]
    for shards in parts:  # one may have been copied over another
        _check_distinct(Run(file, key, 0, math.prod(file.shapes[key])) for file in shards for key in file.shapes
                        if _FLAT.fullmatch(key) and file.dtypes[key] is not None)  # fmt: skip
    divided = (tensor for part in named for name, tensor in part.items() if shard_dim(name) is not None)
    _check_distinct(run for tensor in divided if tensor.dtype is not None for run in tensor.runs)
    tensors = named[0] if len(named) == 1 else _joined(named, [shards[0].path for shards in parts])
    _check_count(tensors, found)
    return Contents(tensors, tuple(heads), told)


def _unflattened(
    files: list[TensorFile], told: Mapping[str, Any], known: OPTConfig | None, parts: int
) -> dict[str, SourceTensor]:
    """One part's tensors under metaseq's keys, from its shards."""
    first = files[0]
    stored = {key: stored_tensor(first, key) for key in first.shapes if not _FLAT.fullmatch(key)}
    if len(stored) == len(first.shapes):
        if len(files) > 1:
            raise CheckpointError(f"{first.path}: one of {len(files)} shards, but its tensors are whole. Rename it.")
        return stored
    if all(file.content.get("shard_metadata") is None for file in files):
        described = _guessed(files, told, known, parts)
    else:
        described = [_described(file) for file in files]
    expected = {key: shapes for key, (shapes, _) in described[0].items()}
    for file, own in zip(files, described, strict=True):
        if {key: shapes for key, (shapes, _) in own.items()} != expected:
            raise CheckpointError(f"{file.path}: its shard_metadata is not that of {first.path.name}. Is it of another "
                                  "model?")  # fmt: skip
        if wrong := sorted(own.keys() ^ {key for key in file.shapes if _FLAT.fullmatch(key)}):
            raise CheckpointError(f"{file.path}: tensors and shard_metadata differ in {some(wrong)}. Fetch it again.")
    for key, shapes in expected.items():
        flat, start = _unpadded(key, files, [own[key] for own in described]), 0
        for name, shape in shapes:
            if name in stored:
                raise CheckpointError(f"{first.path}: {name} is there twice.")
            tensor = flat.rows(start, start + math.prod(shape))
            stored[name] = replace(tensor, name=name, shape=shape)
            start += tensor.numel
    return stored


def _described(file: TensorFile) -> dict[str, _Flat]:
    """Reads how a shard's ``shard_metadata`` describes each flat tensor."""
    found: dict[str, _Flat] = {}
    try:
        for group in file.content["shard_metadata"]["param_metadata"]:
            if not isinstance(group["fsdp_path"], str):
                raise ValueError("an fsdp_path that is not a string")
            prefix = f"{group['fsdp_path']}." if group["fsdp_path"] else ""
            for flat, about in group["params"].items():
                names, padding = [prefix + name for name in about["names"]], about["padding"]
                sizes = [tuple(shape) for shape in about["shapes"]]
                numbers = (*(size for shape in sizes for size in shape), *about["numels"], padding)
                if not all(is_int(n) and 0 <= n < 2**48 for n in numbers) or len(names) != len(sizes):
                    raise ValueError("a size that is not a non-negative integer")
                if [*about["numels"]] != [math.prod(shape) for shape in sizes]:
                    raise ValueError("numels that are not those of the shapes")
                found[prefix + flat] = tuple(zip(names, sizes, strict=True)), padding
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: its shard_metadata does not add up ({error}). Fetch the file again."
                              ) from None  # fmt: skip
    return found


def _unpadded(key: str, files: list[TensorFile], described: list[_Flat]) -> SourceTensor:
    """The numbers of a flat tensor over all shards, without each one's padding."""
    dtype = files[0].dtypes[key]
    runs: list[Run] = []
    for file, (_, padding) in zip(files, described, strict=True):
        size = math.prod(file.shapes[key])
        if len(file.shapes[key]) != 1 or padding > size or file.dtypes[key] != dtype:
            raise CheckpointError(f"{file.path}: {key} must be {dtype}, as in the first shard, and have one dim with "
                                  f"room for its padding, got {file.dtypes[key]} of shape {list(file.shapes[key])} "
                                  f"with {padding} of padding. Fetch the file again.")  # fmt: skip
        runs += [Run(file, key, 0, size - padding)] if size > padding else []
    there, numel = sum(run.stop for run in runs), sum(math.prod(shape) for _, shape in described[0][0])
    if there != numel:
        raise CheckpointError(f"{files[0].path}: its {len(files)} shards hold {there:,} numbers of {key} (padding not "
                              f"counted), expected {numel:,}. Is a shard missing, or one too many?")  # fmt: skip
    return SourceTensor(key, (there,), dtype, tuple(runs))


def _guessed(
    files: list[TensorFile], told: Mapping[str, Any], known: OPTConfig | None, parts: int
) -> list[dict[str, _Flat]]:
    """What flat tensors hold, shard by shard, where no ``shard_metadata`` says so.

    Sizes tell which published model they are of; the order is that of metaseq's modules (metaseq PR 197).
    """
    sizes = {key: [math.prod(file.shapes.get(key, ())) for file in files]
             for key in files[0].shapes if _FLAT.fullmatch(key)}  # fmt: skip
    count = len(files)
    for config, slack in _candidates(told, known):
        layout = _layout(config, slack, parts, sizes)
        numels = {key: sum(map(math.prod, inner.values())) for key, inner in layout.items()}
        chunks = {key: -(-numel // count) for key, numel in numels.items()}  # fairscale: torch.chunk, then padded
        if layout and sizes == {key: [chunk] * count for key, chunk in chunks.items()}:
            return [
                {key: (tuple(inner.items()), min(chunks[key], max(0, (i + 1) * chunks[key] - numels[key])))
                 for key, inner in layout.items()} for i in range(count)
            ]  # fmt: skip
    raise CheckpointError(
        f"{files[0].path}: its tensors are flattened without shard_metadata, and their sizes fit "
        f"{'the given configuration' if known else 'no published size'} in {parts} parts. Name the right one "
        "with --model-config (models with projections, or without biases, cannot be read so)."
    )


def _candidates(told: Mapping[str, Any], known: OPTConfig | None) -> Iterator[tuple[OPTConfig, int]]:
    """Configurations to try, each with how far its vocabulary may be off."""
    if known is not None:
        yield known, 0
        return
    with suppress(ValueError, TypeError):  # TypeError: it says that it is another model
        yield OPTConfig(**told), 2**31  # metaseq's cfg says nothing of the vocabulary
    yield from ((OPTConfig.preset(name), 1024) for name in PRESETS)


def _layout(
    config: OPTConfig, slack: int, parts: int, sizes: Mapping[str, list[int]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes in each flat tensor of a part, in metaseq's order; empty where they cannot be of this model.

    The smallest models were one flat tensor; larger ones have one for each layer, and one for what is outside of them.
    """
    is_plain = config.embed_dim == config.hidden_size and config.enable_bias and config.layer_norm_elementwise_affine
    if not is_plain or config.num_hidden_layers > MOST_LAYERS:
        return {}
    layout: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, whole in parameter_shapes(config).items():
        shape, dim, fused = list(whole), shard_dim(name), fused_key(name)
        if dim is not None:
            shape[dim] //= parts
        shape[0] *= 3 if fused else 1
        key = fused or to_metaseq(name)
        layer = f"{key[: key.index('.', len('decoder.layers.'))]}." if name.startswith("layers.") else ""
        layout.setdefault(f"{layer if len(sizes) > 1 else ''}flat_param_0", {})[key] = tuple(shape)
    root, C = layout["flat_param_0"], config.hidden_size
    # The vocabulary is what is left, but for padding of less than one number a shard.
    shards, known = len(next(iter(sizes.values()))), config.vocab_size // parts
    room = sum(sizes.get("flat_param_0", [])) - sum(math.prod(shape) for key, shape in root.items() if key != _TOKENS)
    rows = known if 0 <= room - known * C < shards else room // C
    if abs(rows * parts - config.vocab_size) > slack or (rows != known and shards > C):
        return {}
    root[_TOKENS] = (rows, C)
    return layout


def _check_distinct(runs: Iterable[Run]) -> None:
    """Refuses two files of which the first four runs begin with the same numbers."""
    samples: dict[Path, list[torch.Tensor]] = {}
    for run in runs:
        own = samples.setdefault(run.file.path, [])
        if len(own) < 4:
            own.append(torch.empty(min(1024, run.stop - run.start), dtype=torch.float32))
            run.file.read_into(own[-1], run.key, run.start)
    seen: dict[bytes, Path] = {}
    for path, own in samples.items():
        numbers = torch.cat(own)
        if len(set(numbers.tolist())) < 16:  # too few to tell, or constants
            continue
        first = seen.setdefault(numbers.numpy().tobytes(), path)
        if first != path:
            raise CheckpointError(f"{path}: holds the same numbers as {first.name}. Was one copied over the other?")


def _joined(named: list[dict[str, SourceTensor]], paths: list[Path]) -> dict[str, SourceTensor]:
    """The model's tensors, from those of its parts, which must hold the same ones in the same shapes and dtypes."""
    for part, path in zip(named, paths, strict=True):
        if differing := sorted(part.keys() ^ named[0].keys()):
            raise CheckpointError(f"{path}: {paths[0].name} and this do not hold the same tensors: {some(differing)}.")
        for name, piece in part.items():
            one = named[0][name]
            if (one.shape, one.dtype) != (piece.shape, piece.dtype):
                raise CheckpointError(f"{path}: {name} is {list(piece.shape)} {piece.dtype}, and {list(one.shape)} "
                                      f"{one.dtype} in {paths[0].name}. Are the parts of one model?")  # fmt: skip
    tensors = {}
    for name, first in named[0].items():
        pieces, dim = tuple(part[name] for part in named), shard_dim(name)
        if dim is None:
            tensors[name] = replace(first, copies=pieces[1:])
            continue
        if dim >= len(first.shape):
            raise CheckpointError(f"{first}: {name} has shape {list(first.shape)}, expected {dim + 1} dims.")
        shape = tuple(size * len(named) if i == dim else size for i, size in enumerate(first.shape))
        if dim == 0:
            tensors[name] = replace(first, shape=shape, runs=tuple(run for piece in pieces for run in piece.runs))
        else:
            tensors[name] = replace(first, shape=shape, runs=(), beside=pieces)
    return tensors


def _check_count(tensors: Mapping[str, SourceTensor], found: Found) -> None:
    """A missing last part leaves no gap in the names, but in the shapes."""
    table, rows = tensors.get("embed_positions.weight"), tensors.get("layers.0.self_attn.k_proj.weight")
    if table is None or rows is None or len(table.shape) != 2 or not rows.numel:
        return
    width, there, parts = table.shape[1], rows.shape[0], found.parts
    if there != width:
        needed = width * parts // there if width * parts % there == 0 else None
        absent = [name_of(found.files[0], part, 0) for part in range(parts, min(needed or 0, parts + 9))]
        raise MissingFileError(
            f"{found.folder}: the {parts} parts of {stem_of(found.files[0])} have {there} of the {width} rows of "
            f"k_proj, so {f'{needed} parts' if needed else 'other parts'} are expected"
            + (f"; missing: {some(absent)}" if absent else "") + ". Fetch them again."
        )  # fmt: skip

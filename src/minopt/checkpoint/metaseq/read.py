"""metaseq's checkpoints: one file, model parallel parts, or FSDP shards of parts, as tensors under minopt's names.

The layouts are those that metaseq's scripts/reshard_mp.py and reshard_fsdp.py read and write. A model parallel part has
the rows or columns of its own heads and units; an FSDP shard has a run of each layer's numbers, written one tensor
after another, where ``shard_metadata`` says which tensors those are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minopt.checkpoint.errors import CheckpointError, MissingFileError, some
from minopt.checkpoint.files import TensorFile, open_file
from minopt.checkpoint.metaseq.config import check_agreement, config_of, facts_of, settings_of
from minopt.checkpoint.names import METASEQ_HEAD, described, from_metaseq, left_out, own_keys, shard_dim
from minopt.checkpoint.pieces import Run, Slice, SourceTensor, check_distinct
from minopt.config import PRESETS, OPTConfig, is_int

# "reshard-model_part-3.pt", "checkpoint_last-model_part-3-shard17.pt", "checkpoint_1_6000.pt-model_part-0.pt"
_NAME = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d{1,4}))?(?:-shard(?P<shard>\d{1,4}))?(?P<suffix>\.\w+)")

_FLAT = re.compile(r"(?:.*\.)?flat_param_\d+")


@dataclass(frozen=True)
class FileSet:
    """The files of one checkpoint, told by their names.

    Attributes:
        folder, stem: what they share.
        files: by part and shard.
    """

    folder: Path
    stem: str
    files: Mapping[tuple[int, int], Path]

    @property
    def parts(self) -> int:
        """How many model parallel parts their names speak of."""
        return max(part for part, _ in self.files) + 1

    @property
    def shards(self) -> int:
        """How many FSDP shards of a part their names speak of."""
        return max(shard for _, shard in self.files) + 1

    @property
    def missing(self) -> list[str]:
        """What is not there of the parts and shards that the other files' names imply, the first hundred of it."""
        wanted = ((part, shard) for part in range(self.parts) for shard in range(self.shards))
        absent = islice((key for key in wanted if key not in self.files), 100)
        return [self.name_of(part, shard) for part, shard in absent]

    def name_of(self, part: int, shard: int) -> str:
        """The name of the file of a part and shard, after the pattern of the others."""
        match = _NAME.fullmatch(next(iter(self.files.values())).name)
        assert match is not None
        name = self.stem + (f"-model_part-{part}" if match["part"] else "")
        return name + (f"-shard{shard}" if match["shard"] else "") + match["suffix"]


def group_files(paths: list[Path]) -> list[FileSet]:
    """Sorts files into checkpoints by their names.

    Raises:
        CheckpointError: if two files have the same numbers in their names.
    """
    groups: dict[tuple[Path, str, bool, bool], dict[tuple[int, int], Path]] = {}
    for path in sorted(paths):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        group = groups.setdefault((path.parent, match["stem"], match["part"] is None, match["shard"] is None), {})
        key = int(match["part"] or 0), int(match["shard"] or 0)
        if key in group:
            raise CheckpointError(f"{path}: {group[key].name} is the same part and shard. Remove one of them.")
        group[key] = path
    return [FileSet(folder, stem, files) for (folder, stem, _, _), files in groups.items()]


@dataclass(frozen=True)
class MetaseqTensors:
    """What a set of files holds.

    Attributes:
        config: as its ``cfg`` has it and its tensors confirm it.
        config_source: where ``config`` comes from, in words.
        tensors: by minopt's names.
        heads: a stored output projection, piece by piece, with the row of the token table at which each begins.
    """

    config: OPTConfig
    config_source: str
    tensors: dict[str, SourceTensor]
    heads: list[tuple[Slice, int]]


def open_metaseq(
    files: FileSet, override: OPTConfig | None, beside: OPTConfig | None, ignore: Sequence[str] = ()
) -> MetaseqTensors:
    """Opens all files of a set, and puts together what they hold; no numbers are read but a sample of each.

    Args:
        files: the set.
        override: a configuration that goes before the one in the files.
        beside: of a config.json beside them, which may not contradict them.
        ignore: patterns of keys to leave out.

    Raises:
        MissingFileError: naming the parts and shards that are not there.
        CheckpointError: if files do not belong together or do not add up.
    """
    if files.missing:
        count = files.parts * files.shards
        raise MissingFileError(f"{files.folder}: {count - len(files.files)} of the {count} files of "
                               f"{files.stem} are missing: {some(files.missing)}. Fetch them again.")  # fmt: skip
    opened = {key: open_file(path) for key, path in sorted(files.files.items())}
    parts = [[opened[part, shard] for shard in range(files.shards)] for part in range(files.parts)]
    settings = settings_of(parts[0][0].content)
    shares = [_share(part, settings, override or beside, len(parts)) for part in parts]
    for number, share in enumerate(shares):
        own = own_keys(share, ignore, parts[number][0].path, say=number == 0)
        shares[number] = {name: share[key] for key, name in own.items()}
    named = [_named(share, part[0].path) for share, part in zip(shares, parts, strict=True)]
    heads = [share.pop(METASEQ_HEAD, None) for share in shares]
    _check_alike(named, parts)
    for shards in parts:
        check_distinct(_flat_runs(shards))
    check_distinct(_split_runs(named))
    tensors = {name: _join(name, [part[name] for part in named]) for name in named[0]}
    _check_count(tensors, files)
    facts = facts_of({name: tensor.shape for name, tensor in tensors.items()}, parts[0][0].path)
    if override is not None:
        config, source = override, "as given"
    elif beside is not None:
        check_agreement(beside, settings, files.folder / "config.json")
        config, source = beside, "config.json"
    else:
        config, source = config_of(settings, facts, parts[0][0].path)
    row, placed = 0, []
    for head, part in zip(heads, named, strict=True):
        if head is not None:
            whole = head.shape[:1] == tensors["embed_tokens.weight"].shape[:1]
            placed.append((head, 0 if whole else row))
        row += part["embed_tokens.weight"].shape[0]
    return MetaseqTensors(config, source, tensors, placed)


def _share(
    files: list[TensorFile], settings: Mapping[str, Any], known: OPTConfig | None, parts: int
) -> dict[str, Slice]:
    """One part's tensors under metaseq's keys, from its shards."""
    first = files[0]
    flat = [key for key in first.shapes if _FLAT.fullmatch(key)]
    if not flat:
        if len(files) > 1:
            raise CheckpointError(f"{first.path}: one of {len(files)} shards, but its tensors are whole. Rename it.")
        return {key: Slice.whole(first, key) for key in first.shapes}
    metadata = [file.content.get("shard_metadata") for file in files]
    share = {key: Slice.whole(first, key) for key in first.shapes if key not in flat}
    if all(data is None for data in metadata):
        groups = _documented_groups(files, settings, known, parts)
    else:
        groups = [_groups(data, file.path) for data, file in zip(metadata, files, strict=True)]
    for file, own in zip(files, groups, strict=True):
        if [group[:4] for group in own] != [group[:4] for group in groups[0]]:
            raise CheckpointError(f"{file.path}: its shard_metadata is not that of {first.path.name}. Is it of another "
                                  "model?")  # fmt: skip
        if wrong := sorted(set(flat) ^ {group[0] for group in own} | set(flat) - set(file.shapes)):
            raise CheckpointError(f"{file.path}: tensors and shard_metadata do not have these alike: {some(wrong)}.")
    for index, (key, names, shapes, numels, _) in enumerate(groups[0]):
        paddings = [group[index][4] for group in groups]
        joined = _unpadded(key, files, paddings, sum(numels))
        start = 0
        for name, shape, numel in zip(names, shapes, numels, strict=True):
            if name in share:
                raise CheckpointError(f"{first.path}: {name} is there twice.")
            share[name] = joined.part(start, shape)
            start += numel
    return share


# Key of the flat tensor; names, shapes and sizes of those in it; how many numbers at its end are padding.
_Group = tuple[str, tuple[str, ...], tuple[tuple[int, ...], ...], tuple[int, ...], int]


def _groups(metadata: Any, path: Path) -> list[_Group]:
    """What ``shard_metadata`` says of each flat tensor.

    Raises:
        CheckpointError: if it is none, or does not add up.
    """
    found: list[_Group] = []
    try:
        for group in metadata["param_metadata"]:
            if not isinstance(group["fsdp_path"], str):
                raise ValueError("an fsdp_path that is no text")
            prefix = f"{group['fsdp_path']}." if group["fsdp_path"] else ""
            for flat, about in group["params"].items():
                names = tuple(prefix + name for name in about["names"])
                shapes = tuple(tuple(shape) for shape in about["shapes"])
                numels, padding = tuple(about["numels"]), about["padding"]
                sizes = (*(size for shape in shapes for size in shape), *numels, padding)
                if not all(is_int(size) and 0 <= size < 2**48 for size in sizes) or not len(names) == len(shapes):
                    raise ValueError("a size that is none")
                if numels != tuple(math.prod(shape) for shape in shapes):
                    raise ValueError("sizes that are not those of its shapes")
                found.append((prefix + flat, names, shapes, numels, padding))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its shard_metadata does not add up ({error}). Fetch the file again.") from None
    return found


def _unpadded(key: str, files: list[TensorFile], paddings: list[int], numel: int) -> Slice:
    """The numbers of a flat tensor over all shards, without each one's padding."""
    dtype = files[0].dtypes[key]
    runs: list[Run] = []
    for file, padding in zip(files, paddings, strict=True):
        size = math.prod(file.shapes[key])
        if len(file.shapes[key]) != 1 or padding > size or file.dtypes[key] != dtype:
            raise CheckpointError(f"{file.path}: {key} has shape {list(file.shapes[key])}, {padding} of it padding, "
                                  f"and is {file.dtypes[key]}; the first shard's is {dtype}.")  # fmt: skip
        runs += Slice((size,), dtype, Slice.whole(file, key).runs).part(0, (size - padding,)).runs
    there = sum(run.stop - run.start for run in runs)
    if there != numel:
        raise CheckpointError(f"{files[0].path}: its {len(files)} shards hold {there:,} numbers of {key} without "
                              f"padding, {numel:,} are described. Is a shard missing, or one too many?")  # fmt: skip
    return Slice((there,), dtype, tuple(runs))


def _documented_groups(
    files: list[TensorFile], settings: Mapping[str, Any], override: OPTConfig | None, parts: int
) -> list[list[_Group]]:
    """What flat tensors hold where no ``shard_metadata`` says so: the order of metaseq's modules (metaseq PR 197).

    Returns:
        For each shard, its groups.

    Raises:
        CheckpointError: if no configuration fits the sizes.
    """
    sizes = {key: [math.prod(file.shapes.get(key, ())) for file in files]
             for key in files[0].shapes if _FLAT.fullmatch(key)}  # fmt: skip
    for candidate, slack in _candidates(settings, override):
        layouts = _layouts(candidate, slack, parts, len(files), list(sizes), sizes.get("flat_param_0", []))
        numels = {key: sum(math.prod(shape) for _, shape in layout) for key, layout in layouts.items()}
        chunks = {key: -(-numel // len(files)) for key, numel in numels.items()}  # fairscale: torch.chunk, then padded
        if sizes.keys() == numels.keys() and all(set(sizes[key]) == {chunks[key]} for key in sizes):
            break
    else:
        raise CheckpointError(
            f"{files[0].path}: its tensors are flattened without shard_metadata, and their sizes fit "
            f"{'the given configuration' if override else 'no published size'} in {parts} parts. Name the right one "
            "with --model-config (models with projections, or without biases, cannot be read so)."
        )
    found = []
    for shard in range(len(files)):
        found.append([
            (key, tuple(name for name, _ in layouts[key]), tuple(shape for _, shape in layouts[key]),
             tuple(math.prod(shape) for _, shape in layouts[key]),
             chunks[key] - max(0, min(chunks[key], numels[key] - shard * chunks[key])))
            for key in sizes
        ])  # fmt: skip
    return found


def _candidates(settings: Mapping[str, Any], override: OPTConfig | None) -> list[tuple[OPTConfig, int]]:
    """Configurations to try, each with how far its vocabulary may be off."""
    if override is not None:
        return [(override, 0)]
    presets = [(OPTConfig.preset(name), 1024) for name in PRESETS]
    shape = {"hidden_size": "decoder_embed_dim", "ffn_dim": "decoder_ffn_embed_dim",
             "num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads",
             "max_position_embeddings": "max_target_positions"}  # fmt: skip
    values = {ours: settings[theirs] for ours, theirs in shape.items() if is_int(settings.get(theirs))}
    try:
        return [(OPTConfig(**values), 2**31), *presets]
    except ValueError:
        return presets


def _layouts(
    config: OPTConfig, slack: int, parts: int, shards: int, keys: list[str], root_sizes: list[int]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes in each flat tensor of a part, in metaseq's order, for a model without projections.

    The smallest were one flat tensor; larger ones have one for each layer, and one for what is outside of them.
    """
    C, F, L = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    if config.embed_dim != C or not config.enable_bias or not config.layer_norm_elementwise_affine or L > 1000:
        return {}
    layer = [
        ("self_attn.qkv_proj.weight", (3 * C // parts, C)), ("self_attn.qkv_proj.bias", (3 * C // parts,)),
        ("self_attn.out_proj.weight", (C, C // parts)), ("self_attn.out_proj.bias", (C,)),
        ("self_attn_layer_norm.weight", (C,)), ("self_attn_layer_norm.bias", (C,)),
        ("fc1.weight", (F // parts, C)), ("fc1.bias", (F // parts,)),
        ("fc2.weight", (C, F // parts)), ("fc2.bias", (C,)),
        ("final_layer_norm.weight", (C,)), ("final_layer_norm.bias", (C,)),
    ]  # fmt: skip
    layers = [(f"decoder.layers.{i}.", layer) for i in range(L)]
    positions = ("decoder.embed_positions.weight", (config.max_position_embeddings + 2, C))
    norm = [("decoder.layer_norm.weight", (C,)), ("decoder.layer_norm.bias", (C,))]
    in_root = [(path + name, shape) for path, group in layers for name, shape in group] if len(keys) == 1 else []
    rest = [positions, *in_root, *norm]
    # metaseq's cfg says nothing of the vocabulary: it is what is left, but for padding.
    room = sum(root_sizes) - sum(math.prod(shape) for _, shape in rest)
    known = config.vocab_size // parts
    rows = known if 0 <= room - known * C < shards else room // C  # padding is less than one number a shard
    if abs(rows * parts - config.vocab_size) > slack or (rows != known and shards > C):
        return {}
    own: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "flat_param_0": [("decoder.embed_tokens.weight", (rows, C)), *rest]
    }
    if len(keys) > 1:
        own |= {f"{path}flat_param_0": [(path + name, shape) for name, shape in group] for path, group in layers}
    return own


def _named(share: dict[str, Slice], path: Path) -> dict[str, Slice]:
    """One part's tensors under minopt's names; fused projections are taken apart."""
    named: dict[str, Slice] = {}
    strange, twice = [], []
    for key, piece in share.items():
        names = from_metaseq(key)
        if key == METASEQ_HEAD or not names:
            continue
        if names == (key,):
            strange.append(key)
            continue
        if piece.shape[0] % len(names) if piece.shape else True:
            raise CheckpointError(f"{path}: {key} has shape {list(piece.shape)}, expected {len(names)} equal shares.")
        shape = (piece.shape[0] // len(names), *piece.shape[1:])
        twice += [name for name in names if name in named]
        named |= {name: piece.part(i * math.prod(shape), shape) for i, name in enumerate(names)}
    if twice:
        raise CheckpointError(f"{path}: holds these twice, fused and apart: {some(sorted(twice))}.")
    if strange:
        raise CheckpointError(f"{path}: {len(strange)} tensors are not an OPT's: {some(list(map(described, strange)))}."
                              f" {left_out(strange)}")  # fmt: skip
    return named


def _check_alike(named: list[dict[str, Slice]], parts: list[list[TensorFile]]) -> None:
    """Each part must hold the same tensors, in the same shapes and dtypes."""
    for share, files in zip(named[1:], parts[1:], strict=True):
        here, first = files[0].path, parts[0][0].path
        if differing := sorted(share.keys() ^ named[0].keys()):
            raise CheckpointError(f"{here}: {first.name} and this do not hold the same tensors: {some(differing)}.")
        for name, piece in share.items():
            one = named[0][name]
            if (one.shape, one.dtype) != (piece.shape, piece.dtype):
                raise CheckpointError(f"{here}: {name} is {list(piece.shape)} {piece.dtype}, and {list(one.shape)} "
                                      f"{one.dtype} in {first.name}. Are the parts of one model?")  # fmt: skip


def _flat_runs(part: list[TensorFile]) -> dict[Path, list[Run]]:
    """Flat tensors of each shard of a part: no two shards hold the same numbers."""
    runs: dict[Path, list[Run]] = {}
    for file in part:
        flat = [key for key in file.shapes if _FLAT.fullmatch(key) and file.dtypes[key] is not None]
        runs[file.path] = [Run(file, key, 0, math.prod(file.shapes[key])) for key in flat[:4]]
    return runs


def _split_runs(named: list[dict[str, Slice]]) -> dict[Path, list[Run]]:
    """Some runs of each file of tensors that parts split: no two parts hold the same numbers of those."""
    samples: dict[Path, list[Run]] = {}
    for share in named:
        for name, piece in share.items():
            if shard_dim(name) is not None and piece.dtype is not None:
                for run in piece.runs:
                    own = samples.setdefault(run.file.path, [])
                    if len(own) < 4:
                        own.append(run)
    return samples


def _join(name: str, slices: list[Slice]) -> SourceTensor:
    first, dim = slices[0], shard_dim(name)
    if len(slices) == 1:
        return SourceTensor(name, first.shape, first.dtype, tuple(slices))
    if dim is not None and dim >= len(first.shape):
        raise CheckpointError(f"{first}: {name} has shape {list(first.shape)}, expected {dim + 1} dims.")
    shape = list(first.shape)
    if dim is not None:
        shape[dim] *= len(slices)
    return SourceTensor(name, tuple(shape), first.dtype, tuple(slices), dim)


def _check_count(tensors: Mapping[str, SourceTensor], files: FileSet) -> None:
    """A missing last part leaves no gap in the names, but in the shapes."""
    table, rows = tensors.get("embed_positions.weight"), tensors.get("layers.0.self_attn.k_proj.weight")
    if table is None or rows is None or len(table.shape) != 2 or not rows.shape or not rows.shape[0]:
        return
    width, there = table.shape[1], rows.shape[0]
    if there != width:
        needed = width * files.parts // there if width * files.parts % there == 0 else None
        absent = [files.name_of(part, 0) for part in range(files.parts, min(needed or 0, files.parts + 9))]
        raise MissingFileError(
            f"{files.folder}: the {files.parts} parts of {files.stem} have {there} of the model's {width} rows of "
            f"attention, so there are {needed or 'not the right number of'} parts in all"
            + (f"; missing: {some(absent)}" if absent else "") + ". Fetch them again."
        )  # fmt: skip

"""Hugging Face's checkpoints: one file or shards, with config.json; of weights in floats, int8 or int4.

The state dicts of torch.distributed.checkpoint, as training writes them, have the same names and are read here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minopt import int4, int8
from minopt.checkpoint.divided import open_divided
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.find import Format, Found
from minopt.checkpoint.names import HF_HEAD, from_hf
from minopt.checkpoint.tensors import Contents, SourceTensor, main_dtype, own_tensors, stored_tensor
from minopt.config import OPTConfig, read_json

_PLAIN = "If its weights are plain, take quantization_config out of config.json."


def read_huggingface(found: Found, known: OPTConfig | None, ignore: Sequence[str]) -> Contents:
    """The tensors of files under Hugging Face's names; no numbers are read but scales of int8 and int4 weights."""
    scheme = _scheme(found.folder, known)
    stored, where = stored_tensors(found), found.where
    tensors = own_tensors(stored, _names_of, ignore, where, say=found.format is not Format.DIVIDED)
    head = tensors.pop(HF_HEAD, None)
    if head is not None and head.dtype == torch.int8:
        raise CheckpointError(f"{where}: {HF_HEAD}: expected the token embeddings, to which OPT's head is tied, got "
                              "int8. Make the int8 weights anew, and ignore lm_head.")  # fmt: skip
    if empty := [name for name, tensor in tensors.items() if 0 in tensor.shape]:
        raise CheckpointError(
            f"{where}: {len(empty)} of its tensors hold no numbers ({some(empty)}): saved in training under ZeRO-3, "
            "which divides them among processes. Put them together first (python zero_to_fp32.py, which lies beside "
            "DeepSpeed's checkpoints), or save with stage3_gather_16bit_weights_on_model_save."
        )
    return Contents(_with_scales(tensors, scheme, where), (head,))


def stored_tensors(found: Found) -> dict[str, SourceTensor]:
    """All tensors of a checkpoint's files by their keys, whatever they are; no numbers are read."""
    if found.format is Format.DIVIDED:
        return open_divided(found.folder)
    files = found.open()
    counts = Counter(key for file in files for key in file.shapes)
    if twice := sorted(key for key, count in counts.items() if count > 1):
        raise CheckpointError(f"{found.where}: stored in several of its files: {some(twice)}. Fetch the files again.")
    return {key: stored_tensor(file, key) for file in files for key in file.shapes}


def _names_of(key: str) -> tuple[str, ...]:
    name = from_hf(key)
    return () if name is None else (name,)


def _scheme(folder: Path, known: OPTConfig | None) -> str | int | None:
    """What the ``quantization_config`` says, of the configuration or else of the folder's config.json: ``"int8"``, or
    int4 weights' group size (see ``int4.group_of``).
    """
    path = folder / "config.json"
    found = None if known is None else known.extra.get(int8.CONFIG_KEY)
    if found is None and path.is_file():  # another one may be given
        with suppress(ValueError):
            found = read_json(path).get(int8.CONFIG_KEY)
    if found is None or (group := int4.group_of(found)) is not None:
        return None if found is None else group
    if (other := int8.other_scheme(found)) is not None:
        raise CheckpointError(
            f"{path}: quantization_config: expected int8 weights with a scale for each channel (compressed-tensors, "
            f"int-quantized), or symmetric int4 ones (pack-quantized), got {other}. Fetch the model that it was made "
            f"from, and convert that with --quantize int8. {_PLAIN}"
        )
    return "int8"


def _with_scales(tensors: Mapping[str, SourceTensor], scheme: str | int | None, where: Path) -> dict[str, SourceTensor]:
    """Joins int8 or int4 weights and their scales; ``scheme`` is what ``_scheme`` gives."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(int8.SCALE)}
    packed = {name.removesuffix(int4.PACKED): tensor for name, tensor in tensors.items() if name.endswith(int4.PACKED)}
    group = scheme if isinstance(scheme, int) else None
    kind, dtype = ("int4", torch.int32) if group is not None or packed else ("int8", torch.int8)
    if kind == "int4":
        plain = {name: t for name, t in tensors.items() if not name.endswith((int4.PACKED, int4.SHAPE))}
        tensors, weights = plain | packed, list(packed)
    else:
        weights = [name for name, tensor in tensors.items() if tensor.dtype == dtype and name not in scales]
    if scheme is not None and not weights:
        raise CheckpointError(f"{where}: expected {kind} weights as config.json's quantization_config says, got none. "
                              + _PLAIN)  # fmt: skip
    if weights and (scheme is None or (kind == "int4" and group is None)):
        raise CheckpointError(
            f"{where}: {len(weights)} of its weights are {kind} ({some(weights)}), expected a quantization_config in "
            "config.json that says how they were made, got none. Fetch config.json again."
        )
    if not weights:
        return dict(tensors)
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    main, problems = main_dtype(found.values()), []
    for name in dict.fromkeys([*weights, *(scale.removesuffix(int8.SCALE) for scale in scales)]):
        weight = found.get(name)
        scale = _read_scale(name, weight, scales.get(name + int8.SCALE), group)
        if isinstance(scale, str) or weight is None:
            problems.append(str(scale))
        elif group is None:
            found[name] = replace(weight, dtype=main, scale=scale)
        else:
            shape = (weight.shape[0], weight.shape[1] * int4.IN_A_WORD)
            packed_one = replace(weight, name=name)
            found[name] = SourceTensor(name, shape, main, packed=packed_one, scale=scale)
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} of its {kind} weights cannot be used: {some(problems)}. Fetch the files again, "
            f"or convert the model that they were made from with --quantize {kind}."
        )
    return found


def _read_scale(name: str, weight: SourceTensor | None, scale: SourceTensor | None, group: int | None) -> Tensor | str:
    """The scale of an int8 weight as float32 ``[out, 1]``, or that of an int4 one as stored ``[out, groups]``; or what
    is wrong with the two. ``group`` is int4's.
    """
    kind, dtype = ("int8", torch.int8) if group is None else ("int4", torch.int32)
    if weight is None or weight.dtype != dtype:
        return f"{name}: expected {kind}, as it has a scale, got {'nothing' if weight is None else weight.dtype}"
    if not (int8.is_quantized(name) or name in ("project_in.weight", "project_out.weight")) or len(weight.shape) != 2:
        return f"{name}: expected a float dtype, got {kind}, which only weights of linear layers may be"
    rows, inputs = weight.shape[0], weight.shape[1] * int4.IN_A_WORD
    columns = inputs // group if group else 1
    if group and inputs % group:
        return f"{name}: expected a multiple of {group} inputs, its groups, got {inputs}"
    if scale is None:
        return f"{name}{int8.SCALE}: expected shape [{rows}, {columns}], got no such tensor"
    if scale.shape not in [(rows, columns)] + [(rows,)] * (columns == 1):
        return f"{scale.name}: expected shape [{rows}, {columns}], got {list(scale.shape)}"
    if scale.dtype is None or not scale.dtype.is_floating_point:
        return f"{scale.name}: expected a float dtype, got {scale.dtype or 'another kind'}"
    values = scale.read(torch.float32).view(rows, columns)
    wrong = ~((values > 0) & (values * 128).isfinite())  # what int8 reaches is finite too
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        worst = values[wrong][0].item()
        return f"{scale.name}: expected positive, finite scales, got {worst:g} at row {first}"
    mapped = None if group is None else scale.map()
    return values if mapped is None else mapped.view(rows, columns)

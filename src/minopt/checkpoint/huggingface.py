"""Hugging Face's checkpoints: one file or shards, with config.json; of weights in floats, or in int8 with scales.

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

from minopt import int8
from minopt.checkpoint.divided import open_divided
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.find import Format, Found
from minopt.checkpoint.names import HF_HEAD, from_hf
from minopt.checkpoint.tensors import Contents, SourceTensor, main_dtype, own_tensors, stored_tensor
from minopt.config import OPTConfig, read_json

_PLAIN = "If its weights are plain, take quantization_config out of config.json."


def read_huggingface(found: Found, known: OPTConfig | None, ignore: Sequence[str]) -> Contents:
    """The tensors of files under Hugging Face's names; no numbers are read but scales of int8 weights."""
    is_int8 = _is_int8(found.folder, known)
    is_divided, where = found.format is Format.DIVIDED, found.where
    if is_divided:
        stored = open_divided(found.folder)
    else:
        files = found.open()
        stored = {key: stored_tensor(file, key) for file in files for key in file.shapes}
        counts = Counter(key for file in files for key in file.shapes)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise CheckpointError(f"{where}: stored in several of its files: {some(twice)}. Fetch the files again.")
    tensors = own_tensors(stored, _names_of, ignore, where, say=not is_divided)
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
    return Contents(_with_scales(tensors, is_int8, where), (head,))


def _names_of(key: str) -> tuple[str, ...]:
    name = from_hf(key)
    return () if name is None else (name,)


def _is_int8(folder: Path, known: OPTConfig | None) -> bool:
    """Whether the configuration, or else the folder's config.json, has a ``quantization_config``, of int8 as ours."""
    path = folder / "config.json"
    found = None if known is None else known.extra.get(int8.CONFIG_KEY)
    if found is None and path.is_file():  # another one may be given
        with suppress(ValueError):
            found = read_json(path).get(int8.CONFIG_KEY)
    other = None if found is None else int8.other_scheme(found)
    if other is not None:
        raise CheckpointError(
            f"{path}: quantization_config: expected int8 weights with a scale for each channel (compressed-tensors, "
            f"int-quantized), got {other}. Fetch the model that it was made from, and convert that with --quantize "
            f"int8. {_PLAIN}"
        )
    return found is not None


def _with_scales(tensors: Mapping[str, SourceTensor], declared: bool, where: Path) -> dict[str, SourceTensor]:
    """Joins int8 weights and their scales; ``declared``: there is a ``quantization_config``."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(int8.SCALE)}
    weights = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and name not in scales]
    if declared and not weights:
        raise CheckpointError(f"{where}: expected int8 weights as config.json's quantization_config says, got none. "
                              + _PLAIN)  # fmt: skip
    if weights and not declared:
        raise CheckpointError(
            f"{where}: {len(weights)} of its weights are int8 ({some(weights)}), expected a quantization_config in "
            "config.json that says how they were made, got none. Fetch config.json again."
        )
    if not weights:
        return dict(tensors)
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    dtype = main_dtype(found.values())
    problems = []
    for name in dict.fromkeys([*weights, *(scale.removesuffix(int8.SCALE) for scale in scales)]):
        scale = _read_scale(name, found.get(name), scales.get(name + int8.SCALE))
        if isinstance(scale, str):
            problems.append(scale)
        else:
            found[name] = replace(found[name], dtype=dtype, scale=scale)
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} of its int8 weights cannot be used: {some(problems)}. Fetch the files again, or "
            "convert the model that they were made from with --quantize int8."
        )
    return found


def _read_scale(name: str, weight: SourceTensor | None, scale: SourceTensor | None) -> Tensor | str:
    """The scale of a weight as float32 ``[out, 1]``, or what is wrong with the two."""
    if weight is None or weight.dtype != torch.int8:
        return f"{name}: expected int8, as it has a scale, got {'nothing' if weight is None else weight.dtype}"
    if not (int8.is_quantized(name) or name in ("project_in.weight", "project_out.weight")) or len(weight.shape) != 2:
        return f"{name}: expected a float dtype, got int8, which only weights of linear layers may be"
    rows = weight.shape[0]
    if scale is None:
        return f"{name}{int8.SCALE}: expected shape [{rows}, 1], got no such tensor"
    if scale.shape not in ((rows,), (rows, 1)):
        return f"{scale.name}: expected shape [{rows}, 1], got {list(scale.shape)}"
    if scale.dtype is None or not scale.dtype.is_floating_point:
        return f"{scale.name}: expected a float dtype, got {scale.dtype or 'another kind'}"
    values = scale.read(torch.float32).view(rows, 1)
    wrong = ~((values > 0) & (values * 128).isfinite())  # what int8 reaches is finite too
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        return f"{scale.name}: expected positive, finite scales, got {values[first].item():g} at row {first}"
    return values

"""int4 weights: each row in groups of inputs that have one scale, and eight numbers in an int32.

The files are those of compressed-tensors (``pack-quantized``: https://github.com/vllm-project/compressed-tensors),
which other programs read too: for a ``weight`` its ``weight_packed``, ``weight_scale`` and ``weight_shape``.
Activations stay as they are.

Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minopt import int8
from minopt.config import OPTConfig
from minopt.memory import CHUNK_NUMBERS

GROUP = 128  # inputs of a group, as in GPTQ's tables (arXiv 2210.17323) and in kernels of other programs
PACKED, SHAPE = "_packed", "_shape"  # behind a weight's name, as ``int8.SCALE`` is
RECORD = "quantization.json"  # beside the weights: how they were made, and what that has changed

IN_A_WORD = 8  # numbers in an int32

_LARGEST, _OFFSET = 7.5, 8


def group_size(config: OPTConfig) -> int:
    """The inputs of a group: 128, or the largest part of it of which all layers' inputs are multiples.

    Raises:
        ValueError: if groups would be smaller than the eight numbers that are packed together.
    """
    size = math.gcd(GROUP, config.hidden_size, config.ffn_dim)
    if size < IN_A_WORD:
        raise ValueError(
            f"quantize: int4 packs {IN_A_WORD} inputs together, so expected hidden_size and ffn_dim to be multiples of "
            f"{IN_A_WORD}, got {config.hidden_size} and {config.ffn_dim}. Take int8."
        )
    return size


def config_for(group: int) -> dict[str, Any]:
    """``quantization_config`` of such a folder."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    only = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": None}
    return {**int8.CONFIG, "format": "pack-quantized", "config_groups": {"group_0": only}}


def config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """``quantization_config`` of a folder that holds these; ``None`` if no weight is int4."""
    for key, packed in tensors.items():
        if key.endswith(PACKED):
            return config_for(packed.shape[1] * IN_A_WORD // tensors[key.removesuffix(PACKED) + int8.SCALE].shape[1])
    return None


def group_of(config: object) -> int | None:
    """The group size that a ``quantization_config`` names if its weights are int4 as ours; 0 is a group for each row.

    ``None`` where it describes something else.
    """
    match config:
        case {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {**groups}} if groups:
            sizes = {_group_of(group) for group in groups.values()}
            return sizes.pop() if len(sizes) == 1 else None
    return None


def _group_of(group: object) -> int | None:
    match group:
        case {"input_activations": {}}:
            return None
        case {"weights": {"num_bits": 4, "type": "int", "symmetric": True, **rest}}:
            if rest.get("actorder") in ("group", "dynamic"):  # its inputs are in another order
                return None
            match rest:
                case {"strategy": "channel"}:
                    return 0
                case {"strategy": "group", "group_size": int(size)} if size > 0:
                    return size
    return None


def scales_of(weight: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The scales ``[O, G]`` of a float weight ``[O, I]``, that its largest number in each group is 7.5 of them.

    Raises:
        ValueError: if the weight holds numbers that are not finite.
    """
    scale = (weight.view(len(weight), -1, group).abs().amax(2) / _LARGEST).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    if not scale.isfinite().all():
        raise ValueError("int4: expected a weight of finite numbers, got some that are not. Is the checkpoint sound?")
    return scale


def round_to(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest int4 numbers, as floats: ``weight ~ them * scale``, where the two have shapes that broadcast."""
    return (weight / scale).round_().clamp_(-8, 7)


def quantize(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight ``[O, I]`` packed, rounded to nearest, and its scales ``[O, G]`` in a dtype. Raises as ``scales_of``."""
    packed, scales = list[Tensor](), list[Tensor]()
    for rows in torch.split(weight, max(1, CHUNK_NUMBERS // weight.shape[1])):  # all at once would be several weights
        exact = rows.float()
        scales.append(scales_of(exact, group, dtype))
        packed.append(pack(round_to(exact.view(*scales[-1].shape, -1), scales[-1].float()[..., None]).flatten(1)))
    return torch.cat(packed), torch.cat(scales)


def pack(numbers: Tensor) -> Tensor:
    """Int4 numbers ``[O, I]`` of any dtype as int32 ``[O, I / 8]``, the first in the lowest bits, 8 added to each."""
    pairs = (numbers + _OFFSET).to(torch.uint8).view(len(numbers), -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)  # which is little-endian, as files are


def unpack(packed: Tensor) -> Tensor:
    """Int8 ``[O, I]`` of int32 ``[O, I / 8]``."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1).view(torch.int8) - _OFFSET


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight ``[O, I]`` that a packed one stands for, in float32."""
    numbers = unpack(packed)
    return (numbers.float().view(*scale.shape, -1) * scale.float()[..., None]).flatten(1)


def parts(shape: tuple[int, ...], group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of a weight, by the end of its name, on the meta device."""
    (rows, columns), meta = shape, torch.device("meta")
    return {
        PACKED: torch.empty(rows, columns // IN_A_WORD, dtype=torch.int32, device=meta),
        int8.SCALE: torch.empty(rows, columns // group, dtype=dtype, device=meta),
        SHAPE: torch.empty(2, dtype=torch.int64, device=meta),
    }

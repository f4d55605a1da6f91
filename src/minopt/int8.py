"""int8 weights: which they are, how a weight becomes one, and what config.json says of them.

The files are those of compressed-tensors (``int-quantized``: https://github.com/vllm-project/compressed-tensors), which
other programs read too: an int8 ``weight`` with a ``weight_scale`` for each output channel.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

SCALE = "_scale"  # what a weight's scale is called, behind the weight's own name

_QUANTIZED = re.compile(r"layers\.\d+\.(self_attn\.[kvq]_proj|self_attn\.out_proj|fc1|fc2)\.weight")

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", "model.decoder.project_in", "model.decoder.project_out"],
}
"""``quantization_config`` of such a folder."""


def is_quantized(name: str) -> bool:
    """Whether a parameter of this name becomes int8: the products of the layers do, tables and norms do not."""
    return _QUANTIZED.fullmatch(name) is not None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` as int8 and its scales ``[out, 1]`` in float32: ``weight ~ int8 * scale``, to nearest."""
    exact = weight.float()
    scale = (exact.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (exact / scale).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that an int8 one stands for."""
    return (weight.float() * scale.float().view(-1, 1)).to(dtype)

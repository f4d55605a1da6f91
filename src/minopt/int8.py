"""int8 weights: which they are, how a weight becomes one, and what config.json says of them.

The files are those of compressed-tensors (``int-quantized``: https://github.com/vllm-project/compressed-tensors), which
other programs read too: an int8 ``weight`` with a ``weight_scale`` for each output channel.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from minopt.memory import CHUNK_NUMBERS, empty

SCALE = "_scale"  # a weight's name and this are the name of its scale
CONFIG_KEY = "quantization_config"  # in config.json

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
"""``quantization_config`` of such a folder. Other programs round activations too, a scale for each token."""


def is_wanted(quantize: str | None) -> bool:
    """Whether an option ``quantize`` asks for int8; what is neither that nor ``None`` must not become int8 in silence.

    Raises:
        ValueError: if it asks for something else.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize: expected None or "int8", got {quantize!r}.')
    return quantize is not None


def is_quantized(name: str) -> bool:
    """Whether a parameter of this name becomes int8: the products of the layers do, tables and norms do not."""
    return _QUANTIZED.fullmatch(name) is not None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` as int8 and its scales ``[out, 1]`` in float32: ``weight ~ int8 * scale``, to nearest.

    Raises:
        ValueError: if the weight holds numbers that are not finite.
    """
    quantized = empty(weight.shape, torch.int8, weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    rows = min(len(weight), max(1, CHUNK_NUMBERS // weight.shape[1]))  # at a time: all would be several weights
    space = empty((rows, weight.shape[1]), torch.float32, weight.device)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        exact, s = space[: len(weight[part])].copy_(weight[part]), scale[part]
        largest = torch.maximum(exact.amax(1, keepdim=True), -exact.amin(1, keepdim=True))
        s.copy_((largest / 127).clamp_min_(torch.finfo(torch.float32).tiny))
        quantized[part] = exact.div_(s).round_().clamp_(-127, 127)
    if not scale.isfinite().all():
        raise ValueError("int8: expected a weight of finite numbers, got some that are not. Is the checkpoint sound?")
    return quantized, scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out, in]`` that an int8 one stands for: the product in float32, then cast."""
    return (weight.float() * scale.float().view(-1, 1)).to(dtype)


def other_scheme(config: object) -> str | None:
    """What a ``quantization_config`` describes in words, ``None`` where that is int8 weights as ours."""
    match config:
        case {"quant_method": "compressed-tensors", "config_groups": {**groups}, **rest} if groups:
            others = [group for group in groups.values() if not _is_int8(group)]
            if not others and rest.get("format") in ("int-quantized", "naive-quantized"):  # two names of one layout
                return None
            words = [str(rest.get("format")), *(_weights_in_words(group) for group in others[:1])]
            return f"compressed-tensors, {', '.join(words)}"[:200]
        case {"quant_method": method}:
            return str(method)[:200]
    return "no quant_method"


def _is_int8(group: object) -> bool:
    match group:
        case {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}, **rest}:
            # Activations whose scales are fixed come with tensors that an OPT has no place for.
            activations = rest.get("input_activations")
            return activations is None or (isinstance(activations, dict) and activations.get("dynamic") is True)
    return False


def _weights_in_words(group: object) -> str:
    match group:
        case {"weights": {"num_bits": bits, "type": kind, **rest}}:
            words = [f"{kind}{bits}", "symmetric" if rest.get("symmetric", True) is True else "asymmetric"]
            if "strategy" in rest:
                words.append(f"a scale for each {rest['strategy']}")
            fixed = words == ["int8", "symmetric", "a scale for each channel"]  # as ours, so it is the activations'
            return ", ".join([*words, "fixed scales of activations"] if fixed else words)
    return "a scheme without weights"

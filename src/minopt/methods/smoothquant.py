"""SmoothQuant: activations that are hard to round to 8 bits hand some of their size to the weights behind them.

Xiao et al. 2022, arXiv 2211.10438. Inputs of queries, keys, values and fc1 are divided by scales, which the layer norm
before them takes in, and the weights are multiplied by them: the same function in floats.

Shapes: C hidden_size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.convert import Reading, Rounding
from minopt.methods.calibration import INPUTS, Walk, reading, run, watched
from minopt.model import DecoderLayer
from minopt.tokenizer import Tokenizer

_LEAST = 1e-5  # of a scale, and of the largest number of a weight's column, as the method's own program has it

# Layer norms, and what alone reads their results where they stand before attention and feed-forward.
_NORMS = (("self_attn_layer_norm", INPUTS[0]), ("final_layer_norm", INPUTS[2]))


def calibrate(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, text: Path, device: torch.device, rounding: Rounding,
    record: dict[str, Any], smooth: float | None,
) -> Reading:  # fmt: skip
    """What reads the numbers that ``convert`` writes: see ``calibration.reading``, also for errors.

    Raises:
        ValueError: also if the model's norms cannot take scales in.
    """
    assert smooth is not None
    config = checkpoint.config
    if not (config.do_layer_norm_before and config.layer_norm_elementwise_affine):
        got = "norms without weights" if config.do_layer_norm_before else "norms behind them, on the residual stream"
        raise ValueError(f"smooth: expected layer norms with weights before the linear layers, which take the scales "
                         f"in, got {got}. Leave out --smooth and --calibration.")  # fmt: skip
    record |= {"method": "smoothquant", "quantize": "int8", "smooth": smooth, "activations": "int8, a scale a token"}
    change = partial(_change, strength=smooth, rounding=rounding)
    return reading(checkpoint, tokenizer, text, device, rounding, record, change)


def _change(walk: Walk, layer: DecoderLayer, strength: float, rounding: Rounding) -> dict[str, tuple[Tensor, ...]]:
    run(layer, walk.before)
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        most = x.flatten(0, -2).abs().amax(0)
        largest[name] = torch.maximum(largest.get(name, most), most)

    with watched(layer, tuple(names[0] for _, names in _NORMS), see):
        run(layer, walk.learned)
    made: dict[str, tuple[Tensor, ...]] = {}
    for norm, names in _NORMS:
        fold(layer, norm, names, largest[names[0]], strength)
        for part, parameter in layer.get_submodule(norm).named_parameters():
            name = f"{norm}.{part}"
            made[name] = (parameter.to(rounding.dtype or walk.sources[name].dtype, copy=True),)
            parameter.copy_(made[name][0])
    every = sum(INPUTS, ())
    for name in every:
        weight = layer.get_submodule(name).get_parameter("weight")
        made[f"{name}.weight"] = numbers, scale = int8.quantize(weight)
        weight.copy_(int8.dequantize(numbers, scale))
    with watched(layer, every, lambda _, x: _rounded(x)):
        run(layer, walk.after)
    return made


def fold(layer: DecoderLayer, norm: str, names: tuple[str, ...], largest: Tensor, strength: float) -> None:
    """Divides a norm's results by scales and multiplies the weights that read them: equation 4, in place.

    Args:
        layer: one whose norms stand before attention and feed-forward.
        norm, names: the norm, and the linear modules that read it.
        largest: ``[C]``, the largest absolute number of each channel of its results.
        strength: how much of an activation's size goes to the weights, 0 to 1.
    """
    weights = [layer.get_submodule(name).get_parameter("weight") for name in names]
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(_LEAST)
    scale = (largest.pow(strength) / of_weights.pow(1 - strength)).clamp_min(_LEAST)
    for weight in weights:
        weight.mul_(scale)
    for parameter in layer.get_submodule(norm).parameters():
        parameter.div_(scale)


def _rounded(x: Tensor) -> Tensor:
    """Activations as other programs round them to 8 bits, with a scale for each token."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round_().clamp_(-127, 127) * scale

"""GPTQ: weights rounded to 4 bits one input after another, each error made good by the inputs not rounded yet.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Inputs are rounded in the order of the model.

Shapes: O outputs, I inputs, G groups of inputs that have one scale.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt import int4
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.convert import Reading, Rounding
from minopt.methods.calibration import INPUTS, Walk, reading, run, watched
from minopt.model import DecoderLayer
from minopt.tokenizer import Tokenizer

DAMPING = 0.01  # of the mean of the Hessian's diagonal, is added to it: section 3.3, step 3


def calibrate(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, text: Path, device: torch.device, rounding: Rounding,
    record: dict[str, Any], smooth: float | None,
) -> Reading:  # fmt: skip
    """What reads the numbers that ``convert`` writes: see ``calibration.reading``, also for errors.

    Each layer learns from what the layers before it give as they are written.
    """
    record |= {"method": "gptq", "quantize": "int4", "group_size": rounding.group, "damping": DAMPING}
    return reading(checkpoint, tokenizer, text, device, rounding, record, partial(_change, rounding=rounding))


def _change(walk: Walk, layer: DecoderLayer, rounding: Rounding) -> dict[str, tuple[Tensor, ...]]:
    run(layer, walk.before)
    grams: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        if name not in grams:
            grams[name] = x.new_zeros(x.shape[1], x.shape[1])
        grams[name].addmm_(x.T, x)

    with watched(layer, tuple(names[0] for names in INPUTS), see):
        run(layer, walk.learned, keep=False)
    made = {}
    for names in INPUTS:
        weights: list[Tensor] = [layer.get_submodule(name).get_parameter("weight") for name in names]
        packed, scale = quantize(
            torch.cat(weights), grams.pop(names[0]).mul_(2 / len(walk.learned)), rounding.group, rounding.main
        )
        for name, weight, *parts in zip(names, weights, packed.chunk(len(names)), scale.chunk(len(names)), strict=True):
            weight.copy_(int4.dequantize(parts[0], parts[1]))
            made[f"{name}.weight"] = (*parts, torch.tensor(weight.shape))
    run(layer, walk.learned)
    run(layer, walk.after)
    return made


def quantize(weight: Tensor, hessian: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds a weight so that its products with the inputs that were seen change least.

    Args:
        weight: ``[O, I]``, in float32 or float64.
        hessian: ``[I, I]``, ``2 / N`` times the sum of ``x x^T`` over the inputs of N windows; it is overwritten.
        group: inputs that share a scale, which is taken of them when the first of them is rounded.
        dtype: the scales'.

    Returns:
        The packed weight ``[O, I / 8]`` and its scales ``[O, G]``: see ``int4``.

    Raises:
        ValueError: if inputs or weights are not finite.
    """
    columns, unseen = weight.T.contiguous(), hessian.diagonal() == 0
    hessian.diagonal()[unseen], columns[unseen] = 1, 0
    hessian.diagonal().add_(hessian.diagonal().mean(), alpha=DAMPING)
    try:
        hessian = torch.linalg.cholesky(hessian)  # one name, so that each is freed: of 13b's fc2 one takes 1.7 GB
        hessian = torch.cholesky_inverse(hessian)
        upper = torch.linalg.cholesky(hessian, upper=True)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ValueError("calibration: the model's activations on this text are not finite, or all alike. Is the "
                         "checkpoint sound? Else give a longer text.") from None  # fmt: skip
    numbers, scales = torch.empty_like(columns), []
    for first in range(0, len(columns), group):
        block, end = columns[first : first + group], first + group
        scales.append(int4.scales_of(block.T.contiguous(), group, dtype))
        scale, factors, errors = scales[-1][:, 0].to(weight.dtype), upper[first:end, first:end], torch.empty_like(block)
        for i, column in enumerate(block):
            numbers[first + i] = int4.round_to(column, scale)
            torch.sub(column, numbers[first + i] * scale, out=errors[i]).div_(factors[i, i])
            block[i + 1 :].addr_(factors[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(upper[first:end, end:].T, errors, alpha=-1)
    return int4.pack(numbers.T), torch.cat(scales, dim=1)

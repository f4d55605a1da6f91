"""int8 weights in a checkpoint: each with its scale, as the weight that the two stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.pieces import Slice, SourceTensor, main_dtype

_CHUNK_NUMBERS = 4_000_000

_PLAIN = "If its weights are plain, take quantization_config out of config.json."


def check_quantization(quantization: object, where: Path) -> None:
    """Refuses weights in a form that is not read here.

    Raises:
        CheckpointError: saying what a ``quantization_config`` describes, if that is not int8 weights as ours.
    """
    other = None if quantization is None else int8.other_scheme(quantization)
    if other is not None:
        raise CheckpointError(
            f"{where}: quantization_config: expected int8 weights with a scale for each channel (compressed-tensors, "
            f"int-quantized), got {other}. Fetch the model that it was made from, and convert that with --quantize "
            f"int8. {_PLAIN}"
        )


def with_scales(tensors: Mapping[str, SourceTensor], declared: bool, where: Path) -> dict[str, SourceTensor]:
    """Puts int8 weights and their scales together; nothing but scales is read.

    Args:
        tensors: by minopt's names, as they are stored; a scale's is its weight's and ``int8.SCALE``.
        declared: there is a ``quantization_config``.
        where: for messages.

    Returns:
        The tensors, without scales.

    Raises:
        CheckpointError: if a weight or its scale cannot be used, or int8 weights are not what is declared.
    """
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
    found = {name: t for name, t in tensors.items() if name not in scales}
    dtype = main_dtype(found.values())
    problems = []
    for name in dict.fromkeys([*weights, *(scale.removesuffix(int8.SCALE) for scale in scales)]):
        scale = _read_scale(name, found.get(name), scales.get(name + int8.SCALE))
        if isinstance(scale, str):
            problems.append(scale)
        else:
            found[name] = _dequantized(found[name], scale, dtype)
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} of its int8 weights cannot be used: {some(problems)}. Fetch the files again, or "
            "convert the model that they were made from with --quantize int8."
        )
    return found


def read_int8(tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 ``[out, in]`` with its float32 scale ``[out, 1]``: as stored, or made of the stored numbers.

    Raises:
        CheckpointError: naming a weight whose numbers are not all finite.
    """
    if tensor.int8 is not None and tensor.scale is not None:
        mapped = tensor.int8.map()
        return tensor.int8.read() if mapped is None else mapped.contiguous(), tensor.scale
    try:
        return int8.quantize(tensor.read())
    except ValueError as error:
        raise CheckpointError(f"{tensor.name}: {error}") from None


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


def _dequantized(weight: SourceTensor, scale: Tensor, dtype: torch.dtype) -> SourceTensor:
    file = _DequantizedFile(weight, scale, dtype)
    return SourceTensor(weight.name, weight.shape, dtype, (Slice.whole(file, file.key),), int8=weight, scale=scale)


class _DequantizedFile(TensorFile):
    """A file of one int8 weight, as it would be of the weight that this stands for."""

    def __init__(self, weight: SourceTensor, scale: Tensor, dtype: torch.dtype) -> None:
        run = weight.slices[0].runs[0]
        self.path, self.key, self._weight, self._scale = run.file.path, run.key, weight, scale
        self.shapes, self.dtypes = {run.key: weight.shape}, {run.key: dtype}

    def begins_at(self, key: str) -> int | None:
        return None

    def read_into(self, out: Tensor, key: str, start: int = 0) -> None:
        width = self._weight.shape[1]
        stop = start + out.numel()
        last, step = -(-stop // width), max(1, _CHUNK_NUMBERS // width)
        for row in range(start // width, last, step):
            rows = torch.empty(min(step, last - row), width, dtype=torch.int8)
            first, end = row * width, row * width + rows.numel()
            self._weight.read_into(rows.view(-1), first)
            numbers = int8.dequantize(rows, self._scale[row : row + len(rows)]).view(-1)
            low, high = max(start, first), min(stop, end)
            out[low - start : high - start] = numbers[low - first : high - first]

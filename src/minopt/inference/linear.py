"""Products of activations and weights that are fixed: each kept in the layout that its kernel reads fastest.

Shapes: M rows (all dims of the input but the last), I inputs, O outputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minopt import int8
from minopt.memory import empty
from minopt.model import ACTIVATIONS

logger = logging.getLogger(__name__)

# Without these instructions the kernel adds pairs of products in 16 bits, which take one bit less of the activations.
_VNNI = torch.cpu._is_vnni_supported()
_LEVELS = 127 if _VNNI else 63
_TINY, _HUGE = 1e-35, 1e35  # between them a scale and its reciprocal are normal numbers of float32, as kernels need it

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, **ACTIVATIONS}


class Product(Protocol):
    """``activation(x @ weight.T + bias)`` of ``[..., I]``, as ``[..., O]`` in the input's dtype."""

    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor: ...

    def weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight ``[O, I]`` as it was given, to the bit, and its scale if it is int8."""


class _Pickled:
    """Pickled and copied as what it was made of, and built anew: kernels' layouts differ from machine to machine."""

    bias: Tensor | None
    _made_for: tuple[str, bool]  # activation, outliers

    def weight(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return _rebuild, (*self.weight(), self.bias, *self._made_for)


class Plain(_Pickled):
    """``F.linear``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        self._weight, self.bias, self._activation = weight, bias, _ACTIVATIONS[activation]
        self._made_for = activation, False

    def __call__(self, x: Tensor) -> Tensor:
        return self._activation(F.linear(x, self._weight, self.bias))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight, None


class Packed(_Pickled):
    """oneDNN's product with a weight in its blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias, self._after = bias, None if activation in ("none", "relu", "gelu") else _ACTIVATIONS[activation]
        self._activation = "none" if self._after else activation
        self._made_for = activation, False
        self._algorithm = "none" if activation == "gelu" else ""  # of two, the exact one
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y = self._product(x, self._weight, self.bias, self._activation, [], self._algorithm)
        return y if self._after is None else self._after(y)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight.to_dense(), None


class Blocked(_Pickled):
    """MKL's product with a weight in blocks of outputs, each of which holds a row of outputs for each input.

    In float32 on Intel's processors it takes a single row as fast as ``F.linear``, a sixth faster than oneDNN does, and
    many rows as fast as oneDNN (benchmarks/README.md).

    Attributes:
        width: outputs of a block.
    """

    width = 128

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        (self._outputs, inputs), rest = weight.shape, -len(weight) % self.width
        self._blocks = empty((-(-len(weight) // self.width), inputs, self.width), weight.dtype)  # [O / width, I, width]
        for block, rows in zip(self._blocks, torch.split(weight, self.width), strict=True):
            block[:, : len(rows)] = rows.T
            block[:, len(rows) :] = 0
        self.bias, self._activation, self._whole = bias, _ACTIVATIONS[activation], rest == 0
        self._bias = weight.new_zeros(()) if bias is None else F.pad(bias, (0, rest)).view(-1, 1, self.width)
        self._made_for = activation, False

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).expand(len(self._blocks), -1, -1)
        y = torch.baddbmm(self._bias, rows, self._blocks)  # [O / width, M, width]
        y = y.transpose(0, 1).reshape(*x.shape[:-1], len(y) * self.width)
        return self._activation(y if self._whole else y[..., : self._outputs])

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._blocks.transpose(1, 2).flatten(0, 1)[: self._outputs], None


class Int8(_Pickled):
    """A product of int8 weights and activations that are rounded to int8, with a scale for each row, as they come.

    Each row's largest value becomes 127 (arXiv 2206.01861, token-wise), so that the rows of a batch do not depend on
    each other. A row that comes alone is rounded between its own least and largest value, which is at least as fine.

    Args:
        weight: int8 ``[O, I]``.
        scale: ``[O, 1]``.
        bias: ``[O]``.
        activation: as of the others.
        outliers: the input has channels far larger than the rest, as OPT's has from 6.7B on (arXiv 2208.07339): what
            rounding a row leaves is rounded to int8 as well and multiplied in the same pass over the weight. The
            activations then are as exact as 16 bits make them.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none", *, outliers: bool = False
    ) -> None:
        self.bias, self._activation, self._outliers = bias, _ACTIVATIONS[activation], outliers
        self._bias, self._made_for = None if bias is None else bias.float(), (activation, outliers)
        # Not linear_dynamic, which finds a row's scale by itself: it takes none below 6.1e-5, however small the row is.
        kernel, self._after = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32, self._activation
        if activation == "relu":
            kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32
            self._after = _ACTIVATIONS["none"]
        self._one_row, self._least_and_largest = kernel.default, torch.ops.aten.aminmax.default
        zeros = torch.zeros(len(weight), dtype=torch.long)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():  # torch means to drop these tensors; minopt's range of versions has them
                warnings.simplefilter("ignore", UserWarning)
                tensor = torch._make_per_channel_quantized_tensor(weight, scale.flatten().double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(tensor, None if outliers else self._bias)
        finally:
            torch.backends.quantized.engine = before

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] and not self._outliers:  # as few operators as can be: each finds cold caches
            row = x.float()
            least, largest = self._least_and_largest(row)
            low = min(least.item(), 0.0)
            scale = (max(largest.item(), 0.0) - low) / (2 * _LEVELS + 1)
            if _TINY < scale < _HUGE:  # not where the row is zeros, or holds NaN or infinity
                y = self._after(self._one_row(row, scale, int(0.5 - low / scale), self._packed))
                return y if y.dtype == x.dtype else y.to(x.dtype)
        y = self._row_by_row(x.reshape(-1, x.shape[-1]).float())
        return self._activation(y).to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _row_by_row(self, rows: Tensor) -> Tensor:
        scale = rows.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        rows = rows / scale
        if self._outliers:
            whole = (rows * _LEVELS).round_().div_(_LEVELS)
            rows = torch.cat([whole, (rows - whole).mul_(2 * _LEVELS)])
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1 / _LEVELS, _LEVELS + 1, self._packed
        )
        if self._outliers:
            y, rest = y.chunk(2)
            y = (y + rest / (2 * _LEVELS)) * scale
            return y if self._bias is None else y + self._bias
        return y * scale if self._bias is None else torch.lerp(self._bias, y, scale)  # the kernel has added the bias

    def weight(self) -> tuple[Tensor, Tensor | None]:
        tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return tensor.int_repr(), tensor.q_per_channel_scales().float()[:, None]


class WeightOnlyInt8(_Pickled):
    """A product of int8 weights and activations as they are, of plain operators: right everywhere, fast if compiled."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        self._weight, self._scale, self.bias = weight, scale, bias
        self._activation, self._made_for = _ACTIVATIONS[activation], (activation, False)

    def __call__(self, x: Tensor) -> Tensor:
        # Scaled before the product, or float16 overflows: its sums are a hundred times the results. By out= a GPU
        # multiplies in float32 and casts in one kernel.
        weight = torch.mul(self._weight, self._scale, out=x.new_empty(self._weight.shape))
        return self._activation(F.linear(x, weight, self.bias))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight, self._scale


def build_product(
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    *,
    scale: Tensor | None = None,
    outliers: bool = False,
) -> Product:
    """The fastest product that this machine and this torch have for a weight.

    Args:
        weight: ``[O, I]``; int8 where there is a scale.
        bias: ``[O]``.
        activation: ``"none"``, or one of ``ACTIVATIONS``.
        scale: ``[O, 1]`` of an int8 weight.
        outliers: see ``Int8``.
    """
    on_cpu = weight.device.type == "cpu"
    if scale is not None:
        if on_cpu and _has_int8():
            return Int8(weight, scale, bias, activation, outliers=outliers)
        return WeightOnlyInt8(weight, scale, bias, activation)
    return (kind_on_cpu(weight.dtype) if on_cpu else Plain)(weight, bias, activation)


def _rebuild(weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str, outliers: bool) -> Product:
    return build_product(weight, bias, activation, scale=scale, outliers=outliers)


def kind_on_cpu(dtype: torch.dtype) -> type[Blocked | Packed | Plain]:
    """The product that is fastest on this machine's CPU."""
    if dtype == torch.float32 and _on_intel():
        return Blocked
    return Packed if _has_packed(dtype) else Plain


def packs(dtype: torch.dtype | None) -> bool:
    """Whether weights of a dtype (``None`` is float32) are copied to other memory on a CPU, or used where they are."""
    return kind_on_cpu(dtype or torch.float32) is not Plain


@cache
def _has_packed(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return _works(f"packed {dtype} weights", lambda: Packed(torch.ones(8, 8, dtype=dtype), torch.ones(8, dtype=dtype)))


@cache
def _on_intel() -> bool:
    """Whether MKL runs on a processor that it was made for. On an AMD EPYC it reads a weight at half oneDNN's speed."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return torch._C.has_mkl and "GenuineIntel" in file.read()
    except OSError:
        return False


@cache
def _has_int8() -> bool:
    weight, scale = int8.quantize(torch.ones(8, 8))
    return _works("int8 products", lambda: Int8(weight, scale, torch.ones(8)))


def _works(what: str, build: Callable[[], Any]) -> bool:
    """Whether a product gives the right numbers: operators that are no part of torch's interface may be missing."""
    try:
        product = build()
        x = torch.ones(2, 8, dtype=product.bias.dtype)
        works = torch.allclose(product(x), torch.full_like(x, 9.0))
        reason = "wrong results"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        works, reason = False, str(error).splitlines()[0]
    if not works:
        logger.debug("%s: not available here (%s); the plain product is used.", what, reason)
    return works

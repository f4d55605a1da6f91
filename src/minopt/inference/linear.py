"""Linear layers for inference: each weight is kept in the memory layout that its kernel reads fastest.

Shapes: M rows (all dims of the input but the last), I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minopt import int8
from minopt.devices import DTYPES
from minopt.memory import to_large_pages
from minopt.model import ACTIVATIONS

logger = logging.getLogger(__name__)

# From this width on (6.7B), OPT's activations have outlier channels that int8 cannot hold: arXiv 2208.07339, table 4.
OUTLIERS_FROM = 4096

_FULL_ROWS = 6  # oneDNN's kernels for AVX-512 take so many in less time than 1 to 3 (benchmarks/README.md)
_FULL_FROM = 2**22  # bytes of a weight
_VOCABULARY = 2**14  # outputs from which on a product may be the head

_FEW_ROWS = 8  # of which torch's GPU kernel for int8 weights reads the weight once; it has not been timed

_TINY, _HUGE = 1e-35, 1e35  # between them a scale and its reciprocal are normal numbers of float32, as kernels need it
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, **ACTIVATIONS}


class Product:
    """``activation(x @ weight.T + bias)`` of ``[..., I]``, as ``[..., O]`` in the input's dtype.

    It is pickled and copied as what it was made of, and built anew: kernels' layouts differ from machine to machine.
    """

    def __init__(self, bias: Tensor | None, activation: str = "none", outliers: bool = False) -> None:
        self.bias, self._activation, self._outliers = bias, _ACTIVATIONS[activation], outliers
        self._made_for = activation, outliers

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight ``[O, I]`` as it was given, to the bit, and its scale ``[O, 1]`` if it is int8."""
        raise NotImplementedError

    def blocks(self) -> Tensor | None:
        """The weight's own memory ``[O / W, I, W]`` if it should be in blocks of W outputs, with a row for each input.

        Compare a result before relying on it: some layouts are another library's.
        """
        return None

    def __reduce__(self) -> Any:
        (weight, scale), (activation, outliers) = self.weight(), self._made_for
        return build_product, (weight, self.bias, activation, scale, outliers)


class Plain(Product):
    """``F.linear``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(bias, activation)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._activation(F.linear(x, self._weight, self.bias))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight, None


class OnGPU(Plain):
    """``F.linear``, with a relu in the same kernel where cuBLAS has one that does both."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(weight, bias, activation)
        self._before_relu = bias if activation == "relu" else None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._activation(_compiled(x, self._weight, self.bias))
        if self._before_relu is None:
            return super().__call__(x)
        y = torch._addmm_activation(self._before_relu, x.flatten(0, -2), self._weight.t())
        return y.view(*x.shape[:-1], y.shape[-1])


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for inductor, whose code for single rows is fast for products without a bias."""
    y = F.linear(x, weight)
    return y if bias is None else y + bias


class OneDNN(Product):
    """oneDNN's product with a weight in its blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(bias, activation)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._fused = activation if activation in ("none", "relu", "gelu") else "none"
        self._after = None if self._fused == activation else self._activation
        self._algorithm = "none" if activation == "gelu" else ""  # of two, the exact one
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._copies = {rows: _FULL_ROWS // rows for rows in (1, 2, 3)} if wants_full_rows(weight) else {}
        self._is_head = len(weight) >= _VOCABULARY
        # oneDNN takes memory in small pages: of large ones a step of float32 is a tenth faster.
        to_large_pages(torch.ops.mkldnn.data_ptr(self._weight), torch.ops.mkldnn._nbytes(self._weight))

    def __call__(self, x: Tensor) -> Tensor:
        copies = self._copies.get(x.numel() // x.shape[-1])
        rows = x if copies is None else x.expand(copies, *x.shape)
        y = self._product(rows, self._weight, self.bias, self._fused, [], self._algorithm)
        if copies is not None:
            y = y[0].clone() if self._is_head else y[0]  # who keeps logits would keep those of the copies
        return y if self._after is None else self._after(y)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight.to_dense(), None

    def blocks(self) -> Tensor | None:
        (outputs, inputs), width = self._weight.shape, 64  # what was found of float32 with AVX2 and AVX-512
        if self._weight.dtype != torch.float32 or outputs % width:
            return None
        size, address = torch.ops.mkldnn._nbytes(self._weight), torch.ops.mkldnn.data_ptr(self._weight)
        if size != 4 * outputs * inputs:  # padded
            return None
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(-1, inputs, width)


def has(instructions: str) -> bool:
    """Whether the CPU has instructions, by torch's name for them: ``"avx512_vnni"``, ``"amx_int8"``."""
    return bool(torch.cpu.get_capabilities().get(instructions))


def wants_full_rows(weight: Tensor) -> bool:
    """Whether oneDNN's product takes ``_FULL_ROWS`` rows in less time than 1 to 3. Measured on AMD's processors."""
    return has("avx512_f") and _is_made_by("AuthenticAMD") and weight.nbytes >= _FULL_FROM


class FullRows(TorchFunctionMode):
    """Adds rows to the inputs of products where that is faster: see ``wants_full_rows``. For a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or args[1].device.type != "cpu" or not wants_full_rows(args[1]):
            return func(*args, **(kwargs or {}))
        x, *others = args
        rows = x.flatten(0, -2)
        missing = torch.sym_max(_FULL_ROWS - rows.shape[0], 0)  # type: ignore[no-untyped-call]
        return F.linear(F.pad(rows, (0, 0, 0, missing)), *others)[: rows.shape[0]].view(*x.shape[:-1], -1)


def split_rows(rows: Tensor, levels: int, outliers: bool) -> tuple[Tensor, Tensor]:
    """Rows ``[M, I]`` as numbers to be rounded to integers up to ``levels``, and a scale for each row ``[M, 1]``.

    Rows do not affect each other (token-wise quantisation, arXiv 2206.01861). With ``outliers``, M more rows follow:
    what rounding leaves of the rows, ``2 * levels`` times as large. The inputs then are as exact as in 16 bits, which
    OPT needs from ``OUTLIERS_FROM`` on, where some channels are far larger than the rest. ``join_rows`` adds the
    products of both.
    """
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / levels
    terms = rows / scale
    if outliers:
        whole = terms.round()
        terms = torch.cat([whole, (terms - whole) * (2 * levels)])
    return terms, scale


def join_rows(y: Tensor, levels: int) -> Tensor:
    """Products ``[2 * M, O]`` of what ``split_rows`` gave with ``outliers``, as products of M rows."""
    whole, rest = y.chunk(2)
    return whole + rest / (2 * levels)


class Int8(Product):
    """fbgemm's product of an int8 weight and activations that are rounded to int8: see ``split_rows``.

    A row that comes alone is rounded between its own least and largest value, which is at least as fine.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none", outliers: bool = False
    ) -> None:
        super().__init__(bias, activation, outliers)
        # Without these instructions the kernel adds pairs of products in 16 bits: inputs have one bit less.
        self.levels = 127 if has("avx512_vnni") else 63
        self._bias = None if bias is None else bias.float()
        # Not linear_dynamic, which finds a row's scale by itself: it takes none below 6.1e-5, however small the row is.
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._one_row, self._after = self._product, self._activation
        if activation == "relu":
            self._one_row = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32.default
            self._after = _ACTIVATIONS["none"]
        self._least_and_largest = torch.ops.aten.aminmax.default
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
            scale = (max(largest.item(), 0.0) - low) / (2 * self.levels + 1)
            if _TINY < scale < _HUGE:  # not where the row is zeros, or holds NaN or infinity
                y = self._after(self._one_row(row, scale, int(0.5 - low / scale), self._packed))
                return y if y.dtype == x.dtype else y.to(x.dtype)
        y = self._many_rows(x.reshape(-1, x.shape[-1]).float())
        return self._activation(y).to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _many_rows(self, rows: Tensor) -> Tensor:
        if self._outliers:
            terms, scale = split_rows(rows, self.levels, outliers=True)
            y = join_rows(self._product(terms, 1.0, self.levels + 1, self._packed), self.levels)
            return y * scale if self._bias is None else torch.addcmul(self._bias, y, scale)
        # split_rows' scale in few operators, for each finds cold caches: the kernel itself divides by the levels. Not
        # vector_norm, which is one operator less and takes ten times as long.
        most = rows.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        y = self._product(rows / most, 1 / self.levels, self.levels + 1, self._packed)
        # The kernel has already added the bias, unscaled: lerp gives (y - bias) * most + bias.
        return y * most if self._bias is None else torch.lerp(self._bias, y, most)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return tensor.int_repr(), tensor.q_per_channel_scales().float()[:, None]


class WeightOnlyInt8(Product):
    """A product of int8 weights and activations as they are.

    On a GPU a few rows take torch's own kernel, which reads the weight once. Elsewhere the weight is made one of the
    input's dtype for each call: right everywhere, and fast if compiled.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(bias, activation)
        self._weight, self._scale = weight, scale

    def __call__(self, x: Tensor) -> Tensor:
        # Scaled before the product, or float16 overflows: its sums are a hundred times the results.
        if torch.compiler.is_compiling():
            return self._activation(_compiled(x, (self._weight * self._scale).to(x.dtype), self.bias))
        rows = x.numel() // x.shape[-1]
        if x.is_cuda and 0 < rows <= _FEW_ROWS and _has_int8_kernel(x.device, x.dtype):
            # It computes in float32, and in bfloat16 a scale would have 8 bits.
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self._weight, self._scale.flatten())
            y = y.view(*x.shape[:-1], -1)
            return self._activation(y if self.bias is None else y + self.bias)
        # By out= a GPU multiplies in float32 and casts in one kernel.
        weight = torch.mul(self._weight, self._scale, out=x.new_empty(self._weight.shape))
        return self._activation(F.linear(x, weight, self.bias))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._weight, self._scale


@cache
def _has_int8_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a product of int8 weights for a GPU, and whether it gives the right numbers."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", "CUDA"):
        return False
    weight = torch.arange(-32, 32, dtype=torch.int8, device=device).expand(64, 64).contiguous()
    x, scale = torch.ones(2, 64, dtype=dtype, device=device), torch.full((64,), 0.5, device=device)
    try:
        return bool((torch._weight_int8pack_mm(x, weight, scale) == -16).all())
    except RuntimeError:
        return False


def build_product(
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    scale: Tensor | None = None,
    outliers: bool = False,
) -> Product:
    """The fastest product that this machine and this torch have for a weight.

    Args:
        weight: ``[O, I]``; int8 if there is a scale.
        bias: ``[O]``.
        activation: ``"none"``, or one of ``ACTIVATIONS``.
        scale: ``[O, 1]`` of an int8 weight.
        outliers: see ``split_rows``; for int8.
    """
    on_cpu = weight.device.type == "cpu"
    if scale is None:
        return (kind_on_cpu(weight.dtype) if on_cpu else OnGPU)(weight, bias, activation)
    if on_cpu and _works(Int8, torch.float32):
        return Int8(weight, scale, bias, activation, outliers)
    return WeightOnlyInt8(weight, scale, bias, activation)


def kind_on_cpu(dtype: torch.dtype) -> type[OneDNN | Plain]:
    """The product that is fastest on this machine's CPU."""
    return _chosen_on_cpu(dtype)[0]


def _chosen_on_cpu(dtype: torch.dtype) -> tuple[type[OneDNN | Plain], str]:
    """The product that is fastest on this machine's CPU, and why."""
    if dtype not in (torch.float32, torch.bfloat16):
        return Plain, "oneDNN packs float32 and bfloat16 alone"
    if not _works(OneDNN, dtype):
        return Plain, "oneDNN's packed product does not work here"
    return OneDNN, "oneDNN's packed product works here"


def kernels() -> list[tuple[str, str, str]]:
    """What each kind of weight is on this machine's CPU: its dtype, the name of its product, and why it takes this."""
    rows = [(name, kind.__name__, why) for name, dtype in DTYPES.items() for kind, why in [_chosen_on_cpu(dtype)]]
    if not _works(Int8, torch.float32):
        return [
            *rows,
            ("int8", WeightOnlyInt8.__name__, "fbgemm's product does not work here"),
        ]
    bits = "8 bits" if has("avx512_vnni") else "7 bits, for there is no AVX-512 VNNI"
    return [*rows, ("int8", Int8.__name__, f"fbgemm's product works here; inputs have {bits}")]


def packs(dtype: torch.dtype | None) -> bool:
    """Whether weights of a dtype (``None`` is float32) are copied to other memory on a CPU, or used where they are."""
    return kind_on_cpu(dtype or torch.float32) is not Plain


@cache
def _is_made_by(vendor: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return vendor in file.read()
    except OSError:
        return False


@cache
def _works(kind: type[Product], dtype: torch.dtype) -> bool:
    """Whether a product gives the right numbers: operators that are no part of torch's interface may be missing."""
    reason = ""
    try:
        with torch.device("cpu"):  # whatever the user's default device is
            weight, bias, expected = torch.ones(8, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.full((2, 8), 9.0)
            made = (*int8.quantize(weight), bias) if kind is Int8 else (weight, bias)
            if not torch.allclose(kind(*made)(torch.ones(2, 8, dtype=dtype)), expected.to(dtype)):
                reason = "wrong results"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        logger.debug("%s in %s: not available here (%s); the plain product is used.", kind.__name__, dtype, reason)
    return not reason

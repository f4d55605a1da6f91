"""Causal attention by torch's kernels, and where another way than its first choice is faster.

Shapes: B batch, T tokens this call, S cached + T, H heads, D head_dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minopt.masks import Packed

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_PIECE = 2**20  # numbers of keys: their copies stay in the caches, and in memory that the C library keeps


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Packed | None, dropout: float = 0.0, scale: float = 1.0
) -> Tensor:
    """Causal attention of ``q`` ``[B, H, T, D]`` to ``k`` and ``v`` ``[B, H, S, D]``, under ``DecoderLayer``'s mask."""
    if isinstance(mask, Packed):
        return _attend_apart(q, k, v, mask, dropout, scale)
    if _is_slow(q):
        return _attend_in_float32(q, k, v, mask, scale)
    if mask is None and q.shape[2] > 1:  # not is_causal=T > 1: T may be symbolic, is_causal must be a plain bool
        return _attention(q, k, v, None, dropout, True, scale)
    return _attention(q, k, v, mask, dropout, False, scale)  # without a mask the one token sees everything


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """torch's attention, on a GPU without cuDNN's, unless the caller has chosen among the kernels.

    cuDNN's is torch's first choice on new GPUs in 16 bits. It plans each new shape for tenths of a second, and texts
    have ever new lengths.
    """
    is_free = q.is_cuda and (torch.compiler.is_compiling() or torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    with sdpa_kernel(WITHOUT_CUDNN) if is_free else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)


# Not compiled, or a compiled layer would be compiled anew for each batch's lengths. torch.compiler.disable would import
# the compiler with this module, which takes a second; this imports it with the first call.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _attend_apart(q: Tensor, k: Tensor, v: Tensor, packed: Packed, dropout: float, scale: float) -> Tensor:
    """Causal attention of each text of a row ``[1, H, T, D]`` to itself: no work goes into pairs of texts."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # The kernel's backward pass takes 3 ms a text more in bfloat16: short ones take half the time in float32.
        with torch.autocast("cpu", enabled=False):
            return _attend_apart(q.float(), k.float(), v.float(), packed, dropout, scale).to(dtype)
    fits = dtype.itemsize == 2 and q.shape[3] % 8 == 0 and not dropout  # flash attention's kernel of several texts
    if q.is_cuda and fits and torch.cuda.get_device_capability(q.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # imports the compiler

        cu_seqlens, longest = packed.cu_seqlens(q.device), max(packed.lengths)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        y: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0))
        return y.transpose(0, 1)[None]
    # Cut and joined as [1, T, H, D], which is how products and kernels leave it in memory: no copy turns it round.
    queries, keys, values = (torch.split(x.transpose(1, 2), list(packed.lengths), dim=1) for x in (q, k, v))
    return torch.cat([
        _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, dropout, True, scale).transpose(1, 2)
        for q, k, v in zip(queries, keys, values, strict=True)
    ], dim=1).transpose(1, 2)  # fmt: skip


def _is_slow(q: Tensor) -> bool:
    """Whether torch's kernel takes these queries longer than copies of keys and values in float32 would.

    On a CPU without AMX it takes two to four times as long in 16 bits for single tokens (benchmarks/README.md).
    Compilers do not know how many there are; several take as long either way.
    """
    if q.device.type != "cpu" or q.dtype.itemsize != 2 or _has_amx():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.compiler.is_compiling() or q.shape[2] == 1


@cache
def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _attend_in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``attend`` in float32, some rows at a time."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        is_causal = mask is None and q.shape[2] > 1
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        return _attention(q.float(), k.float(), v.float(), mask, 0.0, is_causal, scale).to(q.dtype)

    if torch.compiler.is_compiling() or k.numel() <= _PIECE or len(k) == 1:
        return run(q, k, v, mask)
    rows = max(1, _PIECE // k[0].numel())
    masks = [mask] * len(k) if mask is None or len(mask) == 1 else torch.split(mask, rows)
    parts = zip(*(torch.split(x, rows) for x in (q, k, v)), masks, strict=False)
    return torch.cat([run(*part) for part in parts])

"""A linear layer of int4 weights on a CPU: they stay in 4 bits, and inputs are bfloat16.

Shapes: M rows, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minopt import int4, int8
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.tensors import main_dtype
from minopt.config import OPTConfig
from minopt.inference.linear import Product
from minopt.load_options import LoadOptions
from minopt.memory import empty

logger = logging.getLogger(__name__)

_BLOCK = 64  # outputs that lie together
_GROUPS = (32, 64, 128, 256)  # inputs of a group, as the kernel takes them
_FEW_ROWS = 32  # from more rows on it is faster to make the weight bfloat16, piece by piece
_PIECE = 2**21  # numbers


class Int4(Product):
    """torch's product of int4 weights with groups of inputs, as its processors with AVX-512 have it.

    A byte holds the numbers of outputs j and j + 32 of a block of 64 for one input. The kernel multiplies in float32,
    four rows at a time. Scales are rounded to bfloat16 for it.

    Args:
        packed, scale: of ``[O, I]``, as ``int4.quantize`` gives them.
        bias, activation: see ``Product``.
    """

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(bias, activation)
        if activation == "relu":
            self._activation = torch.relu_
        outputs, inputs = packed.shape[0], packed.shape[1] * int4.IN_A_WORD
        self._scale, self._group, self._activation_name = scale, inputs // scale.shape[1], activation
        self._bytes = empty((outputs // _BLOCK, inputs, _BLOCK // 2), torch.uint8)
        for block, rows in zip(self._bytes, torch.split(packed, _BLOCK), strict=True):
            low, high = (int4.unpack(rows) + 8).view(torch.uint8).chunk(2)
            torch.bitwise_or(low.T, high.T << 4, out=block)
        self._as_rows = self._bytes.view(outputs, inputs // 2)
        self._scales = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=2).bfloat16()  # [G, O, scale and zero]
        self._kernel = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        if len(rows) <= _FEW_ROWS:
            y = self._kernel(rows, self._as_rows, self._group, self._scales)
        else:
            y = self._many_rows(rows)
        y = y.to(x.dtype).view(*x.shape[:-1], y.shape[1])
        return self._activation(y if self.bias is None else y.add_(self.bias))

    def _many_rows(self, rows: Tensor) -> Tensor:
        """The product by bfloat16 weights, of which a piece is in memory at a time."""
        blocks, inputs, half = self._bytes.shape
        step = max(1, min(blocks, _PIECE // (_BLOCK * inputs)))
        y = rows.new_empty(len(rows), blocks * _BLOCK)
        scales = self._scales[:, :, 0].contiguous().view(-1, 1, blocks, 2, half)
        # Made once: for memory that is new in each piece, page faults would take most of the time.
        numbers, exact = empty((step, inputs, half), torch.uint8), empty((step, inputs, half), rows.dtype)
        weight = empty((inputs, step, 2, half), rows.dtype)
        for first in range(0, blocks, step):
            part = self._bytes[first : first + step]
            n = len(part)
            for i, (take, by) in enumerate(((torch.bitwise_and, 15), (torch.bitwise_right_shift, 4))):
                take(part, by, out=numbers[:n])
                exact[:n].copy_(numbers[:n].sub_(8).view(torch.int8))
                grouped = exact[:n].view(n, -1, self._group, half).permute(1, 2, 0, 3)
                out = weight.view(-1, self._group, step, 2, half)[:, :, :n, i]
                torch.mul(grouped, scales[:, :, first : first + n, i], out=out)
            y[:, first * _BLOCK : (first + n) * _BLOCK] = rows @ weight[:, :n].reshape(inputs, -1)
        return y

    def weight(self) -> tuple[Tensor, Tensor]:
        """The packed weight and its scale as they were given, to the bit."""
        numbers = torch.stack([self._bytes & 15, self._bytes >> 4], dim=1).transpose(2, 3)  # [blocks, 2, half, I]
        return int4.pack(numbers.reshape(-1, numbers.shape[3]).view(torch.int8) - 8), self._scale

    def __reduce__(self) -> Any:
        return _rebuilt, (*self.weight(), self.bias, self._activation_name)


def _rebuilt(*made_of: Any) -> Int4:
    """A product of a model that was stored, perhaps by another machine."""
    if not _works():
        raise ValueError(
            "model: its int4 weights need a CPU with AVX-512, got one with "
            f"{torch.backends.cpu.get_cpu_capability()}. Load it from its folder, with minopt.load."
        )
    return Int4(*made_of)


def stays(config: OPTConfig, group: int, options: LoadOptions) -> bool:
    """Whether this machine has a product for int4 layers of such a model, with groups of so many inputs."""
    fits = group in _GROUPS and config.hidden_size % _BLOCK == config.ffn_dim % _BLOCK == 0
    return fits and options.device.type == "cpu" and options.dtype != torch.float64 and _works()


def kept_in_int4(checkpoint: Checkpoint, options: LoadOptions) -> tuple[int, torch.dtype] | None:
    """The group size and the scales' dtype of layers that stay int4, or become it; ``None`` where they do not.

    Raises:
        ValueError: if they are to become int4, and this model or this machine has no product for them; or if they
            stay int4 and int8 is to draft.
    """
    config, wanted = checkpoint.config, options.quantize == "int4"
    groups, dtypes, count = set[int](), set[torch.dtype](), 0
    for name, tensor in checkpoint.tensors.items():
        if int8.is_quantized(name) and tensor.packed is not None and tensor.scale is not None:
            groups.add(tensor.shape[1] // tensor.scale.shape[1])
            dtypes.add(tensor.scale.dtype)
            count += 1
    if not (wanted or (options.quantize is None and count == 6 * config.num_hidden_layers)):
        return None
    group, *others = groups or {int4.group_size(config)}
    if not others and stays(config, group, options):
        if options.draft is not None:
            raise ValueError("draft: the model's weights stay int4, and int8 would draft no faster. Leave draft out.")
        return group, next(iter(dtypes or {main_dtype(checkpoint.tensors.values())}))
    if wanted:
        raise no_product(config, group, *others)
    logger.debug("int4: no product for %s here; its weights become floats.", checkpoint.found.folder)
    return None


def no_product(config: OPTConfig, *groups: int) -> ValueError:
    """What int4 weights need here, for a model that has not all of it."""
    fits, found = ", ".join(map(str, _GROUPS)), " and ".join(map(str, sorted(groups)))
    return ValueError(
        f"quantize: int4 needs a CPU with AVX-512, hidden_size and ffn_dim that are multiples of {_BLOCK}, and groups "
        f"of {fits} inputs, got {torch.backends.cpu.get_cpu_capability()}, {config.hidden_size} and {config.ffn_dim}, "
        f"and {found}. Take int8."
    )


@cache
def _works() -> bool:
    """Whether the kernel is there and has the layout that ``Int4`` writes: each processor's is another."""
    with torch.device("cpu"):  # whatever the user's default device is
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (64, 3))
        packed, scale = int4.quantize(weight, 32, torch.bfloat16)
        try:
            y = Int4(packed, scale, None)(x.bfloat16())
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        expected = x @ int4.dequantize(packed, scale).double().T
        return bool((y - expected).norm() < 0.02 * expected.norm())

"""A product for activations that are mostly exact zeros, as they are behind OPT's relu.

A row then needs the weights of its other inputs alone. Nothing is predicted and nothing is left out: results differ
from the dense product's by the order of sums, and in bfloat16 by one more rounding. Of OPT's activations 90 to 97% are
zeros (arXiv 2310.17157, 2312.11514).

Shapes: M rows, I inputs, O outputs, N activations of all rows that are not zero, P parts of the outputs, W = O / P.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from minopt.inference.linear import Product, packs
from minopt.memory import available_memory, empty

logger = logging.getLogger(__name__)

FEW_ROWS = 8  # the dense product reads a weight once for all rows, this one once for each
_WAIT = 16  # calls that use the dense product, without a look, once activations were not sparse

# Measured (benchmarks/README.md): a call of one row takes as long as each thread needs to read so many bytes, and the
# weights of single inputs are read at half of the speed of a whole weight.
_CALL_BYTES, _SPEED = 900_000, 0.45

_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_ROW_BYTES = 8  # of an int8 row: fbgemm's scale and least number of a row of bytes, two of float32


def for_zeros(dense: Product, weight: Tensor) -> Product:
    """A product that is faster than a dense one where activations are zeros; the dense one itself if none is.

    ``weight`` is the dense product's, ``[O, I]``. It has no activation.
    """
    known = weight.device.type == "cpu" and weight.dtype in _DTYPES
    most = [most_active(weight.shape[1], weight.nbytes, rows) if known else 0 for rows in range(FEW_ROWS + 1)]
    return Sparse(dense, weight.shape[1], most) if most[1] > 0 else dense


def most_active(inputs: int, weight_bytes: int, rows: int = 1) -> int:
    """Up to how many activations that are not zero the sum of their weights is faster than the dense product.

    It is 0 below a tenth of the inputs: so little is gained then that it is not worth a copy.
    """
    call_bytes = _CALL_BYTES * torch.get_num_threads() * (1 + rows / 8)
    most = int(_SPEED * inputs * (1 - call_bytes / weight_bytes))
    return most if most > inputs / 10 else 0


def copied_bytes(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """What ``_by_inputs`` takes of memory for a weight where it is used; see ``Product.blocks`` for float32."""
    is_used = dtype in _DTYPES and most_active(inputs, inputs * outputs * dtype.itemsize) > 0
    if not is_used or (dtype == torch.float32 and packs(dtype)):
        return 0
    return inputs * (outputs * dtype.itemsize + _ROW_BYTES * _parts(outputs) * (dtype == torch.int8))


class Sparse(Product):
    """A dense product, and for few rows with few activations that are not zero the sum of the weights of these.

    An int8 weight is multiplied by activations as they are, where the dense product rounds them.

    What a call does depends on the calls since the last one with more than ``FEW_ROWS`` rows, which is a prompt. So the
    same text is always computed in the same way.
    """

    def __init__(self, dense: Product, inputs: int, most: list[int]) -> None:
        super().__init__(dense.bias)
        self._dense, self._inputs, self._most = dense, inputs, most  # by the number of rows
        self._wait = 0
        self._table: _Table | None = None  # made when activations are first found to be sparse

    def __call__(self, x: Tensor) -> Tensor:
        count = x.numel() // self._inputs
        if count > FEW_ROWS:
            self._wait = 0
        elif self._wait > 0:
            self._wait -= 1
        elif count > 0:
            rows, most = x.reshape(count, self._inputs), self._most[count]
            if count == 1 or rows.count_nonzero() <= most:  # to list those of several rows takes ten times as long
                active = rows.view(-1).nonzero().view(-1)
                if len(active) <= most and (table := self._table or self._make_table()) is not None:
                    return table(rows, active).view(*x.shape[:-1], -1)
            self._wait = _WAIT
        return self._dense(x)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._dense.weight()

    def __reduce__(self) -> Any:
        return Sparse, (self._dense, self._inputs, self._most)

    def _make_table(self) -> _Table | None:
        """The weight by inputs: the dense product's own memory if it is laid out so, or else a copy."""
        blocks, found = self._dense.blocks(), None
        if blocks is not None:
            found = self._checked(blocks, None)
        if found is None:
            weight, scale = self._dense.weight()
            free = available_memory(weight.device)
            if free is None or free > 2 * weight.nbytes:
                found = self._checked(_by_inputs(weight), scale)
        if found is None:
            logger.debug("Activations that are zeros are multiplied too: there is no memory or no operator for less.")
            self._most = [-1] * len(self._most)
        self._table = found
        return found

    def _checked(self, parts: Tensor, scale: Tensor | None) -> _Table | None:
        """A table if its results are right: the operators and layouts that it uses are no part of torch's interface."""
        inputs = torch.arange(self._inputs)
        try:
            table = _Table(parts, self.bias, scale)
            row = inputs.sin()[None].to(table.dtype)
            expected = self._dense(row).float()
            return table if (table(row, inputs) - expected).abs().max() <= 0.05 * expected.abs().max() else None
        except (RuntimeError, AttributeError, NotImplementedError):
            return None


class _Table:
    """A weight as rows of W numbers, each of one input.

    Args:
        parts: ``[P, I, W]``, the first two dims stored in this or the other order; in int8 as ``_by_inputs`` gives it.
        bias: ``[O]``.
        scale: ``[O, 1]`` of an int8 weight.
    """

    def __init__(self, parts: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        count, inputs, width = parts.shape
        self._rows = parts.as_strided((count * inputs, width), (width, 1))
        self._numbers = torch.arange(count)[:, None]  # [P, 1]
        self._firsts, self._step = self._numbers * (parts.stride(0) // width), parts.stride(1) // width
        self._bias, self._scale = bias, None if scale is None else scale.flatten()
        self.dtype = parts.dtype
        if scale is not None:
            self.dtype, self._bias = torch.float32, scale.new_zeros(()) if bias is None else bias.float()
            self._sum_of_bytes = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, rows: Tensor, active: Tensor) -> Tensor:
        """``[M, O]`` in the dtype of ``rows [M, I]``, whose numbers at ``active [N]`` are not zero."""
        (M, size), P = rows.shape, len(self._numbers)
        values = rows.view(-1).index_select(0, active).to(self.dtype).expand(P, -1).reshape(-1)  # [P * N]
        inputs, starts = active, self._numbers * len(active)  # [P, 1]
        if M > 1:
            inputs = active % size
            starts = starts + torch.searchsorted(active, torch.arange(0, M * size, size))  # [P, M]
        index = torch.add(self._firsts, inputs, alpha=self._step).view(-1)
        if self._scale is None:
            sums = torch.embedding_bag(self._rows, index, starts.view(-1), False, 0, False, values)[0]  # [P * M, W]
        else:
            sums = self._sum_of_bytes(self._rows, index, starts.view(-1), False, 0, False, values)
        y = sums.view(1, -1) if M == 1 else sums.view(P, M, -1).transpose(0, 1).reshape(M, -1)
        if self._bias is None:
            return y
        if self._scale is not None:
            return torch.addcmul(self._bias, y, self._scale).to(rows.dtype)
        return y + self._bias


def _parts(outputs: int) -> int:
    return math.gcd(outputs, 1 << (min(torch.get_num_threads(), 16) - 1).bit_length())


def _by_inputs(weight: Tensor) -> Tensor:
    """A weight ``[O, I]`` as ``[P, I, W]``, stored by inputs, with a part for each thread.

    Rows of an int8 weight are those of fbgemm: each number plus 128, then the scale 1 and the least number, -128.
    """
    (outputs, inputs), parts = weight.shape, _parts(len(weight))
    if weight.dtype != torch.int8:
        return empty((inputs, outputs), weight.dtype).copy_(weight.t()).view(inputs, parts, -1).transpose(0, 1)
    table = empty((inputs, parts, outputs // parts + _ROW_BYTES), torch.uint8)
    table[..., :-_ROW_BYTES] = (weight.t().contiguous().view(torch.uint8) ^ 128).view(inputs, parts, -1)
    table[..., -_ROW_BYTES:] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return table.transpose(0, 1)

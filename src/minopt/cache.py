"""The key-value cache of a decoder: preallocated, owned by the caller, filled in place.

Shapes: B batch, T tokens this call, S capacity or filled length, H heads, D head_dim, C = H * D, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minopt.config import OPTConfig


class KVCache:
    """Keys and values of every layer for the tokens seen so far.

    ``2 * L * B * S * C * itemsize`` bytes and not one more, allocated once. Keys and values are apart and
    a tensor a layer, so that compilers see plain in-place writes.

    Args:
        config: shape of the model.
        batch_size: B.
        capacity: S, the most tokens a row can hold.
        dtype: the model's, for keys and values.
        device: the model's too.
        heads: H, where they are not all of the model's.

    Attributes:
        keys, values: L tensors ``[B, H, S, D]`` each.
        length: tokens filled so far, the same for every row (rows are padded to it).
        slots: the slots of the new tokens, int64 ``[T]``, in a step that is to have the same shapes wherever it writes
            (CUDA graphs, exported programs): it attends all slots under a mask, and ``length`` stays as it is.
        window: how many slots such a step attends, from the first on.

    Raises:
        ValueError: if batch size or capacity is not positive.
    """

    def __init__(
        self,
        config: OPTConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        heads: int | None = None,
    ) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"KVCache: batch_size and capacity must be positive, got {batch_size} and {capacity}.")
        shape = (batch_size, heads or config.num_attention_heads, capacity, config.head_dim)
        # Zeros, for a masked slot is still multiplied (by 0), and 0 * NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length = 0
        self.slots: Tensor | None = None
        self.window = capacity

    @classmethod
    def of(
        cls, keys: list[Tensor], values: list[Tensor], slots: Tensor | None = None, window: int | None = None
    ) -> KVCache:
        """A cache in the memory of given keys and values; arguments as the attributes."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.length, cache.slots = keys, values, 0, slots
        cache.window = cache.capacity if window is None else window
        return cache

    def __getstate__(self) -> dict[str, Any]:
        tensors = {"keys": [t.detach() for t in self.keys], "values": [t.detach() for t in self.values]}
        return {**self.__dict__, **tensors}  # copied without the graph of gradients, which cannot be

    def __repr__(self) -> str:
        kind = f"{self.keys[0].dtype}, {self.keys[0].device}"
        return f"{type(self).__name__}({self.batch_size} rows, {self.length} of {self.capacity} tokens, {kind})"

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values ``[B, H, T, D]`` after the filled part; the model checks the room.

        Returns:
            Keys and values to attend: views ``[B, H, length + T, D]``, or of the whole window with ``slots``. The model
            moves ``length`` once all layers have written.
        """
        keys, values, new = self.keys[layer], self.values[layer], key.shape[2]
        if self.slots is not None:
            keys.index_copy_(2, self.slots, key)
            values.index_copy_(2, self.slots, value)
            return keys[:, :, : self.window], values[:, :, : self.window]
        end = self.length + new
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens of each row.

        Raises:
            ValueError: if fewer than that are filled.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache.truncate: expected a length from 0 to {self.length}, got {length}.")
        self.length = length

    def compact(self, start: int, slots: Tensor) -> None:
        """Keeps the first ``start`` tokens of each row, and of the others only ``slots [B, M]``, counted from there."""
        assert len(slots) == self.batch_size
        assert slots.shape[1] <= self.length - start
        index = slots[:, None, :, None].expand(-1, self.keys[0].shape[1], -1, self.keys[0].shape[3])
        end = start + slots.shape[1]
        for tensor in (*self.keys, *self.values):
            tensor[:, :, start:end] = tensor[:, :, start:].gather(2, index)
        self.truncate(end)

    def move(self, start: int, to: Tensor) -> None:
        """Moves the tokens behind the first ``start`` slots to slots from ``to [B]`` on; ``length`` stays as it is."""
        rows = torch.arange(self.batch_size, device=to.device)[:, None]
        slots = to[:, None] + torch.arange(self.length - start, device=to.device)
        for tensor in (*self.keys, *self.values):
            tensor[rows, :, slots] = tensor[:, :, start : self.length].transpose(1, 2).clone()  # they may overlap

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Copies the filled part of some rows over other rows."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, : self.length] = tensor[source, :, : self.length]

    def reshape(self, rows: int, batch_size: int, capacity: int) -> None:
        """Changes the shape; the first rows keep the filled part. In the same memory, where that is large enough."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                kept = old[:rows, :, : self.length].clone()
                _, H, _, D = shape = (batch_size, old.shape[1], capacity, old.shape[3])
                if old.untyped_storage().nbytes() >= batch_size * H * capacity * D * old.itemsize:
                    tensors[layer] = old.as_strided(shape, (H * capacity * D, capacity * D, D, 1))
                else:
                    tensors[layer] = old.new_zeros(shape)
                tensors[layer][:rows, :, : self.length] = kept
        self.window = capacity

    def rows(self, begin: int, count: int) -> KVCache:
        """An empty cache of some of the rows, in the same memory."""
        end = begin + count
        return KVCache.of([t[begin:end] for t in self.keys], [t[begin:end] for t in self.values])

    def repeat_rows(self, first: KVCache) -> None:
        """Repeats each row of ``first``, which holds the first rows: the copies of a row stand side by side."""
        copies, rest = divmod(self.batch_size, first.batch_size)
        assert rest == 0
        self.length = first.length
        for tensor in (*self.keys, *self.values) if copies > 1 else ():
            filled = tensor[:, :, : self.length]
            filled.copy_(filled[: first.batch_size].repeat_interleave(copies, dim=0))

"""The key-value cache of a decoder: preallocated, owned by the caller, filled in place.

Shapes: B batch, T tokens this call, S capacity or filled length, H heads, D head_dim, C = H * D, L layers.
"""

from __future__ import annotations

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
        length: tokens filled so far, the same for every row (rows are padded to it). An int; or an
            integer tensor of no dims, with which a decode step has the same shapes at every position
            (CUDA graphs, exported programs) and attends the whole capacity under a mask.
        window: the capacity that such a step attends, if it is less than all.

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
        self.length: int | Tensor = 0
        self.window: int | None = None

    @classmethod
    def of(
        cls, keys: list[Tensor], values: list[Tensor], length: int | Tensor = 0, window: int | None = None
    ) -> KVCache:
        """A cache in the memory of given keys and values; arguments as the attributes."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.length, cache.window = keys, values, length, window
        return cache

    def __repr__(self) -> str:
        kind = f"{self.keys[0].dtype}, {self.keys[0].device}"
        return f"{type(self).__name__}({self.batch_size} rows, {int(self.length)} of {self.capacity} tokens, {kind})"

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.window is None else self.window

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values ``[B, H, T, D]`` after the filled part; the model checks the room.

        Returns:
            Keys and values to attend: views ``[B, H, length + T, D]``, or the whole capacity where ``length``
            is a tensor. The model moves ``length`` once all layers have written.
        """
        keys, values, new = self.keys[layer], self.values[layer], key.shape[2]
        if isinstance(self.length, Tensor):
            at = self.length + torch.arange(new, device=key.device)
            keys.index_copy_(2, at, key)
            values.index_copy_(2, at, value)
            return (keys, values) if self.window is None else (keys[:, :, : self.window], values[:, :, : self.window])
        end = self.length + new
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens of each row.

        Raises:
            ValueError: if fewer than that are filled.
        """
        if not 0 <= length <= int(self.length):
            raise ValueError(f"KVCache.truncate: expected a length from 0 to {int(self.length)}, got {length}.")
        self.length = self.length.fill_(length) if isinstance(self.length, Tensor) else length

    def compact(self, start: int, slots: Tensor) -> None:
        """Keeps the first ``start`` tokens of each row, and of the others only ``slots [B, M]``, counted from there."""
        assert len(slots) == self.batch_size
        assert slots.shape[1] <= int(self.length) - start
        index = slots[:, None, :, None].expand(-1, self.keys[0].shape[1], -1, self.keys[0].shape[3])
        end = start + slots.shape[1]
        for tensor in (*self.keys, *self.values):
            tensor[:, :, start:end] = tensor[:, :, start:].gather(2, index)
        self.truncate(end)

    def expand(self, copies: int) -> None:
        """Repeats each row ``copies`` times, copies side by side: ``[B, ...]`` becomes ``[B * copies, ...]``."""
        self.keys = [t.repeat_interleave(copies, dim=0) for t in self.keys]
        self.values = [t.repeat_interleave(copies, dim=0) for t in self.values]

"""Cuts many rows of unequal length into batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minopt.config import is_int

# Tokens that a batch holds at most unless its caller says otherwise: keys and values of opt-125m in float32 are 0.6 GB.
MAX_BATCH_TOKENS = 8192

# If results come in order, rows of like length are searched only within this many batches, which wait in memory.
POOLED_BATCHES = 8


def limits_of(batch_size: int | None, max_batch_tokens: int | None) -> tuple[float, float]:
    """The most rows and tokens of a batch; arguments and errors are those of ``cut_batches``."""
    for name, limit in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
        if limit is not None and not (is_int(limit) and limit >= 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {limit!r}.")
    return batch_size or math.inf, max_batch_tokens or (math.inf if batch_size else MAX_BATCH_TOKENS)


def cut_batches(
    lengths: Sequence[int], batch_size: int | None = None, max_batch_tokens: int | None = None, in_order: bool = False
) -> list[list[int]]:
    """Indices of rows, in batches of rows of like length. The longest come first: a lack of memory shows at once.

    Args:
        lengths: each row's tokens.
        batch_size: the most rows in a batch; ``None`` is no limit.
        max_batch_tokens: the most tokens in a batch, padding included; a longer row is alone in its batch. ``None``
            is ``MAX_BATCH_TOKENS``, or no limit beside a ``batch_size``.
        in_order: cut each few batches from rows next to each other, and keep the order of these groups.

    Raises:
        ValueError: if a limit is not positive.
    """
    rows, tokens = limits_of(batch_size, max_batch_tokens)
    pools, pool, begin, count = [0] * len(lengths), 0, 0, 0  # of each row; rows of two pools share no batch
    for index, length in enumerate(lengths if in_order else ()):
        pools[index], count = pool, count + length
        if count >= POOLED_BATCHES * tokens or index + 1 - begin >= POOLED_BATCHES * rows:
            pool, begin, count = pool + 1, index + 1, 0
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (pools[i], -lengths[i])):
        longest, size = (batches[-1][0], len(batches[-1])) if batches else (index, 0)
        is_full = size == rows or (size + 1) * lengths[longest] > tokens or pools[index] != pools[longest]
        if is_full or not batches:
            batches.append([])
        batches[-1].append(index)
    batches = [sorted(batch) for batch in batches]
    return sorted(batches) if in_order else batches

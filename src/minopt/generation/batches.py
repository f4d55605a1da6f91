"""Cuts many rows of unequal length into batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from minopt.config import is_int

# Tokens that a batch holds at most unless its caller says otherwise: keys and values of opt-125m in float32 are 0.6 GB.
MAX_BATCH_TOKENS = 8192

# If results come in order, rows of like length are searched only within this many batches, which wait in memory.
POOLED_BATCHES = 8


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
    for name, limit in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
        if limit is not None and not (is_int(limit) and limit >= 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {limit!r}.")
    rows = batch_size or math.inf
    tokens = max_batch_tokens or (math.inf if batch_size else MAX_BATCH_TOKENS)
    if not in_order:
        return _cut(range(len(lengths)), lengths, rows, tokens)
    begin, count, batches = 0, 0, []
    for end, length in enumerate(lengths, 1):
        count += length
        if end == len(lengths) or count >= POOLED_BATCHES * tokens or end - begin >= POOLED_BATCHES * rows:
            batches += sorted(_cut(range(begin, end), lengths, rows, tokens))
            begin, count = end, 0
    return batches


def _cut(indices: Iterable[int], lengths: Sequence[int], rows: float, tokens: float) -> list[list[int]]:
    """Batches of at most so many rows and tokens; the first row of each is the longest until all are cut."""
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        if not batches or (full := len(batches[-1]) + 1) > rows or full * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(index)
    return [sorted(batch) for batch in batches]

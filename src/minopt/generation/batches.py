"""Cuts many rows of unequal length into batches."""

from __future__ import annotations

from collections.abc import Sequence

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
    if max_batch_tokens is None and batch_size is None:
        max_batch_tokens = MAX_BATCH_TOKENS
    if in_order:
        return [batch for pool in _pools(lengths, batch_size, max_batch_tokens)
                for batch in sorted(_cut([*pool], lengths, batch_size, max_batch_tokens))]  # fmt: skip
    return _cut([*range(len(lengths))], lengths, batch_size, max_batch_tokens)


def _pools(lengths: Sequence[int], batch_size: int | None, max_batch_tokens: int | None) -> list[range]:
    """Ranges of neighbouring rows, each enough for ``POOLED_BATCHES`` batches."""
    begin, tokens, pools = 0, 0, []
    for index, length in enumerate(lengths, 1):
        tokens += length
        full = max_batch_tokens is not None and tokens >= POOLED_BATCHES * max_batch_tokens
        if full or index == len(lengths) or (batch_size is not None and index - begin >= POOLED_BATCHES * batch_size):
            pools.append(range(begin, index))
            begin, tokens = index, 0
    return pools


def _cut(
    indices: list[int], lengths: Sequence[int], batch_size: int | None, max_batch_tokens: int | None
) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        rows = len(batches[-1]) + 1 if batches else 1
        too_many = batch_size is not None and rows > batch_size
        too_wide = max_batch_tokens is not None and batches and rows * lengths[batches[-1][0]] > max_batch_tokens
        if not batches or too_many or too_wide:
            batches.append([])
        batches[-1].append(index)
    return [sorted(batch) for batch in batches]

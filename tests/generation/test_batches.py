"""Rows of unequal length become batches: every row once, limits kept, the longest first."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minopt.generation.batches import MAX_BATCH_TOKENS, POOLED_BATCHES, cut_batches

LENGTHS = st.lists(st.integers(0, 60) | st.integers(0, 3 * MAX_BATCH_TOKENS), max_size=60)
LIMIT = st.none() | st.integers(1, 12) | st.integers(1, 2 * MAX_BATCH_TOKENS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, batch_size=LIMIT, max_batch_tokens=LIMIT)
def test_every_row_comes_once_in_batches_that_are_full_and_keep_the_limits(
    lengths: list[int], batch_size: int | None, max_batch_tokens: int | None
) -> None:
    batches = cut_batches(lengths, batch_size, max_batch_tokens)
    ranked = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ends = list(accumulate(map(len, batches), initial=0))
    assert batches == [sorted(ranked[begin:end]) for begin, end in pairwise(ends)]
    assert ends[-1] == len(ranked)
    if batch_size is None and max_batch_tokens is None:
        max_batch_tokens = MAX_BATCH_TOKENS

    def fits(rows: list[int]) -> bool:
        tokens = len(rows) * max(lengths[index] for index in rows)
        return (batch_size is None or len(rows) <= batch_size) and (
            max_batch_tokens is None or tokens <= max_batch_tokens
        )

    assert all(batch for batch in batches)
    assert all(fits(batch) or len(batch) == 1 for batch in batches)
    for batch, following in pairwise(batches):
        assert not fits([*batch, max(following, key=lambda index: lengths[index])])


def test_without_limits_a_batch_holds_so_many_tokens_and_beside_a_size_any_number() -> None:
    lengths = [MAX_BATCH_TOKENS // 4] * 9
    assert list(map(len, cut_batches(lengths))) == [4, 4, 1]
    assert list(map(len, cut_batches(lengths, batch_size=8))) == [8, 1]
    assert list(map(len, cut_batches([MAX_BATCH_TOKENS + 1, 1]))) == [1, 1]
    assert cut_batches([]) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, batch_size=LIMIT, max_batch_tokens=LIMIT)
def test_batches_in_order_keep_the_limits_and_no_row_waits_for_one_far_behind(
    lengths: list[int], batch_size: int | None, max_batch_tokens: int | None
) -> None:
    batches = cut_batches(lengths, batch_size, max_batch_tokens, in_order=True)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    most = MAX_BATCH_TOKENS if batch_size is max_batch_tokens is None else max_batch_tokens
    waiting: set[int] = set()
    given_out = 0
    for batch in batches:
        assert batch_size is None or len(batch) <= batch_size
        assert most is None or len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
        waiting |= set(batch)
        while given_out in waiting:
            waiting.remove(given_out)
            given_out += 1
        assert batch_size is None or len(waiting) < POOLED_BATCHES * batch_size
        assert most is None or sum(lengths[i] for i in waiting) < POOLED_BATCHES * most + max(lengths)


def test_batches_in_order_of_one_row_each_come_in_order() -> None:
    assert cut_batches([5, 9, 1, 9, 4], batch_size=1, in_order=True) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("limits", [{"batch_size": 0}, {"batch_size": -3}, {"max_batch_tokens": 0}])
def test_limits_that_are_not_positive_are_refused(limits: dict[str, Any]) -> None:
    ((name, value),) = limits.items()
    for lengths in ([3, 4], []):
        with pytest.raises(ValueError, match=rf"^{name}: expected an integer of at least 1, got {value}\.$"):
            cut_batches(lengths, **limits)

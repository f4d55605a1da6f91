"""The order of examples follows from seed and step, and a batch says the same however its rows lie."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minopt.training.batches import Batch, Order, collate, seed_of
from minopt.training.tokens import Tokens

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(tuple)
seeds = st.integers(0, 2**40)


def epoch_of(order: Order, epoch: int) -> list[tuple[int, ...]]:
    """The examples of each step of an epoch."""
    n = order.steps_per_epoch
    return [order.examples(step) for step in range(epoch * n, (epoch + 1) * n)]


def flat(steps: list[tuple[int, ...]]) -> list[int]:
    return [index for step in steps for index in step]


@settings(deadline=None)
@given(lengths=lengths_of, batch_size=st.integers(1, 70), seed=seeds, grouped=st.booleans(), epoch=st.integers(0, 9))
def test_every_example_comes_once_an_epoch_in_full_steps_but_for_one(
    lengths: tuple[int, ...], batch_size: int, seed: int, grouped: bool, epoch: int
) -> None:
    order = Order(lengths, batch_size, seed, grouped)
    steps = epoch_of(order, epoch)
    assert sorted(flat(steps)) == list(range(len(lengths)))
    rest = len(lengths) % batch_size
    expected = [batch_size] * (len(lengths) // batch_size) + ([rest] if rest else [])
    assert sorted(map(len, steps), reverse=True) == expected
    assert order.steps_per_epoch == len(expected)
    assert grouped or [len(step) for step in steps] == expected
    # whatever was asked for before it
    assert [
        Order(lengths, batch_size, seed, grouped).examples(epoch * len(steps) + n) for n in range(len(steps))
    ] == steps


@pytest.mark.parametrize("grouped", [False, True])
def test_each_epoch_and_each_seed_has_an_order_of_its_own(grouped: bool) -> None:
    lengths = tuple(1 + i % 3 for i in range(50))
    orders = [epoch_of(Order(lengths, 4, seed, grouped), epoch) for seed in range(20) for epoch in range(20)]
    assert len(set(map(tuple, orders))) == len(orders)
    first = Counter(flat(steps)[0] for steps in orders)
    assert len(first) > 40  # so that any example may be the first
    assert max(first.values()) < 40
    assert len({frozenset(steps[0]) for steps in orders}) > 390  # and come together with any other


PROGRAM = """
from minopt.training.batches import Order, seed_of
for grouped in (False, True):
    order = Order(tuple(range(1, 400)), 3, 7, grouped)
    print([order.microbatches(step, 2) for step in (300, 0, 1, 133, 400)], seed_of(7, 1))
"""


def test_a_fresh_process_has_the_same_order() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=100,
        env={"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    lines = []
    for grouped in (False, True):
        order = Order(tuple(range(1, 400)), 3, 7, grouped)
        lines.append(f"{[order.microbatches(step, 2) for step in (300, 0, 1, 133, 400)]} {seed_of(7, 1)}")
    assert done.stdout.splitlines() == lines


@settings(deadline=None)
@given(lengths=lengths_of, batch_size=st.integers(1, 40), count=st.integers(1, 12), seed=seeds, grouped=st.booleans())
def test_microbatches_share_a_step_evenly_in_examples_and_in_tokens(
    lengths: tuple[int, ...], batch_size: int, count: int, seed: int, grouped: bool
) -> None:
    order = Order(lengths, batch_size, seed, grouped)
    for step in range(order.steps_per_epoch):
        dealt = order.microbatches(step, count)
        assert len(dealt) == count
        assert sorted(i for part in dealt for i in part) == sorted(order.examples(step))
        sizes = [len(part) for part in dealt]
        assert max(sizes) - min(sizes) <= 1
        tokens = [sum(lengths[i] for i in part) for part in dealt]
        assert max(tokens) - min(tokens) <= max(lengths[i] for i in order.examples(step))
        assert dealt == Order(lengths, batch_size, seed, grouped).microbatches(step, count)


def padding(order: Order) -> float:
    """The part of the padded rows of an epoch that holds nothing."""
    steps = [[order.lengths[i] for i in step] for step in epoch_of(order, 0)]
    return 1 - sum(map(sum, steps)) / sum(len(step) * max(step) for step in steps)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_grouped_examples_need_far_less_padding(batch_size: int) -> None:
    lengths = tuple((20 + 280 * torch.rand(3001, generator=torch.Generator().manual_seed(0))).long().tolist())
    shuffled, grouped = (padding(Order(lengths, batch_size, 0, grouped)) for grouped in (False, True))
    assert shuffled > 0.2
    assert grouped < 0.05


# --- seeds


def test_seeds_of_near_numbers_have_nothing_in_common() -> None:
    parts = [(a, b) for a in range(40) for b in range(40)]
    found = [seed_of(*p) for p in parts]
    assert len({*found, seed_of(), *map(seed_of, range(2000))}) == len(found) + 2001
    assert seed_of(1, 23) != seed_of(12, 3)
    assert all(0 <= seed < 2**63 for seed in found)
    for a, b in pairwise(found):
        assert 10 < bin(a ^ b).count("1") < 53
    torch.Generator().manual_seed(max(found))


# --- batches


def tokens_of(pairs: list[tuple[int, int]]) -> Tokens:
    """Rows of a length and a start each; no token comes twice."""
    ends = torch.tensor([length for length, _ in pairs]).cumsum(0)
    ids = torch.arange(1, 1 + int(ends[-1]), dtype=torch.int32)
    return Tokens(ids, ends, torch.tensor([start for _, start in pairs]), 0, 0, 0, "")


def seen(batch: Batch) -> list[tuple[int, int]]:
    """Each learned token and the one that is read before it."""
    return list(zip(batch.input_ids.flatten()[batch.at].tolist(), batch.targets.tolist(), strict=True))


row_shapes = st.integers(2, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@settings(deadline=None)
@given(shapes=st.lists(row_shapes, min_size=1, max_size=8), data=st.data())
def test_packed_and_padded_rows_learn_the_same_tokens_from_the_same(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    tokens = tokens_of(shapes)
    indices = data.draw(st.permutations(range(len(shapes))))[: data.draw(st.integers(1, len(shapes)))]
    rows = [tokens.row(i) for i in indices]
    expected = [(int(ids[n - 1]), int(ids[n])) for ids, start in rows for n in range(start, len(ids))]
    packed, padded = (collate(tokens, indices, packed=packed) for packed in (True, False))
    lengths = [len(ids) - 1 for ids, _ in rows]
    for batch in (packed, padded):
        assert seen(batch) == expected
        assert (batch.input_ids.dtype, batch.targets.dtype) == (torch.long, torch.long)
        assert batch.tokens == sum(lengths)
        assert len(batch.targets) == tokens.learned(indices)
    assert padded.lengths is None
    assert list(padded.input_ids.shape) == [len(rows), max(lengths)]
    for row, (ids, _) in zip(padded.input_ids, rows, strict=True):
        assert row[: len(ids) - 1].tolist() == ids[:-1].tolist()
        assert not row[len(ids) - 1 :].any()
    if len(set(lengths)) == 1:  # then nothing is gained by one row
        assert packed.lengths is None
        assert torch.equal(packed.input_ids, padded.input_ids)
    else:
        assert packed.lengths == tuple(lengths)
        assert packed.input_ids.tolist() == [[i for ids, _ in rows for i in ids[:-1].tolist()]]


@pytest.mark.parametrize("packed", [True, False])
def test_no_examples_are_a_batch_from_which_nothing_is_learned(packed: bool) -> None:
    batch = collate(tokens_of([(3, 1)]), [], packed=packed)
    assert list(batch.input_ids.shape) == [1, 1]
    assert (batch.lengths, batch.at.tolist(), batch.targets.tolist(), batch.tokens) == (None, [], [], 0)
    assert batch.at.dtype == batch.targets.dtype == torch.long


def test_a_batch_moves_whole() -> None:
    batch = collate(tokens_of([(3, 1), (5, 2)]), [0, 1], packed=True)
    moved = batch.to(torch.device("meta"))
    assert (moved.lengths, moved.tokens) == (batch.lengths, batch.tokens) == ((2, 4), 6)
    for name in ("input_ids", "at", "targets"):
        there: Tensor = getattr(moved, name)
        assert there.is_meta
        assert there.shape == getattr(batch, name).shape
    assert all(torch.equal(getattr(batch.to(torch.device("cpu")), n), getattr(batch, n)) for n in ("input_ids", "at"))

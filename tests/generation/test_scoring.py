"""Log-probabilities of given tokens are those of transformers' model, however they are batched, shared or windowed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minopt import OPT
from minopt.generation import scoring
from minopt.generation.scoring import greedy_logprobs, token_logprobs
from tests.conftest import KINDS, SIZE, build_ours, build_reference

LIMIT, V = SIZE["max_position_embeddings"], SIZE["vocab_size"]
NEVER = 10**9

Pair = tuple[Any, OPT]


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """A reference of each kind, and ours with its weights."""
    reference = build_reference(request.param)
    return reference, build_ours(reference)


@pytest.fixture(scope="module")
def model() -> OPT:
    """Any one, where the kind does not matter."""
    return build_ours(build_reference("125m"))


def random_rows(lengths: list[int], shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Rows of random ids, the first ``shared`` of them common to all."""
    draw = random.Random(seed)
    common = [draw.randrange(V) for _ in range(shared)]
    return [common + [draw.randrange(V) for _ in range(length - shared)] for length in lengths]


@torch.no_grad()
def of_transformers(reference: Any, row: list[int], start: int) -> Tensor:
    """One row alone: plain forward, log_softmax, gather."""
    ids = torch.tensor([row])
    logprobs = reference(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[start - 1 :, 0]


def assert_as_transformers(pair: Pair, rows: list[list[int]], starts: list[int]) -> None:
    reference, ours = pair
    found = token_logprobs(ours, rows, starts)
    assert len(found) == len(rows)
    for row, start, got in zip(rows, starts, found, strict=True):
        expected = of_transformers(reference, row, start)
        assert (got.dtype, got.device.type, got.shape) == (torch.float32, "cpu", expected.shape)
        assert got.numel() == 0 or (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def spy_on_reads(model: OPT, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that fills with the shapes of ids that the model reads."""
    reads, read = [], model.hidden_states

    def spied(input_ids: Tensor, *args: Any, **options: Any) -> Tensor:
        reads.append(tuple(input_ids.shape))
        return read(input_ids, *args, **options)

    monkeypatch.setattr(model, "hidden_states", spied)
    return reads


@pytest.mark.parametrize("shared", [1, NEVER])
@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize(
    ("lengths", "common", "starts"),
    [
        ([12], 0, [1]),
        ([1], 0, [1]),
        ([2, 1, 2], 0, [1, 1, 1]),
        ([LIMIT, 3, 17, 1], 0, [1, 1, 1, 1]),
        ([9, 20, 5], 0, [4, 19, 5]),
        ([30, 30, 30], 20, [20, 20, 20]),
        ([30, 41, LIMIT], 20, [1, 1, 1]),
        ([22, 30, 26], 20, [22, 25, 23]),
        ([22, 30, 26], 20, [12, 25, 21]),
        ([20, 30], 20, [20, 20]),
        ([20, 20, 20], 20, [3, 20, 7]),
        ([5, 5], 5, [5, 5]),
    ],
)
def test_log_probabilities_are_those_of_transformers(
    pair: Pair, lengths: list[int], common: int, starts: list[int], chunk: int, shared: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Unequal rows as one batch; what they begin with read once or not, logits in pieces or at once."""
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    monkeypatch.setattr(scoring, "SHARED", shared)
    assert_as_transformers(pair, random_rows(lengths, common), starts)


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_rows_and_starts_score_as_each_row_alone(data: st.DataObject, model: OPT) -> None:
    """Ids of three tokens only, so that rows begin alike by chance, repeat, and hold each other."""
    rows = data.draw(st.lists(st.lists(st.integers(4, 6), min_size=1, max_size=12), min_size=1, max_size=5))
    starts = [data.draw(st.integers(1, len(row))) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SHARED", data.draw(st.integers(1, 12)))
        patch.setattr(scoring, "CHUNK", data.draw(st.integers(1, 12)))
        found = token_logprobs(model, rows, starts)
    for row, start, got in zip(rows, starts, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row]))[0, :-1].log_softmax(-1)
        expected = alone.gather(1, torch.tensor(row)[1:, None])[start - 1 :, 0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_token_later_or_another_start_would_be_seen(pair: Pair) -> None:
    """The comparison above is able to fail: a beginning read as one token less, or rows moved by one, differ."""
    (row,) = random_rows([20])
    right = of_transformers(pair[0], row, 2)
    assert (right - of_transformers(pair[0], row[1:], 1)).abs().max() > 1e-3
    assert (right[1:] - right[:-1]).abs().max() > 1e-3


def test_a_common_beginning_is_read_once_where_that_pays(model: OPT, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = spy_on_reads(model, monkeypatch)
    token_logprobs(model, random_rows([20, 24, 22], shared=16), [16] * 3)
    assert reads == [(1, 16), (3, 7)]
    reads.clear()
    token_logprobs(model, random_rows([20, 24, 22], shared=15), [15] * 3)  # saves 30 tokens: fewer than SHARED
    assert (scoring.SHARED, reads) == (32, [(3, 23)])
    reads.clear()
    token_logprobs(model, random_rows([40]), [1])  # a row alone shares with none
    assert reads == [(1, 39)]


def test_logits_of_so_many_positions_are_in_memory_at_once_and_none_before_a_start(
    model: OPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, head = [], model.head

    def spied(hidden: Tensor) -> Tensor:
        sizes.append(hidden.numel() // hidden.shape[-1])
        return head(hidden)

    monkeypatch.setattr(model, "head", spied)
    monkeypatch.setattr(scoring, "CHUNK", 8)
    token_logprobs(model, random_rows([30, 12]), [20, 3])
    assert max(sizes) <= 8
    assert sum(sizes) == 10 + 9


def test_scores_are_float32_whatever_the_model_and_need_no_gradient() -> None:
    reference = build_reference("125m")
    (row,) = random_rows([20])
    expected = of_transformers(reference, row, 1)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 1e-5)):
        (got,) = token_logprobs(build_ours(reference).to(dtype), [row], [1])
        assert (got.dtype, got.requires_grad) == (torch.float32, False)
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_the_most_probable_tokens_are_marked_and_the_last_may_lie_behind_the_positions(pair: Pair) -> None:
    reference, ours = pair
    rows = random_rows([LIMIT, LIMIT, 9], shared=5)
    for row in rows:
        row[7] = int(reference(torch.tensor([row[:7]])).logits[0, -1].argmax())  # both kinds occur
        row.append(int(reference(torch.tensor([row])).logits[0, -1].argmax()))
    found = greedy_logprobs(ours, rows, [1, 3, 2])
    for row, start, (logprobs, are_best) in zip(rows, [1, 3, 2], found, strict=True):
        best = reference(torch.tensor([row[:-1]])).logits[0].argmax(-1)
        assert are_best.tolist() == (best == torch.tensor(row[1:]))[start - 1 :].tolist()
        assert are_best[[7 - start, -1]].all()
        assert not are_best.all()
        (expected,) = token_logprobs(ours, [row[:-1]], [start])
        assert torch.allclose(logprobs[:-1], expected, atol=1e-4)
    with pytest.raises(ValueError, match=rf"text: {LIMIT + 2} tokens, the model has {LIMIT} positions"):
        greedy_logprobs(ours, [[5] * (LIMIT + 2)], [1])


@pytest.mark.parametrize(
    ("rows", "starts", "message"),
    [
        ([[5] * 4, [5] * (LIMIT + 1)], [1, 1], rf"text: {LIMIT + 1} tokens, the model has {LIMIT} positions\. Shorten"),
        ([[5, 6], []], [1, 1], r"starts: expected 1 to the row's 0 tokens, got 1\."),
        ([[5, 6], [5, 6]], [1, 0], r"starts: expected 1 to the row's 2 tokens, got 0\."),
        ([[5, 6]], [3], r"starts: expected 1 to the row's 2 tokens, got 3\."),
        ([[5, 6], [5, V]], [1, 1], rf"ids: expected 0 to {V - 1}, got {V}\. Do the tokenizer and the model belong"),
        ([[5, -1, V]], [1], rf"ids: expected 0 to {V - 1}, got -1\."),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    model: OPT, rows: list[list[int]], starts: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = spy_on_reads(model, monkeypatch)
    with pytest.raises(ValueError, match=message):
        token_logprobs(model, rows, starts)
    assert reads == []

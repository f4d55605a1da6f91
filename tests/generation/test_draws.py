"""Draws: by their probabilities, and for two models with one random number mostly the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minopt.generation.draws import draw, splitmix64, uniform


def numbers(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_generator_is_splitmix64() -> None:
    """Values as published for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]  # fmt: skip
    assert [number % 2**64 for number in splitmix64(torch.tensor([[1234567]]), 5)[0].tolist()] == published


def test_numbers_are_uniform_and_those_of_two_places_independent() -> None:
    found = uniform((numbers(2000) * 2**53).long(), 40)
    assert 0 < found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    cells = torch.bincount((found * 100).long().flatten(), minlength=100)
    assert abs(((cells - 800.0) ** 2 / 800).sum() - 99) < 4 * (2 * 99) ** 0.5
    assert torch.corrcoef(found.T).sub(torch.eye(40)).abs().max() < 0.1


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 7, 10, 30, 101])
def test_each_token_is_drawn_by_its_probability(vocab_size: int) -> None:
    """Chi-square, also of vocabularies that no groups of one size divide; and it would see temperature 1.15."""
    scores = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    scores[vocab_size // 2 :: 4] = -torch.inf if vocab_size > 3 else 0.0
    scores[0] = 1.0
    counts = torch.bincount(draw(scores.expand(40_000, -1), numbers(40_000)), minlength=vocab_size)
    for temperature, fits in ((1.0, True), (1.15, vocab_size == 1)):
        expected = 40_000 * (scores / temperature).softmax(0)
        assert counts[expected == 0].sum() == 0
        kept, freedom = expected > 5, int((expected > 5).sum()) - 1
        chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
        assert (chi - freedom < 4 * (2 * freedom) ** 0.5 + 1e-6) == fits


def test_rows_that_have_no_token_draw_one_that_is_there() -> None:
    scores = torch.stack([torch.full((7,), value) for value in (-torch.inf, torch.nan, torch.inf)])
    assert 0 <= draw(scores, numbers(3)).min() <= draw(scores, numbers(3)).max() < 7


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_two_models_with_one_number_mostly_draw_the_same(noise: float) -> None:
    """Nearly as often as is possible; by the inverse of cumulated probabilities they differ several times as often."""
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0))
    other = scores + noise * torch.randn(500, generator=torch.Generator().manual_seed(1))
    p, q, at = scores.softmax(0), other.softmax(0), numbers(20_000)
    distance = float((p - q).abs().sum() / 2)
    ours, theirs = (draw(row.expand(len(at), -1), at) for row in (scores, other))
    differ = float((ours != theirs).float().mean())
    assert distance - 0.01 < differ < 1.1 * 2 * distance / (1 + distance) + 0.01
    inverses = [torch.searchsorted(row.double().cumsum(0), at) for row in (p, q)]
    assert (inverses[0] != inverses[1]).float().mean() > 1.5 * differ
    assert float((ours != draw(scores.expand(len(at), -1), numbers(len(at), 1))).float().mean()) > 0.9

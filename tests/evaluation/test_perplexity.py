"""Perplexity in windows is what the published protocol gives with transformers' model, and its text the hub's rows."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minopt import OPT
from minopt.distributed import World
from minopt.evaluation.perplexity import PerplexityResult, wikitext_text, window_perplexity
from tests.conftest import SIZE, build_ours, build_reference

LIMIT = SIZE["max_position_embeddings"]


def random_ids(length: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(SIZE["vocab_size"]) for _ in range(length)]


@pytest.fixture(scope="module")
def model() -> OPT:
    """Any one, where the kind does not matter."""
    return build_ours(build_reference("125m"))


@torch.no_grad()
def protocol(reference: Any, ids: list[int], window: int) -> float:
    """The published loop: mean cross-entropy of each window times its length, by the total length."""
    total, windows = 0.0, len(ids) // window
    for i in range(windows):
        batch = torch.tensor([ids[i * window : (i + 1) * window]])
        logits = reference(batch).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:]).item() * window
    return math.exp(total / (windows * window))


@torch.no_grad()
def strided_recipe(reference: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """As transformers' documentation has it: perplexity, and how many tokens it is of."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        input_ids = torch.tensor([ids[begin:end]])
        labels = input_ids.clone()
        labels[:, : -(end - previous_end)] = -100
        scored = int((labels[:, 1:] != -100).sum())  # the loss shifts labels, which drops the very first
        total += reference(input_ids, labels=labels).loss.item() * scored
        count, previous_end = count + scored, end
        if end == len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(150, 16, 15), (60, 16, 1), (17, 16, 8), (16, 16, 8), (2, 2, 1), (LIMIT + 1, None, 1), (7, 16, None)],
)
def test_overlapping_windows_and_short_texts_are_scored_as_by_the_strided_recipe(
    kind: str, length: int, window: int | None, stride: int | None
) -> None:
    reference, ids = build_reference(kind), random_ids(length)
    result = window_perplexity(build_ours(reference), ids, window, stride)
    expected, count = strided_recipe(reference, ids, window or LIMIT, stride or window or LIMIT)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == count == length - 1


@pytest.mark.parametrize("stride", [None, 5])
def test_processes_share_windows(model: OPT, stride: int | None) -> None:
    shares = []

    class Alone(World):
        def sum(self, *values: float) -> list[float]:
            shares.append(values)
            return list(values)

    ids = random_ids(16 * 7 + 3)
    for rank in range(3):
        window_perplexity(model, ids, 16, stride, Alone(rank, 3, model.device))
    alone = window_perplexity(model, ids, 16, stride)
    total, tokens = map(sum, zip(*shares, strict=True))
    assert (math.exp(-total / tokens), tokens) == (pytest.approx(alone.perplexity, rel=1e-6), alone.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "window", "windows"), [(16 * 5 + 7, 16, 5), (16, 16, 1), (11, 2, 5),
                                                           (LIMIT * 2 + 5, None, 2)])  # fmt: skip
def test_it_is_the_published_protocol(
    kind: str, dtype: torch.dtype, length: int, window: int | None, windows: int
) -> None:
    reference = build_reference(kind, dtype=dtype)
    ids, size = random_ids(length), window or LIMIT
    result = window_perplexity(build_ours(reference), ids, window)
    assert result == PerplexityResult(result.perplexity, windows * (size - 1), windows)
    assert result.perplexity == pytest.approx(protocol(reference, ids, size), rel=1e-5)


def test_full_windows_count_to_their_last_token_and_the_tail_does_not(model: OPT) -> None:
    ids = random_ids(16 * 3 + 15)
    result = window_perplexity(model, ids, 16)
    assert result == window_perplexity(model, tuple(ids[: 16 * 3]), 16)
    for last in (15, 47):
        changed = [*ids[:last], (ids[last] + 1) % SIZE["vocab_size"], *ids[last + 1 :]]
        assert abs(window_perplexity(model, changed, 16).perplexity / result.perplexity - 1) > 1e-3


@pytest.mark.parametrize(
    ("length", "window", "stride", "message"),
    [
        (1, None, None, r"^text: expected at least two tokens, got 1\. Give it a longer one\.$"),
        (99, 65, None, r"^window: expected 2 to the model's 64 positions, got 65\. Change it\.$"),
        (99, 16.0, None, r"^window: expected 2 to the model's 64 positions, got 16\.0\."),
        (99, 16, 17, r"^stride: expected 1 to the window's 16 tokens, got 17\. Change it\.$"),
        (99, 16, 0, r"^stride: expected 1 to the window's 16 tokens, got 0\."),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_numbers(
    model: OPT, length: int, window: Any, stride: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        window_perplexity(model, random_ids(length), window, stride)


def test_the_raw_file_gives_the_hubs_rows_joined(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    raw = " \n = Robert Boulter = \n \n Robert is \u2026 an\u2028actor . \x85 He \n\n \t \n In 2002 \u00e9 @-@ x \n"
    path.write_bytes(raw.encode())
    with path.open(encoding="utf-8") as lines:
        text = wikitext_text(lines)
    assert text == "\n\n".join(
        ["", " = Robert Boulter = \n", "", " Robert is \u2026 an\u2028actor . \x85 He \n", "", "",
         " In 2002 \u00e9 @-@ x \n"]
    )  # fmt: skip

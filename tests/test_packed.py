"""Several texts in one row: each of them gives what it gives alone, forwards and backwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import minopt.attention as attention_module
from minopt import OPT
from minopt.masks import Packed
from minopt.training.config import TrainingConfig
from minopt.training.optim import training_layers
from tests.conftest import SIZE, build_ours, lively

POSITIONS = SIZE["max_position_embeddings"]
ROWS = [(5, 1, 9, 3), (12,), (1, 1, 1), (POSITIONS, 2, POSITIONS)]

Result = tuple[Tensor, dict[str, Tensor]]


def texts_of(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, SIZE["vocab_size"], (1, n), generator=generator) for n in lengths]


def build(kind: str, dtype: torch.dtype = torch.float64) -> OPT:
    """A model that trains, without dropout."""
    return build_ours(lively(kind, dtype, dropout=0.0)).train()


def backward(model: OPT, h: Tensor) -> Result:
    """Hidden states, and the gradients of a weighted sum of them."""
    model.zero_grad()
    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (h * weights).sum().backward()
    return h.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def together(model: OPT, lengths: Sequence[int]) -> Result:
    return backward(model, model.hidden_states(torch.cat(texts_of(lengths), 1), Packed(tuple(lengths))))


def alone(model: OPT, lengths: Sequence[int]) -> Result:
    return backward(model, torch.cat([model.hidden_states(ids) for ids in texts_of(lengths)], 1))


def errors(ours: Result, theirs: Result) -> tuple[float, float]:
    """Largest difference of hidden states and of gradients, each relative to the largest number."""
    assert ours[0].shape == theirs[0].shape
    assert ours[1].keys() == theirs[1].keys()
    mine, other = (torch.cat([g.flatten() for g in result[1].values()]) for result in (ours, theirs))
    pairs = ((ours[0], theirs[0]), (mine, other))
    return tuple(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_texts_in_one_row_give_the_hidden_states_and_gradients_of_each_alone(
    kind: str, lengths: tuple[int, ...]
) -> None:
    model = build(kind)
    packed, separate = together(model, lengths), alone(model, lengths)
    assert len(packed[1]) == len(list(model.parameters()))
    assert max(errors(packed, separate)) <= 1e-10


@torch.no_grad()
def test_texts_in_one_row_give_the_logits_of_transformers_for_each_alone(kind: str) -> None:
    reference, lengths = lively(kind), ROWS[0]
    texts = texts_of(lengths)
    theirs = torch.cat([reference(ids).logits for ids in texts], 1)
    ours = build_ours(reference)(torch.cat(texts, 1), Packed(lengths))
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= 1e-10


def leaking(model: OPT, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A mistake: texts see those before them in the row."""
    return model.hidden_states(ids, None, torch.cat([torch.arange(n) for n in lengths]))


def counting_on(model: OPT, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A mistake: positions do not begin anew."""
    return model.hidden_states(ids, Packed(lengths), torch.arange(sum(lengths)))


@pytest.mark.parametrize("mistake", [leaking, counting_on])
def test_a_mask_or_positions_of_the_whole_row_would_be_found(kind: str, mistake: Callable[..., Tensor]) -> None:
    model, lengths = build(kind), ROWS[0]
    wrong = backward(model, mistake(model, torch.cat(texts_of(lengths), 1), lengths))
    assert min(errors(wrong, alone(model, lengths))) > 1e-2


def test_recomputed_layers_give_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], attention_module._attend_apart

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(attention_module, "_attend_apart", counted)
    model = build(kind, torch.float32)
    h, gradients = together(model, ROWS[0])
    once = len(calls)
    with training_layers(model, TrainingConfig(output_dir="x", recompute=True)):
        again, recomputed = together(model, ROWS[0])
    assert (once, len(calls)) == (len(model.layers), 3 * len(model.layers))
    assert torch.equal(h, again)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


def test_texts_in_one_row_are_as_close_to_float32_under_autocast_as_each_alone(kind: str) -> None:
    model = build(kind, torch.float32)

    def distances(ours: Result, theirs: Result) -> list[float]:
        mine, other = (torch.cat([g.flatten() for g in result[1].values()]) for result in (ours, theirs))
        return [((a - b).norm() / b.norm()).item() for a, b in ((ours[0], theirs[0]), (mine, other))]

    exact = alone(model, ROWS[0])
    with torch.autocast("cpu", torch.bfloat16):
        packed, separate = together(model, ROWS[0]), alone(model, ROWS[0])
        wrong = backward(model, leaking(model, torch.cat(texts_of(ROWS[0]), 1), ROWS[0]))
    for ours, theirs, control in zip(
        distances(packed, exact), distances(separate, exact), distances(wrong, exact), strict=True
    ):
        assert 0 < ours <= 1.5 * theirs < control / 2
    assert all(gradient.dtype == torch.float32 for gradient in packed[1].values())


@pytest.mark.parametrize(
    ("shape", "lengths", "cached"),
    [((2, 6), (6,), False), ((2, 6), (4, 2), False), ((1, 6), (4, 2), True), ((1, 6), (4, 3), False),
     ((1, 6), (4, 1), False), ((1, 6), (6, 0), False), ((1, 6), (8, -2), False), ((1, 6), (), False)],
    ids=str,
)  # fmt: skip
def test_what_is_no_row_of_packed_texts_is_refused(
    shape: tuple[int, int], lengths: tuple[int, ...], cached: bool
) -> None:
    model = build_ours(lively("125m"))
    cache = model.new_cache(shape[0], 16) if cached else None
    message = (
        "attention_mask: expected one row without a cache, as long as the packed texts together, got "
        f"{list(shape)} ids and texts of {list(lengths)}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(torch.full(shape, 5), Packed(lengths), cache=cache)


def test_only_a_text_alone_must_fit_the_positions() -> None:
    model = build_ours(lively("125m"))
    assert model(torch.full((1, 2 * POSITIONS), 5), Packed((POSITIONS, POSITIONS))).shape[1] == 2 * POSITIONS
    with pytest.raises(ValueError, match=r"^input_ids: .* = 65 positions, the model has 64\. Shorten the input\.$"):
        model(torch.full((1, 68), 5), Packed((3, POSITIONS + 1)))


def test_ends_that_a_gpu_keeps_serve_training_after_inference() -> None:
    packed = Packed((3, 5))
    with torch.inference_mode():
        assert packed.cu_seqlens(torch.device("cpu")).tolist() == [0, 3, 8]
    assert not packed.cu_seqlens(torch.device("cpu")).is_inference()

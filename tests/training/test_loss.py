"""The summed cross-entropy is torch's, with the gradients of torch, and without all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minopt.training import loss as module
from minopt.training.batches import Row, collate
from minopt.training.loss import ModelWithLoss, cross_entropy_sum
from tests.conftest import SIZE, build_ours, lively

CHUNK, E, V = 8, 4, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", CHUNK)


def inputs(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a token table, and targets, some of which come twice."""
    generator = torch.Generator().manual_seed(count)
    h = torch.randn(count, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return h, weight, torch.randint(0, V // 5, (count,), generator=generator)


def plain(h: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(F.linear(h, weight), targets, reduction="sum", label_smoothing=label_smoothing)


@pytest.mark.parametrize("learned", [("h", "weight"), ("h",), ("weight",), ()], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_value_and_gradients_are_those_of_torch_and_what_is_frozen_gets_none(
    count: int, smoothing: float, learned: tuple[str, ...]
) -> None:
    h, weight, targets = inputs(count)
    theirs = plain(h, weight, targets, smoothing)
    expected = dict(zip(("h", "weight"), torch.autograd.grad(3 * theirs, (h, weight)), strict=True))
    leaves = {"h": h.detach(), "weight": weight.detach()}
    for name in learned:
        leaves[name].requires_grad_()
    ours = cross_entropy_sum(**leaves, targets=targets, label_smoothing=smoothing)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-10)
    assert ours.requires_grad == bool(learned)
    if learned:
        (3 * ours).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in learned)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_products_in_bfloat16_give_a_loss_in_float32_and_gradients_in_the_weights_dtype(
    smoothing: float, autocast: bool
) -> None:
    h, weight, targets = inputs(5 * CHUNK, torch.float32 if autocast else torch.bfloat16)
    wide_h, wide_weight = (t.detach().float().requires_grad_() for t in (h, weight))
    exact = plain(wide_h, wide_weight, targets, smoothing)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = cross_entropy_sum(h, weight, targets, smoothing)
        rounded = F.cross_entropy(F.linear(h, weight).float(), targets, reduction="sum", label_smoothing=smoothing)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(rounded.item(), rel=1e-5)  # of the same rounded logits
    assert ours.item() != pytest.approx(exact.item(), rel=1e-6)
    right = torch.autograd.grad(exact, (wide_h, wide_weight))
    for gradient, wanted in zip(torch.autograd.grad(ours, (h, weight)), right, strict=True):
        assert gradient.dtype == h.dtype
        assert (gradient - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_float16_keeps_the_gradients_of_improbable_tokens(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is scaled behind this function, where float16 would have taken them for 0."""
    monkeypatch.setattr(module, "has_bfloat16", lambda device: has_bfloat16)
    weight, h = torch.zeros(8, 4), torch.ones(3, 4, requires_grad=True)
    weight[0] = 4.0
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        cross_entropy_sum(h, weight, torch.zeros(3, dtype=torch.long)).backward()
    assert weight.grad is not None
    p = torch.tensor([16.0] + 7 * [0.0]).softmax(0)  # 1e-7 each
    assert p[1] < 2**-23
    torch.testing.assert_close(weight.grad[1:], (3 * p[1:, None]).expand(7, 4), rtol=0.02, atol=0)


class _Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operator gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_more_than_a_chunk_of_logits_is_ever_in_memory(smoothing: float) -> None:
    largest = {}
    for function in (cross_entropy_sum, plain):
        h, weight, targets = inputs(5 * CHUNK)
        with _Largest() as seen:
            function(h, weight, targets, smoothing).backward()
        largest[function] = seen.numbers
    assert largest == {cross_entropy_sum: CHUNK * V, plain: 5 * CHUNK * V}


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_gives_the_loss_of_transformers_over_its_labels(kind: str, packed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [Row(torch.randint(3, SIZE["vocab_size"], (length,), generator=generator).int(), start)
            for length, start in ((9, 4), (2, 1), (14, 13), (30, 2))]  # fmt: skip
    rows[0].ids[1], rows[3].ids[5:9] = 1, 1  # padding's id, whose row has no gradient of lookups
    batch = collate(rows, torch.device("cpu"), packed=packed)
    assert (batch.lengths is not None) == packed
    reference = lively(kind)
    model = build_ours(reference)
    loss = ModelWithLoss(model)(batch)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for ids, start in ((row.ids.long(), row.start) for row in rows):
        labels = torch.where(torch.arange(len(ids)) < start, -100, ids)
        output = reference(ids[None], labels=labels[None])
        own = F.cross_entropy(output.logits[0, :-1], labels[1:], reduction="sum")
        assert own.item() == pytest.approx(output.loss.item() * (len(ids) - start), rel=1e-5)  # theirs is in float32
        total = total + own
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    theirs, ours = reference.model.decoder.embed_tokens.weight.grad, model.embed_tokens.weight.grad
    assert ours is not None  # of both ends: the table is the head
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= 1e-10


def test_a_batch_of_nothing_gives_no_loss_and_gradients_of_0() -> None:
    model = build_ours(lively("125m"))
    loss = ModelWithLoss(model)(collate([], torch.device("cpu"), packed=True), label_smoothing=0.1)
    assert loss.item() == 0
    loss.backward()  # as all processes must, or those that have examples would wait
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

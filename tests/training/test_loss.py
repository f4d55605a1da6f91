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


def close(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
def test_value_and_gradients_are_those_of_torch(count: int, smoothing: float) -> None:
    h, weight, targets = inputs(count)
    ours, theirs = cross_entropy_sum(h, weight, targets, smoothing), plain(h, weight, targets, smoothing)
    assert close(ours, theirs)
    mine = torch.autograd.grad(3 * ours, (h, weight))
    for a, b in zip(mine, torch.autograd.grad(3 * theirs, (h, weight)), strict=True):
        assert close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [{"h"}, {"weight"}, {"h", "weight"}], ids=sorted)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: set[str], smoothing: float) -> None:
    h, weight, targets = inputs(2 * CHUNK + 1)
    expected = dict(zip(("h", "weight"), torch.autograd.grad(plain(h, weight, targets, smoothing), (h, weight)),
                        strict=True))  # fmt: skip
    leaves = {"h": h.detach(), "weight": weight.detach()}
    learned = leaves.keys() - frozen
    for name in learned:
        leaves[name].requires_grad_()
    loss = cross_entropy_sum(**leaves, targets=targets, label_smoothing=smoothing)
    assert close(loss.detach(), plain(h, weight, targets, smoothing).detach())
    assert loss.requires_grad == bool(learned)
    if learned:
        loss.backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad
        assert (gradient is not None) == (name in learned)
        assert gradient is None or close(gradient, expected[name])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_autocast_the_products_are_in_bfloat16_and_the_rest_in_float32(smoothing: float) -> None:
    h, weight, targets = inputs(5 * CHUNK, torch.float32)
    exact = torch.autograd.grad(plain(h, weight, targets, smoothing), (h, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = cross_entropy_sum(h, weight, targets, smoothing), plain(h, weight, targets, smoothing)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)  # of the same rounded logits
    assert ours.item() != pytest.approx(plain(h, weight, targets, smoothing).item(), rel=1e-6)
    for gradient, right in zip(torch.autograd.grad(ours, (h, weight)), exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() <= 1e-2 * right.norm()


def test_a_bfloat16_model_gets_a_float32_loss_and_bfloat16_gradients() -> None:
    h, weight, targets = inputs(5 * CHUNK, torch.bfloat16)
    wide_h, wide_weight = (t.detach().float().requires_grad_() for t in (h, weight))
    loss, expected = cross_entropy_sum(h, weight, targets), plain(wide_h, wide_weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    exact = torch.autograd.grad(expected, (wide_h, wide_weight))
    for gradient, right in zip(torch.autograd.grad(loss, (h, weight)), exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - right).norm() <= 1e-2 * right.norm()


class _Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

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


def made_of(lengths: list[int], starts: list[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, SIZE["vocab_size"], (length,), generator=generator).int() for length in lengths]
    return [Row(row, start) for row, start in zip(ids, starts, strict=True)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_gives_the_loss_of_transformers_over_its_labels(kind: str, packed: bool) -> None:
    rows = made_of([9, 2, 14, 30], [4, 1, 13, 2])
    batch = collate(rows, torch.device("cpu"), packed=packed)
    assert (batch.lengths is not None) == packed
    reference = lively(kind)
    model = build_ours(reference)
    loss = ModelWithLoss(model)(batch)
    loss.backward()

    total, rounded = torch.zeros((), dtype=torch.float64), 0.0
    for ids, start in ((row.ids.long(), row.start) for row in rows):
        labels = torch.where(torch.arange(len(ids)) < start, -100, ids)
        output = reference(ids[None], labels=labels[None])
        rounded += output.loss.item() * (len(ids) - start)  # a mean, in float32
        total = total + F.cross_entropy(output.logits[0, :-1], labels[1:], reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(rounded, rel=1e-6)
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    theirs = reference.model.decoder.embed_tokens.weight.grad  # of both ends: the table is the head
    ours = model.embed_tokens.weight.grad
    assert ours is not None
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= 1e-10


def test_a_batch_of_nothing_gives_no_loss_and_gradients_of_0() -> None:
    model = build_ours(lively("125m"))
    loss = ModelWithLoss(model)(collate([], torch.device("cpu"), packed=True), label_smoothing=0.1)
    assert loss.item() == 0
    loss.backward()  # as all processes must, or those that have examples would wait
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_float16_keeps_the_gradients_of_improbable_tokens() -> None:
    """The loss is scaled behind this function, where float16 would have taken them for 0."""
    torch.manual_seed(0)
    weight = torch.zeros(8, 4, requires_grad=True)
    with torch.no_grad():
        weight[0] = 4.0
    h = torch.ones(3, 4, requires_grad=True)
    targets = torch.zeros(3, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        cross_entropy_sum(h, weight, targets).backward()
    assert weight.grad is not None
    p = torch.tensor([16.0] + 7 * [0.0]).softmax(0)  # 1e-7 each
    assert p[1] < 2**-23
    torch.testing.assert_close(weight.grad[1:], (3 * p[1:, None]).expand(7, 4), rtol=0.02, atol=0)

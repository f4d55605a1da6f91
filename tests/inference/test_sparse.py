"""Activations that are zeros are left out: the same results, tokens and weights as with the dense product."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minopt
from minopt import OPTConfig, int8
from minopt.inference import linear, sparse
from minopt.inference.fast import FastOPT
from minopt.inference.plan import plan_generation
from minopt.inference.sparse import FEW_ROWS, Sparse
from tests.conftest import build_ours, build_reference, lively, quantized_state

INPUTS, OUTPUTS = 96, 128
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 1e-6}


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call uses what is faster for large weights with many zeros alone."""
    monkeypatch.setattr(sparse, "_CALL_BYTES", 0)
    monkeypatch.setattr(sparse, "_SPEED", FEW_ROWS)


@pytest.fixture(params=["onednn", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the operators that this machine has, and without."""
    if request.param == "plain":
        monkeypatch.setattr(linear, "_works", lambda kind, dtype: False)
    return request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(count: int, share: float = 0.1) -> Tensor:
    """Rows of which a share is not zero."""
    return draw(1, count, INPUTS, seed=1).abs() * (draw(1, count, INPUTS, seed=3).argsort().argsort() < share * INPUTS)


def product_of(form: str, outputs: int = OUTPUTS, has_bias: bool = True) -> tuple[Any, Tensor, Tensor | None]:
    """A product in a dtype, its weight in that dtype or what an int8 one stands for, and its bias."""
    weight, bias, scale = draw(outputs, INPUTS), draw(outputs, seed=2) if has_bias else None, None
    if form == "int8":
        weight, scale = int8.quantize(weight)
    else:
        weight = weight.to(getattr(torch, form))
        bias = None if bias is None else bias.to(weight.dtype)
    product = sparse.for_zeros(linear.build_product(weight, bias, scale=scale), weight)
    return product, weight if scale is None else int8.dequantize(weight, scale), bias


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("outputs", [OUTPUTS, 100])  # 100 fill no block: they are copied
@pytest.mark.parametrize("form", TOLERANCES)
def test_results_are_those_of_all_numbers_multiplied(form: str, outputs: int, has_bias: bool, kernels: str) -> None:
    product, weight, bias = product_of(form, outputs, has_bias)
    for rows in (1, 2, FEW_ROWS):
        for share in (0.1, 1.0, 0.0):
            x = rows_of(rows, share).to(torch.float32 if form == "int8" else weight.dtype)
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            found = product(x)
            assert product._table is not None
            assert (found.dtype, found.shape) == (x.dtype, expected.shape)
            assert (found - expected).abs().max() <= TOLERANCES[form] * expected.abs().max()
    assert product(x[:, :0]).shape == (1, 0, outputs)
    x[0, 0, 5] = torch.nan
    assert product(x)[0, 0].isnan().all()


def test_float32_weights_are_not_copied_unless_their_layout_is_another_one(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, weight, bias = product_of("float32")
    product(x := rows_of(2))
    blocks = product._dense.blocks()
    assert (blocks is None) == (kernels == "plain")
    if blocks is not None:
        assert product._table._rows.data_ptr() == blocks.data_ptr()
        monkeypatch.setattr(product._dense, "blocks", lambda: blocks.flip(1))
        product._table = None
        torch.testing.assert_close(product(x), F.linear(x, weight, bias))
        assert product._table._rows.shape == (INPUTS, OUTPUTS)


def test_what_is_not_sparse_is_multiplied_densely_and_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_SPEED", 0.4)
    product, *_ = product_of("float32")
    some, many, events, dense, nonzero = rows_of(1, 0.2), rows_of(1, 0.9), [], product._dense, Tensor.nonzero
    product(some)
    monkeypatch.setattr(product, "_dense", lambda x: (events.append("dense"), dense(x))[1])
    monkeypatch.setattr(Tensor, "nonzero", lambda x: (events.append("look"), nonzero(x))[1])
    product(some)
    assert events == ["look"]
    for _ in range(sparse._WAIT + 2):
        product(many)
    assert events == ["look", "look", *["dense"] * (sparse._WAIT + 1), "look", "dense"]
    product(rows_of(FEW_ROWS + 1))  # a prompt: then it looks again
    del events[:]
    product(some)
    product(rows_of(4, 0.2))  # together too many
    assert events == ["look", "dense"]


def test_small_weights_and_other_activations_dtypes_and_devices_keep_their_product(monkeypatch: Any) -> None:
    for kind, dtype, expected in (("125m", torch.float32, True), ("galactica", torch.float32, False),
                                  ("125m", torch.float64, False), ("125m", torch.float16, False)):  # fmt: skip
        model = build_ours(build_reference(kind)).to(dtype)
        fc2 = FastOPT(model.config, model.state_dict().items()).layers[0]._fc2
        assert isinstance(fc2, Sparse) == expected
    dense = linear.Plain(draw(8, 8), None)
    assert sparse.for_zeros(dense, torch.empty(2048, 1024, device="meta")) is dense
    monkeypatch.undo()
    assert sparse.for_zeros(dense, torch.empty(128, 96)) is dense
    assert isinstance(sparse.for_zeros(dense, torch.empty(2048, 1024)), Sparse)


@pytest.mark.parametrize("missing", ["memory", "operator"])
def test_without_memory_or_operator_all_is_as_before(missing: str, monkeypatch: Any, caplog: Any) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no such operator")

    product, weight, _ = product_of("bfloat16")
    if missing == "memory":
        monkeypatch.setattr(sparse, "available_memory", lambda _: weight.nbytes)
    else:
        monkeypatch.setattr(torch, "embedding_bag", fail)
    x = rows_of(1).bfloat16()
    with caplog.at_level(logging.DEBUG, "minopt"):
        assert all(torch.equal(product(x), product._dense(x)) for _ in range(2 * sparse._WAIT))
    said = "Activations that are zeros are multiplied too: there is no memory or no operator for less."
    assert caplog.messages == [said]


def with_dense_products(model: Any) -> Any:
    """The model with whole products in place of sums; in int8 with one that does not round activations either."""
    for layer in model.layers:
        weight, scale = layer._fc2.weight()
        dense = layer._fc2._dense
        layer._fc2 = dense if scale is None else linear.WeightOnlyInt8(weight, scale, dense.bias)
    return model


@pytest.mark.parametrize("form", TOLERANCES)
@pytest.mark.parametrize("kind_of", ["125m", "350m"])
def test_generated_tokens_and_weights_are_the_dense_models(kind_of: str, form: str, kernels: str) -> None:
    plain = build_ours(lively(kind_of, torch.float32)).to(torch.bfloat16 if form == "bfloat16" else torch.float32)
    state = quantized_state(plain) if form == "int8" else plain.state_dict()
    fast: Any = FastOPT(plain.config, state.items())
    dense = with_dense_products(copy.deepcopy(fast))
    ids = torch.randint(3, plain.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(5))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for options in ({}, {"attention_mask": padded}, {"attention_mask": padded, "num_beams": 3}):
        found, expected = (minopt.generate(m, ids, max_new_tokens=15, **options).sequences for m in (fast, dense))
        assert form != "float32" or torch.equal(found, expected)  # rounding may part tokens, of fc1's inputs too
    assert all(layer._fc2._table is not None for layer in fast.layers)
    for model in (fast, pickle.loads(pickle.dumps(fast))):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        logits, tolerance = fast(ids[:1, :5]), 1e-4 if form == "float32" else 0.1
        torch.testing.assert_close(logits, dense(ids[:1, :5]), rtol=0, atol=tolerance)
        fast.layers[1]._fc2._table._rows.zero_()  # a negative control: these weights are what is used
        assert (fast(ids[:1, :5]) - logits).abs().max() > 2 * tolerance


def test_the_embedded_model_says_the_same() -> None:
    prompts = ["The ship", "It was a dark and stormy night when", "Alice"]
    lm: Any = minopt.load(minopt.DEMO, device="cpu")
    found = lm.generate(prompts, max_new_tokens=40)
    assert all(layer._fc2._table is not None for layer in lm.model.layers)
    with_dense_products(lm.model)
    assert lm.generate(prompts, max_new_tokens=40) == found


def test_a_plan_counts_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OPTConfig(hidden_size=OUTPUTS, ffn_dim=INPUTS, num_hidden_layers=3, num_attention_heads=4)
    for form in TOLERANCES:
        product, weight, _ = product_of(form)
        product(rows_of(1).to(torch.float32 if form == "int8" else weight.dtype))
        copied = product._table._rows.nbytes * (product._dense.blocks() is None)
        options: Any = {"quantize": "int8", "dtype": torch.float32} if form == "int8" else {"dtype": weight.dtype}
        with_zeros, without = (plan_generation(c, **options) for c in (config, OPTConfig(
            **vars(config) | {"activation_function": "gelu"})))  # fmt: skip
        assert (with_zeros.copies, without.copies) == (3 * copied, 0)
        assert with_zeros.total - without.total == 3 * copied

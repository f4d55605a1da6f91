"""The fast model is the plain one: the same logits, tokens and weights, whatever kernels the machine has."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minopt
from minopt import OPT, int8
from minopt.evaluation.perplexity import window_perplexity
from minopt.inference import compile as export
from minopt.inference import fast, linear
from minopt.inference.fast import FastOPT
from minopt.inference.linear import OUTLIERS_FROM
from minopt.model import ACTIVATIONS
from tests.conftest import build_ours, build_reference, lively, quantized_state

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def fast_of(model: OPT, *, quantize: bool = False) -> FastOPT:
    return FastOPT(model.config, (quantized_state(model) if quantize else model.state_dict()).items())


def ids_of(model: OPT, *shape: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest expected value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.fixture(params=["blocked", "onednn", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the operators that this machine has, on an Intel processor and on others, and without."""
    monkeypatch.setattr(linear, "_on_intel", lambda: request.param == "blocked")
    monkeypatch.setattr(linear.Blocked, "width", 16)
    if request.param == "plain":
        monkeypatch.setattr(linear, "_works", lambda kind, dtype: False)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_logits_are_those_of_transformers(kind: str, kernels: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = build_reference(kind)
    plain = build_ours(reference)
    fast = fast_of(plain.to(dtype))
    ids = ids_of(plain, 2, 7)
    with torch.no_grad():
        expected = reference(ids, attention_mask=PADDED).logits[PADDED.bool()]
        assert difference(fast(ids, PADDED)[PADDED.bool()], expected) < tolerance
        assert difference(fast(ids), reference(ids).logits) < tolerance


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers(activation: str, kernels: str) -> None:
    reference = build_reference("125m", activation_function=activation)
    plain = build_ours(reference)
    ids = ids_of(plain, 2, 7)
    with torch.no_grad():
        expected = reference(ids).logits
        assert difference(plain(ids), expected) < 1e-6
        assert difference(fast_of(plain)(ids), expected) < 1e-5
        assert difference(fast_of(build_ours(reference).to(torch.bfloat16))(ids), expected) < 5e-2
        state = quantized_state(plain)
        assert difference(FastOPT(plain.config, state.items())(ids), expected) < 0.2
        other = "tanh" if activation != "tanh" else "relu"
        wrong = build_ours(build_reference("125m", activation_function=other))
        assert difference(wrong(ids), expected) > 1e-3


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"])
def test_each_bias_and_weight_counts(part: str) -> None:
    """A negative control: the test above would see any of them lost or swapped."""
    plain = build_ours(build_reference("125m"))
    ids = ids_of(plain, 2, 7)
    for name in ("weight", "bias"):
        state = dict(plain.state_dict())
        key = f"layers.1.{part}.{name}"
        state[key] = torch.zeros_like(state[key])
        assert difference(FastOPT(plain.config, state.items())(ids), plain(ids)) > 1e-3


def test_every_split_into_prefill_and_steps_gives_the_same_logits(kind: str) -> None:
    fast = fast_of(build_ours(build_reference(kind)))
    ids = ids_of(fast, 2, 9)
    whole = fast(ids)
    for split in range(1, 9):
        cache = fast.new_cache(2, 9)
        parts = [fast(ids[:, :split], cache=cache)]
        parts += [fast(ids[:, i : i + 1], cache=cache) for i in range(split, 9)]
        assert difference(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "no_repeat_ngram_size": 2}, {"do_sample": True, "seed": 3}])
def test_generated_tokens_are_the_plain_models(kind: str, kernels: str, options: dict[str, Any]) -> None:
    plain = build_ours(lively(kind, torch.float32))
    fast = fast_of(plain)
    ids = ids_of(plain, 2, 7)
    for mask in (None, PADDED):
        expected = minopt.generate(plain, ids, mask, max_new_tokens=20, **options)
        assert torch.equal(minopt.generate(fast, ids, mask, max_new_tokens=20, **options).sequences, expected.sequences)


def test_the_embedded_model_says_the_same_with_and_without() -> None:
    prompts = ["The ship", "It was a dark and stormy night when", "Alice"]
    fast, plain = (minopt.load(minopt.DEMO, device="cpu", optimize=optimize) for optimize in (True, False))
    assert isinstance(fast.model, FastOPT)
    assert type(plain.model) is OPT
    assert fast.generate(prompts, max_new_tokens=40) == plain.generate(prompts, max_new_tokens=40)
    assert "".join(fast.stream("The ship", max_new_tokens=9)) == plain.generate("The ship", max_new_tokens=9)
    scores = [lm.score("The ship sailed", [" the sea", " ceiling"])[0].total for lm in (fast, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_are_given_back_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    plain = build_ours(build_reference(kind)).to(dtype)
    fast = fast_of(plain)
    expected = plain.state_dict()
    for found in (fast.state_dict(), dict(fast.named_parameters())):
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in expected.items())
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in plain.parameters())


def test_what_was_packed_is_let_go() -> None:
    plain = build_ours(build_reference("125m"))
    given: dict[str, weakref.ref[Tensor]] = {}

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in plain.state_dict().items():
            own = tensor.clone()
            given[name] = weakref.ref(own)
            yield name, own
            del own
            if name == "layers.1.fc1.weight":  # those of the layer before are joined: copied, whatever the product
                assert not any(given[f"layers.0.self_attn.{p}_proj.weight"]() is not None for p in "qkv")

    FastOPT(plain.config, weights())
    assert given["layers.1.fc1.weight"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pages_of_packed_weights_go_with_them(dtype: str, tmp_path: Path) -> None:
    """Or a model that keeps the dtype of its file would be in memory twice."""
    if linear.kind_on_cpu(getattr(torch, dtype)) is linear.Plain:
        pytest.skip("this machine packs no such weights")
    reference = build_reference("125m", hidden_size=512, ffn_dim=2048, num_hidden_layers=2)
    reference.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    at_most = [0]
    build = fast.build_product

    def counted(*args: Any, **options: Any) -> Any:
        at_most[0] = max(at_most[0], mapped())
        return build(*args, **options)

    def mapped() -> int:
        spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        return sum(int(end, 16) - int(begin, 16) for begin, end in (span.split("-") for span in spans))

    with mock.patch.object(fast, "build_product", counted):
        lm = minopt.load(tmp_path, device="cpu", dtype=dtype)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < at_most[0] < 2 * size  # the reader's own mapping of the file, and what is just now packed
    assert mapped() == 0
    assert lm.decoder.dtype == getattr(torch, dtype)


def test_saving_writes_the_plain_weights(tmp_path: Path) -> None:
    lm = minopt.load(minopt.DEMO, device="cpu")
    lm.save(tmp_path / "saved")
    saved, original = (minopt.load_model(folder, device="cpu") for folder in (tmp_path / "saved", minopt.DEMO))
    assert all(torch.equal(t, original.state_dict()[name]) for name, t in saved.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize: expected None or \"int8\", got 'int4'."),
        ({"quantize": "int8", "optimize": False}, "quantize: int8 weights are for inference, got optimize=False."),
        ({"optimize": "fast"}, "optimize: expected True, False or \"compile\", got 'fast'."),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minopt.load("no/such-model", device="cpu", **options)


# int8


def dequantised(model: OPT) -> OPT:
    """A plain model of the numbers that int8 weights stand for; the head apart, which has them as well."""
    plain = OPT(model.config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in filter(int8.is_quantized, list(state)):
        state[name] = int8.dequantize(*int8.quantize(state[name]), torch.float32)
    plain.load_state_dict(state)
    table = int8.dequantize(*int8.quantize(plain.embed_tokens.weight), torch.float32)
    plain.head = lambda h: h @ table.T  # type: ignore[method-assign]
    return plain.eval()


@pytest.mark.parametrize(("seed", "shape"), [(0, (40, 33)), (1, (1, 5))])
def test_a_quantised_weight_is_off_by_half_a_step_at_most(seed: int, shape: tuple[int, int]) -> None:
    weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-4, 4, shape[0])[:, None]
    )
    weight[0] = 0.0
    quantised, scale = int8.quantize(weight)
    assert quantised.dtype == torch.int8
    assert scale.shape == (shape[0], 1)
    assert torch.all((int8.dequantize(quantised, scale, torch.float32) - weight).abs() <= scale * 0.5001)
    assert shape[0] == 1 or torch.equal(quantised[1:].abs().amax(1), torch.full((shape[0] - 1,), 127, dtype=torch.int8))
    again = int8.quantize(int8.dequantize(quantised, scale, torch.float32))[0]
    assert torch.equal(again, quantised)


@pytest.mark.parametrize(("outliers", "tolerance"), [(False, 3e-2), (True, 2e-4)])
def test_int8_is_its_own_dequantised_reference(
    kind: str, outliers: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minopt.inference.fast.OUTLIERS_FROM", 1 if outliers else OUTLIERS_FROM)
    plain = build_ours(build_reference(kind))
    quantised, ids = fast_of(plain, quantize=True), ids_of(plain, 2, 7)
    with torch.no_grad():
        expected = dequantised(plain)(ids)
        error = ((quantised(ids) - expected).norm() / expected.norm()).item()
        assert error < tolerance
        alone, expected = quantised(ids[:1, :1]), dequantised(plain)(ids[:1, :1])
        assert ((alone - expected).norm() / expected.norm()).item() < tolerance
        assert (plain(ids) - expected).norm() / expected.norm() > 2 * tolerance or not outliers


def test_weight_only_int8_is_its_own_dequantised_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_works", lambda kind, dtype: False)
    plain = build_ours(build_reference(kind))
    quantised, ids = fast_of(plain, quantize=True), ids_of(plain, 2, 7)
    with torch.no_grad():
        assert difference(quantised(ids), dequantised(plain)(ids)) < 1e-5


def test_a_product_of_no_rows_has_none() -> None:
    weight, bias = torch.randn(200, 48), torch.randn(200)
    quantized = int8.quantize(weight)
    made = [kind(weight, bias) for kind in (linear.Blocked, linear.OneDNN, linear.Plain)]
    made += [kind(*quantized, bias) for kind in (linear.Int8, linear.WeightOnlyInt8)]
    for product in (*made, linear.Int8(*quantized, bias, outliers=True)):
        assert product(torch.empty(1, 0, 48)).shape == (1, 0, 200), product
        assert product(torch.empty(0, 48)).shape == (0, 200), product


@pytest.mark.parametrize("outliers", [False, True])
def test_a_row_of_an_int8_product_does_not_depend_on_the_others(outliers: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = int8.quantize(torch.randn(48, 64, generator=generator))
    product = linear.build_product(weight, torch.randn(48, generator=generator), scale=scale, outliers=outliers)
    rows = torch.randn(5, 64, generator=generator) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    together = product(rows)
    for i in range(5):
        assert torch.equal(product(rows[[i, 2]])[0], together[i])
        alone = product(rows[[i]])[0]
        assert (alone - together[i]).norm() <= 0.02 * (1 + together[i].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_single_row_of_an_int8_product_is_what_its_dequantised_weight_gives(
    activation: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, 48, generator=generator), torch.randn(64, generator=generator)
    quantized, scale = int8.quantize(weight)
    product = linear.Int8(quantized, scale, bias.to(dtype), activation)
    x = torch.randn(1, 1, 48, generator=generator).to(dtype)
    expected = F.linear(x.float(), int8.dequantize(quantized, scale), bias.to(dtype).float())
    expected = {"none": expected, "relu": F.relu(expected), "gelu": F.gelu(expected)}[activation]
    got = product(x)
    assert got.shape == (1, 1, 64)
    assert got.dtype == dtype
    rounding = (x.max() - x.min()).item() / 255 / 2 * weight.abs().sum(1).max().item()  # each input is off by so much
    assert (got - expected).abs().max() <= rounding + 0.02 * (dtype == torch.bfloat16)
    assert (got - expected).abs().max() > 0


@pytest.mark.parametrize("form", ["none", "relu", "program", "program in 7 bits", "weights alone"])
@pytest.mark.parametrize("size", [0, 1e-45, 1e-40, 1e-38, 1e-36, 1e-30, 1e-10, 3e-5, 1e-4, 1e-3, 3e-3, 1, 1e5, 1e30])
def test_a_single_row_is_as_exact_as_one_of_a_batch_whatever_its_size(
    size: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "program in 7 bits":  # as it is on processors without VNNI
        monkeypatch.setattr(export, "_saturates", lambda: True)
    generator = torch.Generator().manual_seed(0)
    weight, scale = int8.quantize(torch.randn(64, 256, generator=generator))
    activation = F.relu if form == "relu" else lambda y: y
    product: Any = {
        "program": lambda: export.Int8Linear(weight, scale, None),
        "program in 7 bits": lambda: export.Int8Linear(weight, scale, None),
        "weights alone": lambda: linear.WeightOnlyInt8(weight, scale, None),
    }.get(form, lambda: linear.build_product(weight, None, form, scale=scale))()
    rows = torch.randn(40, 1, 256, generator=generator) * size
    exact = activation(rows.double() @ (weight.double() * scale.double()).T)
    alone = torch.stack([product(row) for row in rows]).double()
    together = product(rows).double()
    bound = max((together - exact).norm().item(), 1e-6 * exact.norm().item())
    assert (alone - exact).norm() <= 1.02 * bound
    if size == 0 or size >= 1e-36:
        in_7_bits = linear.Int8(weight, scale, None).levels == 63 or export._saturates()
        assert (alone - exact).norm() <= (0.02 if in_7_bits else 0.01) * exact.norm() + 1e-40


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_single_row_that_is_not_finite_is_seen(activation: str) -> None:
    weight, scale = int8.quantize(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)))
    product = linear.build_product(weight, torch.ones(64), activation, scale=scale)
    for value in (torch.nan, torch.inf, -torch.inf):
        row = torch.ones(1, 48)
        row[0, 7] = value
        assert not product(row).isfinite().all()


def test_weights_alone_in_int8_do_not_overflow_float16() -> None:
    weight, scale = int8.quantize(torch.full((8, 512), 0.01))
    x = torch.full((1, 512), 4.0, dtype=torch.float16)
    product = linear.WeightOnlyInt8(weight, scale, torch.ones(8, dtype=torch.float16))
    assert product(x).float() == pytest.approx(21.48, rel=1e-3)


def test_outlier_channels_ruin_plain_rounding_and_not_that_of_large_models() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = int8.quantize(torch.randn(64, 256, generator=generator))
    x = torch.randn(8, 256, generator=generator)
    x[:, [3, 77]] *= 100
    expected = x.double() @ (weight.double() * scale.double()).T
    small = [i for i in range(256) if i not in (3, 77)]
    signal = (x[:, small].double() @ (weight[:, small].double() * scale.double()).T).norm()
    errors = [
        ((linear.build_product(weight, None, scale=scale, outliers=outliers)(x) - expected).norm() / signal).item()
        for outliers in (False, True)
    ]
    assert errors[0] > 0.2  # what the other channels say is drowned
    assert errors[1] < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_and_scales_are_given_back_to_the_bit(kind: str, kernels: str, dtype: torch.dtype) -> None:
    plain = build_ours(build_reference(kind)).to(dtype)
    found = fast_of(plain, quantize=True).state_dict()
    for name, tensor in plain.state_dict().items():
        if int8.is_quantized(name):
            weight, scale = int8.quantize(tensor)
            assert torch.equal(found.pop(name), weight)
            assert torch.equal(found.pop(name + int8.SCALE), scale)
        else:
            assert torch.equal(found.pop(name), tensor)
    assert not found


def test_a_state_with_int8_weights_is_taken_as_it_is(kind: str) -> None:
    quantised = fast_of(build_ours(build_reference(kind)), quantize=True)
    again = FastOPT(quantised.config, quantised.state_dict().items())
    ids = ids_of(quantised, 2, 7)
    assert torch.equal(again(ids), quantised(ids))


def test_int8_of_the_embedded_model_reads_nearly_as_well() -> None:
    text = (Path(minopt.DEMO) / "README.md").read_text(encoding="utf-8")
    perplexities = []
    for options in ({"optimize": False}, {"quantize": "int8"}):
        lm = minopt.load(minopt.DEMO, device="cpu", **options)
        assert lm.tokenizer is not None
        perplexities.append(window_perplexity(lm.model, lm.tokenizer.encode(text), 256).perplexity)
    assert perplexities[0] != perplexities[1]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.02)


def test_a_missing_operator_is_said_in_the_debug_log_and_the_plain_product_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(linear.OneDNN):
        def __init__(self, *_: Any) -> None:
            raise AttributeError("no such operator\nand more")

    monkeypatch.setattr(linear, "_on_intel", lambda: False)
    monkeypatch.setattr(linear, "OneDNN", Missing)
    with caplog.at_level(logging.DEBUG, "minopt"):
        product = linear.build_product(torch.ones(8, 8), None)
    assert isinstance(product, linear.Plain)
    assert caplog.messages == [
        "Missing in torch.float32: not available here (no such operator); the plain product is used."
    ]


@pytest.mark.parametrize("quantize", [False, True])
def test_autocast_changes_nothing(quantize: bool) -> None:
    model = build_ours(build_reference("125m"))
    model = FastOPT(model.config, (quantized_state(model) if quantize else model.state_dict()).items())
    ids = torch.arange(2, 12).view(2, 5)
    expected = model(ids), minopt.generate(model, ids, max_new_tokens=5, eos_token_id=()).sequences
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids), minopt.generate(model, ids, max_new_tokens=5, eos_token_id=()).sequences
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("change", [
    lambda layers: layers.__setitem__(0, torch.nn.Identity()),
    lambda layers: layers.__delitem__(0),
])  # fmt: skip
def test_a_model_whose_layers_were_replaced_does_not_give_weights(change: Any, tmp_path: Path) -> None:
    model = build_ours(build_reference("125m"))
    model = FastOPT(model.config, model.state_dict().items())
    change(model.layers)
    with pytest.raises(ValueError, match="others took the place of its layers, so their weights cannot be read"):
        minopt.save_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())

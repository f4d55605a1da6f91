"""Products of one weight: exact where they say so, rounded by rows in int8, given back to the bit by any kernel."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minopt import int8
from minopt.cli import main
from minopt.inference import linear
from minopt.memory import empty


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_of(form: str, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """A product of int8 weights by its name; ``relu`` and other activations name ``build_product``'s."""
    if form == "weights alone":
        return linear.WeightOnlyInt8(weight, scale, bias)
    return linear.build_product(weight, bias, form.replace("outliers", "none"), scale, form == "outliers")


def test_a_product_of_no_rows_has_none() -> None:
    weight, bias = draw(200, 48), draw(200)
    quantized = int8.quantize(weight)
    made: list[Any] = [kind(weight, bias) for kind in (linear.OneDNN, linear.Plain)]
    made += [product_of(form, *quantized, bias) for form in ("none", "outliers", "weights alone")]
    for product in made:
        assert product(torch.empty(1, 0, 48)).shape == (1, 0, 200), product
        assert product(torch.empty(0, 48)).shape == (0, 200), product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [True, False])
def test_few_rows_are_read_as_full_ones_where_that_is_faster(
    few: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_FULL_FROM", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setattr(linear, "_is_made_by", lambda vendor: few and vendor == "AuthenticAMD")
    weight, bias = draw(48, 32).to(dtype), draw(48, seed=1).to(dtype)
    product, counts = linear.OneDNN(weight, bias, "relu"), list[int]()
    operator = product._product

    def counted(x: Tensor, *others: Any) -> Any:
        counts.append(x.numel() // 32)
        return operator(x, *others)

    product._product = counted
    for shape in ((1,), (2,), (3,), (4,), (7,), (1, 1), (1, 2), (3, 1), (2, 2), (1, 3, 1)):
        x = draw(*shape, 32, seed=2).to(dtype)
        y = product(x)
        torch.testing.assert_close(y, F.relu(F.linear(x, weight, bias)))
        assert y.is_contiguous()
    assert counts == ([6, 6, 6, 4, 7, 6, 6, 6, 4, 6] if few else [1, 2, 3, 4, 7, 1, 2, 3, 4, 3])
    monkeypatch.setattr(linear, "_VOCABULARY", 48)
    kept = linear.OneDNN(weight, None)(draw(2, 1, 32).to(dtype))
    assert kept.untyped_storage().nbytes() == kept.nbytes  # logits take no more than they are
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not linear.wants_full_rows(weight)


@pytest.mark.parametrize("kind", [linear.OneDNN, linear.Int8])
def test_a_default_device_changes_no_product(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear._works(kind, torch.float32)
    with torch.device("meta"):
        assert linear._works.__wrapped__(kind, torch.float32) == expected
        assert empty((3,), torch.float32).device.type == "cpu"
    monkeypatch.setattr(kind, "__call__", lambda self, x: x)
    assert not linear._works.__wrapped__(kind, torch.float32)


@pytest.mark.parametrize("form", ["none", "outliers"])
def test_a_row_of_an_int8_product_does_not_depend_on_the_others(form: str) -> None:
    product = product_of(form, *int8.quantize(draw(48, 64)), draw(48))
    rows = draw(5, 64, seed=1) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    together = product(rows)
    for i in range(5):
        assert torch.equal(product(rows[[i, 2]])[0], together[i])
        assert (product(rows[[i]])[0] - together[i]).norm() <= 0.02 * (1 + together[i].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_single_row_of_an_int8_product_is_what_its_dequantised_weight_gives(
    activation: str, dtype: torch.dtype
) -> None:
    weight, bias, x = draw(64, 48), draw(64, seed=1), draw(1, 1, 48, seed=2).to(dtype)
    quantized, scale = int8.quantize(weight)
    expected = F.linear(x.float(), int8.dequantize(quantized, scale), bias.to(dtype).float())
    expected = {"none": expected, "relu": F.relu(expected), "gelu": F.gelu(expected)}[activation]
    got = linear.Int8(quantized, scale, bias.to(dtype), activation)(x)
    assert (got.shape, got.dtype) == ((1, 1, 64), dtype)
    rounding = (x.max() - x.min()).item() / 255 / 2 * weight.abs().sum(1).max().item()  # each input is off by so much
    assert 0 < (got - expected).abs().max() <= rounding + 0.02 * (dtype == torch.bfloat16)


SIZES = [0, 1e-45, 1e-40, 1e-38, 1e-36, 1e-30, 1e-10, 3e-5, 1e-4, 1e-3, 3e-3, 1, 1e5, 1e30]


@pytest.mark.parametrize("form", ["none", "relu", "weights alone"])
@pytest.mark.parametrize("size", SIZES)
def test_a_single_row_is_as_exact_as_one_of_a_batch_whatever_its_size(size: float, form: str) -> None:
    weight, scale = int8.quantize(draw(64, 256))
    check_single_rows(product_of(form, weight, scale), weight, scale, size, form == "relu")


def check_single_rows(product: Any, weight: Tensor, scale: Tensor, size: float, relu: bool = False) -> None:
    rows = draw(40, 1, 256, seed=1) * size
    exact = (F.relu if relu else lambda y: y)(rows.double() @ (weight.double() * scale.double()).T)
    alone = torch.stack([product(row) for row in rows]).double()
    bound = max((product(rows).double() - exact).norm().item(), 1e-6 * exact.norm().item())
    assert (alone - exact).norm() <= 1.02 * bound
    if size == 0 or size >= 1e-36:
        in_7_bits = getattr(product, "levels", 127) == 63
        assert (alone - exact).norm() <= (0.02 if in_7_bits else 0.01) * exact.norm() + 1e-40


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_single_row_that_is_not_finite_is_seen(activation: str) -> None:
    product = product_of(activation, *int8.quantize(draw(64, 48)), torch.ones(64))
    for value in (torch.nan, torch.inf, -torch.inf):
        row = torch.ones(1, 48)
        row[0, 7] = value
        assert not product(row).isfinite().all()


def test_weights_alone_in_int8_do_not_overflow_float16() -> None:
    weight, scale = int8.quantize(torch.full((8, 512), 0.01))
    x = torch.full((1, 512), 4.0, dtype=torch.float16)
    product = linear.WeightOnlyInt8(weight, scale, torch.ones(8, dtype=torch.float16))
    assert product(x).float() == pytest.approx(21.48, rel=1e-3)


def test_the_kernel_for_weights_in_int8_gets_scales_of_all_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's computes in float32; bfloat16 would round a scale by as much as int8 rounds a weight."""
    weight, scale = int8.quantize(draw(64, 48))
    x, bias = draw(1, 48).bfloat16(), draw(64, seed=1).bfloat16()
    expected = linear.WeightOnlyInt8(weight, scale, bias)(x)

    def kernel(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        assert scale.dtype == torch.float32
        return (x.float() @ weight.float().T * scale).to(x.dtype)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(linear, "_has_int8_kernel", lambda *_: True)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", kernel)
    torch.testing.assert_close(linear.WeightOnlyInt8(weight, scale, bias)(x), expected, rtol=0.02, atol=0.02)


def test_outlier_channels_ruin_plain_rounding_and_not_that_of_large_models() -> None:
    weight, scale = int8.quantize(draw(64, 256))
    x = draw(8, 256, seed=1)
    x[:, [3, 77]] *= 100
    exact = weight.double() * scale.double()
    small = [i for i in range(256) if i not in (3, 77)]
    signal = (x[:, small].double() @ exact[:, small].T).norm()
    plain, outliers = ((product_of(form, weight, scale)(x) - x.double() @ exact.T).norm() / signal
                       for form in ("none", "outliers"))  # fmt: skip
    assert plain > 0.2  # what the other channels say is drowned
    assert outliers < 3e-3


def test_a_missing_operator_is_said_in_the_debug_log_and_the_plain_product_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(linear.OneDNN):
        def __init__(self, *_: Any) -> None:
            raise AttributeError("no such operator\nand more")

    monkeypatch.setattr(linear, "OneDNN", Missing)
    with caplog.at_level(logging.DEBUG, "minopt"):
        product = linear.build_product(torch.ones(8, 8), None)
    assert isinstance(product, linear.Plain)
    assert caplog.messages == [
        "Missing in torch.float32: not available here (no such operator); the plain product is used."
    ]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("in_int8", [False, True])
def test_products_of_a_gpu_give_the_same_while_they_are_compiled(in_int8: bool, activation: str) -> None:
    """Then they are written in another way, for inductor."""
    weight, bias, x = draw(64, 48), draw(64, seed=1), draw(2, 3, 48, seed=2)
    product: Any = linear.OnGPU(weight, bias, activation)
    if in_int8:
        product = linear.WeightOnlyInt8(*int8.quantize(weight), bias, activation)
        weight = int8.dequantize(*product.weight())
    expected = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation](F.linear(x, weight, bias))
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(torch.compile(lambda x: product(x), backend="eager")(x), expected)


@pytest.mark.parametrize(
    ("works", "vnni", "expected"),
    [
        (True, True, {"float32": ("OneDNN", "oneDNN's packed"), "bfloat16": ("OneDNN", "oneDNN's packed"),
                      "float16": ("Plain", "oneDNN packs float32 and"), "int8": ("Int8", "inputs have 8 bits")}),
        (True, False, {"float32": ("OneDNN", "oneDNN's packed"), "int8": ("Int8", "7 bits, for there")}),
        (False, True, {"float32": ("Plain", "oneDNN's packed product does not work here"),
                       "bfloat16": ("Plain", "does not work"), "int8": ("WeightOnlyInt8", "does not work")}),
    ],
)  # fmt: skip
def test_the_command_shows_which_products_a_processor_takes(
    works: bool, vnni: bool, expected: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:  # fmt: skip
    """They are those that ``build_product`` makes there."""
    monkeypatch.setattr(linear, "_works", lambda *_: works)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni})
    assert main(["plan", "--kernels", "--json"]) == 0
    found = {row["dtype"]: (row["product"], row["reason"]) for row in json.loads(capsys.readouterr().out)}
    assert [*found] == ["float32", "bfloat16", "float16", "float64", "int8"]
    for dtype, (product, reason) in found.items():
        weight = draw(8, 8)
        made = linear.build_product(weight.to(getattr(torch, dtype)), None) if dtype != "int8" else product_of(
            "none", *int8.quantize(weight))  # fmt: skip
        assert type(made).__name__ == product
        assert expected.get(dtype, (product, ""))[0] == product
        assert expected.get(dtype, ("", reason))[1] in reason
    assert main(["plan", "--kernels"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=2) == ["float32", *found["float32"]]


def test_the_products_of_a_gpu_are_not_shown_and_a_plan_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--kernels", "--device", "cuda"]) == 2
    assert "--kernels: expected a CPU, got --device cuda. On a GPU" in capsys.readouterr().err
    assert main(["plan", "opt-125m", "--kernels"]) == 2
    assert "--kernels: shows the products of every dtype, whatever the model, got opt-125m." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "model: expected a value, got none" in capsys.readouterr().err

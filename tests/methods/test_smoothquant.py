"""SmoothQuant: the same function in floats, the published scales, and smaller errors where channels are outliers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minopt import convert, load_model
from minopt.cli import main
from minopt.evaluation.perplexity import window_perplexity
from minopt.methods import smoothquant
from minopt.methods.smoothquant import fold
from tests.checkpoint.test_convert import stored
from tests.conftest import build_ours, build_reference
from tests.methods.calibrated import README, inputs_of, windows, write_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
READERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}


def plant_outliers(model: Any) -> None:
    """Makes some channels large behind each norm, and the weights that read them small."""
    for layer in model.model.decoder.layers:
        for norm, names in READERS.items():
            for parameter in layer.get_submodule(norm).parameters():
                parameter[[3, 17]] *= 40
            for name in names:
                layer.get_submodule(name).weight[:, [3, 17]] /= 40


@torch.no_grad()
def test_the_smoothed_model_is_the_same_function_in_floats() -> None:
    model = build_ours(build_reference("125m"))
    expected, before = model(IDS), model.layers[0].fc1.weight.clone()
    largest = torch.rand(32, generator=torch.Generator().manual_seed(0)) * 50 + 0.1
    largest[7] = 0  # a channel that says nothing
    for layer in model.layers:
        for norm, names in READERS.items():
            fold(layer, norm, names, largest, 0.5)
    assert torch.allclose(model(IDS), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (model.layers[0].fc1.weight / before - 1).abs().max() > 1
    model.layers[1].final_layer_norm.bias *= 1.5  # what has not been divided is another function
    assert not torch.allclose(model(IDS), expected, rtol=1e-3, atol=1e-3)


def test_norms_keep_their_own_dtype(tmp_path: Path) -> None:
    """A model in float16 with norms in float32, as some training programs write it."""
    write_model(tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    mixed = {key: t if "norm" in key else t.half() for key, t in load_file(path).items()}
    save_file(mixed, path, metadata={"format": "pt"})
    convert(tmp_path / "float", tmp_path / "new", quantize="int8", smooth=0.5, calibration=README, device="cpu")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert {written[key].dtype for key in mixed if "norm" in key} == {torch.float32}
    expected, found = (load_model(tmp_path / name, dtype="float32", device="cpu")(IDS) for name in ("float", "new"))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_scales_are_the_published_ones(strength: float, tmp_path: Path) -> None:
    reference = write_model(tmp_path / "float", change=plant_outliers)
    convert(tmp_path / "float", tmp_path / "new", quantize="int8", smooth=strength, calibration=README, device="cpu")
    learned, _ = windows(tmp_path / "float")
    files = stored(tmp_path / "new")
    for index, layer in enumerate(reference.model.decoder.layers):
        seen, prefix = inputs_of(reference, index, learned), f"model.decoder.layers.{index}."
        for norm, names in READERS.items():
            weights = torch.cat([layer.get_submodule(name).weight for name in names])
            scale = seen[names[0]].abs().amax(0) ** strength / weights.abs().amax(0) ** (1 - strength)
            for part, parameter in layer.get_submodule(norm).named_parameters():
                assert torch.allclose(files[f"{prefix}{norm}.{part}"].double(), parameter / scale, rtol=1e-4)
            for name in names:
                step, smoothed = files[f"{prefix}{name}.weight_scale"], layer.get_submodule(name).weight * scale
                error = files[f"{prefix}{name}.weight"].double() * step.double() - smoothed
                assert (error.abs() <= step.double() * (0.5 + 1e-3)).all()


def test_outlier_channels_cost_less_in_a_program_that_rounds_activations(tmp_path: Path) -> None:
    write_model(tmp_path / "float", change=plant_outliers)
    words = ["convert", str(tmp_path / "float"), str(tmp_path / "smooth"), "--quantize", "int8", "--device", "cpu"]
    with mock.patch.object(smoothquant, "_rounded", side_effect=smoothquant._rounded) as rounded:
        assert main([*words, "--smooth", "0.5", "--calibration", str(README)]) == 0
    convert(tmp_path / "float", tmp_path / "int8", quantize="int8")
    _, held = windows(tmp_path / "float")
    assert rounded.call_count == 3 * 6 * len(held)  # what goes into each linear module after, and nothing before
    row = torch.tensor([[0.3, -2.54, 1.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(smoothquant._rounded(row), torch.tensor([[0.3, -2.54, 1.0], [0.0, 0.0, 0.0]]), atol=0.0101)
    assert torch.allclose(smoothquant._rounded(row[:1]) / 0.02, torch.tensor([[15.0, -127.0, 50.0]]))
    with torch.no_grad():
        expected = load_model(tmp_path / "float", device="cpu")(held)
        errors = {}
        for name in ("int8", "smooth"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            errors[name] = ((theirs(held).logits - expected).norm() / expected.norm()).item()
            if name == "smooth":
                after = torch.nn.functional.cross_entropy(
                    theirs(held).logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()
                )
    assert errors["smooth"] < 0.5 * errors["int8"]
    record = json.loads((tmp_path / "smooth" / "quantization.json").read_text())
    assert (record["method"], record["smooth"]) == ("smoothquant", 0.5)
    before = window_perplexity(load_model(tmp_path / "float", device="cpu"), held.flatten().tolist()).perplexity
    assert record["perplexity"]["before"] == pytest.approx(before, rel=1e-5)
    assert record["perplexity"]["after"] == pytest.approx(after.exp().item(), rel=2e-3)  # theirs rounds alike


@pytest.mark.parametrize(
    ("kind", "got"), [("350m", "norms behind them, on the residual stream"), ("galactica", "norms without weights")]
)
def test_norms_that_cannot_take_scales_in_are_refused_in_one_line(kind: str, got: str, tmp_path: Path) -> None:
    write_model(tmp_path / "float", kind)
    with pytest.raises(
        ValueError, match=rf"^smooth: expected layer norms with weights before .*, got {got}\. Leave out"
    ):
        convert(tmp_path / "float", tmp_path / "new", quantize="int8", smooth=0.5, calibration=README, device="cpu")
    assert not (tmp_path / "new").exists()

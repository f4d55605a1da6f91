"""GPTQ: the weights of the published algorithm, layer after layer, and what a calibration text has to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import minopt
from minopt import convert, int4, load_model
from minopt.cli import main
from minopt.evaluation.perplexity import window_perplexity
from minopt.methods import calibration, gptq
from tests.checkpoint.test_convert import stored
from tests.methods.calibrated import PROJECTIONS, README, inputs_of, windows, write_model

GROUP = 32


def farthest(found: Tensor, weight: Tensor, inputs: Tensor, group: int, windows: int, block: int = 128) -> float:
    """How far integers are from those of algorithm 1 of arXiv 2210.17323 at most, in steps, given those before them.

    In float64: column by column in blocks, with the Cholesky factor of the inverse Hessian; a group's scale is taken
    when its first column is reached, of columns as they are by then. A group's largest number is 7.5 steps: of two
    integers that are as near, rounding of the last bit chooses, so each integer found is taken for the next ones.
    """
    W, X, most = weight.double().clone(), inputs.double(), 0.0
    H = 2 * X.T @ X / windows
    for j in range(len(H)):
        if H[j, j] == 0:
            H[j, j] = 1.0
            W[:, j] = 0.0
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(H)).T
    for i in range(0, W.shape[1], block):
        last = min(i + block, W.shape[1])
        errors = torch.zeros(len(W), last - i, dtype=torch.float64)
        for j in range(i, last):
            if j % group == 0:
                scale = W[:, j : j + group].abs().amax(1) * 2 / 15
            exact, integers = W[:, j] / scale, found[:, j].double()
            nearest = torch.clamp(torch.round(exact), -8, 7)
            most = max(most, ((integers - exact).abs() - (nearest - exact).abs()).max().item())
            errors[:, j - i] = (W[:, j] - integers * scale) / factor[j, j]
            for k in range(j + 1, last):
                W[:, k] -= errors[:, j - i] * factor[j, k]
        W[:, last:] -= errors @ factor[i:last, last:]
    return most


@pytest.mark.parametrize(("inputs", "group"), [(64, 64), (64, 8), (256, 128), (384, 32)])
def test_integers_are_those_of_the_published_algorithm(inputs: int, group: int) -> None:
    """In float64, also where an input is always zero."""
    generator = torch.Generator().manual_seed(inputs + group)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    X = torch.randn(600, inputs, generator=generator, dtype=torch.float64) @ mix + 0.3
    X[:, 5] = 0
    weight = torch.randn(24, inputs, generator=generator, dtype=torch.float64)
    packed, scale = gptq.quantize(weight, 2 / 3 * X.T @ X, group, torch.float64)
    numbers = int4.unpack(packed)
    assert farthest(numbers, weight, X, group, 3) < 1e-9
    others = X[:, torch.randperm(inputs, generator=generator)]
    assert farthest(numbers, weight, others, group, 3) > 0.5  # another Hessian asks for other integers
    found = (numbers.double().view(*scale.shape, -1) * scale[..., None]).flatten(1)
    steps = weight.view(24, -1, group).abs().amax(2, keepdim=True) / 7.5
    nearest = ((weight.view(24, -1, group) / steps).round().clamp(-8, 7) * steps).flatten(1)
    with_gptq, to_nearest = ((X @ (w - weight).T).norm() for w in (found, nearest))
    assert with_gptq < 0.7 * to_nearest


def test_each_layer_learns_from_the_layers_before_it_as_written(kind: str, tmp_path: Path) -> None:
    reference = write_model(tmp_path / "float", kind)
    with mock.patch.object(int4, "GROUP", GROUP):
        convert(tmp_path / "float", tmp_path / "int4", quantize="int4", calibration=README, device="cpu")
    learned, held = windows(tmp_path / "float")
    files, far, other = stored(tmp_path / "int4"), list[float](), list[float]()
    for index, layer in enumerate(reference.model.decoder.layers):
        seen = inputs_of(reference, index, learned)
        for name in PROJECTIONS:
            weight = layer.get_submodule(name).weight
            key = f"model.decoder.layers.{index}.{name}.weight"
            numbers = int4.unpack(files[f"{key}_packed"])
            far.append(farthest(numbers, weight, seen[name], GROUP, len(learned)))
            other.append(farthest(numbers, weight, seen[name].roll(1, dims=1), GROUP, len(learned)))
            with torch.no_grad():
                weight.copy_(int4.dequantize(files[f"{key}_packed"], files[f"{key}_scale"]))
    assert len(far) == 18
    assert max(far) < 1e-3  # of float32's sums
    assert min(other) > 0.1
    record = json.loads((tmp_path / "int4" / "quantization.json").read_text())
    for folder, when in (("float", "before"), ("int4", "after")):
        model = load_model(tmp_path / folder, device="cpu")
        assert record["perplexity"][when] == pytest.approx(
            window_perplexity(model, held.flatten().tolist()).perplexity, rel=1e-5
        )
    assert record["perplexity"]["before"] != pytest.approx(record["perplexity"]["after"], rel=5e-5)
    assert (record["method"], record["group_size"], record["calibration"]["text"]) == ("gptq", GROUP, "README.md")
    assert record["calibration"]["windows"] == len(learned)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    write_model(tmp_path / "float")
    alive, most = [], []
    fill = calibration.Walk.layer

    def layer(walk: calibration.Walk, index: int) -> Any:
        found = fill(walk, index)
        alive.append(found.fc1.weight.data_ptr())
        return found

    with mock.patch.object(calibration.Walk, "layer", layer):
        convert(tmp_path / "float", tmp_path / "new", quantize="int4", calibration=README, device="cpu")
    assert len(alive) == 3
    assert len({*alive, *most}) == 1


def test_windows_are_spread_over_the_text_and_one_in_nine_is_held_out(tmp_path: Path) -> None:
    write_model(tmp_path / "float")
    learned, held = windows(tmp_path / "float")
    every = torch.tensor(minopt.Tokenizer.load(tmp_path / "float").encode(README.read_text(encoding="utf-8")))
    rows = every[: len(every) // 64 * 64].view(-1, 64)
    assert held[0].equal(rows[8])
    assert learned[8].equal(rows[9])
    with mock.patch.object(calibration, "WINDOWS", 8):
        learned, held = windows(tmp_path / "float")
    assert (len(learned), len(held)) == (8, 1)
    assert held[0].equal(rows[-1])


def test_the_command_prints_and_keeps_both_perplexities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "float")
    words = ["convert", str(tmp_path / "float"), str(tmp_path / "new"), "--quantize", "int4", "--calibration"]
    assert main([*words, str(README), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "new" / "quantization.json").read_text())["perplexity"]
    line = f"{found['before']:.4g} before, {found['after']:.4g} after (kept in quantization.json)"
    assert line in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "new")]) == 0
    assert (
        f"quantized       by gptq, perplexity {found['before']} before, {found['after']} after"
        in capsys.readouterr().out
    )
    convert(tmp_path / "float", tmp_path / "new", quantize="int4", force=True)  # of which nothing is known
    assert not (tmp_path / "new" / "quantization.json").exists()


def test_what_does_not_calibrate_is_refused_in_one_line(tmp_path: Path) -> None:
    write_model(tmp_path / "float")
    short, empty, binary = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "x.txt"
    short.write_text("It was a dark night.")
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\xfd")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"calibration": short}, r"^calibration: expected a text of at least 576 tokens \(9 windows of 64\), got \d+ "),
        ({"calibration": empty}, r"^calibration: expected a text of at least 576 tokens .*, got [01] \(.* a longer"),
        ({"calibration": tmp_path / "none.txt"}, r"^calibration: expected a file of plain text, there is none \("),
        ({"calibration": binary}, r"^calibration: expected UTF-8, got .* Convert it to UTF-8\."),
        ({"calibration": README, "quantize": None}, r"^calibration: acts on int4 weights, and on int8 "),
        ({"calibration": README, "quantize": "int8"}, r"^calibration: acts on int4 weights, and on int8 ones with"),
        ({"device": "cpu", "calibration": None}, r"^device: acts with a calibration text only\. Leave it out\."),
        ({"smooth": 0.5, "calibration": None}, r"^smooth: acts on int8 weights with a calibration text\."),
        ({"smooth": 1.5, "quantize": "int8", "calibration": README}, r"^smooth: expected a number of 0 to 1, got 1\.5"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            convert(tmp_path / "float", tmp_path / "new", **({"quantize": "int4", "device": "cpu"} | options))
        assert str(caught.value).isprintable()
    (tmp_path / "float" / "tokenizer.json").unlink()
    (tmp_path / "float" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"^calibration: expected a model with a tokenizer, it has none\."):
        convert(tmp_path / "float", tmp_path / "new", quantize="int4", calibration=README)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"^calibration: the model's activations on this text are not finite"):
        gptq.quantize(torch.ones(2, 8), torch.full((8, 8), torch.nan), 8, torch.float32)

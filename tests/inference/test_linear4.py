"""int4 weights stay in 4 bits on a CPU: their product, the model of them, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import minopt
from minopt import convert, int4, load_model
from minopt.checkpoint.names import parameter_shapes
from minopt.cli import main
from minopt.generation.decode import generate
from minopt.inference import linear4
from minopt.inference.linear4 import Int4, kept_in_int4
from minopt.int8 import is_quantized
from minopt.load_options import LoadOptions
from minopt.model import ACTIVATIONS
from tests.checkpoint.test_convert import assert_identical, stored
from tests.conftest import pad_left
from tests.inference.test_int8 import change_tensors

SIZE = {"hidden_size": 64, "ffn_dim": 128}  # so that there are whole blocks of outputs
pytestmark = pytest.mark.skipif(not linear4._works(), reason="needs a CPU with AVX-512")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(kind: str, write_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """An int4 folder of each kind; the floats that it was made of are beside it."""
    convert(write_checkpoint(kind, "float", **SIZE), tmp_path / "int4", quantize="int4")
    return tmp_path / "int4"


def off(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows", [1, 5, 33])  # of one block, of two, and those that take pieces of bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_that_of_the_numbers(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear4, "_PIECE", 2 * 64 * 256)  # the last piece is smaller than the others
    packed, scale = int4.quantize(drawn(320, 256), 32, torch.bfloat16)
    weight, bias, x = int4.dequantize(packed, scale), drawn(320), drawn(rows, 256).to(dtype)
    for activation, function in {"none": lambda y: y, "relu": torch.relu, "gelu": ACTIVATIONS["gelu"]}.items():
        y = Int4(packed, scale, bias.to(dtype), activation)(x[None])
        assert (y.dtype, y.shape) == (dtype, (1, rows, 320))
        assert off(y[0], function(x.double() @ weight.double().T + bias.double())) < 0.01
    assert off(Int4(packed, scale.roll(1, 1), None)(x), x.double() @ weight.double().T) > 0.1
    one_of_each = torch.eye(256, dtype=dtype)[:: 256 // rows][:rows]  # finds each number, to the bit
    assert Int4(packed, scale, None)(one_of_each).equal(weight.T[:: 256 // rows][:rows].bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_that_of_the_floats(folder: Path, dtype: str) -> None:
    plain, model = (
        load_model(folder, device="cpu", dtype="float64"),
        minopt.load(folder, device="cpu", dtype=dtype).model,
    )
    ids, mask = pad_left([torch.arange(4, 9), torch.arange(11, 20)])
    with torch.inference_mode():
        expected, found = plain.hidden_states(ids, mask), model.hidden_states(ids, mask)
        assert found.dtype == getattr(torch, dtype)
        assert off(found[mask.bool()], expected[mask.bool()]) < 0.02
        assert off(model(ids, mask)[mask.bool()], plain(ids, mask)[mask.bool()]) < 0.04  # whose head is int8
        sequences = generate(model, ids, mask, max_new_tokens=6, num_beams=3, eos_token_id=()).sequences
        whole = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
        greedy = generate(plain, ids, mask, max_new_tokens=6, eos_token_id=()).sequences
        ours, theirs, least = (score(m, s, whole) for m, s in ((model, sequences), (plain, sequences), (plain, greedy)))
        assert torch.allclose(ours, theirs, rtol=0.05)
        assert (theirs > least - 0.5).all()  # beams find texts that are as probable
        change_tensors(folder, lambda t: t["layers.1.fc2.weight_packed"].bitwise_not_())
        changed = minopt.load(folder, device="cpu", dtype=dtype).model.hidden_states(ids, mask)
        assert off(changed[mask.bool()], expected[mask.bool()]) > 0.1


def score(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of the last six tokens of each row."""
    scores = model(sequences, mask)[:, -7:-1].double().log_softmax(-1)
    return scores.gather(-1, sequences[:, -6:, None]).sum((1, 2))


def test_what_is_saved_is_the_folder_to_the_bit(folder: Path, tmp_path: Path) -> None:
    lm = minopt.load(folder, device="cpu", dtype="bfloat16")
    assert {t.dtype for t in lm.model.state_dict().values()} == {
        torch.bfloat16,
        torch.float32,
        torch.int32,
        torch.int64,
    }
    convert(folder, tmp_path / "narrow", dtype="bfloat16", quantize="int4")
    lm.save(tmp_path / "saved")
    expected = stored(folder)
    for key, tensor in stored(tmp_path / "saved").items():
        is_plain = not key.endswith(("_packed", "_scale", "_shape"))
        assert_identical({key: tensor}, {key: expected[key].to(torch.bfloat16) if is_plain else expected[key]})
    minopt.load(tmp_path / "float", device="cpu", quantize="int4").save(tmp_path / "rounded")
    assert_identical(stored(tmp_path / "rounded"), expected)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("rounded", "int4")]
    assert configs[0] == configs[1]
    for twin in (copy.deepcopy(lm.model), pickle.loads(pickle.dumps(lm.model))):
        assert_identical(dict(twin.state_dict()), dict(lm.model.state_dict()))
        assert twin(torch.tensor([[5, 6]])).equal(lm.model(torch.tensor([[5, 6]])))


@pytest.mark.parametrize("kind", ["125m"])
def test_they_become_floats_where_there_is_no_product(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    floats = {dtype: load_model(folder, device="cpu", dtype=dtype).state_dict() for dtype in ("float64", "float32")}
    assert_identical(dict(minopt.load(folder, device="cpu", dtype="float64").model.state_dict()), floats["float64"])
    monkeypatch.setattr(linear4, "_works", lambda: False)
    assert_identical(dict(minopt.load(folder, device="cpu").model.state_dict()), floats["float32"])
    with pytest.raises(
        ValueError, match=r"^quantize: int4 needs a CPU with AVX-512, .* got .*, 64 and 128, and 64\. Take int8\.$"
    ) as loaded:
        minopt.load(folder, device="cpu", quantize="int4")
    assert main(["plan", str(folder), "--device", "cpu", "--quantize", "int4"]) != 0  # names no command that fails
    assert str(loaded.value) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["125m"])
def test_a_pickled_model_is_refused_by_a_machine_without_the_product(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_model = pickle.dumps(minopt.load(folder, device="cpu").model)
    monkeypatch.setattr(linear4, "_works", lambda: False)
    with pytest.raises(ValueError, match=r"^model: its int4 weights need a CPU with AVX-512, got .*\. Load it"):
        pickle.loads(stored_model)


def test_weights_of_unlike_groups_stay_no_int4() -> None:
    """As a folder has them whose rows have one scale each."""
    config = minopt.OPTConfig(hidden_size=64, ffn_dim=256, num_hidden_layers=1, num_attention_heads=2)
    names = {name: shape for name, shape in parameter_shapes(config).items() if is_quantized(name)}

    def found(groups_of_fc2: int, quantize: str | None = None) -> Any:
        tensors = {
            name: SimpleNamespace(
                shape=shape, packed=True, scale=torch.ones(shape[0], groups_of_fc2 if "fc2" in name else 1), dtype=None
            )
            for name, shape in names.items()
        }
        checkpoint: Any = SimpleNamespace(config=config, tensors=tensors, found=SimpleNamespace(folder="x"))
        return kept_in_int4(checkpoint, LoadOptions(torch.device("cpu"), quantize=quantize))

    assert found(4) == (64, torch.float32)
    assert found(1) is None
    with pytest.raises(ValueError, match=r"groups of 32, 64, 128, 256 inputs, got .*, 64 and 256, and 64 and 256\."):
        found(1, "int4")


def test_rounding_takes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(10, 64)
    whole = int4.quantize(weight, 32, torch.bfloat16)
    monkeypatch.setattr(int4, "CHUNK_NUMBERS", 3 * 64)
    for part, of_all in zip(int4.quantize(weight, 32, torch.bfloat16), whole, strict=True):
        assert part.equal(of_all)


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        assert linear4._works.__wrapped__()


def test_a_processor_of_another_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (lambda self, x: x @ drawn(64, 64).to(x.dtype), lambda self, x: torch.ops.aten.no_such):
        monkeypatch.setattr(Int4, "__call__", broken)
        assert not linear4._works.__wrapped__()


@pytest.mark.parametrize(
    ("options", "got"),
    [({"dtype": "float64"}, "dtype=float64. Give another dtype."),
     ({"optimize": False}, "optimize=False. Leave optimize out."),
     ({"offload": "disk"}, "offload=disk. Leave offload out."), ({"draft": "int8"}, "draft=int8. Leave draft out."),
     ({"optimize": "compile", "dtype": "float64"},
      "dtype=float64 and optimize=compile. Give another dtype and leave optimize out.")],
)  # fmt: skip
def test_what_int4_does_not_do_is_refused_in_one_line(options: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=rf"^quantize: int4 weights are for .*, got {re.escape(got)}$"):
        minopt.load("no/such-model", device="cpu", quantize="int4", **options)


def test_int4_is_refused_on_a_gpu_and_divided() -> None:
    with pytest.raises(ValueError, match=r"got device=cuda and a mesh\. Give device=.cpu. and leave the"):
        LoadOptions(torch.device("cuda"), quantize="int4", mesh=cast(Any, "two processes"))


@pytest.mark.parametrize("kind", ["125m"])
def test_int8_drafts_for_the_floats_of_an_int4_folder_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^draft: the model's weights stay int4, and int8 would draft no faster\."):
        minopt.load(folder, device="cpu", draft="int8")
    monkeypatch.setattr(linear4, "_works", lambda: False)
    assert minopt.load(folder, device="cpu", draft="int8").draft is not None


@pytest.mark.parametrize("kind", ["125m"])
def test_plan_knows_that_they_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {}
    for dtype in ("float32", "float64"):
        assert main(["plan", str(folder), "--device", "cpu", "--dtype", dtype, "--json"]) == 0
        (line, *_) = json.loads(capsys.readouterr().out)["plans"]
        weights[line["quantize"]] = line["weights"]
    assert weights.keys() == {"int4", None}
    model = minopt.load(folder, device="cpu").model
    held = sum(t.nbytes for name, t in model.state_dict().items() if not name.endswith("_shape"))
    assert 0 < weights["int4"] - held < 0.2 * held  # the head in int8, and the scales of the kernel
    for name, message in {"cuda": "got device=cuda", "cpu": "got dtype=float64"}.items():
        asked = ["plan", "opt-125m", "--quantize", "int4", "--device", name, "--memory", "1GB"]
        assert main([*asked, "--dtype", "float64" if name == "cpu" else "float32"]) != 0
        assert message in capsys.readouterr().err
    assert main(["plan", "opt-125m", "--quantize", "int4", "--device", "cpu", "--devices", "4", "--json"]) == 0
    assert [line["devices"] for line in json.loads(capsys.readouterr().out)["plans"]] == [1]

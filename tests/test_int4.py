"""int4 folders: the format of compressed-tensors, the numbers that go in and out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

import minopt
from minopt import CheckpointError, OPTConfig, convert, inspect_checkpoint, int4, load_model
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.names import from_hf
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.cli import main
from minopt.inference.plan import find_config, plan_generation
from tests.checkpoint.sources import expected_tensors, write_source
from tests.checkpoint.test_convert import assert_identical, stored
from tests.checkpoint.test_load import change_config
from tests.inference.test_int8 import IDS, change_quantization, change_tensors, quantization_of, quantized_names

FC1 = "layers.0.fc1.weight"
GROUP = 32  # the largest part of 128 in the tests' hidden_size of 32 and ffn_dim of 64


def write_int4(tmp_path: Path, kind: str = "125m", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    convert(write_source("safetensors", tmp_path / "float", kind, dtype), tmp_path / "int4", quantize="int4", **options)
    return tmp_path / "int4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An int4 folder of the 125m style, in one file."""
    return write_int4(tmp_path)


def dequantized(folder: Path) -> dict[str, Tensor]:
    """What a folder stands for in float64 by minopt's names, number by number."""
    files, found = stored(folder), {}
    for key, tensor in files.items():
        name, packed = str(from_hf(key)), key.endswith("_packed")
        if packed:
            numbers = torch.stack([(tensor >> 4 * i & 15) - 8 for i in range(8)], dim=2).flatten(1).double()
            scale = files[key.replace("_packed", "_scale")].double()
            width = numbers.shape[1] // scale.shape[1]
            found[name.removesuffix("_packed")] = numbers * scale.repeat_interleave(width, 1)
        elif not key.endswith(("_scale", "_shape")):
            found[name] = tensor.double()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_programs_open_the_folder_and_compute_the_same(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_int4(tmp_path, kind, dtype)
    theirs = QuantizationConfig.model_validate(quantization_of(folder))
    (scheme,) = theirs.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    files, source = stored(folder), expected_tensors(kind, dtype)
    names = quantized_names(source)
    assert len(names) == 18
    for key in names:
        floats = {"weight": source[key].float(), "weight_scale": files[f"{key}_scale"].float()}
        expected = {f"{key}{part.removeprefix('weight')}": t for part, t in compressor.compress(floats, scheme).items()}
        expected[f"{key}_scale"] = expected[f"{key}_scale"].to(dtype)
        assert_identical({name: files[name] for name in expected}, expected)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == dtype
    ours = load_model(folder, device="cpu", dtype=dtype)
    with torch.no_grad():
        logits, expected = model.eval()(IDS).logits, ours(IDS)
    assert torch.allclose(logits.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.15)
    plain = {str(from_hf(k)): t for k, t in model.state_dict().items() if "lm_head" not in k and "weight_s" not in k}
    assert_identical(plain, ours.state_dict())  # after its first use theirs is unpacked


def test_numbers_are_the_nearest_of_their_group(kind: str, tmp_path: Path) -> None:
    floats = {str(from_hf(key)): tensor.double() for key, tensor in expected_tensors(kind).items()}
    folder = write_int4(tmp_path, kind)
    found, files = dequantized(folder), stored(folder)
    assert found.keys() == floats.keys()
    for name, exact in floats.items():
        if f"model.decoder.{name}" in files:
            assert found[name].equal(exact)
            continue
        groups = exact.view(len(exact), -1, GROUP)
        scale = groups.abs().amax(2, keepdim=True) / 7.5
        assert torch.allclose(files[f"model.decoder.{name}_scale"].double(), scale[..., 0], rtol=1e-6)
        assert ((found[name].view_as(groups) - groups).abs() <= scale * (0.5 + 1e-5)).all(), name
    assert quantization_of(folder)["config_groups"]["group_0"]["weights"]["group_size"] == GROUP


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_every_form_reads_what_the_numbers_stand_for(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = write_int4(tmp_path, kind, torch.float16)
    expected = {name: t.to(getattr(torch, dtype)) for name, t in dequantized(folder).items()}
    assert_identical(load_model(folder, device="cpu", dtype=dtype).state_dict(), expected)
    if dtype == "float32":
        options: list[dict[str, Any]] = [{}, {"optimize": False}, {"offload": "disk"}]
        for option in options:
            assert_identical(dict(minopt.load(folder, device="cpu", **option).model.state_dict()), expected)
    convert(folder, tmp_path / "plain")
    assert_identical({str(from_hf(key)): t.to(getattr(torch, dtype)) for key, t in stored(tmp_path / "plain").items()},
                     {name: t.half().to(getattr(torch, dtype)) for name, t in dequantized(folder).items()})  # fmt: skip
    assert quantization_of(tmp_path / "plain") is None


def test_shares_of_processes_are_parts_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minopt.checkpoint.tensors.CHUNK_NUMBERS", 70)
    checkpoint, whole = open_checkpoint(folder), {name: t.float() for name, t in dequantized(folder).items()}
    for index in range(2):
        share = dict(read_weights(checkpoint, torch.device("cpu"), None, share=Share(index, 2)))
        assert share[FC1].equal(whole[FC1].chunk(2)[index])
        fc2 = "layers.0.fc2.weight"
        assert share[fc2].equal(whole[fc2].chunk(2, dim=1)[index])
        rows = checkpoint.tensors[FC1].rows(21 * index, 33)  # as FSDP reads them
        assert rows.read().equal(whole[FC1][21 * index : 33])


def test_what_is_int4_keeps_its_bits_and_becomes_int8_if_asked(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "again", quantize="int4", max_shard_bytes=5_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert_identical(stored(tmp_path / "again"), stored(folder))
    model = minopt.load(folder, device="cpu", quantize="int8").model
    weight, scale = minopt.int8.quantize(dequantized(folder)[FC1].float())
    assert_identical({name: model.state_dict()[name] for name in (FC1, f"{FC1}_scale")},
                     {FC1: weight, f"{FC1}_scale": scale})  # fmt: skip
    minopt.load(folder, device="cpu").save(tmp_path / "saved")
    assert quantization_of(tmp_path / "saved") is None


def test_a_channels_own_scale_and_other_programs_settings_open(folder: Path) -> None:
    """As of other programs: a scale for each channel, float16 beside float32, an order that changes no layout."""
    change_tensors(folder, lambda t: t.update({k: v[:, :1].half() for k, v in t.items() if k.endswith("_scale")}))
    group = quantization_of(folder)["config_groups"]["group_0"]
    weights = group["weights"] | {"strategy": "channel", "group_size": None, "actorder": "static", "observer": "mse"}
    change_quantization(folder, config_groups={"group_0": group | {"weights": weights}})
    expected = {name: t.float() for name, t in dequantized(folder).items()}
    assert_identical(load_model(folder, device="cpu", dtype="float32").state_dict(), expected)


def test_inspect_and_plan_say_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_checkpoint(folder, check=True, digest=True)
    assert report.is_sound
    assert report.dtypes["int4"] == sum(expected_tensors()[key].numel() for key in quantized_names(expected_tensors()))
    (of_fc1,) = (t for t in report.tensors if t.name == FC1)
    assert (of_fc1.dtype, of_fc1.shape) == ("int4", (64, 32))
    change_tensors(folder, lambda t: t[f"{FC1}_packed"][5, 3].bitwise_xor_(1 << 20))
    changed = inspect_checkpoint(folder, digest=True)
    assert [a.name for a, b in zip(changed.tensors, report.tensors, strict=True) if a.digest != b.digest] == [FC1]
    assert main(["plan", str(folder), "--json"]) == 0
    (line, *_) = json.loads(capsys.readouterr().out)["plans"]
    config, _ = find_config(str(folder))
    assert line["quantize"] is None
    assert line["weights"] == plan_generation(config, dtype=torch.float32).weights  # it computes in floats
    assert main(["plan", str(folder)]) == 0
    assert "The files hold int4 weights, with which the model computes as float32." in capsys.readouterr().out


def damaged(name: str, tensor: Any) -> Any:
    return lambda folder: change_tensors(folder, lambda t: t.update({name: tensor(t)}) if tensor else t.pop(name))


REFUSED: dict[str, tuple[Any, str]] = {
    "no scale": (damaged(f"{FC1}_scale", None), r"fc1\.weight_scale: expected shape \[64, 1\], got no such tensor\."),
    "groups": (damaged(f"{FC1}_scale", lambda t: t[f"{FC1}_scale"].repeat(1, 3)),
               r"1 of its int4 weights cannot be used: .* expected shape \[64, 1\], got \[64, 3\]\..* --quantize int4"),
    "nan": (damaged(f"{FC1}_scale", lambda t: t[f"{FC1}_scale"] * torch.nan),
            r"positive, finite scales, got nan at row 0"),
    "another kind": (damaged(f"{FC1}_packed", lambda t: t[f"{FC1}_packed"].float()),
                     r"expected int4, as it has a scale, got torch"),
    "embeddings": (damaged("embed_tokens.weight_packed", lambda t: t[f"{FC1}_packed"] + 1),
                   r"got int4, which only weights of linear"),
    "no config": (lambda folder: change_config(folder, quantization_config=None),
                  r"18 of its weights are int4 .* expected a quantization_config in config\.json"),
    "order of inputs": (lambda f: change_quantization(f, config_groups={"a": {"weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": "group"}}}),
        r"quantization_config: expected int8 .* or symmetric int4 ones \(pack-quantized\), got compressed-tensors, p"),
    "other groups": (lambda f: change_quantization(f, config_groups={"a": {"weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 48}}}),
        r"expected a multiple of 48 inputs, its groups, got 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(name: str, folder: Path) -> None:
    damage, message = REFUSED[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_what_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    source = write_source("safetensors", tmp_path / "float")
    with pytest.raises(ValueError, match=r"^quantize: metaseq's format cannot hold int4 weights\."):
        convert(source, tmp_path / "new", quantize="int4", format="metaseq")
    with pytest.raises(ValueError, match=r'^quantize: expected None, "int8" or "int4", got "?\'?fp4'):
        convert(source, tmp_path / "new", quantize="fp4")
    with pytest.raises(ValueError, match=r"^quantize: int4 packs 8 inputs .* of 8, got 36 and 64\. Take int8\."):
        int4.group_size(OPTConfig(**{**vars(OPTConfig.preset("opt-125m")), "hidden_size": 36, "ffn_dim": 64}))
    assert int4.group_size(OPTConfig.preset("opt-175b")) == 128
    with pytest.raises(ValueError, match=r"^int4: expected a weight of finite numbers"):
        int4.quantize(torch.full((2, 8), torch.nan), 8, torch.float32)
    numbers = torch.randint(-8, 8, (5, 24))
    assert int4.unpack(int4.pack(numbers)).equal(numbers.to(torch.int8))
    assert not (tmp_path / "new").exists()

"""int8 folders: the format of compressed-tensors, the bits that go in and out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from safetensors.torch import load_file, save_file
from torch import Tensor

import minopt
from minopt import CheckpointError, OPTConfig, convert, inspect_checkpoint, int8, load_model, save_model
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.names import from_hf
from minopt.checkpoint.weights import read_weights
from tests.checkpoint.sources import change_file, expected_tensors, write_source
from tests.checkpoint.test_convert import assert_identical, stored
from tests.checkpoint.test_load import change_config, truncate
from tests.conftest import build_reference

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
DECODER = "model.decoder."
FC1 = "layers.0.fc1.weight"
EMBEDDINGS = "embed_tokens.weight"
SCALE = f"{FC1}_scale"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An int8 folder of the 125m style, in one file."""
    return write_int8(tmp_path)


def write_int8(tmp_path: Path, kind: str = "125m", source: str = "safetensors", **options: Any) -> Path:
    dtype = options.pop("source_dtype", torch.float32)
    convert(write_source(source, tmp_path / "float", kind, dtype), tmp_path / "int8", quantize="int8", **options)
    return tmp_path / "int8"


def quantized_names(tensors: dict[str, Tensor]) -> set[str]:
    """Keys of the layers' matrices, told by their dims and not by the names that minopt has."""
    return {key for key, tensor in tensors.items() if ".layers." in f".{key}" and tensor.dim() == 2}


def dequantized(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a file's tensors stand for, by minopt's names."""
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale")}
    for key in plain.keys() & {key.removesuffix("_scale") for key in tensors.keys() - plain.keys()}:
        plain[key] = (plain[key].float() * tensors[f"{key}_scale"].float().view(-1, 1)).to(dtype)
    return {str(from_hf(key)): tensor for key, tensor in plain.items()}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Lets a function change a folder's tensors; keys are minopt's names."""
    tensors = {key.removeprefix(DECODER): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file({f"{DECODER}{name}": t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def quantization_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def change_quantization(folder: Path, **changes: Any) -> None:
    change_config(folder, quantization_config=quantization_of(folder) | changes)


def with_weights(**changes: Any) -> dict[str, Any]:
    """Groups of a ``quantization_config`` whose weights are other than ours."""
    group = int8.CONFIG["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


# --- the format ---


def test_compressed_tensors_reads_the_configuration_and_rounds_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder = write_int8(tmp_path, kind)
    theirs = QuantizationConfig.model_validate(quantization_of(folder))
    assert (theirs.format, theirs.quantization_status) == ("int-quantized", QuantizationStatus.COMPRESSED)
    (scheme,) = theirs.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    files, source = stored(folder), expected_tensors(kind)
    names = quantized_names(source)
    assert len(names) == 18
    for key in names:
        weight = {"weight": source[key], "weight_scale": files[f"{key}_scale"]}
        assert compressor.compress(weight, scheme)["weight"].equal(files[key]), key
        assert torch.allclose(weight["weight_scale"], source[key].abs().amax(1, keepdim=True) / 127, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_opens_the_folder(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_int8(tmp_path, kind, source_dtype=dtype)
    ours = load_model(folder, device="cpu", dtype=dtype)
    as_floats = transformers.CompressedTensorsConfig(dequantize=True)
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=as_floats, output_loading_info=True
    )
    assert not any(report.values())
    assert_identical({str(from_hf(k)): t for k, t in plain.state_dict().items() if k != "lm_head.weight"},
                     ours.state_dict())  # fmt: skip
    rounding, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    decoder = rounding.model.decoder
    assert {m.weight.dtype for n, m in decoder.layers.named_modules() if isinstance(m, torch.nn.Linear)} == {torch.int8}
    assert {m.weight.dtype for n, m in decoder.named_modules() if n.startswith(("project", "embed"))} == {dtype}
    with torch.no_grad():
        expected, whole, rounded = (model.eval()(IDS) for model in (ours, plain, rounding))
    assert torch.allclose(whole.logits.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.15)
    error = (rounded.logits.float() - expected.float()).norm() / expected.float().norm()
    assert 1e-4 < error < 0.06  # activations are rounded to int8 too


# --- writing and reading ---


@pytest.mark.parametrize(
    ("source", "dtype"),
    [("safetensors", torch.float32), ("safetensors", torch.bfloat16), ("bin shards", torch.float16),
     ("singleton, legacy", torch.float32), ("2 parts", torch.float32), ("2 parts x 3 shards", torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["125m", "350m", "galactica"])
def test_an_int8_folder_is_what_quantizing_at_load_gives(
    kind: str, source: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if kind == "350m" and "parts" in source:
        source = "singleton"  # metaseq keeps a model with projections in one part
    folder = write_int8(tmp_path, kind, source, source_dtype=dtype)
    files, floats = stored(folder), expected_tensors(kind, dtype)
    names = quantized_names(floats)
    assert set(files) == set(floats) | {f"{key}_scale" for key in names}
    for key, tensor in floats.items():
        if key in names:
            scale = files[f"{key}_scale"]
            assert (files[key].dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(tensor), 1))
            error = files[key].double() * scale.double() - tensor.double()
            assert (error.abs() <= scale.double() * (0.5 + 1e-5)).all(), key
            assert files[key].abs().amax(1).eq(127).all()
        else:
            assert_identical({key: files[key]}, {key: tensor})
    one = minopt.load(folder, device="cpu").model
    other = minopt.load(tmp_path / "float", device="cpu", quantize="int8").model
    assert_identical(one.state_dict(), other.state_dict())
    assert sum(tensor.dtype == torch.int8 for tensor in one.state_dict().values()) == len(names)
    assert torch.equal(one(IDS), other(IDS))


@pytest.mark.parametrize("limit", [1, 5_000, 20_000])
def test_shards_keep_to_the_limit_wherever_a_scale_lies(limit: int, tmp_path: Path) -> None:
    whole, shards = write_int8(tmp_path), tmp_path / "shards"
    convert(tmp_path / "float", shards, quantize="int8", max_shard_bytes=limit)
    files = [load_file(path) for path in shards.glob("*.safetensors")]
    assert len(files) > 3
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit for tensors in files)
    assert_identical(stored(shards), stored(whole))
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(whole).values())
    assert index["weight_map"].keys() == stored(whole).keys()
    assert_identical(read_all(shards), read_all(whole))


def read_all(folder: Path, **options: Any) -> dict[str, Tensor]:
    options |= {"keep_int8": True}
    return dict(read_weights(open_checkpoint(folder), torch.device("cpu"), torch.float32, **options))


def test_dtype_rules_the_other_tensors_and_scales_stay_float32(tmp_path: Path) -> None:
    narrow = write_int8(tmp_path, dtype="bfloat16")
    convert(tmp_path / "float", tmp_path / "wide", quantize="int8")
    files, wide = stored(narrow), stored(tmp_path / "wide")
    for key, tensor in files.items():
        if tensor.dtype == torch.int8 or key.endswith("_scale"):
            assert_identical({key: tensor}, {key: wide[key]})
        else:
            assert_identical({key: tensor}, {key: wide[key].to(torch.bfloat16)})
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_load_model_gives_the_plain_model_in_the_floats_dtype(kind: str, tmp_path: Path) -> None:
    folder = write_int8(tmp_path, kind, source_dtype=torch.bfloat16)
    for dtype in ("auto", "float32", "float16", "float64"):
        model = load_model(folder, device="cpu", dtype=dtype)
        wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        expected = {name: t.to(wanted) for name, t in dequantized(stored(folder)).items()}
        assert_identical(model.state_dict(), expected)
        assert all(parameter.requires_grad for parameter in model.parameters())
    elsewhere = dict(read_weights(open_checkpoint(folder), torch.device("meta"), None))  # auto is the file's own dtype
    assert {tensor.dtype for tensor in elsewhere.values()} == {torch.bfloat16}
    model = load_model(folder, device="cpu")
    model(IDS).sum().backward()
    assert model.layers[0].fc1.weight.grad is not None
    slow = minopt.load(folder, device="cpu", optimize=False).model
    assert_identical(slow.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converted_back_it_is_the_dequantized_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_int8(tmp_path, kind, source_dtype=dtype)
    expected = dequantized(stored(folder), dtype)
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "metaseq", format="metaseq", parts=1 if kind == "350m" else 2)
    convert(tmp_path / "metaseq", tmp_path / "back")
    for place in (tmp_path / "plain", tmp_path / "back"):
        assert_identical({str(from_hf(key)): t for key, t in stored(place).items()}, expected)
    for place in (tmp_path / "plain", tmp_path / "back", tmp_path / "metaseq"):
        config = json.loads((place / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    convert(folder, tmp_path / "half", dtype="float16")
    assert {t.dtype for t in stored(tmp_path / "half").values()} == {torch.float16}


def test_parts_of_a_large_weight_are_dequantized_wherever_they_begin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minopt.checkpoint.tensors.CHUNK_NUMBERS", 70)
    source = open_checkpoint(folder).tensors[FC1]
    expected = dequantized(stored(folder))[FC1]
    for start, count in ((0, 2048), (0, 5), (31, 2), (33, 64), (64, 64), (100, 1948), (2047, 1), (7, 1000)):
        out = torch.empty(count)
        source.read_into(out, start)
        assert torch.equal(out, expected.view(-1)[start : start + count]), (start, count)
    assert torch.equal(source.columns(20, 27), expected[:, 20:27])
    assert source.map() is None


@pytest.mark.parametrize("container", ["safetensors", "bin", "decoder."])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["[out]", "[out, 1]"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_programs_int8_weights_keep_their_bits(
    dtype: torch.dtype, shape: tuple[int, ...], container: str, tmp_path: Path
) -> None:
    """Also where other tensors are float16, projections are int8 and rows do not reach 127."""
    folder = write_int8(tmp_path, "350m", source_dtype=torch.float16)
    change_quantization(folder, ignore=["lm_head"], format="naive-quantized")
    tensors = stored(folder)
    for name in ("project_in", "project_out"):
        key = f"{DECODER}{name}.weight"
        tensors[key], tensors[f"{key}_scale"] = int8.quantize(tensors[key])
    tensors[f"{DECODER}{FC1}"] = tensors[f"{DECODER}{FC1}"] // 2 - 64  # down to -128
    tensors = {key: t.to(dtype).view(shape) if key.endswith("_scale") else t for key, t in tensors.items()}
    if container == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        renamed = {key.replace("model.", "") if container == "decoder." else key: t for key, t in tensors.items()}
        save_file(renamed, folder / "model.safetensors")
    expected = dequantized(tensors, torch.float16)
    assert_identical(load_model(folder, device="cpu", dtype="float16").state_dict(), expected)
    state = read_all(folder)
    convert(folder, tmp_path / "ours", quantize="int8")
    again = stored(tmp_path / "ours")
    layers = quantized_names(again) - {key for key in again if key.endswith("_scale")}
    assert len(layers) == 18
    for key in layers:
        scale = tensors[f"{key}_scale"].float().view(-1, 1)
        assert_identical({"weight": again[key], "scale": again[f"{key}_scale"]},
                         {"weight": tensors[key], "scale": scale})  # fmt: skip
        name = key.removeprefix(DECODER)
        assert_identical({"weight": state[name], "scale": state[f"{name}_scale"]},
                         {"weight": tensors[key], "scale": scale})  # fmt: skip
    for name in ("project_in.weight", "project_out.weight"):  # which stay as floats here
        assert_identical({name: again[f"{DECODER}{name}"]}, {name: expected[name]})
        assert f"{name}_scale" not in state
    assert quantization_of(tmp_path / "ours") == int8.CONFIG
    minopt.load(folder, device="cpu").model(IDS)


def test_layers_that_were_left_out_are_kept_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = expected_tensors()[f"{DECODER}{FC1}"]
    change_tensors(folder, lambda t: t.update({FC1: plain}) or t.pop(SCALE))
    expected = dequantized(stored(folder))
    assert expected[FC1].equal(plain)
    assert_identical(load_model(folder, device="cpu").state_dict(), expected)
    assert not caplog.records
    assert_identical(minopt.load(folder, device="cpu").model.state_dict(), expected)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{folder}: only 17 of the layers' 18 weights are int8 ({FC1} not), so those are converted" in caplog.text
    before = stored(folder)
    convert(folder, folder.parent / "rest", quantize="int8")
    assert_identical({key: t for key, t in stored(folder.parent / "rest").items() if FC1 not in key},
                     {key: t for key, t in before.items() if FC1 not in key})  # fmt: skip
    assert stored(folder.parent / "rest")[f"{DECODER}{FC1}"].dtype == torch.int8


def test_a_configuration_may_be_given(folder: Path, tmp_path: Path) -> None:
    expected = load_model(folder, device="cpu").state_dict()
    for config in (OPTConfig.load(tmp_path / "float"), OPTConfig.load(folder)):
        assert_identical(load_model(folder, device="cpu", model_config=config).state_dict(), expected)
    config = OPTConfig.load(folder)
    (folder / "config.json").unlink()
    assert_identical(load_model(folder, device="cpu", model_config=config).state_dict(), expected)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON"):
        load_model(folder)


# --- saving ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_int8_is_saved_and_quantized_again_without_a_change_of_a_bit(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    folder = write_int8(tmp_path, kind, source_dtype=getattr(torch, dtype))
    minopt.load(folder, device="cpu", dtype=dtype).save(tmp_path / "saved")
    minopt.load(tmp_path / "float", device="cpu", dtype=dtype, quantize="int8").save(tmp_path / "quantized")
    convert(folder, tmp_path / "again", quantize="int8", max_shard_bytes=9_000)
    for place in (tmp_path / "saved", tmp_path / "quantized", tmp_path / "again"):
        assert_identical(stored(place), stored(folder))
        ours, other = (json.loads((p / "config.json").read_text()) for p in (place, folder))
        assert ours == other
    assert_identical(read_all(tmp_path / "saved"), read_all(folder))
    assert_identical(*(minopt.load(folder, device="cpu", quantize=q).model.state_dict() for q in (None, "int8")))


def test_plain_weights_are_saved_as_such(folder: Path, tmp_path: Path) -> None:
    expected = dequantized(stored(folder))
    minopt.load(folder, device="cpu", optimize=False).save(tmp_path / "plain")
    save_model(load_model(folder, device="cpu"), tmp_path / "trained")
    save_model(load_model(folder, device="cpu"), folder, force=True)  # over the int8 one
    minopt.load(tmp_path / "plain", device="cpu").save(tmp_path / "fast")
    for place in (tmp_path / "plain", tmp_path / "trained", folder, tmp_path / "fast"):
        assert_identical({str(from_hf(key)): t for key, t in stored(place).items()}, expected)
        assert quantization_of(place) is None
        transformers.AutoModelForCausalLM.from_pretrained(place)


# --- inspecting ---


def test_inspect_counts_int8_and_digests_bits_and_scales(kind: str, tmp_path: Path) -> None:
    folder = write_int8(tmp_path, kind, source_dtype=torch.bfloat16)
    files = stored(folder)
    report = inspect_checkpoint(folder, check=True, digest=True)
    floats = expected_tensors(kind)
    names = quantized_names(floats)
    ints = sum(floats[key].numel() for key in names)
    assert report.is_sound, report
    assert report.parameters == sum(t.numel() for t in floats.values())
    assert report.dtypes == {"bfloat16": report.parameters - ints, "int8": ints}
    assert report.config is not None
    assert report.config["quantization_config"] == int8.CONFIG
    (of_fc1,) = (t for t in report.tensors if t.name == FC1)
    data = files[f"{DECODER}{FC1}"].numpy().tobytes() + files[f"{DECODER}{SCALE}"].numpy().tobytes()
    assert of_fc1.digest == hashlib.sha256(f"{FC1}\nint8\n64,32\n".encode() + data).hexdigest()
    assert (of_fc1.dtype, of_fc1.shape) == ("int8", (64, 32))
    for change in (lambda t: t[FC1][5, 7].bitwise_xor_(1), lambda t: t[SCALE][63].mul_(1 + 2**-23)):
        change_tensors(folder, change)
        changed = inspect_checkpoint(folder, digest=True)
        assert [a.name for a, b in zip(changed.tensors, report.tensors, strict=True) if a.digest != b.digest] == [FC1]
        assert changed.digest != report.digest
        report = changed
    change_tensors(folder, lambda t: t.update({SCALE: t[SCALE].flatten()}))
    assert inspect_checkpoint(folder, digest=True).digest == report.digest


def test_inspect_checks_the_values_that_int8_stands_for(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[SCALE][3] = 2.5
        tensors[FC1][3] = torch.arange(32) + 30  # beyond 100 from 41 on
        tensors["layers.1.fc2.weight"].zero_()

    change_tensors(folder, change)
    assert inspect_checkpoint(folder, check=True).findings == [
        f"{FC1}: 21 beyond 100 (up to 152.5), first at model.safetensors: {DECODER}{FC1}[107]",
        "layers.1.fc2.weight: all 2,048 are zero",
    ]


# --- what is refused ---

ANOTHER = (
    r"config\.json: quantization_config: expected int8 weights with a scale for each channel \(compressed-tensors, "
    r"int-quantized\), or symmetric int4 ones \(pack-quantized\), got {}\. Fetch the model that it was made from, and "
    r"convert that with --quantize int8\."
)
UNUSABLE = r"model\.safetensors: {} of its int8 weights cannot be used: {}\. Fetch the files again, or convert"


def in_row_9(scale: Tensor, value: float) -> Tensor:
    scale = scale.clone()
    scale[9] = value
    return scale


def int8_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head, scale = int8.quantize(tensors[f"{DECODER}{EMBEDDINGS}"])
    tensors |= {"lm_head.weight": head, "lm_head.weight_scale": scale}
    save_file(tensors, folder / "model.safetensors")


SCHEMES: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "no method": ({"bits": 4}, "no quant_method"),
    "no object": ([1, 2], "no quant_method"),
    "int3": (int8.CONFIG | {"format": "pack-quantized"} | with_weights(num_bits=3, strategy="group", group_size=128),
             "compressed-tensors, pack-quantized, int3, symmetric, a scale for each group"),
    "asymmetric": (int8.CONFIG | with_weights(symmetric=False),
                   "compressed-tensors, int-quantized, int8, asymmetric, a scale for each channel"),
    "fixed activations": (
        int8.CONFIG | {"config_groups": {"a": int8.CONFIG["config_groups"]["group_0"] | {
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}}}},
        "compressed-tensors, int-quantized, int8, symmetric, a scale for each channel, fixed scales of activations"),
    "another layout": (int8.CONFIG | {"format": "dense"}, "compressed-tensors, dense"),
    "a preset": (int8.CONFIG | {"config_groups": {"W8A8": ["Linear"]}},
                 "compressed-tensors, int-quantized, a scheme without weights"),
    "no groups": (int8.CONFIG | {"config_groups": {}}, "compressed-tensors"),
}  # fmt: skip

# Changes of one tensor, and what is said of its name.
TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Tensor], str]] = {
    "a scale of a float": (FC1, lambda t: t[FC1].float(), r"expected int8, as it has a scale, got torch\.float32"),
    "a scale of groups": (SCALE, lambda t: t[SCALE].repeat(1, 4), r"expected shape \[64, 1\], got \[64, 4\]"),
    "a scale of another weight": (SCALE, lambda t: t[SCALE][:32], r"expected shape \[64, 1\], got \[32, 1\]"),
    "a scale of integers": (SCALE, lambda t: t[SCALE].long(), r"expected a float dtype, got another kind"),
    "nan": (SCALE, lambda t: in_row_9(t[SCALE], torch.nan), r"expected positive, finite scales, got nan at row 9"),
    "infinite": (SCALE, lambda t: in_row_9(t[SCALE], torch.inf), r"expected positive, .* got inf at row 9"),
    "negative": (SCALE, lambda t: in_row_9(t[SCALE], -0.5), r"expected positive, finite scales, got -0\.5 at row 9"),
    "zero": (SCALE, lambda t: in_row_9(t[SCALE], 0.0), r"expected positive, finite scales, got 0 at row 9"),
    "beyond float32": (SCALE, lambda t: in_row_9(t[SCALE], 3e36), r"expected positive, .* got 3e\+36 at row 9"),
    "beneath float32": (SCALE, lambda t: in_row_9(t[SCALE].double(), 1e-60), r"expected positive, .* got 0 at row 9"),
    "int8 embeddings": (EMBEDDINGS, lambda t: t[EMBEDDINGS].to(torch.int8), r"expected a float dtype, got int8, .*"),
    "a weight of one dim": (FC1, lambda t: t[FC1].flatten(), r"expected a float dtype, got int8, which only .*"),
    "zero points": (f"{FC1}_zero_point", lambda t: torch.zeros(64, 1).to(torch.int8), r"expected a float .*"),
}

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no quantization_config": (
        lambda folder: change_config(folder, quantization_config=None),
        r"model\.safetensors: 18 of its weights are int8 \(layers\.0\.\S+, .* and 13 more\), expected a "
        r"quantization_config in config\.json that says how they were made, got none\. Fetch config\.json again\.",
    ),
    "no int8 weights": (
        lambda folder: (folder.parent / "float" / "model.safetensors").replace(folder / "model.safetensors"),
        r"model\.safetensors: expected int8 weights as config\.json's quantization_config says, got none\. If its "
        r"weights are plain, take quantization_config out of config\.json\.",
    ),
    "a weight without scale, and a scale without weight": (
        lambda folder: change_tensors(folder, lambda t: [t.pop(name) for name in (SCALE, "layers.1.fc1.weight")]),
        UNUSABLE.format(
            2,
            r"layers\.0\.fc1\.weight_scale: expected shape \[64, 1\], got no such tensor, "
            r"layers\.1\.fc1\.weight: expected int8, as it has a scale, got nothing",
        ),
    ),
    "a weight of another shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({FC1: t[FC1][:, :16]})),
        r"the tensors are not those of config\.json: 1 of the wrong shape or kind \(layers\.0\.fc1\.weight: "
        r"expected \[64, 32\], got \[64, 16\]\)",
    ),
    "an int8 head": (
        int8_head,
        r"model\.safetensors: lm_head\.weight: expected the token embeddings, to which OPT's head is tied, got int8\. "
        r"Make the int8 weights anew, and ignore lm_head\.",
    ),
    "cut short": (lambda folder: truncate(folder / "model.safetensors", 0.6), r"model\.safetensors: cut short or not"),
    **{
        name: (
            lambda folder, key=key, make=make: change_tensors(folder, lambda t: t.update({key: make(t)})),
            UNUSABLE.format(1, f"{re.escape(key)}: {words}"),
        )
        for name, (key, make, words) in TENSORS.items()
    },
    **{
        name: (lambda folder, scheme=scheme: change_config(folder, quantization_config=scheme), ANOTHER.format(words))
        for name, (scheme, words) in SCHEMES.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_at_open_in_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    for load in (lambda: load_model(folder), lambda: minopt.load(folder), lambda: convert(folder, tmp_path / "new")):
        with pytest.raises(CheckpointError) as again:
            load()
        assert str(again.value) == line
    assert not (tmp_path / "new").exists()
    assert inspect_checkpoint(folder).problem == line


def test_metaseqs_files_have_no_int8_weights(tmp_path: Path) -> None:
    folder = write_source("singleton, unfused", tmp_path / "m")
    (path,) = folder.glob("*.pt")
    change_file(path, lambda model: model.update({f"decoder.{FC1}": torch.ones(64, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"fc1\.weight: expected float64, .* or bfloat16, got int8\)"):
        load_model(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_cannot_be_quantized(value: float, tmp_path: Path) -> None:
    model = build_reference("125m")
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[31, 63] = value
    write_source("safetensors", tmp_path / "float", model=model)
    message = r"^layers\.1\.fc2\.weight: int8: expected a weight of finite numbers, got some that are not\. "
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "float", tmp_path / "new", quantize="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    with pytest.raises(CheckpointError, match=message):
        minopt.load(tmp_path / "float", device="cpu", quantize="int8")


@pytest.mark.parametrize("chunk", [1, 100, 4_000_000])
def test_rounding_is_by_rows_to_the_nearest_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "CHUNK_NUMBERS", chunk)
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[7] = 0
    weight[8] *= 1e-30
    rounded, scale = int8.quantize(weight)
    exact = weight.double()
    expected = exact.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(scale[exact.abs().amax(1) > 0].double(), expected[expected[:, 0] > 0], rtol=1e-6, atol=0)
    assert rounded[7].eq(0).all()
    assert scale[7] > 0
    back = int8.dequantize(rounded, scale, torch.float64)
    assert ((back - exact).abs() <= scale.double() * (0.5 + 1e-5)).all()
    assert torch.equal(int8.quantize(back.float())[0], rounded)

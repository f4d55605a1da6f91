"""Inspecting: what a checkpoint is, what is wrong with it and where, and digests of nothing but the weights."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minopt import OPT, CheckpointError, OPTConfig, convert, inspect_checkpoint
from minopt.checkpoint import inspect as inspecting
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.find import find_files
from minopt.checkpoint.inspect import Report, fingerprint
from minopt.config import PRESETS
from tests.checkpoint.metaseq_files import write_metaseq
from tests.checkpoint.sources import (
    KINDS_AND_SOURCES,
    METASEQ,
    SOURCES,
    change_tensor,
    content,
    expected_tensors,
    place_of,
    reference,
    write_source,
)
from tests.checkpoint.test_load import drop, truncate

WORDS = {
    "safetensors": ("Hugging Face, safetensors", 1, 1),
    "safetensors shards": ("Hugging Face, safetensors in 3 shards", 1, 3),
    "bin": ("Hugging Face, pickle", 1, 1),
    "legacy bin": ("Hugging Face, pickle", 1, 1),
    "bin shards": ("Hugging Face, pickle in 3 shards", 1, 3),
    "singleton": ("metaseq, one file", 1, 1),
    "singleton, unfused": ("metaseq, one file", 1, 1),
    "singleton, legacy": ("metaseq, one file", 1, 1),
    "2 parts": ("metaseq, model parallel parts", 2, 1),
    "4 parts": ("metaseq, model parallel parts", 4, 1),
    "3 shards": ("metaseq, FSDP shards", 1, 3),
    "2 parts x 3 shards": ("metaseq, FSDP shards", 2, 3),
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face folder of the 125m style."""
    return write_source("safetensors", tmp_path / "hf")


def weight_files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt")}


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model.decoder."): tensor for key, tensor in tensors.items()}


# --- what it is ---


@pytest.mark.parametrize(("kind", "source"), KINDS_AND_SOURCES)
def test_each_kind_is_described_and_its_values_and_digests(kind: str, source: str, tmp_path: Path) -> None:
    dtype = {"125m": torch.float32, "350m": torch.float16, "galactica": torch.bfloat16}[kind]
    folder = write_source(source, tmp_path / "source", kind, dtype)
    before = content(folder)
    tensors, name = named(expected_tensors(kind, dtype)), str(dtype).split(".")[1]
    report = inspect_checkpoint(folder)
    assert (report.kind, report.parts, report.shards) == WORDS[source]
    assert (report.path, report.files) == (str(folder), weight_files(folder))
    assert (report.missing, report.problem, report.findings, report.is_sound) == ((), None, [], True)
    assert report.config_source == ("its cfg" if source in METASEQ else "config.json")
    assert (report.preset, report.tokenizer, report.digest) == (None, None, None)
    count = sum(t.numel() for t in tensors.values())
    assert (report.parameters, report.dtypes) == (count, {name: count})
    config, expected = OPTConfig.from_dict(report.config or {}), reference(kind).config
    assert {t.name: t.shape for t in report.tensors} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert [t.name for t in report.tensors] == list(OPT(config, device="meta").state_dict())
    assert {(t.dtype, t.findings, t.digest) for t in report.tensors} == {(name, None, None)}
    for field in ("hidden_size", "num_attention_heads", "do_layer_norm_before", "word_embed_proj_dim", "enable_bias",
                  "layer_norm_elementwise_affine", "activation_function", "vocab_size", "ffn_dim"):  # fmt: skip
        assert getattr(config, field) == getattr(expected, field)
    checked = inspect_checkpoint(folder, check=True)
    assert checked.is_sound
    assert {t.findings for t in checked.tensors} == {()}
    assert checked.to_text().endswith("\n\nvalues: all finite, none beyond 100, no tensor of zeros")
    assert digests_of(folder) == digests_by_definition(expected_tensors(kind, dtype))
    assert content(folder) == before


@pytest.mark.parametrize("source", SOURCES)
def test_any_file_of_a_checkpoint_stands_for_it(source: str, tmp_path: Path) -> None:
    folder = write_source(source, tmp_path / "source")
    for path in folder.iterdir():
        assert replace(find_files(path), opened={}) == replace(find_files(folder), opened={}), path


def test_a_folder_that_holds_one_models_folder_stands_for_it(tmp_path: Path) -> None:
    folder = write_source("4 parts", tmp_path / "run" / "model")
    (tmp_path / "run" / "logs").mkdir()
    assert inspect_checkpoint(tmp_path / "run") == inspect_checkpoint(folder)
    (folder / "reshard-model_part-0.pt").unlink()
    assert inspect_checkpoint(tmp_path / "run").missing == ("reshard-model_part-0.pt",)
    write_source("safetensors", tmp_path / "run" / "other")
    with pytest.raises(ValueError, match=r"run: holds 2 models \(model, other\)\. Name one of them"):
        inspect_checkpoint(tmp_path / "run")


def test_dtypes_are_counted_in_numbers_and_digests_are_of_mixed_ones_too(tmp_path: Path) -> None:
    write_metaseq(tmp_path / "mixed", reference(), parts=2, dtype=torch.float16, mixed_norms=True)
    report = inspect_checkpoint(tmp_path / "mixed")
    mixed = {k: t if "layer_norm" in k else t.half() for k, t in expected_tensors().items()}
    norms = sum(t.numel() for t in mixed.values() if t.dtype == torch.float32)
    others = sum(t.numel() for t in mixed.values()) - norms
    assert report.dtypes == {"float16": others, "float32": norms}
    assert f"dtypes          float16 ({others:,}), float32 ({norms:,})\n" in report.to_text()
    assert {t.name for t in report.tensors if t.dtype == "float32"} == {n for n in named(mixed) if "layer_norm" in n}
    assert digests_of(tmp_path / "mixed") == digests_by_definition(mixed)


def test_a_configuration_that_is_given_is_the_one_that_is_told(hf: Path, tmp_path: Path) -> None:
    write_metaseq(tmp_path / "flat", reference(), parts=2, shards=3, metadata=False, config=None)
    assert "flattened without shard_metadata" in str(inspect_checkpoint(tmp_path / "flat").problem)
    report = inspect_checkpoint(tmp_path / "flat", model_config=hf)
    assert (report.problem, report.config_source) == (None, "as given")


def sparse_safetensors(path: Path, config: OPTConfig) -> None:
    """A float16 file of zeros that are nowhere on the disk."""
    header, end = {}, 0
    for name, tensor in OPT(config, device="meta").state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[f"model.decoder.{name}"] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("preset", "parameters", "added"),
    [("opt-125m", 125_239_296, 0), ("opt-350m", 331_196_416, 8), ("galactica-125m", 124_909_056, 8)],
)
def test_published_sizes_are_known_by_their_tensors_whatever_the_vocabulary(
    preset: str, parameters: int, added: int, tmp_path: Path
) -> None:
    config = OPTConfig.preset(preset)
    values = config.to_dict() | {"vocab_size": config.vocab_size + added}
    config = OPTConfig.from_dict(values)
    sparse_safetensors(tmp_path / "model.safetensors", config)
    report = inspect_checkpoint(tmp_path)
    assert (report.problem, report.preset, report.config_source) == (None, preset, "its tensors")
    assert report.parameters == parameters + added * config.embed_dim
    assert report.dtypes == {"float16": report.parameters}
    assert report.config is not None
    assert OPTConfig.from_dict(report.config).num_attention_heads == config.num_attention_heads
    assert f"preset          {preset}\n" in report.to_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_knows_its_name_and_no_other_shape_has_it(preset: str) -> None:
    values = OPTConfig.preset(preset).to_dict()
    for same in ({}, {"vocab_size": 51_000}, {"dropout": 0.0}, {"bos_token_id": 5}, {"made_up": 1}):
        assert OPTConfig.from_dict(values | same).preset_name == preset
    for field, value in {
        "num_hidden_layers": values["num_hidden_layers"] + 1,
        "num_attention_heads": values["num_attention_heads"] // 2,
        "ffn_dim": values["ffn_dim"] + 8,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 1024,
        "do_layer_norm_before": not values["do_layer_norm_before"],
        "enable_bias": not values["enable_bias"],
        "layer_norm_elementwise_affine": not values["layer_norm_elementwise_affine"],
        "activation_function": {"relu": "gelu", "gelu": "relu"}[values["activation_function"]],
    }.items():
        assert OPTConfig.from_dict(values | {field: value}).preset_name is None, field


TEXT = """\
path            {folder}
kind            metaseq, FSDP shards
parts x shards  2 x 3
files           6, {size} kB (checkpoint_last-model_part-0-shard0.pt ... checkpoint_last-model_part-1-shard2.pt)
preset          none of the published sizes
config          from its cfg: 3 layers, hidden_size 32, 4 heads, ffn_dim 64
                vocab_size 96 x 32, 64 positions, pre-norm, relu
parameters      30,880
dtypes          float32 (30,880)
tokenizer       none beside the weights or one folder up"""


def test_the_text_says_all_of_it(tmp_path: Path) -> None:
    folder = write_source("2 parts x 3 shards", tmp_path / "source")
    size = f"{sum(weight_files(folder).values()) / 1000:.1f}"
    report = inspect_checkpoint(folder)
    assert report.to_text() == TEXT.format(folder=folder, size=size)
    lines = report.to_text(tensors=True).removeprefix(report.to_text()).splitlines()
    assert lines[:2] == ["", ""]
    assert [line.split() for line in lines[2:]] == [
        [t.name, "float32", *" x ".join(map(str, t.shape)).split()] for t in report.tensors
    ]
    text = inspect_checkpoint(write_source("safetensors", tmp_path / "g", "galactica")).to_text()
    assert "parts x shards" not in text
    assert "1, " in text
    assert "(model.safetensors)\n" in text
    assert "pre-norm, gelu, no biases\n" in text
    text = inspect_checkpoint(write_source("3 shards", tmp_path / "p", "350m")).to_text()
    assert "vocab_size 96 x 16, 64 positions, post-norm, relu\n" in text


def test_the_tokenizers_folder_is_told(tmp_path: Path) -> None:
    folder = write_source("singleton", tmp_path / "up" / "source")
    (tmp_path / "up" / "gpt2-unified.json").write_text("{}")
    assert inspect_checkpoint(folder).tokenizer == str(tmp_path / "up")
    (folder / "gpt2-vocab.json").write_text("{}")
    (folder / "gpt2-merges.txt").write_text("")
    report = inspect_checkpoint(folder)
    assert report.tokenizer == str(folder)
    assert f"tokenizer       {folder}" in report.to_text()


# --- what is missing or damaged ---


def described(path: Path, problem: str, **options: Any) -> Report:
    """The report on a checkpoint that cannot be loaded: what is known of its files, and why."""
    report = inspect_checkpoint(path, **options)
    assert report.problem is not None
    assert problem in report.problem
    assert "\n" not in report.problem
    assert not report.is_sound
    assert json.loads(json.dumps(report.to_dict()))["problem"] == report.problem
    assert report.to_text(tensors=True).endswith(f"\n\nproblem: {report.problem}")
    return report


@pytest.mark.parametrize(
    ("source", "absent"),
    [
        ("bin shards", ["pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin"]),
        ("4 parts", ["reshard-model_part-0.pt", "reshard-model_part-2.pt"]),
        ("2 parts x 3 shards", [f"checkpoint_last-model_part-{i}.pt" for i in ("0-shard0", "0-shard2", "1-shard1")]),
    ],
)
def test_missing_files_are_named(source: str, absent: list[str], tmp_path: Path) -> None:
    folder = write_source(source, tmp_path / "source")
    for name in absent:
        (folder / name).unlink()
    report = described(folder, f"missing: {', '.join(absent)}", check=True, digest=True)
    assert report.missing == tuple(absent)
    assert (report.kind, report.parts, report.shards) == WORDS[source]
    assert report.files == weight_files(folder)
    assert (report.config, report.tensors, report.digest, report.parameters) == (None, (), None, 0)
    assert f"\nmissing         {len(absent)}: {', '.join(absent)}\n" in report.to_text()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: truncate(folder / name)


# All that can be wrong: test_load.py, test_metaseq.py.
DAMAGED: list[tuple[str, Callable[[Path], object], str]] = [
    ("safetensors shards", cut("model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors: cut short"),
    ("legacy bin", cut("pytorch_model.bin"), "pytorch_model.bin: cut short"),
    ("singleton", cut("reshard.pt"), "reshard.pt: cut short"),
    ("2 parts x 3 shards", cut("checkpoint_last-model_part-1-shard1.pt"), "model_part-1-shard1.pt: cut short"),
    ("safetensors", lambda f: (f / "config.json").unlink(), "of no published size (hidden_size 32"),
    ("safetensors", drop("layers.1.fc1.weight"), "1 missing (layers.1.fc1.weight)"),
]


@pytest.mark.parametrize(("source", "damage", "problem"), DAMAGED)
def test_a_damaged_checkpoint_is_described(
    source: str, damage: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    folder = write_source(source, tmp_path / "source")
    damage(folder)
    report = described(folder, problem, check=True, digest=True)
    assert (report.kind, report.parts, report.shards) == WORDS[source]
    assert report.files == weight_files(folder)
    assert (report.config, report.tensors, report.digest) == (None, (), None)


@pytest.mark.parametrize("text", ["{", '{"weight_map": {"a": "../b.bin"}}'])
def test_a_damaged_index_is_described(text: str, tmp_path: Path) -> None:
    folder = write_source("bin shards", tmp_path / "source")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    report = described(folder, "pytorch_model.bin.index.json: ", check=True, digest=True)
    assert report.files.items() >= weight_files(folder).items()


def test_a_file_that_shrinks_meanwhile_is_described(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins_at = TensorFile.begins_at
    monkeypatch.setattr(TensorFile, "begins_at", lambda self, key: begins_at(self, key) + 120_000)
    for options in ({"check": True}, {"digest": True}):
        report = described(hf, "model.safetensors: ends in the middle of its tensors", **options)
        assert report.digest is None
        assert len(report.tensors) == len(expected_tensors())


def test_what_is_no_checkpoint_raises(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, and not the name of a model on the hub"):
        inspect_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected weights .*got nothing"):
        inspect_checkpoint(tmp_path / "empty")
    write_source("singleton", hf)
    write_metaseq(hf, reference(), stem="restored")
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoints \(model\.safetensors, reshard\.pt, restored\.pt\)"):
        inspect_checkpoint(hf)
    for name in ("model.safetensors", "reshard.pt", "restored.pt"):
        assert inspect_checkpoint(hf / name).is_sound
    with pytest.raises(ValueError, match=r"model_config: expected an OPTConfig, .* got dict\."):
        inspect_checkpoint(hf / "reshard.pt", model_config={})  # type: ignore[arg-type]


# --- --check ---


PLANTED = [
    ("layers.1.fc1.weight", 77, math.nan, "1 not finite"),
    ("layers.2.self_attn.k_proj.bias", 5, 5e4, "1 beyond 100 (up to 5e+04)"),
    ("layers.0.self_attn.v_proj.weight", 0, -math.inf, "1 not finite"),
    ("layers.1.self_attn.q_proj.weight", 255, -5e4, "1 beyond 100 (up to 5e+04)"),
    ("layers.2.fc2.weight", 100, -100.25, "1 beyond 100 (up to 100.2)"),
]


@pytest.mark.parametrize("source", SOURCES)
def test_strange_values_are_found_at_their_places(source: str, tmp_path: Path) -> None:
    folder = write_source(source, tmp_path / "source")
    expected = {}
    for name, index, value, words in PLANTED:
        path, key, there = place_of(folder, name, index)
        change_tensor(path, key, lambda tensor, at=there, to=value: tensor.view(-1)[at].fill_(to))
        expected[name] = f"{name}: {words}, first at {path.name}: {key}[{there}]"
    report = inspect_checkpoint(folder, check=True)
    assert report.findings == [expected[t.name] for t in report.tensors if t.name in expected]
    assert report.problem is None
    assert not report.is_sound
    assert report.to_text().endswith("\n\n" + "\n".join(report.findings))
    assert inspect_checkpoint(folder).is_sound, "without check no value is read"


@pytest.mark.parametrize("source", ["safetensors", "4 parts", "2 parts x 3 shards"])
def test_a_tensor_of_zeros_is_found_and_one_parts_zeros_are_not(source: str, tmp_path: Path) -> None:
    model = copy.deepcopy(reference())
    layers = model.model.decoder.layers
    with torch.no_grad():
        layers[2].fc1.bias.zero_()
        layers[0].self_attn.v_proj.weight.zero_()
        layers[0].fc1.weight[16:].zero_()  # all of most parts' shares
        layers[1].fc1.weight[:48].zero_()
    report = inspect_checkpoint(write_source(source, tmp_path / "source", model=model), check=True)
    assert report.findings == [
        "layers.0.self_attn.v_proj.weight: all 1,024 are zero",
        "layers.2.fc1.bias: all 64 are zero",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_counted_by_their_kind_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source, name = "2 parts x 3 shards", "layers.1.fc1.weight"
    folder = write_source(source, tmp_path / "source", dtype=dtype)
    path, key, start = place_of(folder, name, 40)
    values = torch.tensor([math.nan, 101.0, -7168.0, 100.0, math.inf, 250.0])
    change_tensor(path, key, lambda tensor: tensor[start : start + 6].copy_(values))
    (finding,) = inspect_checkpoint(folder, check=True).findings
    at = f"first at {path.name}: {key}"
    assert finding == f"{name}: 2 not finite, {at}[{start}]; 3 beyond 100 (up to 7168), {at}[{start + 1}]"


def test_values_are_found_wherever_they_lie_in_a_long_tensor(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read some at a time: the index counts all of them."""
    monkeypatch.setattr(inspecting, "CHUNK_NUMBERS", 100)
    key = "model.decoder.layers.0.fc2.weight"
    for index in (0, 99, 100, 1_234, 2_047):
        change_tensor(hf / "model.safetensors", key, lambda tensor, at=index: tensor.view(-1)[at].fill_(math.inf))
    for index, count in ((0, 5), (99, 4), (100, 3), (1_234, 2), (2_047, 1)):
        (finding,) = inspect_checkpoint(hf, check=True).findings
        assert finding == f"layers.0.fc2.weight: {count} not finite, first at model.safetensors: {key}[{index}]"
        change_tensor(hf / "model.safetensors", key, lambda tensor, at=index: tensor.view(-1)[at].zero_())


def test_a_head_that_differs_is_a_problem(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, hf / "model.safetensors", metadata={"format": "pt"})
    assert inspect_checkpoint(hf, check=True).is_sound
    change_tensor(hf / "model.safetensors", "lm_head.weight", lambda tensor: tensor[7].add_(1e-3))
    described(hf, "lm_head.weight differs from the token embeddings", check=True)


@pytest.mark.parametrize(
    ("name", "options"), [("embed_positions.weight", {"check": True}), ("layers.1.fc2.bias", {"digest": True})]
)
def test_parts_that_contradict_each_other_are_a_problem(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = write_source("4 parts", tmp_path / "source")
    change_tensor(folder / "reshard-model_part-2.pt", f"decoder.{name}", lambda tensor: tensor[-1].add_(1e-3))
    report = described(folder, f"{name}: every model parallel part holds it, and ", **options)
    assert report.digest is None


# --- --hash ---


def sha256(text: str, data: bytes = b"") -> str:
    return hashlib.sha256(text.encode() + data).hexdigest()


def digest_by_definition(name: str, tensor: Tensor) -> str:
    """SHA-256 over name, dtype and shape as three lines, and then the bytes."""
    dtype, shape = str(tensor.dtype).split(".")[1], ",".join(map(str, tensor.shape))
    return sha256(f"{name}\n{dtype}\n{shape}\n", tensor.contiguous().view(torch.uint8).numpy().tobytes())


def digests_by_definition(tensors: dict[str, Tensor]) -> tuple[dict[str, str], str]:
    """Digests of each tensor by minopt's name, and of all."""
    each = {name: digest_by_definition(name, tensor) for name, tensor in named(tensors).items()}
    return each, sha256("".join(f"{name} {each[name]}\n" for name in sorted(each)))


def digests_of(path: Path) -> tuple[dict[str, str | None], str | None]:
    report = inspect_checkpoint(path, digest=True)
    assert report.problem is None
    assert f"\nsha256          {report.digest}" in report.to_text()
    assert all(f"{t.digest}" in report.to_text(tensors=True) for t in report.tensors)
    return {t.name: t.digest for t in report.tensors}, report.digest


def test_digests_do_not_depend_on_how_much_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "CHUNK_NUMBERS", 37)
    for source in ("4 parts", "2 parts x 3 shards"):
        assert digests_of(write_source(source, tmp_path / source)) == digests_by_definition(expected_tensors())


def test_a_files_metadata_and_order_are_no_weights(hf: Path) -> None:
    before = digests_of(hf)
    tensors = load_file(hf / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"].clone()
    bare = {k.removeprefix("model."): t for k, t in reversed(tensors.items())}
    save_file(bare | {"lm_head.weight": head}, hf / "model.safetensors", metadata={"format": "pt", "by": "me"})
    assert digests_of(hf) == before


@pytest.mark.parametrize("source", SOURCES)
def test_one_bit_of_any_kind_changes_the_fingerprint(source: str, tmp_path: Path) -> None:
    folder = write_source(source, tmp_path / "source")
    before = fingerprint(open_checkpoint(folder))
    assert fingerprint(open_checkpoint(folder)) == before
    name = ("layers.1.fc1.weight", "layers.0.self_attn.q_proj.weight", "layers.2.fc2.weight")[len(source) % 3]
    path, key, index = place_of(folder, name, 0)
    change_tensor(path, key, lambda tensor: tensor.view(-1)[index : index + 1].view(torch.int32).bitwise_xor_(1))
    assert fingerprint(open_checkpoint(folder)) != before


def test_padding_of_shards_is_no_weight(tmp_path: Path) -> None:
    paths = write_metaseq(tmp_path / "source", reference(), shards=7)
    before = digests_of(tmp_path / "source")
    key = "decoder.layers.1.flat_param_0"
    layer = sum(t.numel() for k, t in expected_tensors().items() if "layers.1." in k)
    padding = -layer % 7
    assert padding > 0, "the test needs some"
    change_tensor(paths[-1], key, lambda tensor: tensor[-padding:].fill_(math.nan))
    assert digests_of(tmp_path / "source") == before
    assert inspect_checkpoint(tmp_path / "source", check=True).is_sound
    change_tensor(paths[-1], key, lambda tensor: tensor[-padding - 1].add_(1))
    assert digests_of(tmp_path / "source") != before


def test_scales_are_part_of_the_fingerprint(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "int8", quantize="int8")
    before = fingerprint(open_checkpoint(tmp_path / "int8"))
    path = tmp_path / "int8" / "model.safetensors"
    change_tensor(path, "model.decoder.layers.1.fc1.weight_scale", lambda tensor: tensor.view(-1)[5:6].mul_(2))
    assert fingerprint(open_checkpoint(tmp_path / "int8")) != before


# --- the bar ---


def test_the_bar_is_drawn_while_values_are_read(
    hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minopt.progress.on_terminal", lambda: True)
    inspect_checkpoint(hf, show_progress=True)
    assert capsys.readouterr().err == ""
    inspect_checkpoint(hf, check=True, show_progress=True)
    assert f"/{len(expected_tensors())} [" in capsys.readouterr().err

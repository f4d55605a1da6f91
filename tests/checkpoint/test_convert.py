"""Converting: from every kind of checkpoint, to the same numbers, and nothing half done whatever happens."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import minopt
from minopt import CheckpointError, Tokenizer, convert, load_model
from minopt.checkpoint import convert as converting
from minopt.checkpoint import names
from minopt.checkpoint.files import TensorFile
from tests.checkpoint.metaseq_files import metaseq_state, model_fields, split_into_parts, write_metaseq
from tests.checkpoint.sources import (
    KINDS_AND_SOURCES,
    SOURCES,
    change_file,
    content,
    expected_tensors,
    reference,
    write_source,
)
from tests.checkpoint.test_load import change_config
from tests.conftest import SHARED_DATA, SIZE, build_reference, copy_of
from tests.texts import EMOJI

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
TEXTS = ["The old house", "  two  spaces\n\nand 1234 lines", "</s>naïve<pad> “quotes” Größe 日本語", *EMOJI, ""]
PARTS = [("125m", 1), ("125m", 2), ("125m", 4), ("350m", 1), ("galactica", 1), ("galactica", 2), ("galactica", 4)]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face folder of the 125m style."""
    return write_source("safetensors", tmp_path / "hf")


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = [load_file(path) for path in files]
    assert sum(map(len, tensors)) == len(set().union(*tensors)), "a key in two files"
    return {key: tensor for part in tensors for key, tensor in part.items()}


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Keys, dtypes, shapes and bytes."""
    assert sorted(got) == sorted(expected)
    for key, tensor in expected.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), key


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The parts that were written, read in the way that runs no code."""
    paths = sorted(folder.glob("reshard*.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        return [torch.load(path, weights_only=True) for path in paths]


# --- to Hugging Face ---


@pytest.mark.parametrize(("kind", "source"), KINDS_AND_SOURCES)
def test_transformers_opens_what_was_any_kind_to_the_same_tensors_and_logits(
    kind: str, source: str, tmp_path: Path
) -> None:
    folder = write_source(source, tmp_path / "source", kind)
    before = content(folder)
    convert(folder, tmp_path / "new")
    assert sorted(content(tmp_path / "new")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_identical(stored(tmp_path / "new"), expected_tensors(kind))
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values())
    assert_identical(opened.state_dict(), reference(kind).state_dict())
    with torch.no_grad():
        assert torch.equal(opened.eval()(IDS).logits, reference(kind)(IDS).logits)
    assert content(folder) == before
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["new", "source"]


@pytest.mark.parametrize(("kind", "source"), KINDS_AND_SOURCES)
def test_the_configuration_is_the_references(kind: str, source: str, tmp_path: Path) -> None:
    model = copy.copy(reference(kind))
    changes = {"dropout": 0.25, "attention_dropout": 0.125}
    model.config = transformers.OPTConfig.from_dict(model.config.to_dict() | changes)
    convert(write_source(source, tmp_path / "source", model=model), tmp_path / "new")
    got = transformers.AutoConfig.from_pretrained(tmp_path / "new").to_dict()
    expected = reference(kind).config.to_dict() | changes
    told = (*SIZE, "do_layer_norm_before", "word_embed_proj_dim", "enable_bias", "layer_norm_elementwise_affine",
            "activation_function", "dropout", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
            "tie_word_embeddings", "_remove_final_layer_norm")  # fmt: skip
    assert {name: got[name] for name in told} == {name: expected[name] for name in told}


def test_one_file_of_a_checkpoint_stands_for_it(tmp_path: Path) -> None:
    for source, file in (("2 parts x 3 shards", "checkpoint_last-model_part-1-shard2.pt"), ("bin", "config.json")):
        folder = write_source(source, tmp_path / source)
        convert(folder / file, tmp_path / f"new {source}")
        assert_identical(stored(tmp_path / f"new {source}"), expected_tensors())


def test_a_folder_that_holds_one_models_folder_stands_for_it(tmp_path: Path) -> None:
    write_source("2 parts", tmp_path / "run" / "model")
    write_source("safetensors", tmp_path / "run" / ".hidden")
    convert(tmp_path / "run", tmp_path / "new")
    assert_identical(stored(tmp_path / "new"), expected_tensors())
    before = content(tmp_path)
    for destination in (tmp_path / "run" / "model", tmp_path / "run"):
        with pytest.raises(ValueError, match=r"is, or holds, the source \S*run/model\. Name another destination"):
            convert(tmp_path / "run", destination, force=True)
    nothing_written(tmp_path, before)
    write_source("safetensors", tmp_path / "run" / "other")
    with pytest.raises(ValueError, match=r"run: holds 2 models \(model, other\)\. Name one of them"):
        convert(tmp_path / "run", tmp_path / "another")


def test_flat_shards_without_metadata_need_a_configuration(tmp_path: Path) -> None:
    write_metaseq(tmp_path / "old", reference(), parts=2, shards=3, metadata=False, drop=["decoder_layers"])
    reference().config.save_pretrained(tmp_path / "config")
    with pytest.raises(CheckpointError, match=r"flattened without shard_metadata.*--model-config"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    convert(tmp_path / "old", tmp_path / "new", model_config=tmp_path / "config" / "config.json")
    assert_identical(stored(tmp_path / "new"), expected_tensors())


def test_a_stored_head_is_compared_and_left_out(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, hf / "model.safetensors")
    convert(hf, tmp_path / "new")
    assert_identical(stored(tmp_path / "new"), expected_tensors())
    head[95, 31] += 1e-3
    save_file(tensors | {"lm_head.weight": head}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the token embeddings"):
        convert(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_without_its_last_norm_stays_one(tmp_path: Path) -> None:
    """Fine-tunes made before transformers 4.20.1 are so."""
    old = build_reference("125m", _remove_final_layer_norm=True)
    old.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "new")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, old(IDS).logits)


def test_the_generation_config_comes_along_or_is_the_configurations(hf: Path, tmp_path: Path) -> None:
    own = {"max_new_tokens": 7, "do_sample": True, "top_k": 3, "eos_token_id": [2, 5], "made_up": None}
    (hf / "generation_config.json").write_text(json.dumps(own))
    convert(hf, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == own
    (hf / "generation_config.json").unlink()
    change_config(hf, eos_token_id=[2, 5], bos_token_id=0, pad_token_id=None)
    convert(hf, tmp_path / "derived")
    derived = transformers.GenerationConfig.from_pretrained(tmp_path / "derived")
    assert (derived.bos_token_id, derived.eos_token_id, derived.pad_token_id) == (0, [2, 5], None)


def test_other_keys_of_config_json_come_along(hf: Path, tmp_path: Path) -> None:
    change_config(hf, prefix="</s>", made_up=[1], dtype="float64")
    convert(hf, tmp_path / "new", dtype="float16")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (new["prefix"], new["made_up"], new["torch_dtype"]) == ("</s>", [1], "float16")
    assert "dtype" not in new


# --- files and their sizes ---


@pytest.mark.parametrize(
    ("kind", "source"), [("125m", "safetensors"), ("350m", "bin shards"), ("galactica", "4 parts")]
)
@pytest.mark.parametrize("limit", [1, 9_000, 20_000, 60_000])
def test_files_keep_to_the_limit_and_the_index_knows_them_all(
    kind: str, source: str, limit: int, tmp_path: Path
) -> None:
    convert(write_source(source, tmp_path / "source", kind), tmp_path / "new", max_shard_bytes=limit)
    expected = expected_tensors(kind)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert sorted(index["weight_map"]) == sorted(expected)
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    for tensors in held.values():
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    assert_identical(stored(tmp_path / "new"), expected)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert_identical(opened.state_dict(), reference(kind).state_dict())


def test_what_fits_into_one_file_is_one_without_an_index(hf: Path, tmp_path: Path) -> None:
    total = sum(t.nbytes for t in expected_tensors().values())
    convert(hf, tmp_path / "one", max_shard_bytes=total)
    convert(hf, tmp_path / "two", max_shard_bytes=total - 1)
    assert [p.name for p in sorted((tmp_path / "one").glob("*model*"))] == ["model.safetensors"]
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 20_000}, {"format": "metaseq", "parts": 2}])
def test_files_are_readable_for_whom_the_umask_says(options: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "new", **options)
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {0o666 & ~umask}


# --- dtypes ---


@pytest.mark.parametrize("source", ["safetensors", "legacy bin", "singleton, unfused", "4 parts", "2 parts x 3 shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_is_torchs_own(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "source"), tmp_path / "new", dtype=dtype)
    expected = {key: tensor.to(dtype) for key, tensor in expected_tensors().items()}
    assert_identical(stored(tmp_path / "new"), expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == dtype


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_keeps_what_is_stored(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "source", dtype=dtype), tmp_path / "new")
    assert_identical(stored(tmp_path / "new"), expected_tensors("125m", dtype))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == dtype


def test_a_cast_of_parts_is_torchs_own(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "new", format="metaseq", parts=2, dtype="bfloat16")
    expected = split_into_parts(metaseq_state(reference(), dtype=torch.bfloat16), 2)
    for part, state in zip(parts_of(tmp_path / "new"), expected, strict=True):
        assert part["model"].pop("decoder.version").dtype == torch.float32  # a format's number, no weight
        del state["decoder.version"]
        assert_identical(part["model"], state)


@pytest.mark.parametrize("parts", [1, 2])
def test_auto_keeps_norms_in_float32_beside_float16_there_and_back(parts: int, tmp_path: Path) -> None:
    write_metaseq(tmp_path / "mixed", reference(), parts=parts, dtype=torch.float16, mixed_norms=True)
    expected = {
        key: tensor if "layer_norm" in key else tensor.half()
        for key, tensor in expected_tensors().items()
    }  # fmt: skip
    convert(tmp_path / "mixed", tmp_path / "hf")
    assert_identical(stored(tmp_path / "hf"), expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    convert(tmp_path / "hf", tmp_path / "metaseq", format="metaseq", parts=4)
    state = metaseq_state(reference(), dtype=torch.float16, mixed_norms=True)
    state["decoder.version"] = torch.tensor([3.0])
    for part, independent in zip(parts_of(tmp_path / "metaseq"), split_into_parts(state, 4), strict=True):
        assert_identical(part["model"], independent)
    convert(tmp_path / "metaseq", tmp_path / "back")
    assert_identical(stored(tmp_path / "back"), expected)
    convert(tmp_path / "metaseq", tmp_path / "uniform", dtype="float16")
    assert {t.dtype for t in stored(tmp_path / "uniform").values()} == {torch.float16}


def test_projections_of_several_dtypes_do_not_fuse_in_silence(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    key = "model.decoder.layers.1.self_attn.v_proj.bias"
    save_file(tensors | {key: tensors[key].half()}, hf / "model.safetensors")
    message = (
        r"^layers\.1\.self_attn\.v_proj\.bias: is torch\.float16, and decoder\.layers\.1\.self_attn\.qkv_proj\.bias "
        r"holds torch\.float32\. Name a --dtype\."
    )
    with pytest.raises(CheckpointError, match=message):
        convert(hf, tmp_path / "new", format="metaseq")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    convert(hf, tmp_path / "new", format="metaseq", dtype="float16")


# --- to metaseq ---


@pytest.mark.parametrize(("kind", "parts"), PARTS)
def test_parts_are_those_of_an_independent_writer(kind: str, parts: int, tmp_path: Path) -> None:
    convert(write_source("safetensors", tmp_path / "hf", kind), tmp_path / "new", format="metaseq", parts=parts)
    expected = ["reshard.pt"] if parts == 1 else [f"reshard-model_part-{i}.pt" for i in range(parts)]
    assert sorted(content(tmp_path / "new")) == ["config.json", *expected]
    written = parts_of(tmp_path / "new")
    for part, state in zip(written, split_into_parts(metaseq_state(reference(kind)), parts), strict=True):
        assert_identical(part["model"], state)
        assert list(part) == ["cfg", "model", "args", "extra_state"]
        for key, tensor in part["model"].items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, key
        ours, theirs = vars(part["cfg"]["model"]), model_fields(reference(kind), parts)
        assert {name: theirs[name] for name in ours if name in theirs} == ours


@pytest.mark.parametrize("source", ["2 parts", "4 parts", "2 parts x 3 shards", "3 shards", "legacy bin"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_other_parts_are_the_same_as_of_the_whole(source: str, parts: int, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "source"), tmp_path / "new", format="metaseq", parts=parts)
    expected = split_into_parts(metaseq_state(reference()), parts)
    for part, state in zip(parts_of(tmp_path / "new"), expected, strict=True):
        assert_identical(part["model"], state)


@pytest.mark.parametrize(("kind", "parts"), PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_by_way_of_parts_is_exact(kind: str, parts: int, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(write_source("bin shards", tmp_path / "hf", kind, dtype), tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "parts", format="metaseq", parts=parts)
    convert(tmp_path / "parts", tmp_path / "back")
    assert_identical(stored(tmp_path / "back"), expected_tensors(kind, dtype))
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    convert(tmp_path / "back", tmp_path / "again", format="metaseq", parts=parts)
    for one, other in zip(parts_of(tmp_path / "parts"), parts_of(tmp_path / "again"), strict=True):
        assert_identical(one["model"], other["model"])
        assert vars(one["cfg"]["model"]) == vars(other["cfg"]["model"])


@pytest.mark.parametrize("module", [names, converting])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_round_trip_shows_projections_in_another_order(
    module: Any, parts: int, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, then writing, takes them for queries, keys, values."""
    monkeypatch.setattr(module, "FUSED", ("q_proj", "k_proj", "v_proj"))
    convert(hf, tmp_path / "parts", format="metaseq", parts=parts)
    convert(tmp_path / "parts", tmp_path / "back")
    got, expected = stored(tmp_path / "back"), expected_tensors()
    wrong = {key for key in expected if not torch.equal(got[key], expected[key])}
    assert wrong == {key for key in expected if any(f".{p}_proj." in key for p in "kvq")}


def test_the_independent_writer_shows_projections_in_another_order(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides wrong alike come back from a round trip, so that it alone proves nothing."""
    for module in (names, converting):
        monkeypatch.setattr(module, "FUSED", ("q_proj", "k_proj", "v_proj"))
    convert(hf, tmp_path / "parts", format="metaseq", parts=2)
    convert(tmp_path / "parts", tmp_path / "back")
    assert_identical(stored(tmp_path / "back"), expected_tensors())
    for part, state in zip(parts_of(tmp_path / "parts"), split_into_parts(metaseq_state(reference()), 2), strict=True):
        wrong = {key for key in state if not torch.equal(part["model"][key], state[key])}
        assert wrong == {key for key in state if "qkv_proj" in key}


def test_ids_of_special_tokens_survive_metaseqs_format(tmp_path: Path) -> None:
    """Galactica begins with 0; metaseq's own configuration has no such field, the config.json beside it does."""
    ids = {"bos_token_id": 0, "eos_token_id": [2, 5], "pad_token_id": 3}
    build_reference("galactica", **ids).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "parts", format="metaseq", parts=2)
    convert(tmp_path / "parts", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids


def test_a_model_without_its_last_norm_survives_metaseqs_format(tmp_path: Path) -> None:
    """There, its tensors alone are those of a model with norms behind the layers."""
    old = build_reference("125m", _remove_final_layer_norm=True)
    old.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "parts", format="metaseq", parts=2)
    convert(tmp_path / "parts", tmp_path / "back")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, old(IDS).logits)


# --- tokenizers ---


@functools.cache
def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder that no test changes."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_tokenizer(folder: Path, expected: Path) -> None:
    """transformers' AutoTokenizer gives the same ids as that of the original files, and so does ours."""
    original = open_tokenizer(expected)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    ids = original(TEXTS)["input_ids"]
    assert opened(TEXTS)["input_ids"] == ids
    assert [Tokenizer.load(folder).encode(text) for text in TEXTS] == ids
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(opened, name) == getattr(original, name)
    assert [opened.decode(row) for row in ids] == [original.decode(row) for row in ids]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of the embedded checkpoint's tokenizer, as a published OPT has them."""
    folder = tmp_path_factory.mktemp("files")
    tokenizers.Tokenizer.from_file(str(Path(minopt.DEMO) / "tokenizer.json")).model.save(str(folder))
    shutil.copy(Path(minopt.DEMO) / "tokenizer_config.json", folder)
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real files."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data/opt-tokenizer beside the project")
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(SHARED_DATA / "opt-tokenizer", folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


def beside(vocabulary: Path, source: Path) -> Path:
    for path in vocabulary.glob("[!c]*"):
        shutil.copyfile(path, source / path.name)
    return source


def one_folder_up(vocabulary: Path, source: Path) -> Path:
    beside(vocabulary, source.parent)
    return source


def metaseqs_names(vocabulary: Path, source: Path) -> Path:
    shutil.copyfile(vocabulary / "vocab.json", source / "gpt2-vocab.json")
    shutil.copyfile(vocabulary / "merges.txt", source / "gpt2-merges.txt")
    return source


def metaseqs_names_one_folder_up(vocabulary: Path, source: Path) -> Path:
    metaseqs_names(vocabulary, source.parent)
    return source


def in_one_file(vocabulary: Path, source: Path) -> Path:
    model = models.BPE.from_file(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(source / "gpt2-unified.json"))
    return source


PLACES = (beside, one_folder_up, metaseqs_names, metaseqs_names_one_folder_up, in_one_file)


@pytest.mark.parametrize(
    ("files", "place", "source"),
    [
        *[("small", place, source) for place in PLACES for source in ("safetensors", "2 parts")],
        ("published", beside, "bin"),
        ("published", metaseqs_names_one_folder_up, "2 parts x 3 shards"),
        ("published", in_one_file, "singleton"),
    ],
)
def test_the_tokenizer_is_found_and_transformers_reads_it(
    files: str, place: Callable[[Path, Path], Path], source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    vocabulary = request.getfixturevalue(files)
    (tmp_path / "up").mkdir()
    folder = place(vocabulary, write_source(source, tmp_path / "up" / "source"))
    convert(folder, tmp_path / "new")
    assert_same_tokenizer(tmp_path / "new", vocabulary)


def test_a_tokenizer_that_is_named_goes_before_the_one_beside(small: Path, tmp_path: Path) -> None:
    folder = write_source("singleton", tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "new", tokenizer=small)
    assert_same_tokenizer(tmp_path / "new", small)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected tokenizer\.json.*found no such folder"):
        convert(folder, tmp_path / "other", tokenizer=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"source/tokenizer\.json: not a tokenizer file"):
        convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_embedded_checkpoint_keeps_its_tokenizer_and_logits(tmp_path: Path) -> None:
    demo = Path(minopt.DEMO)
    convert(demo, tmp_path / "new")
    assert_same_tokenizer(tmp_path / "new", demo)
    assert_identical(stored(tmp_path / "new"), load_file(demo / "model.safetensors"))


def test_without_a_tokenizer_a_warning_says_so(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(hf, tmp_path / "new")
    assert caplog.messages == [f"{hf}: no tokenizer's files beside the weights, so none are written."]


@pytest.mark.parametrize("files", ["small", "published"])
def test_metaseqs_vocabulary_is_what_its_library_reads(
    files: str, hf: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """metaseq opens the two files with ``ByteLevelBPETokenizer``, and puts ``</s>`` before a text itself."""
    vocabulary = request.getfixturevalue(files)
    convert(hf, tmp_path / "new", format="metaseq", tokenizer=vocabulary)
    vocab, merges = tmp_path / "new" / "gpt2-vocab.json", tmp_path / "new" / "gpt2-merges.txt"
    assert json.loads(vocab.read_text()) == json.loads((vocabulary / "vocab.json").read_text())
    pairs = [line for line in (vocabulary / "merges.txt").read_text().splitlines() if not line.startswith("#version")]
    assert [line for line in merges.read_text().splitlines() if not line.startswith("#version")] == pairs
    theirs = tokenizers.ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    plain = [text for text in TEXTS if "<" not in text]
    assert [[2, *theirs.encode(text).ids] for text in plain] == open_tokenizer(vocabulary)(plain)["input_ids"]
    convert(tmp_path / "new", tmp_path / "back")
    assert_same_tokenizer(tmp_path / "back", vocabulary)


def digits_apart(settings: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, settings["pre_tokenizer"]]}


def without_a_beginning(settings: dict[str, Any]) -> None:
    settings["post_processor"] = None


@pytest.mark.parametrize("change", [lambda settings: None, digits_apart, without_a_beginning])
def test_a_tokenizer_that_is_more_than_metaseqs_two_files_gives_the_same_ids(
    change: Callable[[dict[str, Any]], None], hf: Path, tmp_path: Path
) -> None:
    """The embedded one has ``<unk>`` as a special token; Galactica's takes digits one by one, and begins with none."""
    settings = json.loads((Path(minopt.DEMO) / "tokenizer.json").read_text())
    change(settings)
    (hf / "tokenizer.json").write_text(json.dumps(settings))
    texts = ["in 1999 and 2000", "an <unk> word"]
    expected = [Tokenizer.load(hf).encode(text) for text in texts]
    convert(hf, tmp_path / "new", format="metaseq")
    assert [Tokenizer.load(tmp_path / "new").encode(text) for text in texts] == expected


# --- what is refused ---


def nothing_written(tmp_path: Path, before: dict[str, bytes]) -> None:
    assert content(tmp_path) == before
    assert not list(tmp_path.glob("**/*.saving"))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown format": ({"format": "gguf"}, ValueError, r"format: expected hf or metaseq, got 'gguf'"),
    "unknown dtype": ({"dtype": "int8"}, ValueError, r"dtype: expected auto, float32, .*got 'int8'"),
    "integers": ({"dtype": torch.int32}, ValueError, r"dtype: expected auto, float32, .*got torch\.int32"),
    "parts of hf": (
        {"parts": 2},
        ValueError,
        r"parts: metaseq's format has them, got 2 with hf\. Add --format metaseq",
    ),
    "no parts": ({"format": "metaseq", "parts": 0}, ValueError, r"parts: expected 1 or more, got 0"),
    "heads": (
        {"format": "metaseq", "parts": 8},
        ValueError,
        r"parts: expected a divisor of heads, ffn_dim and vocab_size, got 8 \(num_attention_heads is 4\)\. 1, 2, 4 ",
    ),
    "ffn_dim": (
        {"format": "metaseq", "parts": 3},
        ValueError,
        r"got 3 \(num_attention_heads is 4, ffn_dim is 64\)\. 1, 2, 4 would do",
    ),
    "no shard": ({"max_shard_bytes": 0}, ValueError, r"max_shard_bytes: expected a positive number, got 0"),
    "no preset": ({"model_config": "opt-9b"}, ValueError, r"model_config: opt-9b: no such file, and .*opt-125m"),
    "another preset": ({"model_config": "opt-125m"}, CheckpointError, r"num_hidden_layers is 12 in the given config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_are_told_before_anything_is_written(case: str, hf: Path, tmp_path: Path) -> None:
    options, error, message = REFUSED[case]
    before = content(tmp_path)
    with pytest.raises(error, match=message):
        convert(hf, tmp_path / "a" / "new", **options)
    nothing_written(tmp_path, before)
    assert not (tmp_path / "a").exists()


def test_a_vocabulary_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    build_reference("125m", vocab_size=98).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"got 4 \(vocab_size is 98\)\. 1, 2 would do"):
        convert(tmp_path / "hf", tmp_path / "new", format="metaseq", parts=4)
    convert(tmp_path / "hf", tmp_path / "new", format="metaseq", parts=2)


def test_a_model_with_projections_has_one_part(tmp_path: Path) -> None:
    folder = write_source("safetensors", tmp_path / "hf", "350m")
    with pytest.raises(ValueError, match=r"projections \(word_embed_proj_dim 16, hidden_size 32\) has one part.*got 2"):
        convert(folder, tmp_path / "new", format="metaseq", parts=2)
    assert not (tmp_path / "new").exists()


def test_the_source_is_not_written_over(hf: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    (tmp_path / "link").symlink_to(hf)
    for source, destination in ((hf, hf), (hf, tmp_path), (hf / "model.safetensors", hf), (hf, tmp_path / "link"),
                                (tmp_path / "link", hf), (hf, hf / "inner" / "..")):  # fmt: skip
        with pytest.raises((ValueError, FileExistsError), match="is, or holds, the source"):
            convert(source, destination, force=True)
    (tmp_path / "link").unlink()
    nothing_written(tmp_path, before)


def test_a_folder_inside_of_the_source_is_another_one(hf: Path) -> None:
    before = content(hf)
    convert(hf, hf / "float16", dtype="float16")
    convert(hf, hf / "float16", dtype="bfloat16", force=True)
    assert {name: data for name, data in content(hf).items() if not name.startswith("float16/")} == before
    assert {t.dtype for t in stored(hf / "float16").values()} == {torch.bfloat16}


def test_sources_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, and not the name of a model on the hub"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected weights .*got nothing"):
        convert(tmp_path / "empty", tmp_path / "new")
    folder = write_source("2 parts x 3 shards", tmp_path / "shards")
    (folder / "checkpoint_last-model_part-1-shard1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"files of checkpoint_last are missing: \S*part-1-shard1\.pt\."):
        convert(folder, tmp_path / "new")
    write_source("singleton", folder)
    write_source("singleton", tmp_path / "two")
    write_metaseq(tmp_path / "two", reference(), stem="restored")
    with pytest.raises(
        CheckpointError, match=r"two: holds 2 checkpoints \(reshard\.pt, restored\.pt\)\. Name the file"
    ):
        convert(tmp_path / "two", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_at_the_destination_stays_unless_force_is_given(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(hf, tmp_path / "empty")
    before = content(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"empty: is there already\. Name another folder, or replace .*force=True"
    ):
        convert(hf, tmp_path / "empty", dtype="float16")
    (tmp_path / "file").write_text("mine")
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"file: expected a folder to write to, got a file\. Name another"):
            convert(hf, tmp_path / "file", force=force)
    (tmp_path / "file").unlink()
    nothing_written(tmp_path, before)


def test_a_destination_that_is_taken_is_told_before_the_hub_is_asked(hf: Path) -> None:
    with pytest.raises(FileExistsError, match=r"is there already"):
        convert("tester/model", hf, local_files_only=True)
    with pytest.raises(ConnectionError, match=r"tester/model: not in the hub's cache"):  # then it is
        convert("tester/model", hf, local_files_only=True, force=True)


def test_a_folder_that_is_no_model_is_not_replaced(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis: holds files that are not a model's \(no config\.json\)"):
        convert(hf, tmp_path / "thesis", force=True)
    nothing_written(tmp_path, before)


def test_the_current_folder_is_not_replaced(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="is, or holds, the current folder"):
        convert(hf, ".")


def test_force_replaces_weights_and_tokenizer_and_keeps_all_else(hf: Path, small: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    convert(hf, new, max_shard_bytes=20_000, tokenizer=small)
    (new / "pytorch_model-00001-of-00002.bin").write_bytes(b"old")
    (new / "vocab.json").write_text("{}")
    (new / "notes.txt").write_text("keep me")
    (new / "logs").mkdir()
    (new / "logs" / "model.safetensors").write_text("me too")
    kept = ["logs/model.safetensors", "notes.txt"]
    written = sorted([*kept, "config.json"])
    convert(hf, new, dtype="float16", force=True)
    assert sorted(content(new)) == sorted([*written, "generation_config.json", "model.safetensors"])
    convert(hf, new, format="metaseq", parts=4, force=True, tokenizer=small)
    vocabulary = ["gpt2-merges.txt", "gpt2-unified.json", "gpt2-vocab.json", "tokenizer_config.json"]
    assert sorted(content(new)) == sorted([*written, *vocabulary, *(f"reshard-model_part-{i}.pt" for i in range(4))])
    convert(hf, new, format="metaseq", parts=2, force=True)
    assert sorted(content(new)) == sorted([*written, *(f"reshard-model_part-{i}.pt" for i in range(2))])
    convert(hf, new, format="metaseq", force=True)
    assert sorted(content(new)) == sorted([*written, "reshard.pt"])
    convert(hf, new, force=True)
    assert sorted(content(new)) == sorted([*written, "generation_config.json", "model.safetensors"])
    assert_identical(stored(new), expected_tensors())
    assert (new / "notes.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new"]


@pytest.mark.parametrize("old", [{"stem": "restored"}, {"parts": 2, "shards": 2}])
def test_what_force_has_written_is_the_only_checkpoint_there(old: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    write_metaseq(tmp_path / "new", reference(), **old)
    reference().config.save_pretrained(tmp_path / "new")
    convert(hf, tmp_path / "new", force=True)
    assert load_model(tmp_path / "new", device="cpu").config.vocab_size == 96


def test_no_old_tokenizer_stays_behind(small: Path, hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "new", format="metaseq")
    in_one_file(small, tmp_path / "new")
    convert(hf, tmp_path / "new", force=True)
    assert minopt.load(tmp_path / "new", device="cpu").tokenizer is None


def test_a_link_in_the_old_folder_is_kept_and_stops_nothing(hf: Path, tmp_path: Path) -> None:
    elsewhere = write_source("singleton", tmp_path / "elsewhere") / "reshard.pt"
    convert(hf, tmp_path / "new", dtype="float16")
    (tmp_path / "new" / "link.pt").symlink_to(elsewhere)
    convert(hf, tmp_path / "new", force=True)
    assert_identical(stored(tmp_path / "new"), expected_tensors())
    assert elsewhere.is_file()


# --- what goes wrong in the middle ---


OUTPUTS: dict[str, dict[str, Any]] = {
    "hf": {"max_shard_bytes": 20_000},
    "metaseq": {"format": "metaseq", "parts": 2},
}


@pytest.fixture(params=OUTPUTS)
def output(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options of each format that is written, in several files."""
    return OUTPUTS[request.param]


@pytest.fixture(params=["new", "old"])
def destination(request: pytest.FixtureRequest, hf: Path, tmp_path: Path) -> Path:
    """A folder that is not there, and one with a model to replace."""
    if request.param == "old":
        convert(hf, tmp_path / "old", dtype="float16")
        (tmp_path / "old" / "notes.txt").write_text("keep me")
    return tmp_path / request.param


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """A function that lets another be called at the 25th read."""

    def install(act: Callable[[], object]) -> None:
        read, calls = TensorFile.read_into, []

        def counted(self: TensorFile, *args: Any) -> None:
            calls.append(1)
            if len(calls) == 25:
                act()
            read(self, *args)

        monkeypatch.setattr(TensorFile, "read_into", counted)

    return install


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_in_the_middle_leaves_all_as_it_was(
    output: dict[str, Any], destination: Path, hf: Path, tmp_path: Path, interrupt_reading: Callable[..., None]
) -> None:
    before = content(tmp_path)
    interrupt_reading(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        convert(hf, destination, force=True, **output)
    nothing_written(tmp_path, before)


def test_an_error_in_the_middle_leaves_all_as_it_was(
    output: dict[str, Any], destination: Path, hf: Path, tmp_path: Path, interrupt_reading: Callable[..., None]
) -> None:
    before = content(tmp_path)

    def fail() -> None:
        raise RuntimeError("of no kind that is known")

    interrupt_reading(fail)
    with pytest.raises(RuntimeError, match="of no kind that is known"):
        convert(hf, destination, force=True, **output)
    nothing_written(tmp_path, before)


@pytest.mark.parametrize("key", ["decoder.embed_positions.weight", "decoder.layers.2.fc2.bias",
                                 "decoder.layers.0.self_attn_layer_norm.weight"])  # fmt: skip
def test_parts_that_contradict_each_other_are_found(
    key: str, output: dict[str, Any], destination: Path, tmp_path: Path
) -> None:
    folder = write_source("4 parts", tmp_path / "parts")

    def differ(model: dict[str, Tensor]) -> None:
        model[key].view(-1)[-1] += 1e-3

    change_file(folder / "reshard-model_part-2.pt", differ)
    before = content(tmp_path)
    message = (
        rf"^{key.removeprefix('decoder.')}: every model parallel part holds it, and \S*part-0\.pt and \S*part-2\.pt "
        r"hold different numbers\. Are the parts of one model\?"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(folder, destination, force=True, **output)
    nothing_written(tmp_path, before)


def test_a_source_that_shrinks_meanwhile_is_told(
    output: dict[str, Any], destination: Path, hf: Path, tmp_path: Path, interrupt_reading: Callable[..., None]
) -> None:
    before = content(tmp_path)
    whole = (hf / "model.safetensors").read_bytes()
    interrupt_reading(lambda: (hf / "model.safetensors").write_bytes(whole[:20_000]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends in the middle of its tensors"):
        convert(hf, destination, force=True, **output)
    (hf / "model.safetensors").write_bytes(whole)
    nothing_written(tmp_path, before)


def test_a_generation_config_that_is_none_is_told_before_anything_is_read(
    hf: Path, tmp_path: Path, interrupt_reading: Callable[..., None]
) -> None:
    (hf / "generation_config.json").write_text("{")
    interrupt_reading(lambda: pytest.fail("the weights were read first"))
    with pytest.raises(ValueError, match=r"generation_config\.json: expected JSON"):
        convert(hf, tmp_path / "new")


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("output", ["hf", "metaseq"], indirect=True)
def test_too_little_free_space_is_told_first(
    output: dict[str, Any], destination: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(t.nbytes for t in expected_tensors().values())
    before = content(tmp_path)
    asked = []

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or Usage(10**9, 0, free))

    for free, dtype in ((needed - 1, "auto"), (needed // 2 - 1, "float16"), (needed, "float64")):
        leave(free)
        with pytest.raises(
            OSError, match=r": [0-9.]+ kB are to be written, and [0-9.]+ kB are free\. Make room, or name"
        ):
            convert(hf, destination, dtype=dtype, force=True, **output)
        nothing_written(tmp_path, before)
    leave(int(0.75 * needed))
    convert(hf, destination, dtype="float16", force=True, **output)
    assert {path.resolve() for path in asked} <= {tmp_path, destination}


# Writes some files, then has the system refuse more than a few bytes for the next one.
FULL = """
import resource, sys
import torch
from minopt.checkpoint import save
from minopt.cli import main

def filling(write):
    written = []
    def limited(*args, **options):
        written.append(1)
        if len(written) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return write(*args, **options)
    return limited

save._write_file, torch.save = filling(save._write_file), filling(torch.save)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flags", [["--max-shard-size", "2MB"], ["--format", "metaseq", "--parts", "2"]])
def test_a_disk_that_fills_up_in_the_middle_is_one_line_and_leaves_all_as_it_was(
    flags: list[str], tmp_path: Path
) -> None:
    source, fresh, old = (tmp_path / name for name in ("source", "fresh", "old"))
    copy_of(minopt.DEMO, source)
    copy_of(minopt.DEMO, old)
    (old / "notes.txt").write_text("keep me")
    before = content(tmp_path)
    command = [sys.executable, "-B", "-c", FULL, "convert", str(source)]
    runs = [
        subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for arguments in ([str(fresh), *flags], [str(old), "--force", *flags])
    ]
    for destination, run in zip((fresh, old), runs, strict=True):
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out) == (2, "")
        assert err.startswith(f"minopt: error: {destination}: ")
        assert err.endswith("Is the disk full?\n")
        assert err.count("\n") == 1
    nothing_written(tmp_path, before)
    assert not fresh.exists()


# --- memory ---


MEASURE = """
import json, shutil, sys
from pathlib import Path
from minopt.checkpoint.convert import convert

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])

warm_up, source, scratch = map(Path, sys.argv[1:4])
options = json.loads(sys.argv[4])
convert(warm_up, scratch / "warm", **options)
before = kilobytes("VmRSS")
convert(source, scratch / "new", **options)
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """A checkpoint of 230 MB in 4 parts x 4 shards, and its tensors; gone afterwards."""
    config = transformers.OPTConfig(**SIZE | {"vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 8,
                                              "num_attention_heads": 8, "ffn_dim": 4096})  # fmt: skip
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in transformers.OPTForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    noise = torch.randn(2**20).half()
    tensors = {
        key: noise.roll(i).repeat(-(-shape.numel() // 2**20))[: shape.numel()].view(shape)
        for i, (key, shape) in enumerate(shapes.items())
        if key != "lm_head.weight"
    }
    folder = tmp_path_factory.mktemp("large")
    write_metaseq(folder / "source", SimpleNamespace(config=config, state_dict=lambda: tensors), parts=4, shards=4)
    yield folder, tensors
    shutil.rmtree(folder)


@pytest.mark.parametrize("options", [{"max_shard_bytes": 80_000_000}, {"format": "metaseq", "parts": 2}])
def test_a_tensor_of_the_output_is_in_memory_at_a_time_or_a_file_in_metaseqs_format(
    options: dict[str, Any], large: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc, where the kernel counts the memory of a process")
    folder, tensors = large
    warm_up = write_source("2 parts x 3 shards", tmp_path / "warm")
    command = [sys.executable, "-c", MEASURE, str(warm_up), str(folder / "source"), str(folder), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    files = [p.stat().st_size for p in (folder / "new").iterdir()]
    for name in ("new", "warm"):
        shutil.rmtree(folder / name)
    total = sum(t.nbytes for t in tensors.values())
    largest = max(t.nbytes for t in tensors.values())
    bound = 2 * largest + 30_000_000 + ("format" in options) * max(files)
    assert sum(files) >= total
    assert bound < 0.85 * total, "all of it would be found"
    assert largest / 2 < int(result.stdout) < bound


# --- the bar ---


@pytest.mark.parametrize(("options", "count"), [({}, 1), (OUTPUTS["metaseq"], 2)])
def test_the_bar_counts_the_tensors_and_is_drawn_on_demand_only(
    options: dict[str, Any],
    count: int,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minopt.progress.on_terminal", lambda: True)
    convert(hf, tmp_path / "silent", **options)
    assert capsys.readouterr() == ("", "")
    convert(hf, tmp_path / "shown", show_progress=True, **options)
    out, err = capsys.readouterr()
    total = count * len(expected_tensors())
    assert out == ""
    assert f" {total}/{total} " in err


def test_paths_may_begin_at_home(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    convert("~/hf", "~/new")
    assert_identical(stored(tmp_path / "new"), expected_tensors())

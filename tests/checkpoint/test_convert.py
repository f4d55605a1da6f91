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
from minopt.checkpoint import names
from minopt.checkpoint.files import TensorFile
from tests.checkpoint.metaseq_files import metaseq_state, model_fields, split_into_parts, write_metaseq
from tests.checkpoint.sources import KINDS_AND_SOURCES, SOURCES, content, expected_tensors, reference, write_source
from tests.checkpoint.test_load import change_config
from tests.conftest import SIZE, build_reference, copy_of
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
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert sum(map(len, files)) == len(set().union(*files)), "a key in two files"
    return {key: tensor for tensors in files for key, tensor in tensors.items()}


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Keys, dtypes, shapes and bytes."""
    assert sorted(got) == sorted(expected)
    for key, tensor in expected.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), key


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The parts that were written, read in the way that runs no code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return [torch.load(path, weights_only=True) for path in sorted(folder.glob("reshard*.pt"))]


def logits(folder: Path) -> Tensor:
    """What transformers computes with a folder."""
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def nothing_written(tmp_path: Path, before: dict[str, bytes]) -> None:
    assert content(tmp_path) == before
    assert not list(tmp_path.glob("**/*.saving"))


# --- to Hugging Face ---


@pytest.mark.parametrize(("kind", "source"), KINDS_AND_SOURCES)
def test_transformers_opens_what_was_any_kind_to_the_same_configuration_tensors_and_logits(
    kind: str, source: str, tmp_path: Path
) -> None:
    model = copy.copy(reference(kind))
    expected = model.config.to_dict() | {"dropout": 0.25, "attention_dropout": 0.125}
    model.config = transformers.OPTConfig.from_dict(expected)
    folder = write_source(source, tmp_path / "source", model=model)
    before = content(folder)
    convert(folder, tmp_path / "new")
    assert sorted(content(tmp_path / "new")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_identical(stored(tmp_path / "new"), expected_tensors(kind))
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(opened.eval()(IDS).logits, reference(kind)(IDS).logits)
    told = (*SIZE, "do_layer_norm_before", "word_embed_proj_dim", "enable_bias", "layer_norm_elementwise_affine",
            "activation_function", "dropout", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
            "tie_word_embeddings", "_remove_final_layer_norm")  # fmt: skip
    got = opened.config.to_dict()
    assert {name: got[name] for name in told} == {name: expected[name] for name in told}
    assert content(folder) == before
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["new", "source"]


def test_a_stored_head_is_compared_and_left_out(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    for added in (0.0, 1e-3):
        head = tensors["model.decoder.embed_tokens.weight"] + added
        save_file(tensors | {"lm_head.weight": head}, hf / "model.safetensors")
        if not added:
            convert(hf, tmp_path / "new")
    assert_identical(stored(tmp_path / "new"), expected_tensors())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the token embeddings"):
        convert(hf, tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("125m", {"_remove_final_layer_norm": True}),  # fine-tunes made before transformers 4.20.1 are so
        ("galactica", {"bos_token_id": 0, "eos_token_id": [2, 5], "pad_token_id": 3}),
    ],
)
def test_what_metaseqs_own_configuration_lacks_survives_in_the_config_json_beside(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    build_reference(kind, **changes).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "parts", format="metaseq", parts=2)
    convert(tmp_path / "parts", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in changes} == changes
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "hf"))


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


@pytest.mark.parametrize(
    ("kind", "source", "limit"),
    [("125m", "safetensors", 1), ("350m", "bin shards", 9_000), ("125m", "4 parts", 30_880 * 4 - 1)],
)
def test_files_keep_to_the_limit_and_the_index_knows_them_all(
    kind: str, source: str, limit: int, tmp_path: Path
) -> None:
    convert(write_source(source, tmp_path / "source", kind), tmp_path / "new", max_shard_bytes=limit)
    expected = expected_tensors(kind)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    held = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    for tensors in held.values():
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    assert_identical(stored(tmp_path / "new"), expected)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "new"), reference(kind)(IDS).logits)


# --- dtypes ---


@pytest.mark.parametrize(
    ("source", "dtype"),
    [("safetensors", torch.float16), ("legacy bin", torch.bfloat16), ("4 parts", torch.float64),
     ("2 parts x 3 shards", torch.bfloat16)],
)  # fmt: skip
def test_a_cast_is_torchs_own(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "source"), tmp_path / "new", dtype=dtype)
    assert_identical(stored(tmp_path / "new"), {key: tensor.to(dtype) for key, tensor in expected_tensors().items()})
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == dtype
    convert(tmp_path / "source", tmp_path / "parts", format="metaseq", parts=2, dtype=dtype)
    expected = split_into_parts(metaseq_state(reference(), dtype=dtype), 2)
    for part, state in zip(parts_of(tmp_path / "parts"), expected, strict=True):
        assert part["model"].pop("decoder.version").dtype == torch.float32  # a format's number, no weight
        del state["decoder.version"]
        assert_identical(part["model"], state)


@pytest.mark.parametrize(
    ("source", "dtype"), list(zip(SOURCES, [torch.float16, torch.bfloat16] * (len(SOURCES) // 2), strict=True))
)
def test_auto_keeps_what_is_stored(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "source", dtype=dtype), tmp_path / "new")
    assert_identical(stored(tmp_path / "new"), expected_tensors("125m", dtype))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]


@pytest.mark.parametrize("parts", [1, 2])
def test_auto_keeps_norms_in_float32_beside_float16_there_and_back(parts: int, tmp_path: Path) -> None:
    write_metaseq(tmp_path / "mixed", reference(), parts=parts, dtype=torch.float16, mixed_norms=True)
    expected = {key: t if "layer_norm" in key else t.half() for key, t in expected_tensors().items()}
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


@pytest.mark.parametrize(
    ("kind", "parts", "source"),
    [
        *((kind, parts, "safetensors") for kind, parts in PARTS),
        ("125m", 1, "2 parts"),
        ("125m", 2, "4 parts"),
        ("125m", 2, "3 shards"),
        ("125m", 4, "2 parts x 3 shards"),
        ("125m", 4, "legacy bin"),
    ],
)
def test_parts_are_those_of_an_independent_writer(kind: str, parts: int, source: str, tmp_path: Path) -> None:
    convert(write_source(source, tmp_path / "old", kind), tmp_path / "new", format="metaseq", parts=parts)
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
    convert(tmp_path / "new", tmp_path / "back")
    assert_identical(stored(tmp_path / "back"), expected_tensors(kind))


def test_the_independent_writer_shows_projections_in_another_order(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control: reading and writing share one table, so a round trip alone proves nothing."""
    monkeypatch.setattr(names, "FUSED", ("q_proj", "k_proj", "v_proj"))
    convert(hf, tmp_path / "parts", format="metaseq", parts=2)
    convert(tmp_path / "parts", tmp_path / "back")
    assert_identical(stored(tmp_path / "back"), expected_tensors())
    for part, state in zip(parts_of(tmp_path / "parts"), split_into_parts(metaseq_state(reference()), 2), strict=True):
        wrong = {key for key in state if not torch.equal(part["model"][key], state[key])}
        assert wrong == {key for key in state if "qkv_proj" in key}


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


def as_published(vocabulary: Path, folder: Path) -> None:
    for path in vocabulary.glob("[!c]*"):
        shutil.copyfile(path, folder / path.name)


def with_metaseqs_names(vocabulary: Path, folder: Path) -> None:
    shutil.copyfile(vocabulary / "vocab.json", folder / "gpt2-vocab.json")
    shutil.copyfile(vocabulary / "merges.txt", folder / "gpt2-merges.txt")


def in_one_file(vocabulary: Path, folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "gpt2-unified.json"))


@pytest.mark.parametrize("place", [as_published, with_metaseqs_names, in_one_file])
@pytest.mark.parametrize(("where", "source"), [("source", "2 parts"), (".", "safetensors")])
def test_the_tokenizer_beside_the_weights_or_one_folder_up_is_found_and_transformers_reads_it(
    place: Callable[[Path, Path], None], where: str, source: str, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "up").mkdir()
    folder = write_source(source, tmp_path / "up" / "source")
    place(small, tmp_path / "up" / where)
    convert(folder, tmp_path / "new")
    assert_same_tokenizer(tmp_path / "new", small)


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


def test_without_a_tokenizer_a_warning_says_so(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(hf, tmp_path / "new")
    assert caplog.messages == [f"{hf}: no tokenizer's files beside the weights, so none are written."]


def test_metaseqs_vocabulary_is_what_its_library_reads(hf: Path, small: Path, tmp_path: Path) -> None:
    """metaseq opens the two files with ``ByteLevelBPETokenizer``, and puts ``</s>`` before a text itself."""
    convert(hf, tmp_path / "new", format="metaseq", tokenizer=small)
    vocab, merges = tmp_path / "new" / "gpt2-vocab.json", tmp_path / "new" / "gpt2-merges.txt"
    assert json.loads(vocab.read_text()) == json.loads((small / "vocab.json").read_text())
    written, given = (
        [line for line in path.read_text().splitlines() if not line.startswith("#version")]
        for path in (merges, small / "merges.txt")
    )
    assert written == given
    theirs = tokenizers.ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    plain = [text for text in TEXTS if "<" not in text]
    assert [[2, *theirs.encode(text).ids] for text in plain] == open_tokenizer(small)(plain)["input_ids"]
    convert(tmp_path / "new", tmp_path / "back")
    assert_same_tokenizer(tmp_path / "back", small)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    "changes", [{}, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}, {"post_processor": None}]
)
def test_a_tokenizer_that_is_more_than_metaseqs_two_files_gives_the_same_ids(
    changes: dict[str, Any], hf: Path, tmp_path: Path
) -> None:
    """The embedded one has ``<unk>`` as a special token; Galactica's takes digits one by one, and begins with none."""
    settings = json.loads((Path(minopt.DEMO) / "tokenizer.json").read_text()) | changes
    (hf / "tokenizer.json").write_text(json.dumps(settings))
    texts = ["in 1999 and 2000", "an <unk> word"]
    expected = [Tokenizer.load(hf).encode(text) for text in texts]
    convert(hf, tmp_path / "new", format="metaseq")
    assert [Tokenizer.load(tmp_path / "new").encode(text) for text in texts] == expected


# --- what is refused ---


METASEQ = {"format": "metaseq"}
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("125m", {"format": "gguf"}, ValueError, r"format: expected hf or metaseq, got 'gguf'"),
    ("125m", {"dtype": "int8"}, ValueError, r"dtype: expected auto, float32, .*got 'int8'"),
    ("125m", {"dtype": torch.int32}, ValueError, r"dtype: expected auto, float32, .*got torch\.int32"),
    ("125m", {"parts": 2}, ValueError, r"parts: only metaseq's format has parts, got 2 with hf\. Add --format metaseq"),
    ("125m", METASEQ | {"parts": 0}, ValueError, r"parts: expected 1 or more, got 0"),
    ("125m", METASEQ | {"parts": 8}, ValueError, r"heads, ffn_dim and vocab_size, got 8 \(num_attention_heads is 4\)"),
    ("125m", METASEQ | {"parts": 3}, ValueError, r"\(num_attention_heads is 4, ffn_dim is 64\)\. 1, 2, 4 would do"),
    ("vocab_size", METASEQ | {"parts": 4}, ValueError, r"got 4 \(vocab_size is 98\)\. 1, 2 would do"),
    (
        "350m",
        METASEQ | {"parts": 2},
        ValueError,
        r"projections \(word_embed_proj_dim 16, hidden_size 32\) has one part",
    ),
    ("125m", {"max_shard_bytes": 0}, ValueError, r"max_shard_bytes: expected a positive number, got 0"),
    ("125m", METASEQ | {"max_shard_bytes": 5}, ValueError, r"max_shard_bytes: acts on format hf only"),
    ("125m", {"quantize": "fp4"}, ValueError, r'quantize: expected None, "int8" or "int4", got \'fp4\''),
    ("125m", METASEQ | {"quantize": "int8"}, ValueError, r"quantize: metaseq's format cannot hold int8 weights"),
    ("125m", {"model_config": "opt-9b"}, ValueError, r"model_config: opt-9b: no such file, and .*opt-125m"),
    ("125m", {"model_config": "opt-125m"}, CheckpointError, r"num_hidden_layers is 12 in the given config"),
    ("generation_config", {}, ValueError, r"generation_config\.json: expected JSON"),
]


@pytest.mark.parametrize(("source", "options", "error", "message"), REFUSED)
def test_options_that_do_not_fit_are_told_before_anything_is_read_or_written(
    source: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path,
    interrupt_reading: Callable[..., None],
) -> None:  # fmt: skip
    changes = {"vocab_size": 98} if source == "vocab_size" else {}
    build_reference("350m" if source == "350m" else "125m", **changes).save_pretrained(tmp_path / "hf")
    if source == "generation_config":
        (tmp_path / "hf" / "generation_config.json").write_text("{")
    interrupt_reading(lambda: pytest.fail("the weights were read first"))
    before = content(tmp_path)
    with pytest.raises(error, match=message):
        convert(tmp_path / "hf", tmp_path / "a" / "new", **options)
    nothing_written(tmp_path, before)
    assert not (tmp_path / "a").exists()


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    hf = write_source("safetensors", tmp_path / "run" / "hf")
    before = content(tmp_path)
    (tmp_path / "link").symlink_to(hf)
    for source, destination in ((hf, hf), (hf, tmp_path), (hf / "model.safetensors", hf), (hf, tmp_path / "link"),
                                (tmp_path / "link", hf), (hf, hf / "inner" / ".."),
                                (tmp_path / "run", tmp_path / "run")):  # fmt: skip
        with pytest.raises(ValueError, match=r"is, or holds, the source \S+\. Name another destination"):
            convert(source, destination, force=True)
    (tmp_path / "link").unlink()
    nothing_written(tmp_path, before)


def test_a_folder_inside_of_the_source_is_another_one(hf: Path) -> None:
    before = content(hf)
    convert(hf, hf / "float16", dtype="float16")
    convert(hf, hf / "float16", dtype="bfloat16", force=True)
    assert {name: data for name, data in content(hf).items() if not name.startswith("float16/")} == before
    assert {t.dtype for t in stored(hf / "float16").values()} == {torch.bfloat16}


def test_what_is_at_the_destination_is_told_before_the_hub_is_asked(hf: Path, tmp_path: Path) -> None:
    """What else cannot be replaced: test_save.py."""
    (tmp_path / "empty").mkdir()
    convert(hf, tmp_path / "empty")
    with pytest.raises(FileExistsError, match=r"empty: is there already\. Name another folder, or .*force=True"):
        convert("tester/model", tmp_path / "empty", local_files_only=True)
    with pytest.raises(ConnectionError, match=r"tester/model: not in the hub's cache"):  # then it is
        convert("tester/model", tmp_path / "empty", local_files_only=True, force=True)


def test_force_replaces_weights_and_tokenizer_and_keeps_all_else(hf: Path, small: Path, tmp_path: Path) -> None:
    new, elsewhere = tmp_path / "new", write_source("singleton", tmp_path / "elsewhere") / "reshard.pt"
    convert(hf, new, max_shard_bytes=20_000, tokenizer=small)
    write_metaseq(new, reference(), stem="restored")
    write_metaseq(new, reference(), parts=2, shards=2)
    for name, text in (("pytorch_model-00001-of-00002.bin", "old"), ("vocab.json", "{}"), ("notes.txt", "keep me")):
        (new / name).write_text(text)
    in_one_file(small, new)
    (new / "logs").mkdir()
    (new / "logs" / "model.safetensors").write_text("me too")
    (new / "link.pt").symlink_to(elsewhere)
    kept = ["config.json", "logs/model.safetensors", "notes.txt"]
    convert(hf, new, dtype="float16", force=True)
    assert not (new / "link.pt").is_symlink()  # a second checkpoint, which would be found beside the new one
    assert elsewhere.is_file()
    assert sorted(content(new)) == sorted([*kept, "generation_config.json", "model.safetensors"])
    assert minopt.load(new, device="cpu").tokenizer is None
    convert(hf, new, format="metaseq", parts=4, force=True, tokenizer=small)
    vocabulary = ["gpt2-merges.txt", "gpt2-unified.json", "gpt2-vocab.json", "tokenizer_config.json"]
    assert sorted(content(new)) == sorted([*kept, *vocabulary, *(f"reshard-model_part-{i}.pt" for i in range(4))])
    convert(hf, new, format="metaseq", force=True)
    assert sorted(content(new)) == sorted([*kept, "reshard.pt"])
    convert(hf, new, force=True)
    assert sorted(content(new)) == sorted([*kept, "generation_config.json", "model.safetensors"])
    assert_identical(stored(new), expected_tensors())
    assert (new / "notes.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "hf", "new"]


# --- what goes wrong in the middle ---


OUTPUTS: dict[str, dict[str, Any]] = {"hf": {"max_shard_bytes": 20_000}, "metaseq": {"format": "metaseq", "parts": 2}}


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


def interrupt(hf: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail(hf: Path) -> None:
    raise RuntimeError("of no kind that is known")


def shrink(hf: Path) -> None:
    os.truncate(hf / "model.safetensors", 20_000)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (interrupt, KeyboardInterrupt, "^$"),
        (fail, RuntimeError, "of no kind that is known"),
        (shrink, CheckpointError, r"model\.safetensors: ends in the middle of its tensors"),
    ],
)
def test_what_goes_wrong_in_the_middle_leaves_all_as_it_was(
    act: Callable[[Path], None], error: type[BaseException], message: str, output: dict[str, Any], destination: Path,
    hf: Path, tmp_path: Path, interrupt_reading: Callable[..., None],
) -> None:  # fmt: skip
    before = content(tmp_path)
    whole = (hf / "model.safetensors").read_bytes()
    interrupt_reading(lambda: act(hf))
    with pytest.raises(error, match=message):
        convert(hf, destination, force=True, **output)
    (hf / "model.safetensors").write_bytes(whole)
    nothing_written(tmp_path, before)


def test_too_little_free_space_is_told_first(
    output: dict[str, Any], hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(t.nbytes for t in expected_tensors().values())
    before = content(tmp_path)
    for free, dtype in ((needed - 1, "auto"), (needed // 2 - 1, "float16"), (needed, "float64")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(OSError, match=r": [0-9.]+ kB are to be written, and [0-9.]+ kB are free\. Make room, or"):
            convert(hf, tmp_path / "new", dtype=dtype, **output)
        nothing_written(tmp_path, before)
    convert(hf, tmp_path / "new", dtype="float16", **output)


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
    old = copy_of(minopt.DEMO, tmp_path / "old")
    (old / "notes.txt").write_text("keep me")
    before = content(tmp_path)
    command = [sys.executable, "-B", "-c", FULL, "convert", str(minopt.DEMO), str(old), "--force", *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"minopt: error: {old}: cannot be written (")
    assert run.stderr.endswith("Is the disk full?\n")
    assert run.stderr.count("\n") == 1
    nothing_written(tmp_path, before)


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


def test_the_bar_counts_the_tensors_and_is_drawn_on_demand_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And paths may begin at home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("minopt.progress.on_terminal", lambda: True)
    write_source("safetensors", tmp_path / "hf")
    capsys.readouterr()
    convert("~/hf", "~/silent")
    assert capsys.readouterr() == ("", "")
    convert("~/hf", "~/shown", show_progress=True, format="metaseq", parts=2)
    out, err = capsys.readouterr()
    total = 2 * len(expected_tensors())
    assert out == ""
    assert f" {total}/{total} " in err
    assert load_model(tmp_path / "shown", device="cpu")

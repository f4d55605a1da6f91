"""Files and folders that are no checkpoint, each named with what to do; links; and the names that metaseq gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minopt import CheckpointError, Tokenizer, inspect_checkpoint, load, load_model
from minopt.checkpoint.hub import find_model
from tests.checkpoint.metaseq_files import write_metaseq
from tests.checkpoint.sources import reference

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
FILES = {
    "a Git LFS pointer, which git lfs pull replaces by the file. Fetch the file again.": LFS,
    "a web page. Fetch the file again.": b"\n<!DOCTYPE html>\n<html lang=en><body>404</body></html>",
    "a web page. Fetch the file": b"\xef\xbb\xbf<html></html>",
    "an XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    'a text that begins "Entry not found"': b"Entry not found\n",
    "Invalid username or password.": b'{"error":"Invalid username or password."}',
    "an empty file": b"",
    "zeros, as of a download that did not finish": bytes(5000),
    "a packed archive. Unpack it": b"\x1f\x8b\x08" + bytes(100),
    "a packed archive. Unpack": b"a" * 257 + b"ustar" + bytes(200),
    "a GGUF file": b"GGUF\3\0\0\0" + bytes(range(200)),
}


EACH_FILE = [(next(iter(FILES)), file) for file in ("pytorch_model.bin", "reshard.pt", "config.json", "tokenizer.json")]


@pytest.mark.parametrize(("what", "file"), [*((what, "model.safetensors") for what in FILES), *EACH_FILE])
def test_a_file_that_is_something_else_is_called_by_its_name(what: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference().save_pretrained(folder)
    if file.endswith((".bin", ".pt")):
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(FILES[what])
    with pytest.raises(ValueError, match=r"expected|not a tokenizer|server") as caught:
        Tokenizer.load(folder) if file == "tokenizer.json" else load_model(folder, device="cpu")
    assert what in str(caught.value)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [b"H\n", b"H\0", b"  "])
def test_a_safetensors_file_that_is_cut_short_is_no_text(size: bytes, tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path)
    content = size + bytes(6) + b'{"__metadata__":{"format":"pt"},'
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short or not safetensors"):
        load_model(tmp_path, device="cpu")


def test_weights_under_the_name_of_another_format(tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"got a safetensors file. Rename it to model\.safetensors"):
        load_model(tmp_path, device="cpu")
    torch.save(reference().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"If torch\.save wrote it, rename it to pytorch_model\.bin"):
        load_model(tmp_path, device="cpu")


RUN = ("run.json", "checkpoints/step-00000010/x", "checkpoints/step-00000020/x", "best/config.json")
FOLDERS: dict[str, tuple[str, ...]] = {
    "an adapter for facebook/opt-125m. Name that model, and the adapter beside it": (
        "adapter_config.json",
        "adapter_model.safetensors",
    ),
    "a training run that is not finished. Run it again to go on, or take": RUN,
    "checkpoints/step-00000020 or": RUN,
    "Put them together first: python zero_to_fp32.py": ("config.json", "global_step5/x", "zero_to_fp32.py"),
    "program.pt2: a program of minopt export, which has no weights": ("config.json", "program.pt2", "manifest.json"),
    "opt.gguf: a model for llama.cpp": ("opt.gguf",),
    "model.onnx: a model for ONNX": ("model.onnx",),
    "tf_model.h5: a model for TensorFlow": ("tf_model.h5",),
    "flax_model.msgpack: a model for Flax": ("flax_model.msgpack",),
    "model.bin: a model for CTranslate2": ("model.bin",),
    "opt.tar.gz: an archive. Unpack it": ("opt.tar.gz",),
    "model.safetensors.incomplete: a download that did not finish": ("model.safetensors.incomplete",),
    "model-1-of-2.safetensors: shards without their index": ("model-1-of-2.safetensors",),
    "weights.pth: of another name. If it holds the weights, name the file itself": ("weights.pth",),
}


def fill(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('{"base_model_name_or_path": "facebook/opt-125m"}')


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_something_else_is_called_by_its_name(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fill(folder, FOLDERS[what])
    with pytest.raises(FileNotFoundError) as caught:
        load_model(folder)
    assert what in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_of_deepspeed_are_called_by_their_name(tmp_path: Path) -> None:
    for rank in (0, 1):
        empty = {key: torch.empty(0) for key in reference().state_dict()}
        torch.save({"module": empty}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    with pytest.raises(FileNotFoundError, match="Put them together first: python"):
        load_model(tmp_path)


def test_any_file_of_a_program_leads_to_its_folder(tmp_path: Path) -> None:
    fill(tmp_path, ("config.json", "program.pt2", "manifest.json"))
    assert find_model(tmp_path / "program.pt2") == find_model(tmp_path / "manifest.json") == tmp_path
    for use in (load_model, inspect_checkpoint):
        with pytest.raises(FileNotFoundError, match="a program of minopt export"):
            use(tmp_path / "program.pt2")
    with pytest.raises(ValueError, match=r"manifest\.json: expected format"):  # it is taken for a program
        load(tmp_path / "program.pt2")


@pytest.mark.parametrize(("all_of_them", "with_config"), [(True, True), (False, False)])
def test_the_empty_tensors_of_zero_3(all_of_them: bool, with_config: bool, tmp_path: Path) -> None:
    """DeepSpeed leaves small tensors whole."""
    empty = {k: torch.empty(0) if all_of_them or t.ndim > 1 else t for k, t in reference().state_dict().items()}
    torch.save(empty, tmp_path / "pytorch_model.bin")
    if with_config:
        reference().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"hold no numbers \(.*\): saved in training under ZeRO-3, which divides"):
        load_model(tmp_path, device="cpu")


# --- links ---


def real(folder: Path, **options: str) -> Path:
    reference().save_pretrained(folder.parent / "real", **options)
    return folder.parent / "real"


def linked(folder: Path) -> Path:
    """Its shards, as the hub's cache links them."""
    for path in real(folder, max_shard_size="20KB").iterdir():
        (folder / path.name).symlink_to(f"../real/{path.name}")
    return folder


def linked_folder(folder: Path) -> Path:
    (folder / "link").symlink_to(real(folder))
    return folder / "link"


def linked_file(folder: Path) -> Path:
    """The configuration lies where the link leads."""
    (folder / "mine.safetensors").symlink_to(real(folder) / "model.safetensors")
    return folder / "mine.safetensors"


def linked_index(folder: Path) -> Path:
    source = real(folder, max_shard_size="20KB")
    shutil.copy(source / "config.json", folder)
    (folder / "model.safetensors.index.json").symlink_to(source / "model.safetensors.index.json")
    return folder


def linked_parts(folder: Path) -> Path:
    for path in write_metaseq(folder.parent / "real", reference(), parts=2):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("write", [linked, linked_folder, linked_file, linked_index, linked_parts])
def test_links_are_followed_wherever_they_lead(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write(folder)
    model = load_model(path, device="cpu")
    assert torch.equal(model.embed_tokens.weight, reference().model.decoder.embed_tokens.weight)
    assert inspect_checkpoint(path).is_sound
    if write is linked:
        shard = sorted((tmp_path / "real").glob("model-*"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=f"{shard.name}: a link to ../real/{shard.name}, which is not"):
            load_model(folder, device="cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "reshard.pt", "config.json"])
@pytest.mark.parametrize("target", ["../gone/there", "itself"])
def test_a_link_that_leads_nowhere_is_named(target: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference().save_pretrained(folder)
    if file != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)
    target = file if target == "itself" else target
    (folder / file).symlink_to(target)
    for path in (folder, folder / file):
        with pytest.raises(FileNotFoundError) as caught:
            load_model(path, device="cpu")
        assert f"{file}: a link to {target}, which is not there" in str(caught.value)
    (tmp_path / "link").symlink_to("no-such-folder")
    with pytest.raises(FileNotFoundError, match="a link to no-such-folder, which is not there"):
        load_model(str(tmp_path / "link"))


def test_a_tokenizer_whose_link_leads_nowhere_is_named(tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").symlink_to("../gone")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: a link to a file that is not there"):
        load(tmp_path / "model", device="cpu")


def test_a_file_that_is_no_models_is_named(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"dev\.json: holds no weights, and nothing beside it does: "):
        load_model(tmp_path / "dev.json")


# --- metaseq's names ---


@pytest.mark.parametrize(
    ("name", "keeps_suffix", "parts", "shards"),
    [("reshard.pt", False, 2, 0), ("checkpoint_last.pt", False, 1, 3), ("checkpoint_1_6000.pt", True, 2, 3)],
)
def test_the_name_that_metaseq_gives_leads_to_the_parts(
    name: str, keeps_suffix: bool, parts: int, shards: int, tmp_path: Path
) -> None:
    for path in write_metaseq(tmp_path, reference(), parts=parts, shards=shards):
        stem = path.name.partition("-")[0]
        path.rename(path.with_name(path.name.replace(stem, name if keeps_suffix else name.removesuffix(".pt"), 1)))
    assert not (tmp_path / name).exists()
    model = load_model(tmp_path / name, device="cpu")
    assert torch.equal(model.embed_tokens.weight, reference().model.decoder.embed_tokens.weight)
    assert inspect_checkpoint(str(tmp_path / name)).parts == parts
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(str(tmp_path / "checkpoint_2.pt"))

"""Saving: transformers opens the folder to the same logits, and no crash costs the old one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from minopt import OPT, OPTConfig, load_model, save_model
from minopt.checkpoint import save
from tests.conftest import SIZE, build_ours, build_reference

Write = Callable[..., Path]


def small_model(seed: int = 0) -> OPT:
    torch.manual_seed(seed)
    return OPT(OPTConfig(**SIZE)).eval()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transformers_opens_what_is_saved_to_the_same_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_ours(build_reference(kind)).to(dtype)
    save_model(model, tmp_path / "saved")
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert reference.dtype == dtype
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = reference.float()(ids).logits, model.float()(ids)
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("max_shard_bytes", [save.MAX_SHARD_BYTES, 20_000])
def test_a_round_trip_is_exact(kind: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model = build_ours(build_reference(kind))
    save_model(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    again = load_model(tmp_path / "saved", device="cpu")
    assert again.config == model.config.from_dict(again.config.to_dict())
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def test_shards_keep_to_their_size_and_transformers_opens_them(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "saved", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {p.name for p in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in small_model().parameters())
    assert all(p.stat().st_size < 20_000 + 4_000 for p in shards)
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.tensor([[2, 7, 9], [2, 8, 50]])
    with torch.no_grad():
        assert torch.allclose(reference(ids).logits, small_model()(ids), atol=1e-6)


def test_saving_over_a_model_leaves_nothing_of_the_old_weights(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(small_model(0), folder, max_shard_bytes=20_000)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"old")
    (folder / "notes.txt").write_text("keep me")
    (folder / "model_old.safetensors").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("me too")
    save_model(small_model(2), folder / "checkpoint-1")
    save_model(small_model(1), folder, force=True)
    inner = ["checkpoint-1/config.json", "checkpoint-1/model.safetensors", "logs/a.txt"]
    assert sorted(content(folder)) == sorted(
        [*inner, "config.json", "model.safetensors", "model_old.safetensors", "notes.txt"]
    )
    assert torch.equal(load_model(folder, device="cpu").embed_tokens.weight, small_model(1).embed_tokens.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_loaded_model_can_be_saved_over_its_own_folder(write_checkpoint: Write) -> None:
    """Its weights are mapped from the very file that is replaced."""
    folder = write_checkpoint()
    model = load_model(folder, device="cpu")
    expected = model.layers[0].fc1.weight.clone()
    save_model(model, folder, force=True)
    assert torch.equal(model.layers[0].fc1.weight, expected)
    assert torch.equal(load_model(folder, device="cpu").layers[0].fc1.weight, expected)


@pytest.mark.parametrize("fails_at", ["write_json", "_flush_to_disk", "rename"])
def test_an_error_while_saving_leaves_the_old_folder_as_it_was(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    save_model(small_model(0), folder)
    before = content(folder)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    if fails_at == "rename":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b))
    else:
        monkeypatch.setattr(save, fails_at, fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(small_model(1), folder, force=True)
    assert content(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


KILLED = """
import os, signal, sys
from minopt import OPT, OPTConfig, save_model
from minopt.checkpoint import save
save._flush_to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
config = OPTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, ffn_dim=16, vocab_size=96)
save_model(OPT(config), sys.argv[1], force=True)
"""


def test_a_process_killed_while_saving_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(small_model(0), folder)
    before = content(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert content(folder) == before
    save_model(small_model(1), folder, force=True)  # what the killed one left beside does not matter
    assert torch.equal(load_model(folder, device="cpu").embed_tokens.weight, small_model(1).embed_tokens.weight)


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis: holds files that are not a model's \(no config\.json\)"):
        save_model(small_model(), tmp_path / "thesis", force=True)
    assert sorted(content(tmp_path)) == ["thesis/chapter-1.txt"]
    with pytest.raises(FileExistsError, match=r"chapter-1\.txt: expected a folder to write to, got a file"):
        save_model(small_model(), tmp_path / "thesis" / "chapter-1.txt")


def test_a_model_that_is_there_is_replaced_on_request_only(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "saved")
    before = content(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"saved: is there already\. Name another folder, or replace it with force=True\."
    ):
        save_model(small_model(1), tmp_path / "saved")
    assert content(tmp_path) == before


def test_an_empty_folder_missing_parents_and_a_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(small_model(), tmp_path / "empty")
    save_model(small_model(), tmp_path / "a" / "b" / "c")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_model(small_model(1), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(
        load_model(tmp_path / "empty", device="cpu").embed_tokens.weight, small_model(1).embed_tokens.weight
    )


def test_files_are_readable_for_whom_the_umask_says(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "saved")
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "saved").iterdir()} == {0o666 & ~umask}


def test_the_current_folder_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(small_model(), tmp_path / "saved")
    (tmp_path / "saved" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "saved" / "inner")
    for name in ("..", "."):
        with pytest.raises(FileExistsError, match="is, or holds, the current folder"):
            save_model(small_model(), name, force=True)


@pytest.mark.parametrize("after", ["old", "saved"])
def test_an_interrupt_between_the_renames_keeps_a_model(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    save_model(small_model(0), folder)
    (folder / "notes.txt").write_text("precious")
    rename = os.rename

    def interrupted(source: str, target: str) -> None:
        rename(source, target)
        if Path(target).name == after and Path(source).name != "old":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(small_model(1), folder, force=True)
    monkeypatch.undo()
    assert (folder / "notes.txt").read_text() == "precious"
    expected = small_model(0 if after == "old" else 1)
    assert torch.equal(load_model(folder, device="cpu").embed_tokens.weight, expected.embed_tokens.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_head_that_was_stored_apart_is_saved_as_the_tied_one_it_is(tmp_path: Path) -> None:
    reference = build_reference("125m", tie_word_embeddings=False)
    reference.lm_head.weight.data.copy_(reference.model.decoder.embed_tokens.weight)
    reference.save_pretrained(tmp_path / "apart")
    save_model(load_model(tmp_path / "apart", device="cpu"), tmp_path / "tied")
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "tied").eval()
    ids = torch.tensor([[2, 7, 9], [2, 8, 50]])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, reference(ids).logits, atol=1e-5)


def test_a_compiled_model_is_saved_as_the_model_it_wraps(tmp_path: Path) -> None:
    save_model(torch.compile(small_model(), backend="eager"), tmp_path / "saved")  # type: ignore[arg-type]
    again = load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(again.embed_tokens.weight, small_model().embed_tokens.weight)


def test_a_model_that_was_changed_is_not_written_as_an_opt(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "saved")
    before = content(tmp_path / "saved")
    normed, shared = small_model(), small_model()
    torch.nn.utils.parametrizations.weight_norm(normed.layers[0].fc1)
    shared.layers[1].fc1 = shared.layers[0].fc1
    for model, name in ((normed, "layers.0.fc1.parametrizations"), (shared, "layers.1.fc1.bias")):
        with pytest.raises(ValueError, match=f"expected an OPT's own parameters, these differ: {name}"):
            save_model(model, tmp_path / "saved", force=True)
    assert content(tmp_path / "saved") == before


def test_a_mount_point_and_a_full_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(FileExistsError, match="volume: is a mount point, which cannot be replaced"):
        save_model(small_model(), tmp_path / "volume")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_file", full)
    with pytest.raises(OSError, match=r"saved: cannot be written \(\[Errno 28\] No space.*Is the disk full"):
        save_model(small_model(), tmp_path / "saved")


def test_generation_defaults_go_into_a_file_of_their_own_and_without_any_it_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(small_model(), folder)
    assert not (folder / "generation_config.json").exists()
    save_model(small_model(), folder, force=True, generation_defaults={"top_p": 0.5, "eos_token_id": (2, 7)})
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"bos_token_id": 2, "eos_token_id": [2, 7], "pad_token_id": 1, "top_p": 0.5}
    for nothing in (None, {}):
        save_model(small_model(1), folder, force=True, generation_defaults=nothing)
        assert json.loads((folder / "generation_config.json").read_text()) == written
    save_model(small_model(), folder, force=True, generation_defaults={"num_beams": 4})
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "num_beams": 4,
    }  # fmt: skip
    assert not (folder / "tokenizer.json").exists()

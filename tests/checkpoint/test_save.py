"""Saving: transformers opens the folder to the same logits, and no crash costs the old one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from minopt import OPT, OPTConfig, load_model, save_model
from minopt.checkpoint import save
from tests.checkpoint.sources import content
from tests.conftest import SIZE, build_ours, build_reference

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def small_model(seed: int = 0) -> OPT:
    torch.manual_seed(seed)
    return OPT(OPTConfig(**SIZE)).eval()


def assert_saved(model: OPT, folder: Path) -> None:
    """The same configuration and numbers, to the bit."""
    again = load_model(folder, device="cpu", dtype="auto" if model.dtype == torch.float32 else model.dtype)
    assert again.config == model.config.from_dict(again.config.to_dict())
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (name, a.dtype) == (other, b.dtype)
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 20_000), (torch.float16, save.MAX_SHARD_BYTES), (torch.bfloat16, 20_000)]
)
def test_a_round_trip_is_exact_and_transformers_opens_it_to_the_same_logits(
    kind: str, dtype: torch.dtype, limit: int, tmp_path: Path
) -> None:
    model = build_ours(build_reference(kind)).to(dtype)
    save_model(model, tmp_path / "saved", max_shard_bytes=limit)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (limit == 20_000)
    assert_saved(model, tmp_path / "saved")
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert reference.dtype == dtype
    with torch.no_grad():
        expected, got = reference.float()(IDS).logits, model.float()(IDS)
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()


def test_a_loaded_model_can_be_saved_over_its_own_folder(write_checkpoint: Callable[..., Path]) -> None:
    """Its weights are mapped from the very file that is replaced."""
    folder = write_checkpoint()
    model = load_model(folder, device="cpu")
    expected = model.layers[0].fc1.weight.clone()
    save_model(model, folder, force=True)
    assert torch.equal(model.layers[0].fc1.weight, expected)
    assert_saved(model, folder)


def test_what_is_not_to_be_replaced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(small_model(), tmp_path / "saved")
    for name in ("thesis", "saved/inner"):
        (tmp_path / name).mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path / "saved" / "inner")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    for name, force, message in (
        ("thesis", True, r"thesis: holds files that are not a model's \(no config\.json\)\. Name another folder\."),
        ("thesis/chapter-1.txt", False, r"chapter-1\.txt: expected a folder to write to, got a file\. Name another\."),
        ("thesis/chapter-1.txt/a", True, r"a: expected a folder to write to, got a file above it, \S+/chapter-1\.txt"),
        ("saved", False, r"saved: is there already\. Name another folder, or replace it with force=True\."),
        ("saved", True, r"saved: is, or holds, the current folder, which cannot be replaced"),
        ("saved/inner", True, r"inner: is, or holds, the current folder"),
        ("volume", False, r"volume: is a mount point, which cannot be replaced\. Name a folder in it\."),
    ):
        with pytest.raises(FileExistsError, match=message):
            save_model(small_model(1), tmp_path / name, force=force)
    assert content(tmp_path) == before


def test_an_empty_folder_missing_parents_and_a_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(small_model(), tmp_path / "empty")
    save_model(small_model(), tmp_path / "a" / "b" / "c")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_model(small_model(1), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert_saved(small_model(1), tmp_path / "empty")


def test_a_model_that_was_changed_is_not_written_as_an_opt(tmp_path: Path) -> None:
    normed, shared = small_model(), small_model()
    torch.nn.utils.parametrizations.weight_norm(normed.layers[0].fc1)
    shared.layers[1].fc1 = shared.layers[0].fc1
    for model, name in ((normed, "layers.0.fc1.parametrizations"), (shared, "layers.1.fc1.bias")):
        with pytest.raises(ValueError, match=f"expected an OPT's own parameters, these differ: {name}"):
            save_model(model, tmp_path / "saved", force=True)
    assert list(tmp_path.iterdir()) == []


def test_generation_defaults_go_into_a_file_of_their_own_and_without_any_it_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tokens = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    save_model(small_model(), folder)
    assert not (folder / "generation_config.json").exists()
    for given, expected in (
        ({"top_p": 0.5, "eos_token_id": (2, 7)}, tokens | {"top_p": 0.5, "eos_token_id": [2, 7]}),
        (None, tokens | {"top_p": 0.5, "eos_token_id": [2, 7]}),
        ({}, tokens | {"top_p": 0.5, "eos_token_id": [2, 7]}),
        ({"num_beams": 4}, tokens | {"num_beams": 4}),
    ):
        save_model(small_model(), folder, force=True, generation_defaults=given)
        assert json.loads((folder / "generation_config.json").read_text()) == expected

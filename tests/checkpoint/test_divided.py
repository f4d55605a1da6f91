"""Checkpoints of torch.distributed.checkpoint as models: those of training, from any number of processes."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import minopt
from minopt import CheckpointError, TrainingConfig, convert, inspect_checkpoint, load, load_model
from minopt.cli import main
from tests.checkpoint.sources import content, reference


class RunsCode:
    """A pickle that would create a file when loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")


def state() -> dict[str, Tensor]:
    return {key: tensor for key, tensor in reference().state_dict().items() if key != "lm_head.weight"}


def write(folder: Path, tensors: dict[str, Tensor], processes: int, dim: int = 0) -> Path:
    """As so many processes write it, each a share of every tensor's rows."""
    folder.mkdir()
    reference().config.save_pretrained(folder)
    files = [io.BytesIO() for _ in range(processes)]
    sizes: dict[str, Any] = {}
    places = {}
    for key, tensor in tensors.items():
        chunks, row = [], 0
        for rank, piece in enumerate(tensor.chunk(processes, dim)):
            start = files[rank].tell()
            blob = io.BytesIO()  # torch.save writes an archive whose first byte is that of its file
            torch.save(piece.clone(), blob)
            files[rank].write(blob.getvalue())
            offsets = torch.Size([row if i == dim else 0 for i in range(tensor.ndim)])
            chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            place = _StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)
            places[MetadataIndex(key, offsets)] = place
            row += piece.shape[dim]
        sizes[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(sizes, None, places)))
    return folder


@pytest.mark.parametrize(("processes", "front"), [(1, "model."), (2, "model._orig_mod.module."), (3, "")])
def test_pieces_of_any_number_of_processes_are_put_together(processes: int, front: str, tmp_path: Path) -> None:
    tensors = {front + key: tensor for key, tensor in state().items()}
    folder = write(tmp_path / "step", tensors | {"optimizer.state.x.exp_avg": torch.ones(4)}, processes)
    for path in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        model = load_model(path, device="cpu")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state()[f"model.decoder.{name}"]), name
    assert inspect_checkpoint(folder).kind == f"torch.distributed.checkpoint, {processes} file{'s' * (processes > 1)}"
    convert(folder, tmp_path / "new")
    again = load_model(tmp_path / "new", device="cpu", dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.bfloat16().parameters(), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("The ship sailed over the sea, and it was a dark and stormy night. " * 40)
    config = TrainingConfig(
        output_dir=str(folder / "run"),
        max_steps=2,
        save_steps=1,
        src_length=32,
        per_device_train_batch_size=1,
        device="cpu",
    )
    minopt.train(minopt.DEMO, (folder / "text.txt").read_text(), config=config)
    return folder / "run"


def test_a_checkpoint_of_a_run_is_a_model(run: Path, tmp_path: Path) -> None:
    last, first = run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000001"
    final = dict(load_model(run, device="cpu").named_parameters())
    before = content(run)
    for name, parameter in load_model(last, device="cpu").named_parameters():
        assert torch.equal(parameter, final[name]), name
    assert main(["convert", str(first), str(tmp_path / "model")]) == 0
    lm = load(tmp_path / "model", device="cpu")
    assert lm.generate("The ship", max_new_tokens=4) == load(first, device="cpu").generate("The ship", max_new_tokens=4)
    assert not torch.equal(lm.model.state_dict()["embed_tokens.weight"], final["embed_tokens.weight"])
    assert content(run) == before


def test_a_run_without_a_model_says_which_checkpoint_to_take(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    for use in (load, inspect_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"not finished.*take the model of .*/checkpoints/step-00000002"):
            use(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds 2 models \(step-00000001, step-00000002\)\. Name one of them"):
        load(tmp_path / "run" / "checkpoints")


def rewritten(folder: Path, change: Callable[[Metadata], object]) -> None:
    data = pickle.loads((folder / ".metadata").read_bytes())
    change(data)
    (folder / ".metadata").write_bytes(pickle.dumps(data))


def first_place(data: Metadata) -> _StorageInfo:
    return next(iter(data.storage_data.values()))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp: expected this file"),
    "a file is cut short": (
        lambda f: (f / "__1_0.distcp").write_bytes((f / "__1_0.distcp").read_bytes()[:5000]),
        "__1_0.distcp: cut short or damaged at model.decoder",
    ),
    "the metadata is cut short": (
        lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:500]),
        ".metadata: cut short or no checkpoint's",
    ),
    "a web page": (lambda f: (f / ".metadata").write_text("<html>"), ".metadata: cut short or no checkpoint's"),
    "a file elsewhere": (
        lambda f: rewritten(f, lambda m: setattr(first_place(m), "relative_path", "../__0_0.distcp")),
        "files must lie in the folder itself, got ../__0_0",
    ),
    "a place that is none": (
        lambda f: rewritten(f, lambda m: setattr(first_place(m), "offset", -5)),
        "a place that is none, of model.decoder",
    ),
    "a piece is missing": (
        lambda f: rewritten(f, lambda m: m.storage_data.pop(list(m.storage_data)[1])),
        "rows, got",
    ),
    "code": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(RunsCode(f / "ran"))), ".metadata: cut short or no"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_one_is_refused_in_one_line_and_runs_nothing(fault: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "step", state(), 2)
    break_it, message = FAULTS[fault]
    break_it(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu")
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


def test_tensors_divided_by_columns_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "step", {key: t for key, t in state().items() if t.ndim == 2}, 2, dim=1)
    with pytest.raises(CheckpointError, match="expected pieces that follow one another by rows"):
        load_model(folder, device="cpu")


def test_the_configuration_comes_from_the_run(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step-00000001"
    assert inspect_checkpoint(step).config_source == "state.json"
    shutil.copytree(step, tmp_path / "step")  # alone, too
    assert load(tmp_path / "step", device="cpu").tokenizer is None
    saved = json.loads((tmp_path / "step" / "state.json").read_text())
    (tmp_path / "step" / "state.json").write_text(json.dumps(saved | {"config": {"model_type": "gpt2"}}))
    with pytest.raises(ValueError, match=r'state\.json: .*expected "opt", got \'gpt2\''):
        load(tmp_path / "step", device="cpu")

"""Rows of a tensor, wherever its numbers lie: they are those of the whole, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minopt import CheckpointError, convert
from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.tensors import Share
from tests.checkpoint.sources import SOURCES, change_tensor, place_of, write_source


def opened(source: str, folder: Path) -> Checkpoint:
    if source != "int8":
        return open_checkpoint(write_source(source, folder / "model"))
    convert(write_source("2 parts", folder / "model"), folder / "int8", quantize="int8")
    return open_checkpoint(folder / "int8")


@pytest.mark.parametrize("count", [1, 3, 5, 40])  # 40 is more than most tensors have rows: the last get none
@pytest.mark.parametrize("source", [*SOURCES, "int8"])
def test_rows_are_those_of_the_whole_and_all_that_is_read(
    source: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_into = [0], TensorFile.read_into

    def counted(file: TensorFile, out: torch.Tensor, *place: Any) -> None:
        read[0] += out.numel()
        read_into(file, out, *place)

    monkeypatch.setattr(TensorFile, "read_into", counted)
    for name, tensor in opened(source, tmp_path).tensors.items():
        whole, read[0] = tensor.read(torch.float32), 0
        shares = [tensor.rows(*Share(k, count).of(tensor.shape[0])) for k in range(count)]
        assert torch.equal(torch.cat([share.read(torch.float32) for share in shares]), whole), name
        assert read[0] == tensor.numel * (1 + 2 * len(tensor.copies)), name  # copies are compared in pairs


def test_rows_that_parts_hold_in_copies_are_compared(tmp_path: Path) -> None:
    folder, name = write_source("2 parts", tmp_path / "model"), "embed_positions.weight"
    path, key, index = place_of(folder, name, 32 * 40)
    change_tensor(path, key, lambda tensor: tensor.view(-1)[index : index + 1].add_(1))
    tensor = open_checkpoint(folder).tensors[name]
    tensor.rows(0, 40).read()
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight: every model parallel part holds it, and"):
        tensor.rows(40, 41).read()

"""Rows of a tensor, wherever its numbers lie: they are those of the whole, and nothing else is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minopt import CheckpointError, convert
from minopt.checkpoint import tensors
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.names import shard_dim
from minopt.checkpoint.open import open_checkpoint
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
    read, read_into = [0], tensors.Slice.read_into

    def counted(piece: tensors.Slice, out: torch.Tensor, start: int = 0) -> None:
        read[0] += out.numel()
        read_into(piece, out, start)

    monkeypatch.setattr(tensors.Slice, "read_into", counted)
    for name, tensor in opened(source, tmp_path).tensors.items():
        whole, read[0] = tensor.read(torch.float32), 0
        shares = [tensor.rows(*Share(k, count).of(tensor.shape[0])) for k in range(count)]
        assert torch.equal(torch.cat([share.read(torch.float32) for share in shares]), whole), name
        copies = len(tensor.slices) - 1 if shard_dim(name) is None else 0  # compared in pairs
        assert read[0] == tensor.stored.numel * ((1 if tensor.scale is None else 2) + 2 * copies), name


def test_rows_that_parts_hold_in_copies_are_compared(tmp_path: Path) -> None:
    folder, name = write_source("2 parts", tmp_path / "model"), "embed_positions.weight"
    path, key, index = place_of("2 parts", folder, name, 32 * 40)
    change_tensor(path, key, lambda tensor: tensor.view(-1)[index : index + 1].add_(1))
    tensor = open_checkpoint(folder).tensors[name]
    tensor.rows(0, 40).read()
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight: every model parallel part holds it, and"):
        tensor.rows(40, 41).read()

"""The weights of a model that is trained: read from a checkpoint, and saved. Under FSDP no process has all of them."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.inspect import check_same_seen, fingerprint
from minopt.checkpoint.save import save_model
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.distributed import World
from minopt.model import OPT
from minopt.strangers import NO_WEIGHTS, is_exported
from minopt.tokenizer import Tokenizer

NO_TOKENIZER = "--model_name_or_path: expected a model with a tokenizer, {} has none. Add its files."

FILE_BYTES = 1_000_000_000  # of one file of weights


def find(name_or_path: str | Path, tokenizer: Tokenizer | None, world: World) -> tuple[Checkpoint, Tokenizer]:
    """Opens a checkpoint, in the first process before the others; every process has to call it.

    Args:
        name_or_path: see ``load_model``.
        tokenizer: ``None`` takes the one beside the weights, or one folder up.
        world: the processes.

    Raises:
        ValueError: (``CheckpointError`` where it is the files) if they are no model's, or have no tokenizer, or
            processes see different ones.
        OSError: as ``load_model`` does.
    """

    def opened() -> tuple[Checkpoint, Tokenizer]:
        path = find_model(name_or_path)
        if is_exported(path):
            raise ValueError(NO_WEIGHTS)
        checkpoint = open_checkpoint(path)
        found = tokenizer or Tokenizer.beside(checkpoint.found.folder)
        if found is None:
            raise ValueError(NO_TOKENIZER.format(name_or_path))
        return checkpoint, found

    checkpoint, found = world.first_then_all(opened)
    if world.size > 1:
        seen = world.gather(world.each(lambda: fingerprint(checkpoint)))
        world.each(lambda: check_same_seen(checkpoint.found.folder, seen))
    if world.is_first:
        found.warn_of_conflicts(checkpoint.config, checkpoint.found.folder)
    return checkpoint, found


def fill(model: OPT, checkpoint: Checkpoint, world: World) -> None:
    """Gives a model the weights of a checkpoint, in float32; every process has to call it.

    Args:
        model: of the checkpoint's configuration, on the ``"meta"`` device; or sharded by ``apply_fsdp``, and then each
            process reads its share of each tensor alone.
        checkpoint: an open one.
        world: the processes.

    Raises:
        ValueError: (``CheckpointError``) if the files do not hold what they should.
        OSError: if they cannot be read.
    """
    if _is_sharded(model):
        world.first(checkpoint.check_head)
        world.each(lambda: _read_shares(model, checkpoint, Share(world.rank, world.size)))
    else:
        state = world.each(lambda: dict(read_weights(checkpoint, world.device, torch.float32)))
        model.load_state_dict(state, assign=True)


@torch.no_grad()
def _read_shares(model: OPT, checkpoint: Checkpoint, share: Share) -> None:
    """Fills this process' shares: of the rows of each parameter, as FSDP divides them."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local, source = parameter.to_local(), checkpoint.tensors[name]
        source = source.rows(*share.of(source.shape[0]))
        assert local.shape == source.shape, name
        if local.device.type == "cpu":
            source.fill(local)
        else:
            local.copy_(source.read(local.dtype))


@torch.no_grad()
def save(model: OPT, folder: Path, tokenizer: Tokenizer, world: World) -> None:
    """Writes a model as ``save_model`` does, in the first process; every process has to call it.

    Under FSDP each process gathers one parameter at a time, on its device (docs/decisions.md says why not with
    torch.distributed.checkpoint).

    Args:
        model: sharded or not.
        folder, tokenizer: see ``save_model``.
        world: the processes.

    Raises:
        FileExistsError, ValueError, OSError: as ``save_model`` does, in all processes.
    """
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())

    def write() -> None:
        try:
            if world.is_first:
                save_model(model, folder, tokenizer, max_shard_bytes=FILE_BYTES, numbers=whole, force=True)
        finally:
            if _is_sharded(model):
                deque(whole, maxlen=0)  # the other processes gather with the first, which gathers on after an error

    world.each(write)


def _is_sharded(model: OPT) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

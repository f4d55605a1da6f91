"""The weights of a model that is trained: read, sharded by FSDP, gathered for evaluation, and saved.

Every process has to call each of these functions. Under FSDP none of them has all weights, but to evaluate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.inspect import check_same_seen, fingerprint
from minopt.checkpoint.save import Head, save_model
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.config import OPTConfig
from minopt.distributed import World
from minopt.model import OPT
from minopt.strangers import NO_WEIGHTS, is_exported
from minopt.tokenizer import Tokenizer

NO_TOKENIZER = "--model_name_or_path: expected a model with a tokenizer, {} has none. Add its files."

FILE_BYTES = 1_000_000_000  # of one file of weights


def find(
    name_or_path: str | Path, tokenizer: Tokenizer | None, world: World, ignore: Sequence[str] = ()
) -> tuple[Checkpoint, Tokenizer]:
    """Opens a checkpoint as ``load_model`` does, and the tokenizer beside its weights, or one folder up.

    Raises what that raises, and ``ValueError`` without a tokenizer, or if processes see different files.
    """

    def opened() -> tuple[Checkpoint, Tokenizer]:
        path = find_model(name_or_path)
        if is_exported(path):
            raise ValueError(NO_WEIGHTS)
        checkpoint = open_checkpoint(path, ignore=ignore)
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


def apply_fsdp(module: nn.Module, model: OPT, dtype: torch.dtype | None, device: torch.device) -> None:
    """Shards the float32 parameters of a model over all processes in place (FSDP2), each layer apart.

    Parameters outside of the layers form one group with the root module: the token table is used first and last, and
    must not be in two groups. Of a model on the ``"meta"`` device each process gets its shares unfilled.

    ``module`` is the one whose forward is called, and holds the model. Parameters are gathered and used in ``dtype``,
    gradients are then summed in float32; ``None`` is float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for part in (*model.layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if model.device.type == "meta":
        module.to_empty(device=device)


@torch.no_grad()
def fill(model: OPT, checkpoint: Checkpoint, world: World, names: Mapping[str, str] | None = None) -> None:
    """Gives a model on the ``"meta"`` device, or a sharded one, the weights of its checkpoint, in its own dtype.

    Of a sharded one each process reads its share of each tensor alone: of the rows, as FSDP divides them. ``names`` are
    the checkpoint's by those of the model, where they differ; other parameters of the model stay as they are.
    """
    names = names or {name: name for name, _ in model.named_parameters()}
    if not _is_sharded(model):
        state = world.each(lambda: dict(read_weights(checkpoint, world.device, model.dtype)))
        model.load_state_dict({name: state[key] for name, key in names.items()}, strict=False, assign=True)
        return
    world.first(checkpoint.check_head)
    share, parameters = Share(world.rank, world.size), dict(model.named_parameters())

    def read() -> None:
        for name, key in names.items():
            parameter, source = parameters[name], checkpoint.tensors[key]
            assert isinstance(parameter, DTensor)
            own, source = parameter.to_local(), source.rows(*share.of(source.shape[0]))
            assert own.shape == source.shape, name
            if own.device.type == "cpu":
                source.fill(own)
            else:
                own.copy_(source.read(own.dtype))

    world.each(read)


@torch.no_grad()
def gathered(
    config: OPTConfig, parameters: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> OPT:
    """A plain model in evaluation mode with such parameters, whole in each process; shares what is there already.

    A model sharded by layers would gather each layer for each generated token.
    """
    tensors = {name: whole(parameter).detach().to(device, dtype) for name, parameter in parameters}
    plain = OPT(config, device="meta", dtype=dtype)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


@torch.no_grad()
def save(model: OPT, folder: Path, tokenizer: Tokenizer, world: World, head: Head | None = None) -> None:
    """Writes a model, sharded or not, as ``save_model`` does, and raises what that raises; the first process writes.

    Under FSDP each process gathers one parameter at a time, on its device (docs/decisions.md says why not with
    torch.distributed.checkpoint).
    """
    numbers = map(whole, [*model.parameters(), *(head.tensors.values() if head else ())])

    def write() -> None:
        try:
            if world.is_first:
                save_model(model, folder, tokenizer, max_shard_bytes=FILE_BYTES, numbers=numbers, force=True, head=head)
        finally:
            if _is_sharded(model):
                deque(numbers, maxlen=0)  # the other processes gather with the first, which gathers on after an error

    world.each(write)


def whole(parameter: Tensor) -> Tensor:
    """A parameter out of the shares of all processes, which all take it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(parameter: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What this process has of a parameter, and the same rows of a tensor as large as the whole of it."""
    if not isinstance(parameter, DTensor):
        return parameter, numbers
    mesh = parameter.device_mesh
    begin, end = Share(mesh.get_local_rank(), mesh.size()).of(parameter.shape[0])
    return parameter.to_local(), numbers[begin:end]


def _is_sharded(model: OPT) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())

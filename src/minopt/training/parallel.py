"""Parallelism, applied to a built model from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from minopt.model import OPT


def apply_fsdp(module: nn.Module, model: OPT, dtype: torch.dtype | None, device: torch.device) -> None:
    """Shards a model's parameters over all processes, each layer apart, in place (FSDP2).

    All that is in no layer makes one group with the module's root: the token table is used first and last, and must
    not be in two groups.

    Args:
        module: the module whose forward is called; holds ``model``.
        model: in float32; its layers are sharded one by one. Of one on the ``"meta"`` device each process gets its
            shares, to be filled.
        dtype: in which parameters are gathered and used; gradients are summed in float32. ``None`` is float32.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    if model.device.type == "meta":
        module.to_empty(device=device)


@torch.no_grad()
def gathered(model: OPT, device: torch.device, dtype: torch.dtype) -> OPT:
    """A plain model in evaluation mode, with a model's parameters, sharded or not; every process has to call it.

    Evaluation generates with it, which a model that is sharded by layers would do by gathering each for each token.

    Args:
        model: whose layers may be wrapped.
        device, dtype: of the result, which shares what is there already, and is whole in each process.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        tensors[name] = whole.detach().to(device, dtype)
    plain = OPT(model.config, device="meta", dtype=dtype)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


@contextmanager
def wrapped_layers(model: OPT, *, recompute: bool, compile: bool) -> Iterator[None]:
    """Lets layers run in another way until the block ends.

    Args:
        model: whose layers.
        recompute: keep a layer's inputs alone, and compute the rest anew in the backward pass.
        compile: each layer apart; they share one program, and texts of any lengths use it.
    """
    for layer in model.layers:
        forward: Any = layer.forward
        if compile:
            forward = torch.compile(forward)
        if recompute:
            forward = partial(checkpoint, forward, use_reentrant=False)
        layer.__dict__["forward"] = forward  # before the class' own
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.__dict__["forward"]

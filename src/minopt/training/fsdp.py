"""FSDP, applied to a built model from outside, and the whole model gathered again for evaluation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minopt.model import OPT


def apply_fsdp(module: nn.Module, model: OPT, dtype: torch.dtype | None, device: torch.device) -> None:
    """Shards the parameters of a model over all processes in place (FSDP2), each layer apart.

    Parameters outside of the layers form one group with the root module: the token table is used first and last, and
    must not be in two groups.

    Args:
        module: the module whose forward is called; holds ``model``.
        model: a float32 model. On the ``"meta"`` device, each process gets its shares unfilled.
        dtype: parameters are gathered and used in it; gradients are summed in float32. ``None`` is float32.
        device: this process's device.
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
    """A plain model in evaluation mode with a model's parameters, sharded or not; every process has to call it.

    A model sharded by layers would gather each layer for each generated token. The result, whole in each process,
    shares what is there already.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        tensors[name] = whole.detach().to(device, dtype)
    plain = OPT(model.config, device="meta", dtype=dtype)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()

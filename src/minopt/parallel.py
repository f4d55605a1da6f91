"""Parallelism, applied to a built model from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from minopt.model import OPT


def apply_fsdp(module: nn.Module, model: OPT, dtype: torch.dtype | None) -> None:
    """Shards a model's parameters over all processes, each layer apart, in place (FSDP2).

    All that is in no layer makes one group with the module's root: the token table is used first and last, and must
    not be in two groups.

    Args:
        module: the module whose forward is called; holds ``model``.
        model: in float32; its layers are sharded one by one.
        dtype: in which parameters are gathered and used; gradients are summed in float32. ``None`` is float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)


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

"""A model divided among processes: each has some heads, some inner units of the feed-forward, some of the vocabulary.

The division is Megatron's (arXiv 1909.08053), and that of metaseq's parts: ``checkpoint.names.shard_dim``
says what a process reads. The processes exchange two sums a layer, one sum of the tokens' embeddings, and the logits.
Tensors are local and collectives plain: DTensor's dispatch takes longer than a small layer.

Shapes: V vocabulary, N processes, W = V / N rounded up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.inspect import check_same_seen, fingerprint
from minopt.checkpoint.tensors import Share
from minopt.config import OPTConfig
from minopt.distributed import end_well, watch_group
from minopt.inference.fast import FastOPT, weights_of
from minopt.inference.linear import Product
from minopt.inference.plan import check_divides, check_fits
from minopt.load_options import LoadOptions

# Biases of the layers of which each process has some inputs, so that their outputs are sums over all processes.
_ADDED_ONCE = ("self_attn.out_proj.bias", "fc2.bias")


class ParallelOPT(FastOPT):
    """One process' share of a ``FastOPT``; all of them call the same methods with the same arguments.

    Every process gets the same logits to the bit, for each number is computed by one of them.

    Args:
        config: the whole model's.
        weights: this process' share of them, as ``read_weights`` gives it.
        mesh: a mesh of one dim: the processes.

    Raises:
        ValueError: if the model cannot be divided so, see ``plan.device_counts``.
    """

    def __init__(self, config: OPTConfig, weights: Iterable[tuple[str, Tensor]], mesh: DeviceMesh) -> None:
        self.group, self.share = mesh.get_group(), share_of(config, mesh)
        if self.share.index > 0:  # what all processes add is added once
            weights = ((name, torch.zeros_like(t) if name.endswith(_ADDED_ONCE) else t) for name, t in weights)
        first = self.share.of(config.vocab_size)[0]
        super().__init__(
            config,
            weights,
            lookup=lambda table: _SharedLookup(table, first, self.group),
            summed=lambda product: _Summed(product, self.group),
        )

    def head(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., E]``."""
        V, N = self.config.vocab_size, self.share.count
        own = super().head(h)
        own = F.pad(own, (0, -(-V // N) - own.shape[-1])).contiguous()  # [..., W]
        every = own.new_empty(N, *own.shape)
        dist.all_gather(list(every.unbind()), own, group=self.group)
        return every.movedim(0, -2).flatten(-2)[..., :V]

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for this process' heads; see ``Decoder.new_cache``."""
        heads = self.config.num_attention_heads // self.share.count
        return KVCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device, heads=heads)

    def read_weight(self, name: str) -> Tensor:
        """Refuses: no process has all weights."""
        raise ValueError(
            f"model: is divided among {self.share.count} processes, none of which has all weights. Load it in one to "
            "save or change it."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.read_weight("")

    def agreed(self, decision: Tensor) -> Tensor:
        """See ``Decoder.agreed``."""
        decision = decision.contiguous()
        dist.broadcast(decision, group=self.group, group_src=0)
        return decision


def check(options: LoadOptions) -> None:
    """Refuses options that do not go with a model divided among processes."""
    if options.optimize is not True:
        raise ValueError(f"optimize: expected True for a divided model, got {options.optimize!r}. Leave it out.")
    if options.offload is not None:
        raise ValueError("offload: expected one process, got a mesh of several. Leave out offload or mesh.")


def build(checkpoint: Checkpoint, options: LoadOptions) -> ParallelOPT:
    """This process' share of a checkpoint, for ``minopt.load``; it reads nothing else but what all processes hold.

    Raises:
        ValueError: as ``ParallelOPT`` does, or if it does not fit into memory; ``CheckpointError`` if processes see
            different checkpoints.
    """
    mesh = options.mesh
    assert mesh is not None
    share = share_of(checkpoint.config, mesh)
    end_well()
    watch = watch_group(mesh.get_group())
    try:
        shortage = ""
        try:
            check_fits(checkpoint, options, share.count)
        except ValueError as error:
            shortage = str(error)
        seen = [("", "")] * share.count
        dist.all_gather_object(seen, (fingerprint(checkpoint), shortage), group=mesh.get_group())
        check_same_seen(checkpoint.found.folder, [other for other, _ in seen])
        if shortages := [reason for _, reason in seen if reason]:
            raise ValueError(shortages[0])
        model = ParallelOPT(checkpoint.config, weights_of(checkpoint, options, share), mesh)
    except BaseException:
        watch.stop(well=False)
        raise
    weakref.finalize(model, watch.stop)
    return model


def share_of(config: OPTConfig, mesh: DeviceMesh) -> Share:
    """This process' share.

    Raises:
        ValueError: if the mesh has several dims, or the model cannot be divided so.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dim, got {mesh.ndim}. Take one of them: mesh['tp'].")
    check_divides("tensor_parallel", config, mesh.size())
    return Share(mesh.get_local_rank(), mesh.size())


class _Summed(Product):
    """A product of which each process computes a summand."""

    def __init__(self, product: Product, group: dist.ProcessGroup) -> None:
        super().__init__(product.bias)
        self._product, self._group = product, group

    def __call__(self, x: Tensor) -> Tensor:
        y = self._product(x).contiguous()
        dist.all_reduce(y, group=self._group)
        return y

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self._product.weight()


class _SharedLookup:
    """Rows of a table of which each process has those from ``first`` on."""

    def __init__(self, table: Tensor, first: int, group: dist.ProcessGroup) -> None:
        self._table, self._first, self._group = table, first, group

    def __call__(self, ids: Tensor) -> Tensor:
        own = ids - self._first
        is_here = (own >= 0) & (own < len(self._table))
        found = F.embedding(own.where(is_here, 0), self._table) * is_here[..., None]
        dist.all_reduce(found, group=self._group)
        return found

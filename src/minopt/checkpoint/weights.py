"""Builds a model from a checkpoint: on the meta device first, then each tensor is checked and assigned."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import some
from minopt.checkpoint.names import shard_dim
from minopt.checkpoint.tensors import Share, SourceTensor
from minopt.load_options import LoadOptions
from minopt.model import OPT
from minopt.progress import bar

logger = logging.getLogger(__name__)

_WORTH_A_FILE = 1_000_000  # bytes: what is smaller is read and not mapped, where mappings hold open files


def load_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> OPT:
    """The plain, trainable model of an open checkpoint, in evaluation mode; ``dtype`` ``None`` is ``"auto"``."""
    model = OPT(checkpoint.config, device="meta")
    model.load_state_dict(dict(read_weights(checkpoint, device, dtype)), assign=True)
    return model.eval()


def check(options: LoadOptions) -> None:
    """Refuses what the plain model does not do."""
    if options.quantize is not None:
        raise ValueError(
            f"quantize: int8 weights need optimize, got optimize={options.optimize}. Leave out one of the two."
        )


def build(checkpoint: Checkpoint, options: LoadOptions) -> OPT:
    """The plain model, for ``minopt.load``."""
    return load_checkpoint(checkpoint, options.device, options.dtype)


def read_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    apart: bool = False,
    keep_int8: bool = False,
    quantize: str | None = None,
    in_int4: tuple[int, torch.dtype] | None = None,
    share: Share | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint with minopt's names, as ``load_model`` has them, each read when its turn comes.

    Args:
        checkpoint: an open one.
        device: the one to put them on.
        dtype: ``None`` is ``"auto"``.
        apart: large ones that are mapped from a file give their pages back when they are let go.
        keep_int8: leave int8 weights as they are, if all of the layers' are; a float32 scale follows each, under its
            name and ``int8.SCALE``.
        quantize: ``"int8"`` gives int8 weights in all layers, made where they are not int8 yet.
        in_int4: give all layers' weights as int4, in groups of so many inputs with scales of that dtype: packed
            int32 under a weight's name, and then the scales, under that and ``int8.SCALE``.
        share: read this process' part of the tensors that ``shard_dim`` divides; of those divided by rows, no more.
    """
    dtype = dtype or checkpoint.dtype_on(device)
    checkpoint.check_head()
    if int8.is_wanted(quantize):
        in_int8 = {name for name in checkpoint.tensors if int8.is_quantized(name)}
    else:
        in_int8 = _int8_names(checkpoint) if keep_int8 else set()
    taken: set[object] = set()
    tensors = checkpoint.tensors.items()
    for name, source in bar(len(tensors), "tensor", iterable=tensors, desc="loading", delay=1, leave=False):
        dim = None if share is None else shard_dim(name)
        if share is not None and dim == 0:
            source = source.rows(*share.of(source.shape[0]))
        columns = share.of(source.shape[1]) if share is not None and dim == 1 else None
        if in_int4 is not None and int8.is_quantized(name):
            read = list(zip((name, name + int8.SCALE), source.read_int4(*in_int4), strict=True))
        elif name in in_int8:
            read = _read_int8(source, columns)
        elif columns is not None:
            read = [(name, source.columns(*columns, dtype))]
        elif device.type == "cpu" and source.dtype == dtype:
            is_small = apart and source.numel * dtype.itemsize < _WORTH_A_FILE
            tensor = None if is_small else source.map(apart)
            if tensor is None:
                tensor = source.read()
            elif not tensor.is_contiguous() or (source.place in taken and not apart):  # a view, or under two names
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            taken.add(source.place)
            read = [(name, tensor)]
            del tensor
        else:
            read = [(name, source.read(dtype))]
        while read:  # nothing here holds a weight while it is packed, or while the next is read
            yield read[0][0], read.pop(0)[1].to(device)


def _read_int8(source: SourceTensor, columns: tuple[int, int] | None) -> list[tuple[str, Tensor]]:
    """A weight of whole rows, or some columns of it, and its scale, which all shares of columns have."""
    weight, scale = source.read_int8()
    if columns is not None:
        weight = weight[:, slice(*columns)].contiguous()
    return [(source.name, weight), (source.name + int8.SCALE, scale)]


def _int8_names(checkpoint: Checkpoint) -> set[str]:
    """The int8 weights of the layers, if all of those are."""
    names = {name for name in checkpoint.tensors if int8.is_quantized(name)}
    other = sorted(name for name in names if checkpoint.tensors[name].kind != "int8")
    if other and len(other) < len(names):
        logger.warning("%s: only %d of the layers' %d weights are int8 (%s not), so those are converted to floats too.",
                       checkpoint.found.folder, len(names) - len(other), len(names), some(other))  # fmt: skip
    return set() if other else names

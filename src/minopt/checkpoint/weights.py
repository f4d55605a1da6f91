"""Builds a model from a checkpoint: on the meta device first, then each tensor is checked and assigned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.errors import some
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.names import shard_dim
from minopt.checkpoint.pieces import Share, SourceTensor, main_dtype
from minopt.checkpoint.quantized import read_int8
from minopt.checkpoint.source import Checkpoint, open_checkpoint
from minopt.config import OPTConfig
from minopt.model import OPT
from minopt.progress import bar

logger = logging.getLogger(__name__)

_WORTH_A_FILE = 1_000_000  # bytes: what is smaller is read and not mapped, where mappings hold open files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
          "fp64": "float64", "double": "float64"}  # fmt: skip


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
) -> OPT:
    """Loads the plain, trainable model of a checkpoint, in evaluation mode.

    Weights are read straight into place. On a CPU, those that keep their dtype stay memory-mapped: they cost
    nothing until used, and the file must not be changed in place meanwhile (replacing it is fine).

    Args:
        name_or_path: a model's folder, a folder that holds exactly one model's folder, any one file of a
            checkpoint, or a name on the hub such as ``"facebook/opt-125m"``.
        device: ``None`` is the GPU if there is one, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` (or ``"bf16"``, ``"fp16"``, ...) or the torch
            dtype; ``"auto"`` is float32 on a CPU and the file's own elsewhere. Tensors are cast as they are read.
        revision: branch, tag or commit on the hub.
        local_files_only: use what the hub's cache holds, ask nobody.
        model_config: instead of the configuration that the checkpoint comes with: one, the name of a preset such
            as ``"opt-1.3b"``, or a config.json.
        ignore: tensors to leave out, by patterns of their names in the files, such as ``"score.*"`` or ``"v_head.*"``.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        ValueError: (``CheckpointError`` where it is the files) if anything is missing, unexpected or of another
            shape, files do not belong together, or device or dtype is unknown.
        OSError: if the hub cannot be reached or refuses.
    """
    target, number_type = resolve_device(device), resolve_dtype(dtype)  # before anything is downloaded
    path = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    return load_checkpoint(open_checkpoint(path, model_config, ignore), target, number_type)


def load_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> OPT:
    """``load_model`` of a checkpoint that is open; ``dtype`` ``None`` is ``"auto"``."""
    model = OPT(checkpoint.config, device="meta")
    model.load_state_dict(dict(read_weights(checkpoint, device, dtype)), assign=True)
    return model.eval()


def read_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    apart: bool = False,
    keep_int8: bool = False,
    quantize: bool = False,
    share: Share | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint with minopt's names, as ``load_model`` has them, each read when its turn comes.

    Args:
        checkpoint: an open one.
        device: where to.
        dtype: ``None`` is ``"auto"``.
        apart: large ones that are mapped from a file give their pages back when they are let go, and not with the
            last of the file's.
        keep_int8: leave int8 weights as they are, each followed by its float32 scale under its name and
            ``int8.SCALE``; where only some of the layers' weights are int8, none are left so.
        quantize: have int8 weights in all layers, made of the numbers in the files where those are not int8 yet.
        share: read this process' part of the tensors that ``shard_dim`` divides, and nothing else of them where they
            are divided by rows.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else main_dtype(checkpoint.tensors.values())
    checkpoint.check_head()
    if quantize:
        in_int8 = {name for name in checkpoint.tensors if int8.is_quantized(name)}
    else:
        in_int8 = _int8_names(checkpoint) if keep_int8 else set()
    taken: set[object] = set()
    tensors = checkpoint.tensors.items()
    for name, source in bar(len(tensors), "tensor", iterable=tensors, desc="loading", delay=1, leave=False):
        if name in in_int8:
            read = _read_int8(name, source, share)
        else:
            read = [(name, _read(name, source, dtype, share, taken, device.type == "cpu", apart))]
        while read:  # nothing here holds a weight while it is packed, or while the next is read
            yield read[0][0], read.pop(0)[1].to(device)


def _read_int8(name: str, source: SourceTensor, share: Share | None) -> list[tuple[str, Tensor]]:
    dim = None if share is None else shard_dim(name)
    if share is not None and dim == 0:
        source = source.rows(*share.of(source.shape[0]))
    weight, scale = read_int8(source)  # of whole rows, whose scales all shares have
    if share is not None and dim == 1:
        start, stop = share.of(source.shape[1])
        weight = weight[:, start:stop].contiguous()
    return [(name, weight), (name + int8.SCALE, scale)]


def _read(
    name: str,
    source: SourceTensor,
    dtype: torch.dtype,
    share: Share | None,
    taken: set[object],
    may_map: bool,
    apart: bool,
) -> Tensor:
    """A weight, in its file's pages if it may be; ``taken`` are the places of those that are."""
    dim = None if share is None else shard_dim(name)
    if share is not None and dim == 1:
        return source.columns(*share.of(source.shape[1]), dtype)
    if share is not None and dim == 0:
        source = source.rows(*share.of(source.shape[0]))
    if not may_map or source.dtype != dtype or (apart and source.numel * dtype.itemsize < _WORTH_A_FILE):
        return source.read(dtype)
    tensor = source.map(apart)
    if tensor is None:
        return source.read(dtype)
    place = source.slices[0].place
    if not tensor.is_contiguous() or (place in taken and not apart):  # a view, or one tensor under two names
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(place)
    return tensor


def _int8_names(checkpoint: Checkpoint) -> set[str]:
    """The int8 weights of the layers, if all of those are."""
    names = {name for name in checkpoint.tensors if int8.is_quantized(name)}
    other = sorted(name for name in names if checkpoint.tensors[name].int8 is None)
    if other and len(other) < len(names):
        logger.warning("%s: %d of the layers' %d weights are not int8 (%s), so the others are not kept so either.",
                       checkpoint.found.folder, len(other), len(names), some(other))  # fmt: skip
    return set() if other else names


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, by default the GPU if there is one.

    Raises:
        ValueError: if this machine or this torch does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ValueError(f'device: {str(device)!r} is not available here ({reason}). Try "cpu".') from None
    return device


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for, ``None`` for ``"auto"``.

    Raises:
        ValueError: if it is none that an OPT computes in.
    """
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    resolved = DTYPES.get(_SHORT.get(name, name)) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return resolved

"""From any kind of checkpoint to a Hugging Face folder or to metaseq's parts, one tensor at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.metaseq.write import check_parts, write_parts, write_vocabulary
from minopt.checkpoint.names import to_hf
from minopt.checkpoint.save import (
    check_apart,
    check_destination,
    generation_config_of,
    replacing_model,
    write_config,
    write_json,
    write_safetensors,
)
from minopt.checkpoint.tensors import main_dtype
from minopt.config import OPTConfig
from minopt.devices import resolve_dtype
from minopt.progress import bar, size_of
from minopt.tokenizer import TOKENIZER_FILES, Tokenizer

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2_000_000_000


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "hf",
    parts: int = 1,
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    force: bool = False,
    show_progress: bool = False,
) -> None:
    """Writes a checkpoint of any kind anew, as a Hugging Face folder or as metaseq's model parallel parts.

    One tensor is in memory at a time, or one file of metaseq's format. If anything fails, the destination is as it was.

    Args:
        source: a folder, file or name, as ``minopt.load_model`` takes it.
        destination: a folder, made if missing.
        format: ``"hf"``: safetensors, config.json, generation_config.json and the tokenizer's files, which
            transformers opens; or ``"metaseq"``: reshard.pt, or reshard-model_part-N.pt, with fused projections.
        parts: the number of files in metaseq's format; more than 1 needs a model without projections, whose heads,
            ffn_dim and vocab_size it divides.
        dtype: all tensors' dtype; ``"auto"`` keeps each as it is stored.
        quantize: ``"int8"`` rounds the layers' weights to 8 bits, with a float32 scale for each output channel, in the
            format that compressed-tensors calls int-quantized; ``dtype`` is then that of the other tensors, and weights
            that are int8 already are copied. ``None`` writes int8 weights as the floating point numbers they stand for.
        max_shard_bytes: the most that one safetensors file holds, unless a single tensor is larger.
        revision, local_files_only, model_config, ignore: see ``minopt.load_model``.
        tokenizer: the folder of its files; ``None`` looks beside the weights, then one folder up.
        force: replace a model that is there.
        show_progress: draw a bar on stderr, if that is a terminal.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        FileExistsError: if the destination holds something and ``force`` is not given, or something other than a model.
        ValueError: (``CheckpointError`` where it is the files) if source or options do not fit.
        OSError: if it cannot be written, or the hub cannot be reached or refuses.
    """
    destination = Path(destination).expanduser()
    number_type = resolve_dtype(dtype)
    _check_options(format, parts, quantize, max_shard_bytes)
    check_destination(destination, force)  # before anything is downloaded
    path = find_model(source, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config, ignore)
    check_apart(checkpoint, destination)
    if format == "metaseq":
        check_parts(checkpoint.config, parts)
    checkpoint.check_head()
    reader = Tokenizer.beside(checkpoint.found.folder, tokenizer)
    if reader is None:
        logger.warning("%s: no tokenizer's files beside the weights, so none are written.", checkpoint.found.folder)
    generation_config = generation_config_of(checkpoint)
    in_int8 = {name for name in checkpoint.tensors if int8.is_wanted(quantize) and int8.is_quantized(name)}
    shown = _shown(checkpoint, number_type, in_int8)
    _check_space(destination, sum(tensor.nbytes for tensor in shown.values()))
    with (
        bar(len(checkpoint.tensors) * parts, " tensors", shown=show_progress) as drawn,
        replacing_model(destination, (*TOKENIZER_FILES, "generation_config.json")) as new,
    ):
        if format == "hf":
            write_safetensors(new, shown, _read(checkpoint, number_type, in_int8, drawn.update), max_shard_bytes)
            write_json(new / "generation_config.json", generation_config)
        else:
            write_parts(new, checkpoint, parts, number_type, drawn.update)
        main = number_type or main_dtype(checkpoint.tensors.values())
        write_config(new, checkpoint.config, main, is_int8=int8.is_wanted(quantize))
        if reader is not None:
            reader.save(new) if format == "hf" else write_vocabulary(new, reader)


def _check_options(format: str, parts: int, quantize: str | None, max_shard_bytes: int) -> None:
    if format not in ("hf", "metaseq"):
        raise ValueError(f"format: expected hf or metaseq, got {format!r}.")
    if format == "hf" and parts != 1:
        raise ValueError(f"parts: only metaseq's format has parts, got {parts} with hf. Add --format metaseq.")
    if int8.is_wanted(quantize) and format == "metaseq":
        raise ValueError("quantize: metaseq's format cannot hold int8 weights. Leave it out, or choose format hf.")
    if parts < 1:
        raise ValueError(f"parts: expected 1 or more, got {parts}.")
    if format == "metaseq" and max_shard_bytes != MAX_SHARD_BYTES:
        raise ValueError("max_shard_bytes: acts on format hf only, for metaseq has one file a part. Leave it out.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}.")


def _check_space(destination: Path, total_bytes: int) -> None:
    place = next(p for p in (destination.absolute(), *destination.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < total_bytes:
        raise OSError(f"{destination}: {size_of(total_bytes)} are to be written, and {size_of(free)} are free. "
                      "Make room, or name a folder on another disk.")  # fmt: skip


def _shown(checkpoint: Checkpoint, dtype: torch.dtype | None, in_int8: set[str]) -> dict[str, Tensor]:
    """The tensors to write, by Hugging Face key, on the meta device; an int8 weight is followed by its scale."""
    shown: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        kind = torch.int8 if name in in_int8 else dtype or tensor.dtype
        shown[to_hf(name)] = torch.empty(tensor.shape, dtype=kind, device="meta")
        if name in in_int8:
            shown[to_hf(name) + int8.SCALE] = torch.empty(tensor.shape[0], 1, dtype=torch.float32, device="meta")
    return shown


def _read(
    checkpoint: Checkpoint, dtype: torch.dtype | None, in_int8: set[str], update: Callable[[], object]
) -> Iterator[Tensor]:
    """The numbers of each tensor of ``_shown``, in that order."""
    for name, tensor in checkpoint.tensors.items():
        update()
        yield from tensor.read_int8() if name in in_int8 else (tensor.read(dtype),)

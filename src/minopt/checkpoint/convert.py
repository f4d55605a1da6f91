"""From any kind of checkpoint to a Hugging Face folder or to metaseq's parts, one tensor at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt import int4, int8
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
from minopt.checkpoint.tensors import SourceTensor, main_dtype
from minopt.config import OPTConfig, is_number
from minopt.devices import resolve_device, resolve_dtype
from minopt.progress import bar, size_of
from minopt.tokenizer import TOKENIZER_FILES, Tokenizer

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2_000_000_000

Reading = Callable[[str, SourceTensor], tuple[Tensor, ...]]  # gives the numbers to write of a tensor and its name

# Of ``quantize`` with a calibration text: the module whose ``calibrate`` gives the numbers to write.
CALIBRATED = {"int4": "minopt.methods.gptq", "int8": "minopt.methods.smoothquant"}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "hf",
    parts: int = 1,
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    calibration: str | Path | None = None,
    smooth: float | None = None,
    device: torch.device | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    adapter: str | Path | None = None,
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
            that are int8 already are copied. ``"int4"`` packs them to 4 bits, with a scale for each group of 128 inputs
            (or the largest part of 128 that fits), in the format pack-quantized. ``None`` writes quantized weights as
            the floating point numbers they stand for.
        calibration: a file of plain text, of which up to 144 windows are read, one layer after another. With
            ``"int4"`` GPTQ then rounds the weights (arXiv 2210.17323), and not to nearest. The perplexity of one window
            in nine, which GPTQ does not see, is measured before and after, and kept in quantization.json.
        smooth: with ``"int8"`` and ``calibration``, SmoothQuant's migration strength, 0 to 1 (arXiv 2211.10438): scales
            of activations go from the weights into the layer norms, for programs that round activations to 8 bits.
        device: where calibration computes; ``None`` is the GPU if there is one, else the CPU.
        max_shard_bytes: the most that one safetensors file holds, unless a single tensor is larger.
        revision, local_files_only, model_config, ignore, adapter: see ``minopt.load_model``.
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
    _check_calibration(quantize, calibration, smooth, device)
    target = resolve_device(device)
    check_destination(destination, force)  # before anything is downloaded
    path = find_model(source, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config, ignore, adapter)
    check_apart(checkpoint, destination)
    if format == "metaseq":
        check_parts(checkpoint.config, parts)
    checkpoint.check_head()
    reader = Tokenizer.beside(checkpoint.found.folder, tokenizer)
    if reader is None:
        logger.warning("%s: no tokenizer's files beside the weights, so none are written.", checkpoint.found.folder)
    generation_config = generation_config_of(checkpoint)
    main = number_type or main_dtype(checkpoint.tensors.values())
    rounding = Rounding(quantize, number_type, main, int4.group_size(checkpoint.config) if quantize == "int4" else 0)
    read: Reading = rounding.read
    record: dict[str, Any] = {}
    if calibration is not None and quantize is not None:
        calibrate = import_module(CALIBRATED[quantize]).calibrate
        read = calibrate(checkpoint, reader, Path(calibration), target, rounding, record, smooth)
    shown = _shown(checkpoint, rounding)
    _check_space(destination, sum(tensor.nbytes for tensor in shown.values()))
    with (
        bar(len(checkpoint.tensors) * parts, " tensors", shown=show_progress) as drawn,
        replacing_model(destination, (*TOKENIZER_FILES, "generation_config.json")) as new,
    ):
        if format == "hf":
            write_safetensors(new, shown, _read(checkpoint, read, drawn.update), max_shard_bytes)
            write_json(new / "generation_config.json", generation_config)
            if record:
                write_json(new / int4.RECORD, record)
        else:
            write_parts(new, checkpoint, parts, number_type, drawn.update)
        write_config(new, checkpoint.config, main, rounding.config())
        if reader is not None:
            reader.save(new) if format == "hf" else write_vocabulary(new, reader)


def _check_options(format: str, parts: int, quantize: str | None, max_shard_bytes: int) -> None:
    if format not in ("hf", "metaseq"):
        raise ValueError(f"format: expected hf or metaseq, got {format!r}.")
    if format == "hf" and parts != 1:
        raise ValueError(f"parts: only metaseq's format has parts, got {parts} with hf. Add --format metaseq.")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f'quantize: expected None, "int8" or "int4", got {quantize!r}.')
    if quantize is not None and format == "metaseq":
        raise ValueError(f"quantize: metaseq's format cannot hold {quantize} weights. Leave it out, or choose format "
                         "hf.")  # fmt: skip
    if parts < 1:
        raise ValueError(f"parts: expected 1 or more, got {parts}.")
    if format == "metaseq" and max_shard_bytes != MAX_SHARD_BYTES:
        raise ValueError("max_shard_bytes: acts on format hf only, for metaseq has one file a part. Leave it out.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}.")


def _check_calibration(
    quantize: str | None, calibration: str | Path | None, smooth: float | None, device: object
) -> None:
    if smooth is not None and (quantize != "int8" or calibration is None):
        raise ValueError("smooth: acts on int8 weights with a calibration text. Add --quantize int8 and --calibration.")
    if smooth is not None and not (is_number(smooth) and 0 <= smooth <= 1):
        raise ValueError(f"smooth: expected a number of 0 to 1, got {smooth!r}. Try 0.5.")
    if calibration is not None and (quantize is None or (quantize == "int8" and smooth is None)):
        raise ValueError("calibration: acts on int4 weights, and on int8 ones with smooth. Add --quantize int4, or "
                         "--quantize int8 --smooth 0.5.")  # fmt: skip
    if calibration is None and device is not None:
        raise ValueError("device: acts with a calibration text only. Leave it out.")
    if calibration is not None and not Path(calibration).is_file():
        raise FileNotFoundError(f"calibration: expected a file of plain text, there is none ({calibration}). Check the "
                                "path.")  # fmt: skip


def _check_space(destination: Path, total_bytes: int) -> None:
    place = next(p for p in (destination.absolute(), *destination.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < total_bytes:
        raise OSError(f"{destination}: {size_of(total_bytes)} are to be written, and {size_of(free)} are free. "
                      "Make room, or name a folder on another disk.")  # fmt: skip


@dataclass(frozen=True)
class Rounding:
    """How each tensor is written: in which scheme the layers' weights, in which dtype the others.

    ``dtype`` is ``None`` where each keeps its own; ``main`` is that of most, and of int4's scales.
    """

    quantize: str | None
    dtype: torch.dtype | None
    main: torch.dtype
    group: int

    def shown(self, name: str, tensor: SourceTensor) -> dict[str, Tensor]:
        """What a file holds of a tensor, by the end of its name, on the meta device."""
        like = torch.empty(tensor.shape, dtype=self.dtype or tensor.dtype, device="meta")
        if self.quantize is None or not int8.is_quantized(name):
            return {"": like}
        if self.quantize == "int4":
            return int4.parts(tensor.shape, self.group, self.main)
        return {"": like.to(torch.int8), int8.SCALE: like.new_empty(len(like), 1, dtype=torch.float32)}

    def read(self, name: str, tensor: SourceTensor) -> tuple[Tensor, ...]:
        """The numbers of ``shown``, rounded to nearest."""
        if self.quantize is None or not int8.is_quantized(name):
            return (tensor.read(self.dtype),)
        if self.quantize == "int4":
            return *tensor.read_int4(self.group, self.main), torch.tensor(tensor.shape)
        return tensor.read_int8()

    def config(self) -> dict[str, Any] | None:
        """The ``quantization_config``."""
        return int4.config_for(self.group) if self.quantize == "int4" else int8.CONFIG if self.quantize else None


def _shown(checkpoint: Checkpoint, rounding: Rounding) -> dict[str, Tensor]:
    """The tensors to write, by Hugging Face key, on the meta device; a quantized weight is several."""
    return {
        to_hf(name) + end: part
        for name, tensor in checkpoint.tensors.items()
        for end, part in rounding.shown(name, tensor).items()
    }


def _read(checkpoint: Checkpoint, read: Reading, update: Callable[[], object]) -> Iterator[Tensor]:
    """The numbers of each tensor of ``_shown``, in that order."""
    for name, tensor in checkpoint.tensors.items():
        update()
        yield from read(name, tensor)

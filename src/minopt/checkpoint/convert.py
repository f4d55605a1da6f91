"""From any kind of checkpoint to a Hugging Face folder or to metaseq's parts, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minopt import int8
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.names import FUSED, fused_key, shard_dim, to_hf, to_metaseq
from minopt.checkpoint.pieces import SourceTensor, main_dtype
from minopt.checkpoint.quantized import read_int8
from minopt.checkpoint.save import (
    TOKENIZER_FILES,
    check_apart,
    check_destination,
    generation_config,
    replacing,
    write_config,
    write_json,
    write_safetensors,
)
from minopt.checkpoint.source import Checkpoint, open_checkpoint
from minopt.config import OPTConfig, read_json
from minopt.load_options import resolve_dtype
from minopt.progress import bar, size_of
from minopt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMATS = ("hf", "metaseq")
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

    One output file's tensors are in memory at a time, whatever the size of the whole. The destination appears when all
    is written; if anything fails, it is as it was.

    Args:
        source: as ``name_or_path`` of ``minopt.load_model``.
        destination: a folder, made if missing.
        format: ``"hf"``: safetensors, config.json, generation_config.json and the tokenizer's files, which
            transformers opens; or ``"metaseq"``: reshard.pt, or reshard-model_part-N.pt, with fused projections.
        parts: of metaseq's format; more than 1 needs a model without projections, whose heads, ffn_dim and
            vocab_size it divides.
        dtype: of all tensors; ``"auto"`` keeps each as it is stored.
        quantize: ``"int8"`` rounds the layers' weights to 8 bits, with a float32 scale for each output channel, in the
            format that compressed-tensors calls int-quantized; ``dtype`` then is that of the other tensors, and what
            is int8 already stays so. ``None`` writes int8 weights as what they stand for.
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
    if format not in FORMATS:
        raise ValueError(f"format: expected {' or '.join(FORMATS)}, got {format!r}.")
    if format == "hf" and parts != 1:
        raise ValueError(f"parts: metaseq's format has them, got {parts} with hf. Add --format metaseq.")
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize: expected None or "int8", got {quantize!r}.')
    if quantize and format == "metaseq":
        raise ValueError("quantize: metaseq's format has no int8 weights, got both. Leave out one of the two.")
    if parts < 1:
        raise ValueError(f"parts: expected 1 or more, got {parts}.")
    if format == "metaseq" and max_shard_bytes != MAX_SHARD_BYTES:
        raise ValueError("max_shard_bytes: metaseq's files are its parts. Leave it out, or name more parts.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}.")
    check_destination(destination, force)  # before anything is downloaded
    path = find_model(source, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config, ignore)
    check_apart(checkpoint, destination)
    if format == "metaseq":
        _check_parts(checkpoint.config, parts)
    checkpoint.check_head()
    reader = Tokenizer.beside(checkpoint.found.folder, tokenizer)
    if reader is None:
        logger.warning("%s: no tokenizer's files beside the weights, so none are written.", checkpoint.found.folder)
    generation_file = checkpoint.found.folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {
        "_from_model_config": True, **generation_config(checkpoint.config)}  # fmt: skip
    shown = _shown(checkpoint, number_type, bool(quantize))
    _check_space(destination, sum(tensor.nbytes for tensor in shown.values()))
    # A bar of bytes would be finer, but a tensor is what is read and written as one.
    with (
        bar(len(shown) * (parts if format == "metaseq" else 1), " tensors", shown=show_progress) as drawn,
        replacing(destination, (*TOKENIZER_FILES, "generation_config.json")) as new,
    ):
        if format == "hf":
            _write_hf(new, checkpoint, number_type, shown, max_shard_bytes, drawn.update)
            write_json(new / "generation_config.json", generation)
        else:
            _write_parts(new, checkpoint, number_type, parts, drawn.update)
        main = number_type or main_dtype(checkpoint.tensors.values())
        write_config(new, checkpoint.config, main, is_int8=bool(quantize))
        if reader is not None:
            reader.save(new) if format == "hf" else _write_vocabulary(new, reader)


def _check_parts(config: OPTConfig, parts: int) -> None:
    if parts > 1 and config.embed_dim != config.hidden_size:
        raise ValueError(f"parts: a model with projections (word_embed_proj_dim {config.embed_dim}, hidden_size "
                         f"{config.hidden_size}) has one part in metaseq, got {parts}.")  # fmt: skip
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "ffn_dim", "vocab_size")}
    wrong = [f"{name} is {size}" for name, size in sizes.items() if size % parts]
    if wrong:
        fitting = [n for n in range(1, 65) if not any(size % n for size in sizes.values())]
        raise ValueError(f"parts: expected a divisor of heads, ffn_dim and vocab_size, got {parts} ({some(wrong)})."
                         f" {', '.join(map(str, fitting))} would do.")  # fmt: skip


def _check_space(destination: Path, total_bytes: int) -> None:
    place = next(p for p in (destination.absolute(), *destination.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < total_bytes:
        raise OSError(f"{destination}: {size_of(total_bytes)} are to be written, and {size_of(free)} are free. "
                      "Make room, or name a folder on another disk.")  # fmt: skip


def _shown(checkpoint: Checkpoint, dtype: torch.dtype | None, quantize: bool) -> dict[str, Tensor]:
    """What is to be written, by its Hugging Face key, on the meta device; an int8 weight is followed by its scale."""
    shown: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        key = to_hf(name)
        in_int8 = quantize and int8.is_quantized(name)
        kind = torch.int8 if in_int8 else dtype or tensor.dtype
        shown[key] = torch.empty(tensor.shape, dtype=kind, device="meta")
        if in_int8:
            shown[key + int8.SCALE] = torch.empty(tensor.shape[0], 1, dtype=torch.float32, device="meta")
    return shown


def _write_hf(
    new: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, shown: Mapping[str, Tensor], max_bytes: int,
    update: Callable[[], object],
) -> None:  # fmt: skip
    sources = {to_hf(name): tensor for name, tensor in checkpoint.tensors.items()}
    scales: dict[str, Tensor] = {}  # of the weight that was read last

    def read(key: str) -> Tensor:
        update()
        if key in scales:
            return scales.pop(key)
        if key + int8.SCALE not in shown:
            return sources[key].read(dtype)
        weight, scales[key + int8.SCALE] = read_int8(sources[key])
        return weight

    write_safetensors(new, shown, read, max_bytes)


def _write_parts(
    new: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, parts: int, update: Callable[[], object]
) -> None:
    cfg = {"model": argparse.Namespace(**_metaseq_settings(checkpoint.config, parts))}  # as metaseq's own files have it
    for part in range(parts):
        state: dict[str, Tensor] = {"decoder.version": torch.tensor([3.0])}
        for name, tensor in checkpoint.tensors.items():
            _fill_part(state, name, tensor, part, parts, dtype)
            update()
        file = "reshard.pt" if parts == 1 else f"reshard-model_part-{part}.pt"
        torch.save({"cfg": cfg, "model": state, "args": None, "extra_state": {}}, new / file)


def _fill_part(
    state: dict[str, Tensor], name: str, tensor: SourceTensor, part: int, parts: int, dtype: torch.dtype | None
) -> None:
    """Puts one part's share of a tensor into its state dict; keys, values and queries into one fused tensor."""
    dim, fused = shard_dim(name), fused_key(name)
    shape = list(tensor.shape)
    if dim is not None:
        shape[dim] //= parts
    if fused is None:
        share = state[to_metaseq(name)] = torch.empty(shape, dtype=dtype or tensor.dtype)
        if dim == 1:
            tensor.read_columns(share, part * shape[1])
        elif dim == 0 or part > 0:
            tensor.read_into(share.view(-1), part * math.prod(shape) if dim == 0 else 0)
        else:
            share.copy_(tensor.read(dtype))  # compares what the source's parts hold alike, once
        return
    if fused not in state:
        state[fused] = torch.empty([3 * shape[0], *shape[1:]], dtype=dtype or tensor.dtype)
    elif state[fused].dtype != (dtype or tensor.dtype):
        raise CheckpointError(f"{name}: is {tensor.dtype}, and {fused} holds {state[fused].dtype}. Name a --dtype.")
    order = next(i for i, projection in enumerate(FUSED) if f".{projection}." in name)
    tensor.read_into(state[fused].view(3, -1)[order], part * math.prod(shape))


def _metaseq_settings(config: OPTConfig, parts: int) -> dict[str, object]:
    """The configuration under metaseq's names (models/transformer_lm.py)."""
    return {
        "_name": "transformer_lm_megatron", "arch": "transformer_lm_megatron",
        "activation_fn": config.activation_function, "dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "decoder_embed_dim": config.hidden_size,
        "decoder_ffn_embed_dim": config.ffn_dim, "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads, "decoder_input_dim": config.embed_dim,
        "decoder_output_dim": config.embed_dim, "decoder_normalize_before": config.do_layer_norm_before,
        "decoder_learned_pos": True, "decoder_learned_sinusoidal": False, "no_scale_embedding": True,
        "no_emb_dropout": True, "share_decoder_input_output_embed": True, "alibi": False,
        "disable_bias": not config.enable_bias, "disable_affine_ln": not config.layer_norm_elementwise_affine,
        "max_target_positions": config.max_position_embeddings, "tokens_per_sample": config.max_position_embeddings,
        "model_parallel_size": parts,
    }  # fmt: skip


def _write_vocabulary(new: Path, tokenizer: Tokenizer) -> None:
    """Writes what metaseq reads a tokenizer from: one file, or in older versions two, which lack added tokens."""
    tokenizer.save(new)
    (new / "tokenizer.json").rename(new / "gpt2-unified.json")
    model = json.loads(tokenizer.backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (new / "gpt2-vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (new / "gpt2-merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

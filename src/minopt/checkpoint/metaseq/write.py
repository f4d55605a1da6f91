"""Writes metaseq's model parallel parts: reshard.pt, or reshard-model_part-N.pt."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.metaseq.config import to_settings
from minopt.checkpoint.names import from_metaseq, fused_key, shard_dim, to_metaseq
from minopt.checkpoint.tensors import Share, SourceTensor
from minopt.config import OPTConfig
from minopt.tokenizer import Tokenizer


def check_parts(config: OPTConfig, parts: int) -> None:
    """Refuses a number of parts that does not divide the model, and names those that would do."""
    if parts > 1 and config.embed_dim != config.hidden_size:
        raise ValueError(f"parts: a model with projections (word_embed_proj_dim {config.embed_dim}, hidden_size "
                         f"{config.hidden_size}) has one part in metaseq, got {parts}.")  # fmt: skip
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "ffn_dim", "vocab_size")}
    wrong = [f"{name} is {size}" for name, size in sizes.items() if size % parts]
    if wrong:
        fitting = [n for n in range(1, 65) if not any(size % n for size in sizes.values())]
        raise ValueError(f"parts: expected a divisor of heads, ffn_dim and vocab_size, got {parts} ({some(wrong)})."
                         f" {', '.join(map(str, fitting))} would do.")  # fmt: skip


def write_parts(
    folder: Path, checkpoint: Checkpoint, parts: int, dtype: torch.dtype | None, update: Callable[[int], object]
) -> None:
    """Fills a folder with a checkpoint's tensors in so many files; those of one file are in memory at a time.

    ``dtype`` is all tensors', or ``None``. ``update`` is called with the number of tensors of which a part was read.
    """
    cfg = {"model": argparse.Namespace(**to_settings(checkpoint.config, parts))}  # as metaseq's own files have it
    for part in range(parts):
        file = "reshard.pt" if parts == 1 else f"reshard-model_part-{part}.pt"
        state = _state(checkpoint, Share(part, parts), dtype, update)
        torch.save({"cfg": cfg, "model": state, "args": None, "extra_state": {}}, folder / file)
        del state  # before the next part is read


def _state(
    checkpoint: Checkpoint, share: Share, dtype: torch.dtype | None, update: Callable[[int], object]
) -> dict[str, Tensor]:
    state = {"decoder.version": torch.tensor([3.0])}
    for key in dict.fromkeys(fused_key(name) or to_metaseq(name) for name in checkpoint.tensors):
        names = from_metaseq(key)
        tensors = [_read_share(checkpoint.tensors[name], share, dtype) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.dtype != tensors[0].dtype:
                raise CheckpointError(f"{name}: is {tensor.dtype}, and {key} holds {tensors[0].dtype}. Name a --dtype.")
        state[key] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        update(len(names))
    return state


def _read_share(tensor: SourceTensor, share: Share, dtype: torch.dtype | None) -> Tensor:
    dim = shard_dim(tensor.name)
    if dim == 1:
        return tensor.columns(*share.of(tensor.shape[1]), dtype)
    return (tensor if dim is None else tensor.rows(*share.of(tensor.shape[0]))).read(dtype)


def write_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the files that metaseq reads a tokenizer from: one, or in older versions two, which lack added tokens."""
    tokenizer.save(folder)
    (folder / "tokenizer.json").rename(folder / "gpt2-unified.json")
    model = json.loads(tokenizer.backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "gpt2-vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    (folder / "gpt2-merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

"""A calibration text on its way through a model's layers, of which one is in memory at a time.

Shapes: N windows, T tokens of each, C hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.convert import Reading, Rounding
from minopt.checkpoint.tensors import SourceTensor
from minopt.checkpoint.weights import read_weights
from minopt.config import OPTConfig
from minopt.model import OPT, DecoderLayer
from minopt.tokenizer import Tokenizer

WINDOWS = 128  # of calibration, as in GPTQ's experiments (arXiv 2210.17323, section 4)
HELD_OUT = 8  # of so many windows and one more, the last is held out to measure perplexity

_PIECE = 256  # tokens whose logits are in memory at a time

# What a layer's linear modules read: those of one row have the same input.
INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)

# What becomes of a layer: changes the layer in place to the one that is written, and gives what is written, by the
# names of the layer's tensors.
Change = Callable[["Walk", DecoderLayer], dict[str, tuple[Tensor, ...]]]


class Walk:
    """The activations of a calibration text before the next layer, in float32.

    Attributes:
        learned: ``[N, T, C]``, what a method learns from.
        before, after: of windows that are held out, by the model as it was and as it is written.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, device: torch.device, learned: Tensor, held: Tensor) -> None:
        self.checkpoint, self._held, self._device = checkpoint, held, device
        ends = self._ends()
        ends.final_layer_norm = ends.project_out = None
        self.learned, self.before = (
            torch.cat([ends.hidden_states(row[None].to(device)) for row in ids]) for ids in (learned, held)
        )
        self.after = self.before.clone()
        self._layer = DecoderLayer(checkpoint.config, 0, device, torch.float32).eval().requires_grad_(False)

    def _ends(self) -> OPT:
        """The model without its layers. It is read twice: between, its table is not in memory."""
        tensors = {name: t for name, t in self.checkpoint.tensors.items() if not name.startswith("layers.")}
        ends = OPT(self.checkpoint.config, device="meta").eval()
        ends.layers = nn.ModuleList()
        weights = read_weights(replace(self.checkpoint, tensors=tensors), self._device, torch.float32)
        ends.load_state_dict(dict(weights), assign=True)
        return ends

    def layer(self, index: int) -> DecoderLayer:
        """A layer with its weights, in the place of the one before; ``sources`` are where they come from."""
        self.sources = {name: self.checkpoint.tensors[f"layers.{index}.{name}"]
                        for name, _ in self._layer.named_parameters()}  # fmt: skip
        for name, parameter in self._layer.named_parameters():
            parameter.copy_(self.sources[name].read(torch.float32))
        return self._layer

    def perplexities(self) -> tuple[float, float]:
        """Of the held-out windows, by the model as it was and as it is written."""
        ends, found = self._ends(), []
        for states in (self.before, self.after):
            total = 0.0
            for x, ids in zip(states, self._held, strict=True):
                for module in filter(None, (ends.final_layer_norm, ends.project_out)):
                    x = module(x)
                for h, following in zip(x[:-1].split(_PIECE), ids[1:].split(_PIECE), strict=True):
                    total += F.cross_entropy(ends.head(h), following.to(h.device), reduction="sum").item()
            found.append(math.exp(total / (self._held.numel() - len(self._held))))
        return found[0], found[1]


def run(layer: DecoderLayer, states: Tensor, keep: bool = True) -> None:
    """Runs a layer over windows ``[N, T, C]``, which become its results unless these are not kept."""
    for row in states:
        y = layer(row[None])[0]
        if keep:
            row.copy_(y)


@contextmanager
def watched(layer: DecoderLayer, names: tuple[str, ...], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Shows what goes into linear modules, ``[..., I]``; a tensor that ``see`` returns goes in instead."""
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: see(name, x[0])) for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def windows_of(text: Path, tokenizer: Tokenizer | None, config: OPTConfig) -> tuple[Tensor, Tensor]:
    """Windows of a text, as long as the model has positions: those to learn from ``[N, T]``, and those held out.

    The text is encoded in one piece. Of a long one, windows are taken at even distances.

    Raises:
        ValueError: if it is no text, there is no tokenizer, or the text is too short.
    """
    if tokenizer is None:
        raise ValueError("calibration: expected a model with a tokenizer, it has none. Name its folder with "
                         "--tokenizer.")  # fmt: skip
    try:
        ids = torch.tensor(tokenizer.encode(text.read_bytes().decode("utf-8-sig")), dtype=torch.long)
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration: expected UTF-8, got {error} ({text}). Convert it to UTF-8.") from None
    length, cycle = config.max_position_embeddings, HELD_OUT + 1
    count = min(len(ids) // length, WINDOWS + WINDOWS // HELD_OUT)
    if count < cycle:
        raise ValueError(
            f"calibration: expected a text of at least {cycle * length:,} tokens ({cycle} windows of {length:,}), got "
            f"{len(ids):,} ({text}). Give a longer one."
        )
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(f"calibration: the tokenizer gives ids up to {int(ids.max())}, the model has "
                         f"{config.vocab_size}. Do they belong together?")  # fmt: skip
    chosen = ids[: len(ids) // length * length].view(-1, length)[
        torch.linspace(0, len(ids) // length - 1, count).long()
    ]
    is_held = torch.arange(count) % cycle == HELD_OUT
    return chosen[~is_held], chosen[is_held]


def reading(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, text: Path, device: torch.device, rounding: Rounding,
    record: dict[str, Any], change: Change,
) -> Reading:  # fmt: skip
    """What gives the numbers of each tensor that ``convert`` writes, asked for in the model's order.

    With the last layer the windows and both perplexities go into ``record``. Raises as ``windows_of`` does.
    """
    learned, held = windows_of(text, tokenizer, checkpoint.config)
    walk = Walk(checkpoint, device, learned, held)
    made: dict[str, tuple[Tensor, ...]] = {}
    last = -1

    @torch.no_grad()
    def read(name: str, tensor: SourceTensor) -> tuple[Tensor, ...]:
        nonlocal last
        if name.startswith("layers.") and (index := int(name.split(".")[1])) != last:
            last = index
            made.update({f"layers.{index}.{key}": parts for key, parts in change(walk, walk.layer(index)).items()})
            if index == checkpoint.config.num_hidden_layers - 1:
                before, after = walk.perplexities()
                record["calibration"] = {"text": text.name, "windows": len(learned), "tokens": learned.numel()}
                record["perplexity"] = {"windows": len(held), "before": round(before, 4), "after": round(after, 4)}
        return made.pop(name) if name in made else rounding.read(name, tensor)

    return read

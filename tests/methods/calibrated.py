"""Small models with a tokenizer and a calibration text, and what their layers read, by transformers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minopt
from minopt.methods.calibration import windows_of
from tests.conftest import build_reference

README = Path(minopt.DEMO) / "README.md"  # a text of more than 9 windows of 64 tokens
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


def write_model(folder: Path, kind: str = "125m", change: Callable[[Any], object] | None = None) -> Any:
    """Writes a model of the package's vocabulary with its tokenizer, and gives it as transformers' in float64."""
    model = build_reference(kind, vocab_size=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # texts are then neither certain nor impossible
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(minopt.DEMO) / name, folder / name)
    return copy.deepcopy(model).double()


def windows(folder: Path) -> tuple[Tensor, Tensor]:
    """The windows of the text that a method learns from, and those that are held out."""
    return windows_of(README, minopt.Tokenizer.load(folder), minopt.OPTConfig.load(folder))


@torch.no_grad()
def inputs_of(model: Any, index: int, ids: Tensor) -> dict[str, Tensor]:
    """What the linear modules of a layer read ``[N * T, I]``, by their names."""
    seen: dict[str, Tensor] = {}
    layer = model.model.decoder.layers[index]
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.__setitem__(name, x[0].reshape(-1, x[0].shape[-1]).clone())
        )
        for name in PROJECTIONS
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen

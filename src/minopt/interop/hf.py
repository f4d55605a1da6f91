"""A model as transformers' class: the same modules in transformers' tree, for programs that are written for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minopt.inference.frozen import Frozen, refuse
from minopt.interop import need
from minopt.methods.heads import ModelWithHead
from minopt.model import OPT
from minopt.text import LanguageModel
from minopt.wrapped import decoder_of

_SHARED = ("embed_tokens", "project_in", "project_out", "final_layer_norm")
_OF_LAYER = ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
_OF_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


def as_hf(model: OPT | LanguageModel | ModelWithHead) -> Any:
    """A model of transformers' class that has the modules of a plain model, so that both always have the same weights.

    It is what ``from_pretrained`` would give, without a copy: ``OPTForCausalLM``, or the class of a model with another
    head. Training, pruning and quantisation scripts, transformers' ``Trainer``, TRL and peft take it. What they change
    in place, the minopt model has too. What they put in a module's place (peft's adapters) it has once that is merged.

    Args:
        model: loaded with ``optimize=False``. It stays as it is, in its place, dtype and mode.

    Raises:
        ValueError: if the model was made for inference, or transformers is not installed.
    """
    transformers = need("transformers", "reference")
    opt = decoder_of(model.model if isinstance(model, ModelWithHead) else model).as_opt()
    if isinstance(opt, Frozen):
        refuse("and other programs change a model's weights and modules")
    kind = model.ARCHITECTURE if isinstance(model, ModelWithHead) else "OPTForCausalLM"
    settings = {**opt.config.to_dict(), **getattr(model, "settings", {}), "architectures": [kind]}
    config = transformers.OPTConfig.from_dict({**settings, "dtype": str(opt.dtype).removeprefix("torch.")})
    with torch.device("meta"):
        view = getattr(transformers, kind)(config)
    decoder = view.model.decoder
    _share(opt, decoder, _SHARED)
    decoder.embed_positions.weight = opt.embed_positions.weight
    for ours, theirs in zip(opt.layers, decoder.layers, strict=True):
        _share(ours, theirs, _OF_LAYER)
        _share(ours.self_attn, theirs.self_attn, _OF_ATTENTION)
    if isinstance(model, ModelWithHead):
        _share(model, view, (model.HEAD,))
    else:
        view.lm_head.weight = opt.embed_tokens.weight
    return view.train(opt.training)


def _share(ours: nn.Module, theirs: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(ours, name, None) is not None:
            setattr(theirs, name, getattr(ours, name))

"""Models as people hold them: the OPT inside of other programs' wrappers, and what is none."""

from __future__ import annotations

from typing import Any

from torch import nn

from minopt.config import OPTConfig
from minopt.model import OPT

# Where wrappers have what they wrap and call it unchanged, by the names of their classes: none is imported for that.
_INSIDE = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module",
           "LanguageModel": "decoder"}  # fmt: skip


def decoder_of(model: Any) -> Any:
    """Finds the decoder in a model: an ``OPT``, out of its wrappers, or another decoder as it is.

    Raises:
        ValueError: if it is neither, or its weights have no numbers.
    """
    while type(model).__name__ in _INSIDE:
        model = getattr(model, _INSIDE[type(model).__name__])
    if hasattr(type(model), "get_base_model") and not model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()  # whose layers peft has replaced; prompts would be lost
    is_other = not isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), OPTConfig)
    if isinstance(model, type) or not (isinstance(model, OPT) or is_other):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ValueError(
            f"model: expected a minopt.OPT or an exported program, got {name}. minopt.load opens a model by its name "
            "or its folder, such as transformers' save_pretrained writes; an adapter has to be merged first."
        )
    if model.device.type == "meta":
        raise ValueError(
            "model: expected weights with numbers, got some on the meta device (built there, or offloaded by another "
            "program). Load it with minopt.load, whose option offload does that."
        )
    return model

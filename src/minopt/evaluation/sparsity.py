"""How many activations behind a relu are exact zeros on a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minopt.model import OPT


@torch.inference_mode()
def zeros_by_layer(model: OPT, input_ids: Sequence[int]) -> tuple[float, ...]:
    """The share of zeros in what goes into each layer's ``fc2``, over all tokens of a text.

    Args:
        model: a plain one.
        input_ids: at least one, in windows of as many tokens as the model has positions, each of which is read alone.
    """
    found = torch.zeros(len(model.layers), dtype=torch.long)

    def count(index: int, x: Tensor) -> None:
        found[index] += x.numel() - x.count_nonzero().cpu()

    hooks = [
        layer.get_submodule("fc2").register_forward_pre_hook(lambda _, x, index=index: count(index, x[0]))
        for index, layer in enumerate(model.layers)
    ]
    try:
        for window in torch.split(torch.tensor(input_ids, device=model.device), model.config.max_position_embeddings):
            model.hidden_states(window[None])
    finally:
        for hook in hooks:
            hook.remove()
    return tuple((found / (len(input_ids) * model.config.ffn_dim)).tolist())

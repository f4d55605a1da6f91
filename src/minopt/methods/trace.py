"""Looks into a forward pass, and changes it: the residual stream, attention, what goes into and out of each module.

It is made of hooks on the modules of a plain model: without a trace a pass runs as it always does.

Shapes: B batch, T tokens, H heads, D head_dim, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from minopt.inference.frozen import Frozen, refuse
from minopt.masks import causal_mask, plain_causal_mask
from minopt.model import OPT
from minopt.text import LanguageModel
from minopt.wrapped import decoder_of

Patch = Callable[[Tensor], Tensor] | Tensor


class Trace:
    """What one pass of a model has computed, by name; see ``trace``."""

    def __init__(self, logits: Tensor, values: Mapping[str, Tensor], num_layers: int) -> None:
        self.logits = logits
        self.values = dict(values)
        self._layers = num_layers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"{name}: not traced. There are {', '.join(list(self.values)[:5])}, ...; see minopt.trace.")
        return self.values[name]

    def __repr__(self) -> str:
        return f"Trace({len(self.values)} values of {self._layers} layers, logits {list(self.logits.shape)})"

    @property
    def residual(self) -> list[Tensor]:
        """The residual stream ``[B, T, C]``: before the first layer, and behind each."""
        return [self["layers.0.input"], *(self[f"layers.{i}.output"] for i in range(self._layers))]

    @property
    def attention(self) -> list[Tensor]:
        """The attention weights ``[B, H, T, T]`` of each layer."""
        return [self[f"layers.{i}.self_attn.weights"] for i in range(self._layers)]


@torch.no_grad()
def trace(
    model: OPT | LanguageModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    names: Sequence[str] = ("*",),
    patch: Mapping[str, Patch] | None = None,
    callback: Callable[[str, Tensor], None] | None = None,
) -> Trace:
    """Runs a pass and keeps what it computes inside; changes it on the way if asked to.

    The names are those of the modules, with what is meant of them:

    - ``layers.3.input`` and ``layers.3.output``: the residual stream ``[B, T, C]`` before and behind a layer;
    - ``layers.3.self_attn.q_proj.input`` and ``.output``, and so for ``k_proj``, ``v_proj``, ``out_proj``, ``fc1``,
      ``fc2``, the two norms, and ``embed_tokens``, ``embed_positions``, ``final_layer_norm``, ``project_in``,
      ``project_out``. The input of ``out_proj`` is the heads' results ``[B, T, C]``, head after head, D numbers each;
    - ``layers.3.self_attn.weights``: the attention weights ``[B, H, T, T]`` in the model's dtype, 0 where a token does
      not attend. They are computed for the trace, as kernels keep none. A patch of them replaces the heads' results.

    Args:
        model: loaded with ``optimize=False``.
        input_ids, attention_mask, inputs_embeds: see ``OPT.hidden_states``; the mask is ``[B, T]`` or ``None``.
        names: which to keep, as patterns (``"layers.*.output"``). The fewer, the less memory.
        patch: by name, a tensor that takes the place of a value, or a function of the value that gives another. Of the
            same shape; it is used from there on, and kept in the trace.
        callback: is called with each name and tensor in place of keeping them; the trace then has the logits alone.

    Returns:
        A ``Trace``; tensors on the model's device.

    Raises:
        ValueError: if the model was made for inference, a name matches nothing, or a patch has another shape.
    """
    opt = decoder_of(model).as_opt()
    if isinstance(opt, Frozen):
        refuse("and its layers are joined, so that there is nothing to look at inside")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (attention_mask is not None and attention_mask.ndim != 2):
        raise ValueError("trace: expected input_ids or inputs_embeds, and a mask [batch, tokens] or None.")
    names = (names,) if isinstance(names, str) else names
    watch = _Watch(names, dict(patch or {}), callback)
    known = _names(opt)
    unknown = [pattern for pattern in names if not any(fnmatchcase(name, pattern) for name in known)]
    if unknown := [*unknown, *(name for name in watch.patch if name not in known)]:
        raise ValueError(f"trace: expected names such as {known[0]} or layers.0.fc1.input (of patch whole ones), got "
                         f"{unknown[0]!r}.")  # fmt: skip

    @cache
    def mask() -> Tensor:  # asked for in the pass, which has checked the shapes
        T = given.shape[1]
        found = causal_mask(attention_mask, 0, T, T, given.device)
        return plain_causal_mask(0, T, T, given.device) if found is None else found

    handles = []
    try:
        for name, module in opt.named_modules():
            if f"{name}.input" in known:
                handles.append(module.register_forward_pre_hook(partial(watch.before, name)))
                handles.append(module.register_forward_hook(partial(watch.behind, name)))
        for index, layer in enumerate(opt.layers):
            name = f"layers.{index}.self_attn.weights"
            if watch.wants(name):
                handles += _hooks_of_weights(watch, name, layer.self_attn, mask)
        logits = opt(input_ids, attention_mask, inputs_embeds=inputs_embeds)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(logits, watch.values, len(opt.layers))


def _names(model: OPT) -> list[str]:
    """All that can be traced: parts with a tensor in and a tensor out."""
    found = []
    for name, module in model.named_modules():
        is_layer = name.startswith("layers.") and name.count(".") == 1
        if is_layer or isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
            found += [f"{name}.input", f"{name}.output"]
        if name.endswith(".self_attn"):
            found.append(f"{name}.weights")
    return found


class _Watch:
    """The hooks: each value is changed, then kept."""

    def __init__(
        self, names: Sequence[str], patch: dict[str, Patch], callback: Callable[[str, Tensor], None] | None
    ) -> None:
        self.names, self.patch, self.callback = names, patch, callback
        self.values: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        return name in self.patch or any(fnmatchcase(name, pattern) for pattern in self.names)

    def see(self, name: str, value: Tensor) -> Tensor | None:
        """Keeps a value; returns what takes its place, if anything does."""
        new: Any = self.patch.get(name)
        if new is not None:
            new = new(value.clone()) if callable(new) else new
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"patch: expected {list(value.shape)} for {name}, got {got}.")
            new = new.to(value.device, value.dtype)
        if any(fnmatchcase(name, pattern) for pattern in self.names):
            kept = value if new is None else new
            if self.callback is None:
                self.values[name] = kept
            else:
                self.callback(name, kept)
        return new

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = self.see(f"{name}.input", args[0])
        return None if new is None else (new, *args[1:])

    def behind(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self.see(f"{name}.output", output)


def _hooks_of_weights(watch: _Watch, name: str, attention: Any, mask: Callable[[], Tensor]) -> list[Any]:
    """Hooks that compute a layer's attention weights, and put the heads' results anew if those are changed."""
    parts: dict[str, Tensor] = {}

    def split(part: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        parts[part] = output.view(*output.shape[:2], -1, attention.head_dim).transpose(1, 2)  # [B, H, T, D]

    def weigh(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        q, k, v = parts["q"] * attention.head_dim**-0.5, parts["k"], parts["v"]
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask(), -torch.inf)
        new = watch.see(name, scores.softmax(-1).to(q.dtype))
        return None if new is None else ((new @ v).transpose(1, 2).flatten(2),)

    hooks: list[Any] = [
        getattr(attention, f"{part}_proj").register_forward_hook(partial(split, part)) for part in "qkv"
    ]
    return [*hooks, attention.out_proj.register_forward_pre_hook(weigh, prepend=True)]

"""An OPT for inference alone: the same function, its weights in the form that a step reads fastest.

Shapes: B batch, T tokens this call, S cached + T, H heads, D head_dim, C hidden_size, E word_embed_proj_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minopt import int4, int8
from minopt.attention import attend
from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.names import parameter_shapes
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.config import OPTConfig
from minopt.inference.frozen import Frozen, InferenceOPT, norm, refuse
from minopt.inference.linear import OUTLIERS_FROM, Product, build_product, packs
from minopt.inference.linear4 import Int4, kept_in_int4
from minopt.inference.plan import check_fits
from minopt.inference.sparse import for_zeros
from minopt.load_options import LoadOptions
from minopt.masks import Packed, pick
from minopt.memory import empty

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_NORMS = ("self_attn_layer_norm", "final_layer_norm")


class FastOPT(InferenceOPT):
    """An OPT for inference that is fast. It has all methods of ``OPT``.

    ``state_dict`` gives the plain weights, to the bit. The only weight held twice is the head's, for the token table
    cannot serve it in another layout.

    Args:
        config: shape and options.
        weights: of an OPT, with their names. Each is taken when its turn comes and freed as soon as it is packed, if
            nobody else holds it. Those of the layers may be int8, or int4 packed in int32, with scales under
            ``minopt.int8``'s names; the head becomes int8 then too.
        lookup: makes a lookup of tokens of the token table; ``None`` looks into it.
        summed: wraps the products that write to the residual stream (``out_proj``, ``fc2``).
    """

    def __init__(
        self,
        config: OPTConfig,
        weights: Iterable[tuple[str, Tensor]],
        *,
        lookup: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
        summed: Callable[[Product], Product] = lambda product: product,
    ) -> None:
        build = _Builder(weights, config, summed)
        table = build.take("embed_tokens.weight").detach()
        layers = [FastLayer(config, index, build) for index in range(config.num_hidden_layers)]
        weight, scale = int8.quantize(table) if build.in_int8 or build.in_int4 else (table, None)
        head = build_product(weight, None, scale=scale, outliers=build.outliers)
        others = {"embed_tokens.weight": table} | build.rest()
        looked_up = None if lookup is None else lookup(table)
        super().__init__(config, others, layers, head, looked_up, build.in_int8, build.in_int4)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """See ``OPT.forward``."""
        if torch.compiler.is_compiling() and self.device.type == "cpu":  # compilers know nothing of packed weights
            return torch._dynamo.disable(super().forward)(*args, **options)  # type: ignore[no-untyped-call]
        return super().forward(*args, **options)

    def hidden_states(self, *args: Any, **options: Any) -> Tensor:
        """See ``OPT.hidden_states``."""
        with self._no_autocast():
            return super().hidden_states(*args, **options)

    def head(self, h: Tensor) -> Tensor:
        """See ``OPT.head``."""
        with self._no_autocast():
            return super().head(h)

    def _no_autocast(self) -> AbstractContextManager[Any]:
        """Weights have their dtype for good, so autocast changes nothing."""
        is_on = torch.is_autocast_enabled(self.device.type)
        return torch.autocast(self.device.type, enabled=False) if is_on else nullcontext()

    def read_weight(self, name: str) -> Tensor:
        """See ``InferenceOPT.read_weight``."""
        if not name.startswith("layers."):
            return super().read_weight(name)
        _, index, rest = name.split(".", 2)
        layer = self.layers[int(index)] if int(index) < len(self.layers) else None
        if not isinstance(layer, FastLayer):
            refuse("and others took the place of its layers, so their weights cannot be read")
        if rest.endswith(int4.SHAPE):
            return torch.tensor(parameter_shapes(self.config)[name.removesuffix(int4.SHAPE)])
        return layer.read_weight(rest)


def check(options: LoadOptions) -> None:
    """Refuses nothing: all options go with this form."""


def build(checkpoint: Checkpoint, options: LoadOptions) -> FastOPT:
    """The fast model of a checkpoint, for ``minopt.load``.

    Raises:
        ValueError: if it does not fit into memory.
    """
    in_int4 = kept_in_int4(checkpoint, options)
    check_fits(checkpoint, options, group=None if in_int4 is None else in_int4[0])
    return FastOPT(checkpoint.config, weights_of(checkpoint, options, in_int4=in_int4))


def weights_of(
    checkpoint: Checkpoint,
    options: LoadOptions,
    share: Share | None = None,
    in_int4: tuple[int, torch.dtype] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights that a ``FastOPT`` is built of, or one process' share of them; ``in_int4``: see ``read_weights``."""
    if options.held:  # and the stored head has been compared with the table when that was read
        rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in options.held}
        checkpoint = replace(checkpoint, tensors=rest, heads=())
    read = read_weights(
        checkpoint,
        options.device,
        options.dtype,
        apart=packs(options.dtype),
        keep_int8=True,
        quantize=None if in_int4 else options.quantize,
        in_int4=in_int4,
        share=share,
    )
    return chain(options.held.items(), read)


class _Builder:
    """Takes weights as they come, and makes products and norms of them."""

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], config: OPTConfig, summed: Callable[[Product], Product]
    ) -> None:
        self._coming, self._waiting = iter(weights), dict[str, Tensor]()
        self._config, self.summed, self.outliers = config, summed, config.hidden_size >= OUTLIERS_FROM
        self.in_int8 = False  # whether the layers' weights are
        self.in_int4: tuple[int, torch.dtype] | None = None  # or else their groups of inputs and scales' dtype

    def take(self, name: str) -> Tensor:
        while name not in self._waiting:
            key, tensor = next(self._coming)
            self._waiting[key] = tensor
        return self._waiting.pop(name)

    def rest(self) -> dict[str, Tensor]:
        return self._waiting | dict(self._coming)

    def __call__(self, prefix: str, names: tuple[str, ...], activation: str = "none", behind: str = "none") -> Product:
        """The product of one linear layer, or of several side by side that have the same input.

        ``activation`` comes after it; ``behind`` is the one before it.
        """
        weight = self._joined(f"{prefix}{name}.weight" for name in names)
        scale = bias = None
        if weight.dtype in (torch.int8, torch.int32):
            scale = self._joined(f"{prefix}{name}.weight{int8.SCALE}" for name in names)
        if self._config.enable_bias:
            bias = self._joined(f"{prefix}{name}.bias" for name in names)
        if scale is not None and weight.dtype == torch.int32:
            self.in_int4 = weight.shape[1] * int4.IN_A_WORD // scale.shape[1], scale.dtype
            return Int4(weight, scale, bias, activation)
        self.in_int8 = scale is not None
        product = build_product(weight, bias, activation, scale=scale, outliers=self.outliers)
        return for_zeros(product, weight) if behind == "relu" else product

    def norm(self, name: str) -> partial[Tensor]:
        affine = self._config.layer_norm_elementwise_affine
        weight, bias = (self.take(f"{name}.{part}") if affine else None for part in ("weight", "bias"))
        return norm(self._config, weight, bias)

    def _joined(self, names: Iterable[str]) -> Tensor:
        tensors = [self.take(name) for name in names]
        if len(tensors) == 1:
            return tensors[0]
        rows, first = sum(map(len, tensors)), tensors[0]
        return torch.cat(tensors, out=empty((rows, *first.shape[1:]), first.dtype, first.device))


class FastLayer(Frozen):
    """``DecoderLayer`` with four products: query, key and value are one.

    Products and norms are plain callables in attributes, not modules: the weights have just gone through all caches, so
    that a call or a lookup that takes a microsecond elsewhere takes five here.
    """

    def __init__(self, config: OPTConfig, index: int, build: _Builder) -> None:
        super().__init__()
        prefix = f"layers.{index}."
        self.index, self.norm_before = index, config.do_layer_norm_before
        self.head_dim, self._scale = config.head_dim, config.head_dim**-0.5
        self._qkv = build(f"{prefix}self_attn.", _PROJECTIONS)
        self._out = build.summed(build(f"{prefix}self_attn.", ("out_proj",)))
        self._fc1 = build(prefix, ("fc1",), config.activation_function)
        self._fc2 = build.summed(build(prefix, ("fc2",), behind=config.activation_function))
        self._norms = {name: build.norm(prefix + name) for name in _NORMS}
        self._attn_norm, self._final_norm = self._norms.values()

    def forward(
        self, x: Tensor, mask: Tensor | Packed | None = None, cache: KVCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """See ``DecoderLayer.forward``."""
        B, T, _ = x.shape
        y = self._qkv(self._attn_norm(x) if self.norm_before else x)
        q, k, v = y.view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, D]
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        y = attend(q, k, v, mask, scale=self._scale).transpose(1, 2).reshape(B, T, -1)
        x = pick(x, wanted) + self._out(pick(y, wanted))
        if not self.norm_before:
            x = self._attn_norm(x)
        x = x + self._fc2(self._fc1(self._final_norm(x) if self.norm_before else x))
        return x if self.norm_before else self._final_norm(x)

    def read_weight(self, name: str) -> Tensor:
        """A weight by its name in a ``DecoderLayer``, or the scale of one."""
        module, _, part = name.rpartition(".")
        if module in self._norms:
            tensor = self._norms[module].keywords[part]
        else:
            of_three = module.removeprefix("self_attn.")
            product = {"self_attn.out_proj": self._out, "fc1": self._fc1, "fc2": self._fc2}.get(module, self._qkv)
            tensor = product.bias if part == "bias" else product.weight()[part.endswith(int8.SCALE)]
            if tensor is not None and of_three in _PROJECTIONS:
                tensor = tensor.chunk(3)[_PROJECTIONS.index(of_three)]
        assert isinstance(tensor, Tensor)
        return tensor

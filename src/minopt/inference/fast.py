"""An OPT for inference alone: the same function, its weights in the form that a step reads fastest.

Shapes: B batch, T tokens this call, S cached + T, H heads, D head_dim, C hidden_size, E word_embed_proj_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minopt import int8
from minopt.cache import KVCache
from minopt.config import OPTConfig
from minopt.inference.products import Product, build_product
from minopt.model import OPT, Embedding, Packed, attend

# From this width on (6.7B), OPT's activations have outlier channels that int8 cannot hold: arXiv 2208.07339, table 4.
OUTLIERS_FROM = 4096

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FastOPT(OPT):
    """An OPT that cannot be trained, moved or cast, and is fast.

    It has all methods of ``OPT``. ``state_dict`` gives the plain weights, to the bit; beside them no copy is kept but
    the head's, which the token table cannot serve in another layout.

    Args:
        config: shape and options.
        state: an OPT's weights by name; taken out of it one after the other, so that a weight that nobody else
            holds is freed as soon as it is packed. The layers' weights may be int8, with scales under
            ``minopt.int8``'s names; the head becomes int8 then too.
    """

    def __init__(self, config: OPTConfig, state: dict[str, Tensor]) -> None:
        super().__init__(config, device="meta", dtype=state["embed_tokens.weight"].dtype)
        self._order = {name: number for number, name in enumerate(super().state_dict())}
        rows, width = state["embed_tokens.weight"].shape  # all of it, or a share
        self.embed_tokens = Embedding(rows, width, device="meta")
        in_int8 = any(name.endswith(int8.SCALE) for name in state)
        build = _Builder(state, config)
        self.layers = nn.ModuleList(FastLayer(config, index, build) for index in range(config.num_hidden_layers))
        self.load_state_dict(state, assign=True)
        for _, parameter in nn.Module.named_parameters(self):
            parameter.requires_grad = False
        self.eval()
        table = self.embed_tokens.weight
        weight, scale = int8.quantize(table) if in_int8 else (table, None)
        self._head = build_product(weight, None, scale=scale, outliers=build.outliers)

    def head(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., E]``."""
        return self._head(h)

    def state_dict(self, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of an ``OPT``, int8 ones with their scales; options are those of ``nn.Module.state_dict``."""
        state, prefix = super().state_dict(**options), options.get("prefix", "")
        for layer in self.layers:
            assert isinstance(layer, FastLayer)
            state.update((prefix + name, tensor) for name, tensor in layer.tensors().items())
        for name in sorted(state, key=lambda n: self._order.get(n.removeprefix(prefix).removesuffix(int8.SCALE), -1)):
            state[name] = state.pop(name)  # in an OPT's order
        return state

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of an ``OPT``: copies, where this model has them in another layout."""
        for name, tensor in self.state_dict().items():
            yield f"{prefix}.{name}" if prefix else name, nn.Parameter(tensor, requires_grad=False)

    def _apply(self, *args: Any, **options: Any) -> Any:
        raise ValueError(
            "model: made for inference, it cannot be moved or cast. Say device and dtype when loading, or "
            "optimize=False."
        )

    def train(self, mode: bool = True) -> FastOPT:
        """Refuses to be trained."""
        if mode:
            raise ValueError("model: made for inference, it cannot be trained. Load it with optimize=False.")
        return super().train(False)


class _Builder:
    """Takes weights out of a state and makes products of them."""

    def __init__(self, state: dict[str, Tensor], config: OPTConfig) -> None:
        self.state, self.outliers = state, config.hidden_size >= OUTLIERS_FROM

    def __call__(self, prefix: str, names: tuple[str, ...], activation: str = "none") -> Product:
        """Of one linear layer, or of several that read the same, side by side."""
        weights = [self.state.pop(f"{prefix}{name}.weight") for name in names]
        scales = [self.state.pop(f"{prefix}{name}.weight{int8.SCALE}", None) for name in names]
        biases = [self.state.pop(f"{prefix}{name}.bias", None) for name in names]
        weight, scale, bias = (_joined(tensors) for tensors in (weights, scales, biases))
        assert weight is not None
        return build_product(weight, bias, activation, scale=scale, outliers=self.outliers)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if len(given) > 1 else given[0] if given else None


class FastLayer(nn.Module):
    """``DecoderLayer`` with four products: query, key and value are one."""

    def __init__(self, config: OPTConfig, index: int, build: Callable[..., Product]) -> None:
        super().__init__()
        self.index, self.prefix, self.norm_before = index, f"layers.{index}.", config.do_layer_norm_before
        self.head_dim = config.head_dim
        C, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.self_attn_layer_norm = nn.LayerNorm(C, elementwise_affine=affine, device="meta")
        self.final_layer_norm = nn.LayerNorm(C, elementwise_affine=affine, device="meta")
        self._qkv = build(f"{self.prefix}self_attn.", _PROJECTIONS)
        self._out = build(f"{self.prefix}self_attn.", ("out_proj",))
        self._fc1 = build(self.prefix, ("fc1",), config.activation_function)
        self._fc2 = build(self.prefix, ("fc2",))

    def forward(self, x: Tensor, mask: Tensor | Packed | None = None, cache: KVCache | None = None) -> Tensor:
        """As ``DecoderLayer``'s."""
        B, T, _ = x.shape
        y = self._qkv(self.self_attn_layer_norm(x) if self.norm_before else x)
        q, k, v = y.view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, D]
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        x = x + self._out(attend(q, k, v, mask, scale=self.head_dim**-0.5).transpose(1, 2).reshape(B, T, -1))
        if not self.norm_before:
            x = self.self_attn_layer_norm(x)
        x = x + self._fc2(self._fc1(self.final_layer_norm(x) if self.norm_before else x))
        return x if self.norm_before else self.final_layer_norm(x)

    def tensors(self) -> dict[str, Tensor]:
        """The weights of a ``DecoderLayer`` but for its norms, by their names in an OPT."""
        found: dict[str, Tensor] = {}
        for prefix, names, product in (
            ("self_attn.", _PROJECTIONS, self._qkv),
            ("self_attn.", ("out_proj",), self._out),
            ("", ("fc1",), self._fc1),
            ("", ("fc2",), self._fc2),
        ):
            weight, scale = product.weight()
            for part, tensor in (("weight", weight), ("weight" + int8.SCALE, scale), ("bias", product.bias)):
                if tensor is not None:
                    pieces = tensor.chunk(len(names))
                    found |= {f"{self.prefix}{prefix}{n}.{part}": t for n, t in zip(names, pieces, strict=True)}
        return found

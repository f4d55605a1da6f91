"""The OPT decoder (Zhang et al. 2022, arXiv 2205.01068): ids in, logits out.

Shapes: B batch, T tokens this call, S cached + T, H heads, D head_dim, C hidden_size, E word_embed_proj_dim,
F ffn_dim, V vocab_size, L layers.

Parameters carry the names of the published state dict without its ``model.decoder.``. There is no ``lm_head``
parameter: the head is the token table, so that the two cannot come apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from minopt.attention import attend
from minopt.cache import KVCache
from minopt.config import OPTConfig
from minopt.masks import Packed, causal_mask, pick, positions

# Rows 0 and 1 of the position table belong to no token: fairseq, where OPT was trained, counts positions
# from padding_idx + 1 = 2 and gives padding row 1 (metaseq, utils.make_positions).
POSITION_OFFSET = 2


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _linear(x: Tensor) -> Tensor:
    return x


# Published models have the first two; the others are what transformers computes under these names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_python": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
                    partial(F.gelu, approximate="tanh")),
    "quick_gelu": _quick_gelu, "silu": F.silu, "swish": F.silu, "relu2": _squared_relu, "relu6": F.relu6,
    "leaky_relu": F.leaky_relu, "hardswish": F.hardswish, "mish": F.mish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "linear": _linear,
}  # fmt: skip


class _Unfilled(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def _linear_layer(
    inputs: int, outputs: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """An ``nn.Linear`` left unfilled: OPT draws all weights itself, and loading replaces them anyway.

    Its type is exactly that, by which other programs find the layers to quantise or prune.
    """
    layer: nn.Linear = _Unfilled(inputs, outputs, bias, device, dtype)
    layer.__class__ = nn.Linear
    return layer


class Embedding(nn.Embedding):
    """``nn.Embedding`` left unfilled, as linear layers are. Given floats, it is the head: a product with the table."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_meta and not x.is_meta:  # torch would give whatever the memory holds
            raise ValueError(
                f"model: expected weights with numbers, got some on the meta device under input on {x.device}. Load "
                "the model with minopt.load, whose option offload keeps weights elsewhere."
            )
        if hasattr(self.weight, "full_tensor") and not hasattr(x, "full_tensor"):
            raise ValueError(
                "model: expected whole weights, got FSDP's shards outside of the model's own call. Call model(...), or "
                "first model.unshard()."
            )
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


def _norm(config: OPTConfig) -> partial[nn.LayerNorm]:
    return partial(nn.LayerNorm, config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: OPTConfig, index: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.index, self.head_dim, self.dropout = index, config.head_dim, config.attention_dropout
        C, bias = config.hidden_size, config.enable_bias
        self.k_proj = _linear_layer(C, C, bias, device, dtype)
        self.v_proj = _linear_layer(C, C, bias, device, dtype)
        self.q_proj = _linear_layer(C, C, bias, device, dtype)
        self.out_proj = _linear_layer(C, C, bias, device, dtype)

    def forward(
        self, x: Tensor, mask: Tensor | Packed | None, cache: KVCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        # The query is scaled before the product, as in training: q @ k alone can overflow float16.
        q = (self.q_proj(x) * self.head_dim**-0.5).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # [B, H, S, D]
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(pick(attend(q, k, v, mask, dropout).transpose(1, 2).reshape(B, T, -1), wanted))


def _dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``F.dropout``; on a CPU, which draws in one thread, of 16 random bits a number: in a fifth of the time.

    p is rounded to 1/65,536 then, and what is kept is scaled by what it was rounded to.
    """
    dropped = round(p * 2**16)
    if not (training and 0 < dropped < 2**16 and x.device.type == "cpu") or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def _has_hooks(*modules: nn.Module | None) -> bool:
    """Whether somebody watches a forward pass of modules or of their parts, or of all modules."""
    parts = (part for module in modules if module is not None for part in module.modules())
    is_any = _has_any_global_hook()  # type: ignore[no-untyped-call]
    return is_any or any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on a residual stream normalised before (or, in 350m, after) it.

    ``final_layer_norm`` is the published name of the norm around the feed-forward; the decoder has another
    module of that name, after the last layer.
    """

    def __init__(self, config: OPTConfig, index: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.norm_before, self.dropout = config.do_layer_norm_before, config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        C, bias, norm = config.hidden_size, config.enable_bias, _norm(config)
        self.self_attn = Attention(config, index, device, dtype)
        self.self_attn_layer_norm = norm(device=device, dtype=dtype)
        self.fc1 = _linear_layer(C, config.ffn_dim, bias, device, dtype)
        self.fc2 = _linear_layer(config.ffn_dim, C, bias, device, dtype)
        self.final_layer_norm = norm(device=device, dtype=dtype)

    def forward(
        self, x: Tensor, mask: Tensor | Packed | None = None, cache: KVCache | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Maps the residual stream ``[B, T, C]`` to ``[B, T, C]``, and writes the cache at the layer's own index.

        ``mask`` is ``None`` where ``causal_mask`` gives none; else boolean ``[B or 1, 1, T, S]``, True = attend; or the
        ``Packed`` texts of one row. ``wanted`` is for the last layer: it gives these positions alone, ``[N, C]``.
        """
        y = self.self_attn(self.self_attn_layer_norm(x) if self.norm_before else x, mask, cache, wanted)
        x = pick(x, wanted) + _dropout(y, self.dropout, self.training)
        if not self.norm_before:
            x = self.self_attn_layer_norm(x)
        y = self.fc2(self.activation(self.fc1(self.final_layer_norm(x) if self.norm_before else x)))
        x = x + _dropout(y, self.dropout, self.training)
        return x if self.norm_before else self.final_layer_norm(x)


class OPT(nn.Module):
    """An OPT decoder with its tied head. It is a ``Decoder`` (generation/decoder.py), which all of generation drives.

    Args:
        config: shape and options.
        device: where to build it. On ``"meta"`` nothing is allocated or drawn; elsewhere the weights are
            drawn as for training from scratch (``reset_parameters``).
        dtype: the parameters' dtype; ``None`` is torch's default.
    """

    max_batch: int | None = None  # any number of rows
    in_8_bits = False

    def __init__(
        self, config: OPTConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        C, E, rows = config.hidden_size, config.embed_dim, config.max_position_embeddings + POSITION_OFFSET
        # A padding_idx as in fairseq and transformers: looking its row up gives it no gradient, the head does.
        self.embed_tokens = Embedding(config.vocab_size, E, config.pad_token_id, device=device, dtype=dtype)
        self.embed_positions = Embedding(rows, C, device=device, dtype=dtype)
        self.project_in = _linear_layer(E, C, False, device, dtype) if E != C else None
        self.layers = nn.ModuleList(DecoderLayer(config, i, device, dtype) for i in range(config.num_hidden_layers))
        self.final_layer_norm = _norm(config)(device=device, dtype=dtype) if config.has_final_layer_norm else None
        self.project_out = _linear_layer(C, E, False, device, dtype) if E != C else None
        if not self.embed_tokens.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial weights of arXiv 2205.01068, section 2.2.

        Normal with standard deviation ``config.init_std`` (0.006 there), divided by ``sqrt(2 L)`` for the two
        linear layers that write to the residual stream; biases 0; norms 1 and 0; the padding row 0.
        """
        std, L = self.config.init_std, self.config.num_hidden_layers
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = name.endswith((".out_proj", ".fc2"))
                nn.init.normal_(module.weight, std=std / (2 * L) ** 0.5 if writes_residual else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.config.pad_token_id is not None:
            self.embed_tokens.weight[self.config.pad_token_id].zero_()

    def as_opt(self) -> OPT:
        """The model itself: it has weights."""
        return self

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Packed | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Scores the next token at each position: ``head(hidden_states(...))``.

        Args:
            logits_to_keep: only the last that many positions get logits; 0 means all.
            input_ids, attention_mask, position_ids, cache, inputs_embeds: see ``hidden_states``.

        Returns:
            Logits ``[B, T or logits_to_keep, V]`` in the model's dtype.

        Raises:
            ValueError: as ``hidden_states`` does, or if ``logits_to_keep`` is negative.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected 0 (all) or more, got {logits_to_keep}.")
        h = self.hidden_states(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        if logits_to_keep:
            # Of a view, F.linear would make a batch of products, with a copy of the token table for each row.
            h = h[:, -logits_to_keep:].clone(memory_format=torch.contiguous_format)
        return self.head(h)

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Packed | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Runs the decoder without its head.

        Args:
            input_ids: ``[B, T]`` integer ids.
            attention_mask: which of the S tokens (cached ones included) are real: ``[B, S]``, 1 or True = real.
                ``None`` says that none is padding, and is the fast path. Positions count real tokens only, so
                that a padded row gives what it gives alone. A boolean ``[B, 1, T, S]`` is used as it is.
                ``Packed`` says that the one row holds several texts; positions begin anew in each.
                Where the cache has ``slots``, S is its window, and position_ids and a mask ``[B, 1, T, S]`` have to be
                given: booleans, or numbers that are added to the scores.
            position_ids: ``[B, T]`` or ``[T]``, from 0 and below ``max_position_embeddings`` (not checked: reading
                them would wait for a GPU); derived from ``attention_mask`` if ``None``.
            cache: filled tokens to go on from; the new ones are appended to it.
            inputs_embeds: floats ``[B, T, E]`` in place of ``input_ids`` and of their embeddings: soft prompts, or what
                another model has made of an image. Positions are added to them as to tokens.
            wanted: ``[N]`` tokens, counted through all rows: the only ones computed behind the last layer's attention.

        Returns:
            ``[B, T, E]``, or ``[N, E]`` of those wanted, in the model's dtype, ready for ``head``. Rows of padding
            hold finite numbers without a meaning.

        Raises:
            ValueError: if cached and new tokens exceed the cache or the position table, or shapes do not fit;
                nothing has run or been written then.
        """
        past = 0 if cache is None else cache.length
        given = self._check_shapes(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        T = given.shape[1]
        if position_ids is None:
            position_ids = positions(attention_mask, past, T, given.device)
        mask = attention_mask
        if not (isinstance(mask, Packed) or (mask is not None and mask.ndim == 4)):
            mask = causal_mask(mask, past, T, past + T, given.device)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(position_ids + POSITION_OFFSET)  # [B, T, C]
        for index, layer in enumerate(self.layers, 1):
            if self.training and self.config.layerdrop > 0 and torch.rand(()) < self.config.layerdrop:
                continue
            x = layer(x, mask, cache, wanted if index == len(self.layers) else None)
        if x.ndim == 3:  # the last layer was dropped
            x = pick(x, wanted)
        if cache is not None and cache.slots is None:
            cache.length += T
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., E]``: the product with the token table."""
        if isinstance(self.embed_tokens, Embedding):
            # Not called as a module: its hooks expect embeddings as the result. Programs that keep weights elsewhere
            # (accelerate) replace forward itself, and fetch the table in it. FSDP2 has sharded it again.
            table: Any = self.embed_tokens
            is_sharded = hasattr(table, "unshard")
            if is_sharded:
                table.unshard()
            logits: Tensor = table.forward(h)
            if is_sharded and not torch.is_grad_enabled():  # else the backward pass needs it, and shards it then
                table.reshard()
            return logits
        return F.linear(h, self.embed_tokens.weight)  # an adapter is in its place, and acts on embeddings alone

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``batch_size`` rows of up to ``capacity`` tokens, in the model's dtype and place."""
        return KVCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

    def read(
        self, inputs: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See ``Decoder.read``."""
        ids, embeds = (None, inputs) if inputs.is_floating_point() else (inputs, None)
        # Hooks in the last layer and behind it see every token, as those in the others do.
        behind = (*[*self.layers][-1:], self.final_layer_norm, self.project_out)
        watched = wanted is not None and _has_hooks(*behind)
        h = self.hidden_states(ids, mask, position_ids, cache, embeds, None if watched else wanted)
        return self.head((pick(h, wanted) if h.ndim == 3 else h).flatten(0, -2))  # of [N, E]

    def agreed(self, decision: Tensor) -> Tensor:
        """See ``Decoder.agreed``."""
        return decision

    def _check_shapes(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | Packed | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """The ids, or what is given in their place; ``ValueError`` if shapes do not fit together."""
        given, E = input_ids if inputs_embeds is None else inputs_embeds, self.config.embed_dim
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"input_ids, inputs_embeds: expected one, got {'none' if given is None else 'both'}.")
        if input_ids is not None and (input_ids.ndim != 2 or 0 in input_ids.shape):
            raise ValueError(f"input_ids: expected [batch, tokens], at least one of each, got {list(input_ids.shape)}.")
        if inputs_embeds is not None and (given.ndim != 3 or 0 in given.shape or given.shape[2] != E):
            raise ValueError(f"inputs_embeds: expected [batch, tokens, {E}], got {list(given.shape)}.")
        B, T = given.shape[:2]
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"cache: made for {cache.batch_size} rows, got input_ids of {B}.")
        length = 0 if cache is None else cache.length
        by_slots = cache is not None and cache.slots is not None
        S = cache.window if cache is not None and by_slots else length + T
        if cache is not None and S > (most := cache.capacity):
            what = f"cache: {length} tokens cached + {T} new = {S}, its capacity is {most}"
            raise ValueError(f"{what}. Make it larger, or feed less.")
        if isinstance(mask, Packed):
            if B != 1 or cache is not None or sum(mask.lengths) != T or min(mask.lengths) < 1:
                raise ValueError(
                    f"attention_mask: expected one row without a cache, as long as the packed texts together, got "
                    f"{[B, T]} ids and texts of {list(mask.lengths)}."
                )
            S, mask = max(mask.lengths), None
        is_whole = mask is not None and mask.ndim == 4  # says all about which token attends to which
        expected = ([B, 1, T, S], [1, 1, T, S]) if is_whole else ([B, S],)
        if mask is not None and list(mask.shape) not in expected:
            raise ValueError(f"attention_mask: expected {expected[0]} (cached and new tokens), got {list(mask.shape)}.")
        if mask is not None and is_whole and mask.dtype != torch.bool and not by_slots:
            raise ValueError(
                f"attention_mask: expected booleans where it has 4 dims (True = attend), got {mask.dtype}."
            )
        if position_ids is not None and list(position_ids.shape) not in ([B, T], [T]):
            raise ValueError(f"position_ids: expected {[B, T]} or {[T]}, got {list(position_ids.shape)}.")
        limit = self.config.max_position_embeddings
        if position_ids is None and S > limit:
            # Padding takes no position; counting it synchronises a GPU, so only where it can matter.
            longest = S if mask is None or is_whole else int(mask.sum(1).max())
            if longest > limit:
                what = f"input_ids: {length} tokens cached + {T} new = {longest} positions, the model has {limit}"
                raise ValueError(f"{what}. Shorten the input.")
        return given

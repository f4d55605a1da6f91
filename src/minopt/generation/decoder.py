"""``Decoder``, the interface that generation and scoring drive; and decoders that draft for others."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.config import OPTConfig
from minopt.generation.options import GenerationConfig
from minopt.model import OPT
from minopt.wrapped import decoder_of

logger = logging.getLogger(__name__)

_LAYER_BYTES = 6_000_000  # measured: steps of 4 layers of 256 units, and of 12 of 768, in three dtypes


class Decoder(Protocol):
    """The interface that generation and scoring drive. All forms have it: plain, fast, divided, programs."""

    config: OPTConfig
    max_batch: int | None
    """The most rows at once; ``None`` is any number."""
    in_8_bits: bool
    """Whether a step takes as long as if the layers' weights were in int8, or less."""

    @property
    def device(self) -> torch.device:
        """The device on which ids must be."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""

    def as_opt(self) -> OPT:
        """The model with its weights; ``ValueError`` where there are none."""

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``batch_size`` rows of up to ``capacity`` tokens."""

    def read(
        self, inputs: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Reads tokens into the cache.

        Args:
            inputs: ids, int64 ``[B, T]``; or embeddings in the decoder's dtype, ``[B, T, E]``.
            position_ids: int64 ``[B, T]``. Nothing but padding has a position below 0.
            mask: boolean ``[B or 1, 1, T, S]``, True = attend; S is the number of cached tokens, new ones included.
                ``None``: a token attends to all cached ones, to itself, and to those before it in this call.
            wanted: int64 ``[N]``, the tokens after which logits are wanted, counted through all rows: 0 to
                ``B * T - 1``. ``None`` is all of them.
            cache: a cache of B rows.

        Returns:
            Logits ``[N, V]``. They hold until the next call.

        Raises:
            ValueError: if the decoder reads no embeddings (an exported program).
        """

    def agreed(self, decision: Tensor) -> Tensor:
        """The first process' decision if a model is divided among processes; else the tensor itself."""


@dataclass(frozen=True)
class Draft:
    """A model that says how a text may go on, which another one checks.

    Attributes:
        decoder: the model.
        shares_cache: its weights are those of the other one, rounded to 8 bits: it reads and writes the other's cache.
    """

    decoder: Decoder
    shares_cache: bool = False

    def cost_for(self, other: Decoder) -> float:
        """The time of its step as a share of the other's: a step reads all weights once, and calls operators.

        While it calls those of a layer, memory would give ``_LAYER_BYTES`` more; int8 has a quarter more operators.
        """
        times = []
        for decoder in (self.decoder, other):
            itemsize, calls = (1, 1.25) if decoder.in_8_bits else (decoder.dtype.itemsize, 1.0)
            times.append(size_of(decoder) * itemsize + calls * decoder.config.num_hidden_layers * _LAYER_BYTES)
        return times[0] / times[1]


def size_of(decoder: Decoder) -> int:
    """The numbers that a step reads, but for a few."""
    c = decoder.config
    return c.num_hidden_layers * c.hidden_size * (4 * c.hidden_size + 2 * c.ffn_dim) + c.vocab_size * c.embed_dim


def checked_draft(
    draft: Any, decoder: Decoder, config: GenerationConfig, rows: int, longest: int, has_embeds: bool
) -> Draft:
    """The draft that a call gives, checked: a model, or a ``Draft``."""
    try:
        draft = draft if isinstance(draft, Draft) else Draft(decoder_of(draft))
    except ValueError as error:
        raise ValueError(str(error).replace("model:", "draft:", 1)) from None
    model, needed = draft.decoder.config, longest + config.max_new_tokens
    positions, most = model.max_position_embeddings, draft.decoder.max_batch
    problem = ""
    if has_embeds:
        problem = "expected a prompt of ids, got inputs_embeds, which are the model's alone. Leave the draft out"
    elif config.num_beams > 1:
        problem = f"expected greedy decoding or sampling, got num_beams {config.num_beams}. Leave out one of them"
    elif config.prompt_lookup_num_tokens is not None:
        problem = "expected one source of drafts, got prompt_lookup_num_tokens too. Leave out one of them"
    elif model.vocab_size != decoder.config.vocab_size:
        problem = f"expected the model's vocabulary of {decoder.config.vocab_size} tokens, got {model.vocab_size}. "
        problem += "Take a model that was trained with the same tokenizer"
    elif draft.decoder.device != decoder.device:
        problem = f"expected it on {decoder.device}, where the model is, got {draft.decoder.device}. Load it there"
    elif positions < needed:
        problem = f"expected at least {needed} positions, for prompt and new tokens, got {positions}. Ask for fewer "
        problem += "tokens, or leave the draft out"
    elif most is not None and rows > most:
        problem = f"expected at most {most} rows, for which its program was exported, got {rows}. Run fewer at once"
    if problem:
        raise ValueError(f"draft: {problem}.")
    if size_of(draft.decoder) > size_of(decoder):
        logger.warning("draft: is larger than the model, so that each token takes longer than without a draft.")
    return draft

"""Decoders without a model, which check what they are told: positions, masks, and the room in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minopt import OPTConfig
from tests.conftest import SIZE

V = SIZE["vocab_size"]


@dataclass
class Slots:
    """A cache that keeps the tokens themselves, ``[rows, slots]``, and which of them are no padding."""

    tokens: Tensor
    real: Tensor
    capacity: int
    reads: int = 0
    copies: int = 1
    compacted: int = 0

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def rows(self, begin: int, count: int) -> Slots:
        end = begin + count
        return Slots(self.tokens[begin:end], self.real[begin:end], self.capacity)

    def repeat_rows(self, first: Slots) -> None:
        self.copies, self.reads = len(self.tokens) // len(first.tokens), first.reads
        self.tokens, self.real = (t.repeat_interleave(self.copies, 0) for t in (first.tokens, first.real))

    def compact(self, start: int, slots: Tensor) -> None:
        self.compacted += 1
        assert slots.shape[1] < self.length - start
        self.tokens, self.real = (
            torch.cat([t[:, :start], t[:, start:].gather(1, slots)], 1) for t in (self.tokens, self.real)
        )

    def truncate(self, length: int) -> None:
        assert length < self.length
        self.tokens, self.real = self.tokens[:, :length], self.real[:, :length]


@dataclass(frozen=True)
class Read:
    """What one call was told."""

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    wanted: Tensor | None


class Fake:
    """A decoder whose logits follow from the tokens that a token attends to.

    Args:
        logits: maps these tokens to ``[V]``.
        config: of the model that it stands for.
    """

    device, dtype = torch.device("cpu"), torch.float32
    max_batch, in_8_bits = None, False

    def __init__(self, logits: Callable[[Sequence[int]], Tensor], **config: Any) -> None:
        self.logits = logits
        self.config = OPTConfig(**(SIZE | config))
        self.reads: list[Read] = []
        self.caches: list[Slots] = []

    @property
    def calls(self) -> int:
        return len(self.reads) + len(self.caches)

    def agreed(self, decision: Tensor) -> Tensor:
        return decision

    def logprobs(self, past: Sequence[int]) -> Tensor:
        return self.logits(past).log_softmax(0)

    def new_cache(self, batch_size: int, capacity: int) -> Any:
        nothing = torch.zeros(batch_size, 0, dtype=torch.long)
        self.caches.append(Slots(nothing, nothing.bool(), capacity))
        return self.caches[-1]

    def read(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: Slots
    ) -> Tensor:
        self.reads.append(Read(input_ids, position_ids, mask, wanted))
        cache.reads += 1
        (B, T), real = input_ids.shape, position_ids >= 0
        assert position_ids.shape == (B, T)
        cache.tokens, cache.real = torch.cat([cache.tokens, input_ids], 1), torch.cat([cache.real, real], 1)
        S = cache.length
        assert S <= cache.capacity
        causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        if mask is None:
            assert cache.real.all()
            seen = causal.expand(B, T, S)
        else:
            assert (mask.dtype, mask.shape[1:]) == (torch.bool, (1, T, S))
            seen = mask[:, 0].expand(B, T, S)
            assert not (seen & ~causal).any()  # no token sees what comes behind it
            assert not (seen & ~cache.real[:, None])[real].any()  # nor padding
            assert seen.diagonal(S - T, 1, 2).all()  # but itself
        assert torch.equal(position_ids[real], seen.sum(-1)[real] - 1)
        every = [(row, t) for row in range(B) for t in range(T)]
        chosen = every if wanted is None else [every[i] for i in wanted]
        return torch.stack([self.say(row, cache.tokens[row][seen[row, t]].tolist(), cache) for row, t in chosen])

    def say(self, row: int, past: list[int], cache: Slots) -> Tensor:
        return self.logits(past)


class Script(Fake):
    """A decoder that says what is written, ``[N, B, V]``."""

    def __init__(self, written: Tensor, **config: Any) -> None:
        super().__init__(lambda past: written[0, 0], vocab_size=written.shape[-1], **config)
        self.written = written

    def say(self, row: int, past: list[int], cache: Slots) -> Tensor:
        return self.written[cache.reads - 1, row // cache.copies]


def say(rows: list[list[int]], vocab_size: int = V, **config: Any) -> Script:
    """A decoder whose most probable tokens are those of ``rows``."""
    return Script(5.0 * torch.nn.functional.one_hot(torch.tensor(rows).T, vocab_size), **config)


class Table(Fake):
    """A decoder whose logits depend on the last token only: row ``token`` of a ``[V, V]``."""

    def __init__(self, table: Tensor, **config: Any) -> None:
        super().__init__(lambda past: table[past[-1]], **({"vocab_size": len(table), "eos_token_id": None} | config))
        self.table = table


class Watched:
    """A decoder inside of which another does the work; says what it is asked, and where it is, if told so."""

    def __init__(self, decoder: Any, device: str | None = None) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.device = decoder.device if device is None else torch.device(device)
        self.reads: list[Read] = []

    def read(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: Any
    ) -> Tensor:
        self.reads.append(Read(input_ids, position_ids, mask, wanted))
        logits: Tensor = self.decoder.read(input_ids, position_ids, mask, wanted, cache)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

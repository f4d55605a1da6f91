"""Which examples a step sees, and how they lie in a batch. The order follows from seed and step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from minopt.training.tokens import Tokens

_POOL = 50  # batches that are sorted by length together, where examples are grouped: as many as in transformers


def seed_of(*parts: int) -> int:
    """A seed that follows from some numbers: near ones give unlike seeds."""
    return int.from_bytes(hashlib.sha256(",".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Order:
    """The order in which examples are seen: each once an epoch, another order in each.

    Attributes:
        lengths: of the examples, in tokens.
        batch_size: examples of a step, of all processes together; the last step of an epoch may have fewer.
        seed: of the order.
        grouped: examples of like length share a step.
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int
    grouped: bool

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def examples(self, step: int) -> tuple[int, ...]:
        """Indices of the examples of a step, counted from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[at]

    def microbatches(self, step: int, count: int) -> list[list[int]]:
        """A step's examples dealt to ``count`` microbatches, about equally in examples and in tokens.

        Microbatches may differ by one example, and be empty where the step has fewer examples than ``count``.
        """
        longest_first = sorted(self.examples(step), key=lambda i: (-self.lengths[i], i))
        dealt: list[list[int]] = [[] for _ in range(count)]
        for at, index in enumerate(longest_first):
            turn, place = divmod(at, count)
            dealt[place if turn % 2 == 0 else count - 1 - place].append(index)  # back and forth
        return dealt


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed_of(order.seed, epoch))
    shuffled = torch.randperm(len(order.lengths), generator=generator).tolist()
    if not order.grouped:
        return _split(shuffled, order.batch_size)
    pools = _split(shuffled, order.batch_size * _POOL)
    batches = [b for pool in pools for b in _split(sorted(pool, key=lambda i: -order.lengths[i]), order.batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _split(items: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[at : at + size]) for at in range(0, len(items), size)]


@dataclass(frozen=True)
class Batch:
    """Rows as the model reads them.

    Attributes:
        input_ids: ``[R, T]``, int64: the last token of each example left out, since nothing follows it.
        lengths: of the texts that share the one row; ``None`` where each row is one text, padded behind its end, which
            causal attention never sees.
        at: where in ``input_ids``, flattened, a token that is learned comes next: ``[M]``.
        targets: those tokens, ``[M]``.
        tokens: real ones among ``input_ids``.
    """

    input_ids: Tensor
    lengths: tuple[int, ...] | None
    at: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.at, self.targets))
        input_ids, at, targets = moved
        return Batch(input_ids, self.lengths, at, targets, self.tokens)


def collate(tokens: Tokens, indices: Sequence[int], *, packed: bool) -> Batch:
    """Lays examples into one row, or into padded rows; rows of one length stay rows either way.

    Without any example it is a batch of one token from which nothing is learned, for a process that has none left.
    """
    rows = [tokens.row(i) for i in indices]
    if not rows:
        none = torch.zeros(0, dtype=torch.long)
        return Batch(torch.zeros(1, 1, dtype=torch.long), None, none, none, 0)
    lengths = [len(ids) - 1 for ids, _ in rows]
    in_one_row = packed and len(set(lengths)) > 1
    width = 0 if in_one_row else max(lengths)
    begins = [sum(lengths[:n]) if in_one_row else n * width for n in range(len(rows))]
    if in_one_row:
        input_ids = torch.cat([ids[:-1] for ids, _ in rows])[None]
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids, _ in rows], batch_first=True)
    at = torch.cat([torch.arange(b + s - 1, b + n) for b, n, (_, s) in zip(begins, lengths, rows, strict=True)])
    targets = torch.cat([ids[start:] for ids, start in rows])
    return Batch(input_ids, tuple(lengths) if in_one_row else None, at, targets, sum(lengths))

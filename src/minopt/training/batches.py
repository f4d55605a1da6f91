"""From examples to batches: examples as token ids, which of them a step sees, and how they lie in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from minopt.evaluation.tasks import seed_of
from minopt.progress import bar
from minopt.tokenizer import Tokenizer
from minopt.training.data import Example

_AT_ONCE = 1000  # examples that the tokenizer gets at once
_POOL = 50  # batches that are sorted by length together, where examples are grouped: as many as in transformers


class Row(NamedTuple):
    """An example as tokens."""

    ids: Tensor  # of the prompt and the completion, int32 [T]
    start: int  # the index of the first token that counts in the loss; at least 1


@dataclass
class Tokens:
    """The rows of some data, and how many examples did not fit."""

    rows: list[Row]
    cut_prompts: int = 0
    cut_completions: int = 0  # these end without an eos
    dropped: int = 0  # these have no row: too little of their prompt may be cut

    def learned(self, indices: Sequence[int]) -> int:
        """How many tokens of some rows count in the loss."""
        return sum(len(self.rows[i].ids) - self.rows[i].start for i in indices)

    def digest(self) -> str:
        """Names the content: the same for the same rows."""
        sha = hashlib.sha256()
        for ids, start in self.rows:
            sha.update(f"{len(ids)},{start};".encode() + ids.numpy().tobytes())
        return sha.hexdigest()[:40]


def tokenise(
    data: Sequence[Example] | str, tokenizer: Tokenizer, src_length: int, tgt_length: int, *,
    eos_token_id: int | None, bos_token_id: int | None = None, around_answer: bool,
) -> Tokens:  # fmt: skip
    """Encodes examples, or a text.

    A row is the prompt as ``Tokenizer.encode`` gives it, the completion, and an eos. A prompt that is too long loses
    tokens of its context; if it names none, its first tokens (but for the bos). A text becomes rows of
    ``src_length + tgt_length`` tokens and the one after them, of which all but the first count in the loss.

    Args:
        data: examples, or one text.
        tokenizer: the model's.
        src_length: the most tokens of a prompt, bos included.
        tgt_length: the most tokens of a completion, eos included.
        eos_token_id: the id that ends a completion; ``None`` adds none.
        bos_token_id: the prompt of an example that has no tokens in its prompt; ``None`` is the eos.
        around_answer: cut what is farthest from the answer, and drop examples that cannot be cut to length: for
            training. Otherwise cut the end of the context, as if the answer were not known, and drop nothing.
    """
    if isinstance(data, str):
        ids, width = torch.tensor(tokenizer.encode(data), dtype=torch.int32), src_length + tgt_length
        return Tokens([Row(ids[at : at + width + 1], 1) for at in range(0, len(ids) - 1, width)])
    eos = [] if eos_token_id is None else [eos_token_id]
    bos = eos or [0] if bos_token_id is None else [bos_token_id]
    tokens = Tokens([])
    with bar(len(data), "example", desc="tokenising", delay=1) as drawn:
        for at in range(0, len(data), _AT_ONCE):
            part = data[at : at + _AT_ONCE]
            prompts = tokenizer.encode_each([example.prompt for example in part])
            completions = tokenizer.encode_each([example.completion for example in part], add_bos=False)
            for example, prompt, completion in zip(part, prompts, completions, strict=True):
                # Without a bos of the tokenizer's, an empty prompt has no token: something has to come first.
                kept = prompt or bos
                if len(kept) > src_length:
                    kept = _cut(example, kept, tokenizer, src_length, around_answer)
                    tokens.cut_prompts += bool(kept)
                if not kept:
                    tokens.dropped += 1
                    continue
                completion = completion + eos
                tokens.cut_completions += len(completion) > tgt_length
                tokens.rows.append(Row(torch.tensor(kept + completion[:tgt_length], dtype=torch.int32), len(kept)))
            drawn.update(len(part))
    return tokens


def _cut(example: Example, ids: list[int], tokenizer: Tokenizer, src_length: int, around_answer: bool) -> list[int]:
    """A prompt in ``src_length`` tokens; an empty one if too little of it may be cut."""
    excess = len(ids) - src_length
    encoding = tokenizer.backend.encode(example.prompt)
    spans = encoding.offsets  # made anew at each access
    first = encoding.special_tokens_mask.index(0)  # after the bos
    begin, end = example.context
    begin = len(example.prompt[:begin].rstrip())  # a token may hold a space of the template and a first word
    context = [
        i for i in range(first, len(ids))
        if begin <= spans[i][0] and spans[i][1] <= end and _overlap(spans[i], example.context)
    ]  # fmt: skip
    answer = [i for i in context if _overlap(spans[i], example.answer)]
    if around_answer and example.context != (0, 0) and len(context) - len(answer) < excess:
        return []
    if len(context) < excess:
        return (ids[:first] + ids[first + excess :])[-src_length:]
    kept = len(context) - excess
    begin = context[0]
    if around_answer and answer:
        middle = (answer[0] + answer[-1] + 1 - kept) // 2
        begin = min(max(middle, context[0]), context[-1] + 1 - kept)
    return ids[: context[0]] + ids[begin : begin + kept] + ids[context[-1] + 1 :]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and a[1] > b[0]


@dataclass(frozen=True)
class Order:
    """The order in which examples are seen: each once an epoch, in another order each epoch.

    Attributes:
        lengths: the examples' lengths in tokens.
        batch_size: examples of a step, of all processes together; the last step of an epoch may have fewer.
        seed: the order's seed.
        grouped: examples of similar length share a step.
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

        Microbatches may differ by one example, and be empty if the step has fewer examples than ``count``.
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
        input_ids: ``[R, T]``, int64, without the last token of each example, since nothing follows it.
        lengths: tokens of the texts that share the one row; ``None`` if each row is one text, padded after its end,
            where causal attention never looks.
        at: indices in ``input_ids``, flattened, whose next token counts in the loss: ``[M]``.
        targets: those next tokens, ``[M]``.
        tokens: the number of ``input_ids`` without padding.
    """

    input_ids: Tensor
    lengths: tuple[int, ...] | None
    at: Tensor
    targets: Tensor
    tokens: int


def collate(rows: Sequence[Row], device: torch.device, *, packed: bool) -> Batch:
    """Lays rows one after another into one, or pads them; rows of one length are only stacked.

    Without any row it is a batch of one token that does not count in the loss, for a process that has none left.
    """
    texts = [ids.long() for ids, _ in rows] or [torch.zeros(2, dtype=torch.long)]
    starts = [start for _, start in rows] or [2]
    lengths = [len(ids) - 1 for ids in texts]
    in_one_row = packed and len(set(lengths)) > 1
    inputs = [ids[:-1] for ids in texts]
    if in_one_row:
        input_ids, begins = torch.cat(inputs)[None], [0, *accumulate(lengths)][:-1]
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        begins = [n * input_ids.shape[1] for n in range(len(inputs))]
    at = [torch.arange(b + s - 1, b + n) for b, n, s in zip(begins, lengths, starts, strict=True)]
    targets = [ids[start:] for ids, start in zip(texts, starts, strict=True)]
    moved = (t.to(device, non_blocking=True) for t in (input_ids, torch.cat(at), torch.cat(targets)))
    input_ids, places, wanted = moved
    tokens = sum(lengths) if rows else 0
    return Batch(input_ids, tuple(lengths) if in_one_row else None, places, wanted, tokens)

"""From examples to batches: examples as token ids, which of them a step sees, and how they lie in a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from minopt.config import OPTConfig
from minopt.evaluation.tasks import EvaluationConfig, seed_of
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

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [len(ids) for ids, _ in self.rows]

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
    data: Sequence[Example] | str, tokenizer: Tokenizer, model: OPTConfig, config: EvaluationConfig, *, training: bool
) -> Tokens:
    """Encodes examples, or a text, in the lengths that the settings allow.

    A row is the prompt as ``Tokenizer.encode`` gives it, the completion, and an eos. A prompt that is too long loses
    tokens of its context; if it names none, its first tokens (but for the bos). For training it loses those farthest
    from the answer, and is dropped if the answer would have to be cut. Otherwise it loses the end of its context, as if
    the answer were not known. A text becomes rows of ``src_length + tgt_length`` tokens and the one after them, of
    which all but the first count in the loss. No row at all is a ``ValueError``.
    """
    src_length, tgt_length, tokens = config.src_length, config.tgt_length, Tokens([])
    if isinstance(data, str):
        ids, width = torch.tensor(tokenizer.encode(data), dtype=torch.int32), src_length + tgt_length
        tokens.rows = [Row(ids[at : at + width + 1], 1) for at in range(0, len(ids) - 1, width)]
        data = []
    eos = model.eos_token_ids[0] if model.eos_token_ids else tokenizer.eos_token_id
    end, bos = [] if eos is None else [eos], tokenizer.beginning(model)
    with bar(len(data), "example", desc="tokenising", delay=1) as drawn:
        for at in range(0, len(data), _AT_ONCE):
            part = data[at : at + _AT_ONCE]
            prompts = tokenizer.encode_each([example.prompt for example in part])
            completions = tokenizer.encode_each([example.completion for example in part], add_bos=False)
            for example, prompt, completion in zip(part, prompts, completions, strict=True):
                # Without a bos of the tokenizer's, an empty prompt has no token: something has to come first.
                kept = prompt or ([bos] if bos is not None else end or [0])
                if len(kept) > src_length:
                    kept = _cut(example, kept, tokenizer, src_length, training)
                    tokens.cut_prompts += bool(kept)
                if not kept:
                    tokens.dropped += 1
                    continue
                completion = completion + end
                tokens.cut_completions += len(completion) > tgt_length
                tokens.rows.append(Row(torch.tensor(kept + completion[:tgt_length], dtype=torch.int32), len(kept)))
            drawn.update(len(part))
    if not tokens.rows:
        raise ValueError(
            f"--{'train' if training else 'dev'}_file: expected at least one example, got none ({tokens.dropped} "
            f"cannot be cut to --src_length {src_length} without losing their answer). Raise it, or name another file."
        )
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


def microbatches(
    lengths: Sequence[int], batch_size: int, count: int, seed: int, *, grouped: bool, first_step: int = 0
) -> Iterator[list[list[int]]]:
    """The examples of the microbatches of each step, by index, without end: each example once an epoch.

    A step has ``batch_size`` examples of all processes together, the last one of an epoch perhaps fewer, and ``count``
    microbatches, each with about as many examples and tokens as the others; some are empty if it has fewer examples.
    Each epoch has another order, which follows from the seed. ``grouped`` means that examples of similar length share a
    step. ``first_step`` is counted from 0 over all epochs.
    """
    epoch, at = divmod(first_step, math.ceil(len(lengths) / batch_size))
    sizes = torch.tensor(lengths)
    while True:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        shuffled = torch.randperm(len(lengths), generator=generator)
        steps = [*torch.split(shuffled, batch_size)]
        if grouped:
            steps = []
            for pool in torch.split(shuffled, batch_size * _POOL):
                longest_first = pool[sizes[pool].argsort(descending=True, stable=True)]
                steps += torch.split(longest_first, batch_size)
            steps = [steps[i] for i in torch.randperm(len(steps), generator=generator)]
        for examples in steps[at:]:
            dealt: list[list[int]] = [[] for _ in range(count)]
            for number, index in enumerate(sorted(examples.tolist(), key=lambda i: (-lengths[i], i))):
                turn, place = divmod(number, count)
                dealt[place if turn % 2 == 0 else count - 1 - place].append(index)  # back and forth
            yield dealt
        epoch, at = epoch + 1, 0


@dataclass(frozen=True)
class Batch:
    """Rows as the model reads them."""

    input_ids: Tensor  # int64 [R, T], without the last token of each example, since nothing follows it
    lengths: tuple[int, ...] | None  # of the texts that share the one row; None if each has its own, padded at its end
    at: Tensor  # [M]: indices in input_ids, flattened, whose next token counts in the loss
    targets: Tensor  # [M]: those next tokens
    tokens: int  # the number of input_ids without padding


def collate(rows: Sequence[Row], device: torch.device, *, packed: bool) -> Batch:
    """Lays rows one after another into one, or pads them; rows of one length are only stacked.

    Without any row it is a batch of one token that does not count in the loss, for a process that has none left.
    """
    texts = [ids.long() for ids, _ in rows] or [torch.zeros(2, dtype=torch.long)]
    starts = [start for _, start in rows] or [2]
    lengths = [len(ids) - 1 for ids in texts]
    inputs = [ids[:-1] for ids in texts]
    in_one_row = packed and len(set(lengths)) > 1
    if in_one_row:
        input_ids, begins = torch.cat(inputs)[None], [0, *accumulate(lengths)][:-1]
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        begins = [n * input_ids.shape[1] for n in range(len(inputs))]
    at = torch.cat([torch.arange(b + s - 1, b + n) for b, n, s in zip(begins, lengths, starts, strict=True)])
    targets = torch.cat([ids[start:] for ids, start in zip(texts, starts, strict=True)])
    tensors = [input_ids, at, targets]
    if device.type == "cuda":  # which copies from pinned memory by itself, while the host goes on
        tensors = [tensor.pin_memory() for tensor in tensors]
    input_ids, at, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Batch(input_ids, tuple(lengths) if in_one_row else None, at, targets, sum(lengths) if rows else 0)

"""Examples as tokens: encoded once, cut to length, kept on disk under a name that follows from their content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minopt.atomic import replacing
from minopt.progress import bar
from minopt.tokenizer import Tokenizer
from minopt.training.data import Example, cache_folder

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the files; raise it when the same content is to give other tokens
_AT_ONCE = 1000  # examples that the tokenizer gets at once


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, each a prompt and what is to follow it.

    Attributes:
        ids: of all rows, one behind another: int32 ``[all tokens]``.
        ends: where each row ends in ``ids``: int64 ``[rows]``.
        starts: of each row, the index of the first token that is learned: int64 ``[rows]``, at least 1.
        cut_prompts: rows whose prompt was longer than allowed.
        cut_completions: rows whose completion was longer than allowed; they end without an eos.
        dropped: examples that have no row, for too little of their prompt may be cut.
        digest: names the content: the same for the same texts, tokenizer and lengths.
    """

    ids: Tensor
    ends: Tensor
    starts: Tensor
    cut_prompts: int
    cut_completions: int
    dropped: int
    digest: str

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> Tensor:
        """Tokens of each row."""
        return torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.long))

    def row(self, index: int) -> tuple[Tensor, int]:
        """The ids ``[T]`` of a row, int64, and the index of the first that is learned."""
        begin = int(self.ends[index - 1]) if index else 0
        return self.ids[begin : int(self.ends[index])].long(), int(self.starts[index])

    def prompt(self, index: int) -> list[int]:
        """The ids of a row's prompt."""
        ids, start = self.row(index)
        return ids[:start].tolist()

    def learned(self, indices: Sequence[int] | None = None) -> int:
        """How many tokens are learned in some rows, or in all."""
        counts = self.lengths() - self.starts
        return int((counts if indices is None else counts[list(indices)]).sum())


def tokenise(
    data: Sequence[Example] | str,
    tokenizer: Tokenizer,
    src_length: int,
    tgt_length: int,
    *,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
    around_answer: bool,
) -> Tokens:
    """Encodes examples, or a text, or finds them in the cache.

    A row is the prompt as ``Tokenizer.encode`` gives it, the completion, and an eos. From a prompt that is too long,
    tokens of its context are left out; where it names none, its first tokens (but for the bos). A text becomes rows of
    ``src_length + tgt_length`` tokens and the one behind them, of which all but the first are learned.

    Args:
        data: examples, or one text.
        tokenizer: the model's.
        src_length: the most tokens of a prompt, bos included.
        tgt_length: the most tokens of a completion, eos included.
        eos_token_id: what ends a completion; ``None`` is nothing.
        bos_token_id: the prompt that has no tokens; ``None`` is the eos.
        around_answer: leave out what is farthest from the answer, and examples that cannot be cut to length; otherwise
            leave out the end of the context, as must be done where the answer is not known, and drop nothing.
    """
    digest = _digest(data, tokenizer, [_FORMAT, src_length, tgt_length, eos_token_id, bos_token_id, around_answer])
    path = cache_folder() / "tokens" / f"{digest}.safetensors"
    found = _read(path, digest)
    if found is None:
        encoder = _Encoder(tokenizer, src_length, tgt_length, eos_token_id, bos_token_id, around_answer)
        found = encoder.text(data, digest) if isinstance(data, str) else encoder.examples(data, digest)
        _write(found, path)
    return found


class _Encoder:
    """Collects rows."""

    def __init__(
        self, tokenizer: Tokenizer, src_length: int, tgt_length: int, eos_token_id: int | None,
        bos_token_id: int | None, around_answer: bool,
    ) -> None:  # fmt: skip
        self.tokenizer, self.src_length, self.tgt_length = tokenizer, src_length, tgt_length
        self.eos = [] if eos_token_id is None else [eos_token_id]
        self.bos = self.eos or [0] if bos_token_id is None else [bos_token_id]
        self.around_answer = around_answer
        self.cut_prompts = self.cut_completions = self.dropped = 0

    def examples(self, data: Sequence[Example], digest: str) -> Tokens:
        ids, lengths, starts = [torch.zeros(0, dtype=torch.int32)], list[int](), list[int]()
        with bar(len(data), "example", desc="tokenising", delay=1) as drawn:
            for at in range(0, len(data), _AT_ONCE):
                part, flat = data[at : at + _AT_ONCE], list[int]()
                prompts = self.tokenizer.encode_each([example.prompt for example in part])
                completions = self.tokenizer.encode_each([example.completion for example in part], add_bos=False)
                for example, prompt, completion in zip(part, prompts, completions, strict=True):
                    kept = self._fit(example, prompt)
                    if kept is None:
                        self.dropped += 1
                        continue
                    row = kept + self._cut_completion(completion + self.eos)
                    flat += row
                    lengths.append(len(row))
                    starts.append(len(kept))
                ids.append(torch.tensor(flat, dtype=torch.int32))
                drawn.update(len(part))
        return self._tokens(torch.cat(ids), lengths, starts, digest)

    def text(self, data: str, digest: str) -> Tokens:
        ids = self.tokenizer.encode(data)
        width = self.src_length + self.tgt_length
        rows = [ids[at : at + width + 1] for at in range(0, len(ids) - 1, width)]
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        return self._tokens(flat, [len(row) for row in rows], [1] * len(rows), digest)

    def _tokens(self, ids: Tensor, lengths: list[int], starts: list[int], digest: str) -> Tokens:
        ends, learned_from = torch.tensor(lengths, dtype=torch.long).cumsum(0), torch.tensor(starts, dtype=torch.long)
        return Tokens(ids, ends, learned_from, self.cut_prompts, self.cut_completions, self.dropped, digest)

    def _cut_completion(self, ids: list[int]) -> list[int]:
        if len(ids) > self.tgt_length:
            self.cut_completions += 1
        return ids[: self.tgt_length]

    def _fit(self, example: Example, ids: list[int]) -> list[int] | None:
        """The prompt in at most ``src_length`` tokens, at least one; ``None`` if too little of it may be cut."""
        if not ids:  # an empty prompt, and a tokenizer that puts no bos in front: something has to come first
            return self.bos
        excess = len(ids) - self.src_length
        if excess <= 0:
            return ids
        encoding = self.tokenizer.backend.encode(example.prompt)
        spans = encoding.offsets  # made anew at each access
        first = encoding.special_tokens_mask.index(0)  # behind the bos
        begin, end = example.context
        begin = len(example.prompt[:begin].rstrip())  # a token may hold a space of the template and a first word
        context = [
            i for i in range(first, len(ids))
            if begin <= spans[i][0] and spans[i][1] <= end and _within(spans[i], example.context)
        ]  # fmt: skip
        answer = [i for i in context if _within(spans[i], example.answer)]
        if self.around_answer and example.context != (0, 0) and len(context) - len(answer) < excess:
            return None
        self.cut_prompts += 1
        if len(context) < excess:
            return (ids[:first] + ids[first + excess :])[-self.src_length :]
        kept = len(context) - excess
        begin = context[0]
        if self.around_answer and answer:
            middle = (answer[0] + answer[-1] + 1 - kept) // 2
            begin = min(max(middle, context[0]), context[-1] + 1 - kept)
        return ids[: context[0]] + ids[begin : begin + kept] + ids[context[-1] + 1 :]


def _within(span: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether characters of a token lie in a span."""
    return span[0] < outer[1] and span[1] > outer[0]


def _digest(data: Sequence[Example] | str, tokenizer: Tokenizer, settings: Sequence[object]) -> str:
    sha = hashlib.sha256(json.dumps(list(settings)).encode())
    sha.update(tokenizer.backend.to_str().encode())
    for text in [data] if isinstance(data, str) else map(_as_json, data):
        sha.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return sha.hexdigest()[:40]


def _as_json(example: Example) -> str:
    return json.dumps([example.prompt, example.completion, example.context, example.answer])


def _read(path: Path, digest: str) -> Tokens | None:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("ids", "ends", "starts")}
            cut_prompts, cut_completions, dropped = json.loads(file.metadata()["counts"])
            return Tokens(**tensors, cut_prompts=cut_prompts, cut_completions=cut_completions, dropped=dropped,
                          digest=digest)  # fmt: skip
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there, or damaged: made anew
        return None


def _write(tokens: Tokens, path: Path) -> None:
    tensors = {"ids": tokens.ids, "ends": tokens.ends, "starts": tokens.starts}
    counts = json.dumps([tokens.cut_prompts, tokens.cut_completions, tokens.dropped])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            save_file(tensors, new, metadata={"counts": counts})
    except (OSError, SafetensorError) as error:
        logger.warning("%s: tokens cannot be kept there (%s); they will be made again next time.", path.parent, error)

"""Tokens that are drafted, and read in one pass: what the text says itself, or what a smaller model says.

A draft is checked as in Leviathan et al. 2023 (arXiv 2211.17192), but by the tokens that would be chosen anyway:
``decode_steps`` asks for the logits after each token that it has chosen. If a draft was right, they are here already.
So rules, draws and stop conditions act as without drafts.

Shapes: B prompts, R rows, K tokens read at once, T prompt tokens (padding included), N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import compress
from typing import Protocol

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.decoder import Decoder, Draft
from minopt.generation.draws import draw
from minopt.generation.request import Request
from minopt.masks import causal_mask, positions, with_new_tokens


class Drafter(Protocol):
    """Says how the rows may go on."""

    def length(self) -> int:
        """How many tokens are worth drafting."""

    def draft(self, begin: int, count: int, chosen: list[list[int]], runs: list[int]) -> int:
        """Writes up to ``count`` tokens of each row behind the first ``begin`` tokens; returns how many.

        ``chosen`` are the tokens of each row that came since the last call, step by step. Rows that have ended, where
        ``runs`` is 0, may get any draft.
        """

    def learn(self, right: int, drafted: int, length: int) -> None:
        """The first ``right`` tokens of the newest draft came true; so the first ``length`` of what was read hold."""


class Drafts:
    """Reads the tokens that decoding chooses; the tokens of a right draft are read already.

    A pass has one length, and so has the cache: a draft is used as long as it is right in all running rows.

    Args:
        request: asks for drafts.
        cache: holds the prompts of the request, and has room for all new tokens.
        sequences: ``[R, T + N]``, in which the caller writes each token that it chooses. Drafts stand behind those.
        draws: the random numbers of sampling, ``[N, R, 1]``.
    """

    def __init__(self, request: Request, cache: KVCache, sequences: Tensor, draws: Tensor | None) -> None:
        self.reader = Reader(request, request.decoder, cache, sequences)
        self.length, self.end = request.prompt_length, sequences.shape[1]
        self.drafter: Drafter
        if request.draft is None:
            self.drafter = PromptLookup(request, sequences)
        else:
            self.drafter = SmallerModel(request, request.draft, cache, sequences, draws)
        # The rest of the draft, the next token last: a token of each row, and the logits [R, V] after it.
        self.ahead: list[tuple[Tensor, Tensor]] = []
        self.came_true = self.newest = 0  # accepted tokens of the newest draft, and all of it
        self.chosen: list[list[int]] = []  # that the drafter has not seen
        self.drafted = self.accepted = [0] * len(sequences)  # of each row; accepted ones saved a pass

    def counts(self) -> dict[str, tuple[int, ...]]:
        """The parts of a ``Step`` about drafts."""
        return {"drafted_tokens": tuple(self.drafted), "accepted_tokens": tuple(self.accepted)}

    def read(self, tokens: Tensor, running: Tensor) -> Tensor:
        """Logits ``[R, V]`` after the newest token of each row.

        Args:
            tokens: ``[R]``.
            running: ``[R]``, whether a row goes on. The logits of a row that has ended have no meaning.
        """
        self.length += 1
        foreseen, logits = self.ahead.pop() if self.ahead else (None, tokens)
        is_right = running if foreseen is None else (foreseen == tokens) | ~running
        is_right, runs, newest = torch.stack([is_right, running, tokens]).tolist()  # one wait for a GPU
        self.chosen.append(newest)
        if foreseen is not None:
            if all(is_right):
                self.accepted = [count + goes_on for count, goes_on in zip(self.accepted, runs, strict=True)]
                self.came_true += 1
                return logits
            self.ahead.clear()
            self.reader.cache.truncate(self.length - 1)
        if self.newest:
            self.drafter.learn(self.came_true, self.newest, self.length - 1)
        count = min(self.drafter.length(), self.end - self.length - 1)  # one more token is chosen after a draft
        self.newest = self.drafter.draft(self.length, count, self.chosen, runs) if count > 0 else 0
        end = self.length + self.newest
        logits = self.reader.read_until(end)
        if count <= 0:
            return logits[:, 0]
        self.chosen, self.came_true = [], 0
        self.drafted = [sum + self.newest * goes_on for sum, goes_on in zip(self.drafted, runs, strict=True)]
        drafts = self.reader.sequences[:, self.length : end].T.clone()  # [count, R]; the places are written anew
        first, *later = logits.unbind(1)
        self.ahead = [*zip(drafts, later, strict=True)][::-1]
        return first


class Reader:
    """Reads what stands in ``sequences`` into a cache."""

    def __init__(self, request: Request, decoder: Decoder, cache: KVCache, sequences: Tensor) -> None:
        self.decoder, self.cache, self.sequences = decoder, cache, sequences
        copies = len(sequences) // len(request.input_ids)
        real = with_new_tokens(request.attention_mask, request.config.max_new_tokens)
        self.real = real if real is None or copies == 1 else real.repeat_interleave(copies, dim=0)

    def read_until(self, end: int) -> Tensor:
        """Reads up to the token before ``end``; returns the logits ``[R, K, V]`` after those that were not read yet."""
        past = self.cache.length
        ids = self.sequences[:, past:end].contiguous()
        (R, K), device = ids.shape, ids.device
        real = None if self.real is None else self.real[:, :end]
        mask = None if real is None else causal_mask(real, past, K, end, device)
        position_ids = positions(real, past, K, device).expand(R, K)
        return self.decoder.read(ids, position_ids, mask, None, self.cache).view(R, K, -1)


class Text:
    """The tokens of a row, without padding, and the places of each."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids: list[int] = []
        self.places: defaultdict[int, list[int]] = defaultdict(list)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        self.places[token].append(len(self.ids))
        self.ids.append(token)

    def draft(self, ngram_size: int, count: int) -> list[int]:
        """The tokens that followed the longest n-gram of the text's end at its latest earlier place; empty if none.

        Where the text ends, the draft goes on with itself, as a text that repeats itself does.
        """
        ids, longest, start = self.ids, 0, 0
        for place in reversed(self.places[ids[-1]][:-1]):
            length = 1  # of the n-gram that ends at this place and at the end of the text
            while length < min(ngram_size, place + 1) and ids[place - length] == ids[-1 - length]:
                length += 1
            if length > longest:
                longest, start = length, place + 1
            if longest == ngram_size:
                break
        return [ids[start + i % (len(ids) - start)] for i in range(count)] if longest else []


class PromptLookup:
    """Where the newest tokens stand earlier in the text, the tokens after them there are a draft.

    After Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding). There is a draft only if each running row finds
    one.
    """

    def __init__(self, request: Request, sequences: Tensor) -> None:
        config, copies = request.config, len(sequences) // len(request.input_ids)
        assert config.prompt_lookup_num_tokens is not None
        self.most, self.ngram_size = config.prompt_lookup_num_tokens, config.max_matching_ngram_size
        self.sequences, self.right = sequences, 0
        self.pad_token_id = request.pad_token_id
        # On a CPU a pass takes longer the more it reads.
        self.adapts = request.decoder.device.type == "cpu"
        is_text = torch.ones_like(request.input_ids) if request.attention_mask is None else request.attention_mask
        rows = list(zip(request.input_ids.tolist(), is_text.tolist(), strict=True))
        self.texts = [Text(compress(*row)) for row in rows for _ in range(copies)]

    def length(self) -> int:
        """As many tokens as were accepted last time, twice, plus two.

        Of six rules this was the fastest over texts that copy their prompt and texts that do not.
        """
        return min(self.most, 2 * self.right + 2) if self.adapts else self.most

    def draft(self, begin: int, count: int, chosen: list[list[int]], runs: list[int]) -> int:
        """See ``Drafter``."""
        for column in chosen:
            for text, token in zip(self.texts, column, strict=True):
                text.append(token)
        drafts = [[self.pad_token_id] * count] * len(runs)
        for row in compress(range(len(runs)), runs):
            drafts[row] = self.texts[row].draft(self.ngram_size, count)
        count = min(map(len, drafts))
        self.sequences[:, begin : begin + count] = torch.tensor([ids[:count] for ids in drafts])
        return count

    def learn(self, right: int, drafted: int, length: int) -> None:
        """See ``Drafter``."""
        self.right = right


class SmallerModel:
    """A second model drafts, by the rules and random numbers of the first: it follows the text in a cache of its own.

    A draft of the model's own weights reads and writes the model's cache, so it reads no prompt and holds none.
    """

    most = 16  # tokens of a draft: by then the passes of the draft take most of the time
    probe_every = 32  # passes after which it is tried again, where drafts did not pay
    least = 1.2  # times as fast has decoding to be if all drafts are right, or none is tried: trials take time

    def __init__(self, request: Request, draft: Draft, cache: KVCache, sequences: Tensor, draws: Tensor | None) -> None:
        self.own, self.draws, self.begin = replace(request, decoder=draft.decoder), draws, request.prompt_length
        self.reader = Reader(request, draft.decoder, cache, sequences)
        self.has_own_cache, self.is_empty = not draft.shares_cache, not draft.shares_cache
        # Functions of the user are called once a token, as without drafts.
        rest = replace(request, logits_processor=())
        self.rules = rest.rules(rest.padding(len(sequences) // len(request.input_ids)))
        self.step_cost, self.waited = draft.cost_for(request.decoder) + 0.03, 0
        self.can_pay = 1 + self.most > self.least * (1 + self.most * self.step_cost)
        # Of drafted tokens, as far as they are known to be right or wrong; older ones count less. Hopeful at first.
        self.right, self.known = 1.8, 2.0

    def length(self) -> int:
        """As many tokens as give the most tokens for the time, by the share that came true so far; 0 is none."""
        if not self.can_pay:
            return 0
        share = self.right / self.known
        best, fastest, tokens = 0, 1.05, 1.0  # a draft has to promise something
        for count in range(1, self.most + 1):
            tokens += share**count  # expected, of a pass of the model and its draft
            if (speed := tokens / (1 + count * self.step_cost)) > fastest:
                best, fastest = count, speed
        self.waited = 0 if best else self.waited + 1
        return best or int(self.waited % self.probe_every == 0)

    def draft(self, begin: int, count: int, chosen: list[list[int]], runs: list[int]) -> int:
        """See ``Drafter``."""
        sequences = self.reader.sequences
        if self.is_empty:
            self._read_prompts()
        for end in range(begin, begin + count):
            scores = self.reader.read_until(end)[:, -1].float()
            for rule in self.rules:
                scores = rule(sequences[:, :end], scores)
            tokens = scores.argmax(-1) if self.draws is None else draw(scores, self.draws[end - self.begin])
            sequences[:, end] = tokens
        if not self.has_own_cache:
            self.reader.cache.truncate(begin - 1)
        return count

    def learn(self, right: int, drafted: int, length: int) -> None:
        """See ``Drafter``."""
        self.right, self.known = 0.95 * self.right + right, 0.95 * self.known + min(drafted, right + 1)
        if self.has_own_cache and length < self.reader.cache.length:
            self.reader.cache.truncate(length)

    def _read_prompts(self) -> None:
        sequences, B = self.reader.sequences, len(self.own.input_ids)
        cache = self.reader.cache = self.own.decoder.new_cache(*sequences.shape)
        prompts = cache.rows(0, B)
        self.own.read_prompts(prompts)
        cache.repeat_rows(prompts)
        self.is_empty = False

"""Prompt lookup: where the newest tokens stand earlier in the text, the tokens after them there are a draft.

The model reads a draft in one pass. After Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding) and, for the
check of drafts, Leviathan et al. 2023 (arXiv 2211.17192). ``decode_steps`` asks for the logits after each token that
it has chosen. If a draft was right, they are here already. So rules and stop conditions act as without drafts.

Shapes: B rows, K tokens read at once, T prompt tokens (padding included), S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import compress

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.request import Request
from minopt.masks import causal_mask, positions, with_new_tokens


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
    """Reads the tokens that greedy decoding chooses; the tokens of a right draft are read already.

    A pass has one length, and so has the cache: there is a draft only if each running row finds one, and it is used as
    long as it is right in all running rows.

    ``cache`` holds the prompts of the request, and has room for all new tokens.
    """

    def __init__(self, request: Request, cache: KVCache) -> None:
        (B, T), config = request.input_ids.shape, request.config
        assert config.prompt_lookup_num_tokens is not None
        self.request, self.cache = request, cache
        self.most, self.ngram_size = config.prompt_lookup_num_tokens, config.max_matching_ngram_size
        self.length, self.end = T, T + config.max_new_tokens
        self.real = with_new_tokens(request.attention_mask, config.max_new_tokens)
        is_text = torch.ones_like(request.input_ids) if request.attention_mask is None else request.attention_mask
        self.texts = [Text(compress(*row)) for row in zip(request.input_ids.tolist(), is_text.tolist(), strict=True)]
        # The rest of the draft, the next token last: a token of each row, and the logits [B, V] after it.
        self.ahead: list[tuple[tuple[int, ...], Tensor]] = []
        self.came_true = 0  # accepted tokens of the newest draft
        self.drafted = self.accepted = torch.zeros(B, dtype=torch.long)  # of each row; accepted ones saved a pass

    def counts(self) -> dict[str, tuple[int, ...]]:
        """The parts of a ``Step`` about drafts."""
        return {"drafted_tokens": tuple(self.drafted.tolist()), "accepted_tokens": tuple(self.accepted.tolist())}

    def read(self, tokens: Tensor, running: Tensor) -> Tensor:
        """Logits ``[B, V]`` after the newest token of each row.

        Args:
            tokens: ``[B]``.
            running: ``[B]``, whether a row goes on. The logits of a row that has ended have no meaning.
        """
        ids, flags = torch.stack([tokens, running]).cpu()  # one wait for a GPU
        newest, runs = ids.tolist(), flags.bool()
        for text, token in zip(self.texts, newest, strict=True):
            text.append(token)
        self.length += 1
        if self.ahead:
            foreseen, logits = self.ahead.pop()
            if all(foreseen[row] == newest[row] for row in runs.nonzero()[:, 0].tolist()):
                self.accepted = self.accepted + runs
                self.came_true += 1
                return logits
            self.ahead.clear()
            self.cache.truncate(self.length - 1)
        if drafts := self._drafts(runs.nonzero()[:, 0].tolist()):
            self.drafted = self.drafted + len(drafts) * runs
            self.came_true = 0
        B, K, past, S = len(tokens), 1 + len(drafts), self.length - 1, self.length + len(drafts)
        drafted = torch.tensor(drafts, dtype=torch.long, device=tokens.device).view(-1, B)
        ids = torch.cat([tokens[None], drafted]).T.contiguous()  # [B, K]
        real = None if self.real is None else self.real[:, :S]
        mask = None if real is None else causal_mask(real, past, K, S, ids.device)
        position_ids = positions(real, past, K, ids.device).expand(B, K)
        first, *later = self.request.decoder.read(ids, position_ids, mask, None, self.cache).view(B, K, -1).unbind(1)
        self.ahead = [*zip(drafts, later, strict=True)][::-1]
        return first

    def _drafts(self, rows: list[int]) -> list[tuple[int, ...]]:
        """The drafts: for each step a token of each row. Empty if one of ``rows``, which run, finds none."""
        count = min(self.most, self.end - self.length - 1)  # one more token is chosen after a draft
        if self.request.decoder.device.type == "cpu":
            # On a CPU a pass takes longer the more it reads, so the draft length adapts: twice the tokens accepted last
            # time, plus two. Of six rules this was the fastest over texts that copy their prompt and texts that do not.
            count = min(count, 2 * self.came_true + 2)
        drafts = [[self.request.pad_token_id] * count for _ in self.texts]
        for row in rows:
            drafts[row] = self.texts[row].draft(self.ngram_size, count)
        return [*zip(*drafts, strict=False)]  # no longer than the shortest

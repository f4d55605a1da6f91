"""Rules: functions from the tokens so far and their scores to new scores.

Shapes: R rows (beams included), S tokens so far (padding and prompt included), V vocabulary, n size of an n-gram, W
windows of that size. Scores are float32 ``[R, V]``: logits, or log-probabilities in beam search. What a rule excludes
becomes ``-inf``. No rule changes its arguments. Results are those of transformers' processors, except that padding
never counts as text here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from minopt.generation.options import GenerationConfig

Rule = Callable[[Tensor, Tensor], Tensor]

# How many of the most probable tokens are looked at for a nucleus before all are sorted.
NUCLEUS = 1024
_ROUNDING = 1e-12  # by which a sum of probabilities may be off in float64


def build_rules(
    config: GenerationConfig,
    prompt_length: int,
    padding: Tensor,
    eos_token_ids: Sequence[int],
    logits_processor: Sequence[Rule] = (),
) -> list[Rule]:
    """The rules that a configuration asks for, in the order in which they act: the user's before those of sampling.

    ``prompt_length`` counts padding too. ``padding [R]`` int64 is on the device of the scores.
    """
    device, rules = padding.device, []
    if config.sequence_bias:
        rules.append(bias_sequences(config.sequence_bias, padding))
    if config.repetition_penalty != 1.0:
        rules.append(lambda ids, scores: penalize_repetition(ids, scores, padding, config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        presence, frequency = config.presence_penalty, config.frequency_penalty
        rules.append(lambda ids, scores: penalize_generated(ids[:, prompt_length:], scores, presence, frequency))
    if config.no_repeat_ngram_size > 0:
        size = config.no_repeat_ngram_size
        begin = padding if config.no_repeat_ngram_include_prompt else torch.full_like(padding, prompt_length)
        start = begin if bool(begin.any()) else None
        rules.append(lambda ids, scores: block_ngrams(ids, scores, start, size))
    if config.bad_words_ids:
        rules.append(bias_sequences([(ids, -torch.inf) for ids in config.bad_words_ids], padding))
    if config.min_new_tokens > 0 and eos_token_ids:
        eos = torch.tensor(eos_token_ids, device=device)
        end = prompt_length + config.min_new_tokens
        rules.append(lambda ids, scores: scores.index_fill(1, eos, -torch.inf) if ids.shape[1] < end else scores)
    if config.forced_bos_token_id is not None:
        bos, single = config.forced_bos_token_id, padding == prompt_length - 1
        rules.append(lambda ids, scores: force_token(scores, single, bos) if ids.shape[1] == prompt_length else scores)
    if config.suppress_tokens:
        banned = torch.tensor(config.suppress_tokens, device=device)
        rules.append(lambda ids, scores: scores.index_fill(1, banned, -torch.inf))
    rules += map(_on_a_copy, logits_processor)
    if config.do_sample:
        # A beam needs one token more than can end it, or a narrow filter leaves none to continue it.
        least = max(2, len(eos_token_ids) + 1) if config.num_beams > 1 else 1
        if config.temperature != 1.0:
            rules.append(lambda ids, scores: scores / config.temperature)
        if config.top_k > 0:
            rules.append(lambda ids, scores: keep_top_k(scores, max(config.top_k, least)))
        if config.top_p < 1.0:
            rules.append(lambda ids, scores: keep_top_p(scores, config.top_p, least))
        if config.min_p is not None:
            min_p = config.min_p
            rules.append(lambda ids, scores: keep_min_p(scores, min_p, least))
    return rules


def _on_a_copy(rule: Rule) -> Rule:
    """Gives a user's rule its own copy of the scores, which it may change, and checks its result."""

    def checked(ids: Tensor, scores: Tensor) -> Tensor:
        found = rule(ids, scores.clone())
        if not isinstance(found, Tensor) or found.shape != scores.shape or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"logits_processor: expected it to return scores, float {list(scores.shape)}, got {got}.")
        return found.float()

    return checked


def bias_sequences(biases: Sequence[tuple[Sequence[int], float]], padding: Tensor) -> Rule:
    """A rule that adds a number to the last id of each sequence wherever the row ends with the ids before it."""
    by_length: defaultdict[int, list[tuple[Sequence[int], float]]] = defaultdict(list)
    for ids, bias in sorted(biases, key=lambda pair: len(pair[0]) > 1):  # in the order in which transformers adds
        by_length[len(ids) - 1].append((ids, bias))
    device = padding.device
    groups = [
        (
            length,
            torch.tensor([list(ids[:-1]) for ids, _ in group], dtype=torch.long, device=device),  # [G, length]
            torch.tensor([ids[-1] for ids, _ in group], device=device),
            torch.tensor([float(bias) for _, bias in group], dtype=torch.float32, device=device),
        )
        for length, group in by_length.items()
    ]

    def rule(ids: Tensor, scores: Tensor) -> Tensor:
        S, total = ids.shape[1], torch.zeros_like(scores)
        for length, beginnings, last, bias in groups:
            if length > S:
                continue
            follows = (ids[:, None, S - length :] == beginnings).all(-1)  # [R, G]
            follows &= (padding <= S - length)[:, None]
            total.index_add_(1, last, torch.where(follows, bias, 0.0))
        return scores + total

    return rule


def penalize_repetition(ids: Tensor, scores: Tensor, padding: Tensor, penalty: float) -> Tensor:
    """Divides the positive scores of tokens that are in their row already, and multiplies the negative ones."""
    # The last token, which is never padding, in place of padding: it changes nothing twice.
    at = torch.arange(ids.shape[1], device=ids.device)
    ids = torch.where(at < padding[:, None], ids[:, -1:], ids)
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def penalize_generated(ids: Tensor, scores: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtracts ``presence`` once, and ``frequency`` each time, from tokens in ``ids [R, generated]``."""
    once = scores.scatter(1, ids, scores.gather(1, ids) - presence)
    return once.scatter_add(1, ids, torch.full_like(ids, -frequency, dtype=scores.dtype))


def block_ngrams(ids: Tensor, scores: Tensor, start: Tensor | None, size: int) -> Tensor:
    """Excludes what would end an n-gram that is in its row already, from position ``start [R]`` (``None``: 0) on."""
    S = ids.shape[1]
    if size > S:
        return scores
    windows = S - size + 1
    # For each window [R, W] whether it counts, and begins as the newest tokens do.
    conditions = [] if start is None else [torch.arange(windows, device=ids.device) >= start[:, None]]
    for offset in range(size - 1):
        conditions.append(ids[:, offset : offset + windows] == ids[:, windows + offset, None])
    repeated = reduce(torch.Tensor.bitwise_and_, conditions) if conditions else torch.ones_like(ids, dtype=torch.bool)
    if repeated.device.type == "cpu" and not bool(repeated.any()):  # on a GPU this would wait for it
        return scores
    # Adding 0 where nothing matches: an index of the matches would have a size that only the device knows.
    excluded = torch.zeros_like(repeated, dtype=scores.dtype).masked_fill_(repeated, -torch.inf)
    return scores.scatter_add(1, ids[:, size - 1 :], excluded)


def force_token(scores: Tensor, rows: Tensor, token_id: int) -> Tensor:
    """Leaves one token only, with score 0, in the ``rows [R]`` that are True; none, if an earlier rule excluded it."""
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token_id] = torch.where(scores[:, token_id] > -torch.inf, 0.0, -torch.inf)
    return torch.where(rows[:, None], forced, scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Excludes all but the ``k`` highest scores of each row; those equal to the last of them stay."""
    least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, p: float, least: int = 1) -> Tensor:
    """Excludes the least probable tokens of each row that together have at most ``1 - p``; ``least`` always stay.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751), in float64: thousands of probabilities are added.
    """
    if scores.shape[1] > NUCLEUS and scores.device.type == "cpu":  # on a GPU the check below would wait for it
        # Mostly a few tokens have p together. The others need not be sorted.
        probabilities, order = scores.softmax(-1, dtype=torch.float64).topk(NUCLEUS)
        up_to = probabilities.cumsum(-1)
        if bool((up_to[:, -1] >= p).all()):
            dropped = up_to - probabilities >= p - _ROUNDING
            dropped[:, :least] = False
            kept = scores.gather(1, order).masked_fill(dropped, -torch.inf)
            return torch.full_like(scores, -torch.inf).scatter(1, order, kept)
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(-1, dtype=torch.float64).cumsum(-1) <= 1 - p + _ROUNDING
    dropped[:, -least:] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def keep_min_p(scores: Tensor, p: float, least: int = 1) -> Tensor:
    """Excludes tokens less than ``p`` times as probable as the most probable one; ``least`` always stay.

    Nguyen et al. 2024, arXiv 2407.01082.
    """
    exact = scores.double()  # a difference of scores is the logarithm of a ratio of probabilities
    dropped = exact - exact.amax(-1, keepdim=True) < (math.log(p) if p > 0 else -math.inf)
    dropped.scatter_(1, scores.topk(min(least, scores.shape[-1])).indices, False)
    return scores.masked_fill(dropped, -torch.inf)

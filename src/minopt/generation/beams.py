"""Beam search and beam sampling, with the results of transformers' ``generate``.

The cache has one row a prompt, not one a beam: the prompt's keys and values once, then those of all beams' tokens as
they came. Which of them are a beam's own past is a mask. So a step that drops some beams and continues others twice
moves rows of that mask and no keys or values, and each step reads the prompt's once for all beams.

Shapes: B prompts, K beams, M candidates, T prompt tokens (padding included), S tokens so far, C slots of the cache
behind the prompt, V vocabulary. A beam with score ``-inf`` is none: all but one at first, and where there are too few
texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.options import GenerationConfig
from minopt.generation.request import EXHAUSTED, RUNNING, STOP_REASONS, GenerationOutput, Request, refuse
from minopt.masks import beam_mask, positions, with_new_tokens

# Steps between two looks for slots that no running beam needs any more.
COMPACT_EVERY = 16


def beam_search(request: Request) -> GenerationOutput:
    """Continues each prompt with its ``num_return_sequences`` best hypotheses, best first."""
    return _trace(request, *_search(request))


@dataclass
class Candidates:
    """Continuations of running beams by one token; ``[B, M]`` each."""

    scores: Tensor  # sums over all new tokens; -inf where there is no such hypothesis
    parent: Tensor  # the beam that is continued
    token: Tensor
    logprob: Tensor  # of the token under the model's own distribution
    reason: Tensor  # number in STOP_REASONS, 0 = goes on

    def take(self, pick: Tensor) -> Candidates:
        """Those of indices ``[B, N]``."""
        return Candidates(*(tensor.gather(1, pick) for tensor in vars(self).values()))


@dataclass
class Finished:
    """The best hypotheses of each prompt that have ended, in falling order of score; ``[B, K]`` each."""

    scores: Tensor  # length penalty included; -inf where there is none
    last: Candidates  # their last tokens
    step: Tensor  # in which those came; -1 for a hypothesis without any

    def best_with(self, other: Finished) -> Finished:
        """The best of both, as many as there are here."""
        scores, pick = torch.cat([self.scores, other.scores], 1).topk(self.scores.shape[1])
        pairs = zip(vars(self.last).values(), vars(other.last).values(), strict=True)
        last = Candidates(*(torch.cat(pair, 1) for pair in pairs)).take(pick)
        step = torch.cat([self.step, other.step], 1).gather(1, pick)
        nothing = scores == -torch.inf
        last.parent, last.reason = last.parent.masked_fill(nothing, 0), last.reason.masked_fill(nothing, EXHAUSTED)
        return Finished(scores, last, step.masked_fill(nothing, -1))


@dataclass
class History:
    """What each step has decided, to go back along a hypothesis; an entry a step."""

    chosen: list[Candidates] = field(default_factory=list)  # [B, K], after the step
    scores: list[Tensor] = field(default_factory=list)  # [B, K, V] before it, if asked for
    top: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # log-probabilities, ids [B, K, N], if asked for


@torch.inference_mode()
def _search(request: Request) -> tuple[History, Finished]:
    decoder, config = request.decoder, request.config
    (B, T), K, device = request.input_ids.shape, config.num_beams, decoder.device
    stopper, history = request.stopper(), History()
    cache = decoder.new_cache(B, T + K * (config.max_new_tokens - 1))
    logits = request.read_prompts(cache)[:, None].expand(-1, K, -1)  # [B, K, V]
    position_ids = positions(with_new_tokens(request.attention_mask, 1), T, 1, device).expand(B, K)
    sequences = request.input_ids[:, None].expand(-1, K, -1)  # [B, K, S]
    sums = torch.full((B, K), -torch.inf, dtype=torch.float32, device=device)  # scores, in falling order
    sums[:, 0] = 0.0  # K equal beams would find each continuation K times
    visible = torch.zeros(B, K, 0, dtype=torch.bool, device=device)  # [B, K, C] which slots are a beam's own past
    own = torch.eye(K, dtype=torch.bool, device=device).expand(B, -1, -1)
    finished = _nothing(B, K, device)
    is_open = torch.ones(B, dtype=torch.bool, device=device)  # whether a row's finished hypotheses may still change
    rules = request.rules(K)
    for step in range(config.max_new_tokens):
        logprobs = logits.flatten(0, 1).float().log_softmax(-1)
        scores = logprobs
        for rule in rules:
            scores = rule(sequences.flatten(0, 1), scores)
        logprobs, scores = logprobs.view(B, K, -1), scores.view(B, K, -1)
        _record(history, config, logprobs, scores)
        candidates = _candidates(request, scores, sums, logprobs)
        ids = _extend(sequences, candidates).flatten(0, 1) if stopper.criteria else None
        candidates.reason = stopper(candidates.token, step + 1, ids)
        finished = finished.best_with(_ended(candidates, step, config, is_open))
        chosen = _going_on(candidates, K)
        best = candidates.scores.amax(1)
        exhausted, broken = is_open & (best == -torch.inf), is_open & ~(best < torch.inf)
        is_open = is_open & _may_improve(chosen.scores[:, 0], finished.scores[:, -1], step + 1, config)
        goes_on, some_exhausted, is_broken = torch.stack([is_open, exhausted, broken]).any(1).tolist()
        refuse(is_broken, step)
        # A row without any candidate ends with the beams that it has.
        if some_exhausted and step > 0:
            finished = finished.best_with(_ended(history.chosen[-1], step - 1, config, exhausted, EXHAUSTED))
        history.chosen.append(chosen)
        if not goes_on:
            break
        sequences, sums = _extend(sequences, chosen), chosen.scores
        visible = visible.gather(1, chosen.parent[..., None].expand(-1, -1, visible.shape[2]))
        if step % COMPACT_EVERY == COMPACT_EVERY - 1:
            visible = _compact(cache, T, visible)
        visible = torch.cat([visible, own], 2)
        mask = beam_mask(request.attention_mask, T, visible)
        logits = decoder.read(chosen.token, position_ids, mask, None, cache).view(B, K, -1)
        position_ids = position_ids + 1
    return history, finished


def _nothing(B: int, K: int, device: torch.device) -> Finished:
    """Of a search that has not begun."""
    zeros = torch.zeros(B, K, dtype=torch.long, device=device)
    lowest = torch.full((B, K), -torch.inf, dtype=torch.float32, device=device)
    return Finished(lowest, Candidates(lowest, zeros, zeros, lowest, zeros + EXHAUSTED), zeros - 1)


def _record(history: History, config: GenerationConfig, logprobs: Tensor, scores: Tensor) -> None:
    if config.output_scores:
        history.scores.append(scores)
    if config.top_logprobs:
        values, ids = logprobs.topk(config.top_logprobs)
        history.top.append((values, ids))


def _candidates(request: Request, scores: Tensor, sums: Tensor, logprobs: Tensor) -> Candidates:
    """The best continuations of all beams together, or as many drawn ones, best first; ``reason`` is not known yet.

    There are more than K, so that K can go on whichever of them end. ``scores`` and ``logprobs`` are ``[B, K, V]``.
    """
    V = scores.shape[2]
    M = max(2, 1 + len(request.eos_token_ids)) * request.config.num_beams
    if request.config.do_sample:
        flat = (scores + sums[..., None]).flatten(1)
        # Without replacement. multinomial refuses rows without any probability, or with NaN; those draw at random, and
        # their best score, which is no number, stands for what they drew.
        top = flat.amax(1, keepdim=True)
        probabilities = flat.softmax(-1).masked_fill(~top.isfinite(), 1.0)
        index = request.decoder.agreed(
            torch.multinomial(probabilities, min(M, flat.shape[1]), generator=request.generator)
        )
        values, order = torch.where(top.isfinite(), flat.gather(1, index), top).sort(descending=True)
        index = index.gather(1, order)  # the best come first here too: only the first K may end
    else:
        # The best of all are among the best of each beam: short rows to look through, and one pass over scores.
        values, token = _topk(scores, min(M, V))
        index = token + V * torch.arange(len(sums[0]), device=token.device)[:, None]
        values, pick = (values + sums[..., None]).flatten(1).topk(min(M, values[0].numel()))
        index = index.flatten(1).gather(1, pick)
    return Candidates(values, index // V, index % V, logprobs.flatten(1).gather(1, index), torch.zeros_like(index))


def _topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(k)`` of ``[B, K, V]``, faster for a large V: the k best lie in the k blocks of best maxima."""
    width = math.gcd(scores.shape[2], 64)
    if width < 8 or scores.shape[2] < 8 * width * k:
        values, index = scores.topk(k)
        return values, index
    blocks = scores.view(*scores.shape[:2], -1, width)  # [B, K, V / width, width]
    block = blocks.amax(-1).topk(k).indices  # [B, K, k]
    values, pick = blocks.gather(2, block[..., None].expand(-1, -1, -1, width)).flatten(2).topk(k)
    return values, block.gather(2, pick // width) * width + pick % width


def _ended(
    candidates: Candidates, step: int, config: GenerationConfig, rows: Tensor, reason: int | None = None
) -> Finished:
    """Those of the first K candidates that end in this step, or (with a ``reason``) all of them, in the given rows."""
    K = config.num_beams
    first = Candidates(*(tensor[:, :K] for tensor in vars(candidates).values()))
    ends = first.reason != RUNNING
    if reason is not None:
        first.reason = torch.full_like(first.reason, reason)
        ends = torch.ones_like(ends)
    scores = (first.scores / (step + 1) ** config.length_penalty).masked_fill(~(ends & rows[:, None]), -torch.inf)
    return Finished(scores, first, torch.full_like(first.token, step))


def _going_on(candidates: Candidates, K: int) -> Candidates:
    """The K best candidates that do not end."""
    scores = candidates.scores.masked_fill(candidates.reason != RUNNING, -torch.inf)
    scores, pick = scores.topk(min(K, scores.shape[1]))
    chosen = candidates.take(pick)
    chosen.scores = scores
    return chosen


def _may_improve(running: Tensor, worst: Tensor, length: int, config: GenerationConfig) -> Tensor:
    """Whether a row's best running beam may still pass the worst of its K finished hypotheses; ``[B]``."""
    if config.early_stopping is True:
        return (worst == -torch.inf) & (running > -torch.inf)
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_new_tokens
    return running / length**config.length_penalty > worst


def _extend(sequences: Tensor, candidates: Candidates) -> Tensor:
    """All tokens of candidates, ``[B, M, S + 1]``."""
    past = sequences.gather(1, candidates.parent[..., None].expand(-1, -1, sequences.shape[2]))
    return torch.cat([past, candidates.token[..., None]], 2)


def _compact(cache: KVCache, prompt_length: int, visible: Tensor) -> Tensor:
    """Frees slots that no running beam sees, if those are the most. Returns ``visible`` of the slots that stay."""
    alive = visible.any(1)  # [B, C]
    count = int(alive.sum(1).max())
    if 2 * count > alive.shape[1]:
        return visible
    slots = alive.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    cache.compact(prompt_length, slots)
    return visible.gather(2, slots[:, None].expand(-1, visible.shape[1], -1))


def _trace(request: Request, history: History, finished: Finished) -> GenerationOutput:
    """Goes back along the best hypotheses of each prompt, and puts together what belongs to them."""
    B, R = len(request.input_ids), request.config.num_return_sequences
    best = torch.arange(R, device=request.input_ids.device).expand(B, R)
    last, end = finished.last.take(best), finished.step.gather(1, best)
    N = int(end.max()) + 1
    tokens = torch.full((B, R, N), request.pad_token_id, device=best.device)
    logprobs = torch.zeros(B, R, N, dtype=torch.float32, device=best.device)
    sources = torch.zeros(B, R, N, dtype=torch.long, device=best.device)  # the beam whose distribution a token is from
    beam = last.parent
    for step in reversed(range(N)):
        before, is_last, is_part = history.chosen[step].take(beam), end == step, end >= step
        tokens[..., step] = torch.where(is_last, last.token, before.token).where(is_part, request.pad_token_id)
        logprobs[..., step] = torch.where(is_last, last.logprob, before.logprob)
        sources[..., step] = beam = torch.where(is_last, last.parent, before.parent).where(is_part, beam)

    def along(steps: list[Tensor]) -> Tensor | None:
        """``[B, K, X]`` a step, as ``[B * R, N, X]`` along the hypotheses."""
        if not steps:
            return None
        rows = [t.gather(1, sources[:, :, n, None].expand(-1, -1, t.shape[2])) for n, t in enumerate(steps[:N])]
        return torch.stack(rows, 2).flatten(0, 1) if rows else steps[0].new_zeros(B * R, 0, steps[0].shape[2])

    prompts = request.input_ids.repeat_interleave(R, dim=0)
    return GenerationOutput(
        torch.cat([prompts, tokens.flatten(0, 1)], dim=1),
        tuple((end + 1).flatten().tolist()),
        tuple(STOP_REASONS[reason] for reason in last.reason.flatten().tolist()),
        finished.scores.gather(1, best).flatten(),
        along(history.scores),
        logprobs.flatten(0, 1) if request.config.output_logprobs else None,
        along([ids for _, ids in history.top]),
        along([values for values, _ in history.top]),
    )

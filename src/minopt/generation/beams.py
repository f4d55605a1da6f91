"""Beam search and beam sampling, with the results of transformers' ``generate``.

The cache has one row a prompt: the prompt's keys and values once, then those of all beams' tokens in the order in which
they were read. A mask says which of them belong to a beam. So a step that drops some beams and continues others twice
moves rows of that mask and no keys or values, and each step reads the prompt's once for all beams.

Shapes: B prompts, K beams, M texts, T prompt tokens (padding included), N the most new tokens, C slots of the cache
after the prompt, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.options import GenerationConfig
from minopt.generation.request import EXHAUSTED, RUNNING, STOP_REASONS, GenerationOutput, Request, Stopper, refuse
from minopt.masks import beam_mask, positions, with_new_tokens

# Steps between two searches for slots that no running beam needs any more.
COMPACT_EVERY = 16


@dataclass
class Texts:
    """M texts of each prompt: the running beams, their continuations, or finished hypotheses, best first."""

    scores: Tensor  # [B, M] sums of log-probabilities, or with the length penalty; -inf: there is no such text
    lengths: Tensor  # [B, M] new tokens
    reasons: Tensor  # [B, M] numbers in STOP_REASONS
    ids: Tensor  # [B, M, T + N] the prompt included
    logprobs: Tensor  # [B, M, N] of each new token under the model's own distribution
    sources: Tensor  # [B, M, N] the beam from whose distribution each new token is

    def take(self, pick: Tensor) -> Texts:
        """The texts of indices ``[B, R]``."""
        tensors = []
        for tensor in vars(self).values():
            index = pick if tensor.ndim == 2 else pick[..., None].expand(-1, -1, tensor.shape[2])
            tensors.append(tensor.gather(1, index))
        return Texts(*tensors)

    def best(self, other: Texts) -> Texts:
        """The best texts of both, as many as there are here."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        both = Texts(*(torch.cat(pair, 1) for pair in pairs))
        return both.take(both.scores.topk(self.scores.shape[1]).indices)


@torch.inference_mode()
def beam_search(request: Request) -> GenerationOutput:
    """Continues each prompt with its ``num_return_sequences`` best hypotheses, best first."""
    decoder, config = request.decoder, request.config
    (B, begin), T, device = request.input_ids.shape, request.prompt_length, decoder.device
    K, N = config.num_beams, config.max_new_tokens
    stopper, rules = Stopper(request), request.rules(request.padding(K))
    cache = decoder.new_cache(B, T + K * (N - 1))
    logits = request.read_prompts(cache)[:, None].expand(-1, K, -1)  # [B, K, V]
    position_ids = positions(with_new_tokens(request.attention_mask, 1), T, 1, device).expand(B, K)
    running = _no_texts(request)
    running.scores[:, 0] = 0.0  # K equal beams would find each continuation K times
    finished = _no_texts(request)
    is_open = torch.ones(B, dtype=torch.bool, device=device)  # whether a row's finished hypotheses may still change
    visible = torch.zeros(B, K, 0, dtype=torch.bool, device=device)  # [B, K, C] which slots belong to a beam
    own = torch.eye(K, dtype=torch.bool, device=device).expand(B, -1, -1)
    seen: list[dict[str, Any]] = []  # what the options ask for of each step
    for step in range(N):
        logprobs = logits.flatten(0, 1).float().log_softmax(-1)
        scores = logprobs
        for rule in rules:
            scores = rule(running.ids[..., : begin + step].flatten(0, 1), scores)
        logprobs, scores = logprobs.view(B, K, -1), scores.view(B, K, -1)
        seen.append({"scores": scores} if config.output_scores else {})
        if config.top_logprobs:
            seen[-1]["top_logprobs"], seen[-1]["top_token_ids"] = logprobs.topk(config.top_logprobs)
        candidates = _candidates(request, running, scores, logprobs, step)
        texts = candidates.ids[..., : begin + step + 1].flatten(0, 1)
        candidates.reasons = stopper(candidates.ids[..., begin + step], step + 1, texts)
        ends = candidates.reasons != RUNNING
        finished = finished.best(_ended(candidates, config, step + 1, ends & is_open[:, None]))
        # A row without any candidate ends with the beams that it has.
        best = candidates.scores.amax(1)
        exhausted, broken = is_open & (best == -torch.inf), is_open & ~(best < torch.inf)
        before, running = running, replace(candidates, scores=candidates.scores.masked_fill(ends, -torch.inf))
        running = running.take(running.scores.topk(K).indices)
        is_open = is_open & _may_improve(running.scores[:, 0], finished.scores[:, -1], step + 1, config)
        goes_on, some_exhausted, is_broken = torch.stack([is_open, exhausted, broken]).any(1).tolist()
        refuse(is_broken, step)
        if some_exhausted and step > 0:
            before.reasons.fill_(EXHAUSTED)
            finished = finished.best(_ended(before, config, step, exhausted[:, None].expand(-1, K)))
        if not goes_on:
            break
        parents = running.sources[..., step]
        visible = visible.gather(1, parents[..., None].expand(-1, -1, visible.shape[2]))
        if step % COMPACT_EVERY == COMPACT_EVERY - 1:
            visible = _compact(cache, T, visible)
        visible = torch.cat([visible, own], 2)
        mask = beam_mask(request.attention_mask, T, visible)
        logits = decoder.read(running.ids[..., begin + step], position_ids, mask, None, cache).view(B, K, -1)
        position_ids = position_ids + 1
    return _output(request, finished, seen)


def _no_texts(request: Request) -> Texts:
    """K places for texts of each prompt, all of them empty."""
    B, K, N = len(request.input_ids), request.config.num_beams, request.config.max_new_tokens
    ids = F.pad(request.input_ids, (0, N), value=request.pad_token_id)[:, None].expand(-1, K, -1)
    zeros = torch.zeros(B, K, N, dtype=torch.long, device=ids.device)
    logprobs = zeros.float()
    return Texts(logprobs[..., 0] - torch.inf, zeros[..., 0], zeros[..., 0].to(torch.int8), ids, logprobs, zeros)


def _candidates(request: Request, running: Texts, scores: Tensor, logprobs: Tensor, step: int) -> Texts:
    """The best continuations of all beams together, or as many drawn ones, best first.

    There are more than K, so that K can go on whichever of them end. ``scores`` and ``logprobs`` are ``[B, K, V]``.
    """
    K, V = scores.shape[1:]
    M = max(2, 1 + len(request.eos_token_ids)) * K
    if request.config.do_sample:
        flat = (scores + running.scores[..., None]).flatten(1)
        # Without replacement. multinomial refuses rows without any probability, or with NaN; those draw at random, and
        # their best score, which is no number, stands for what they drew.
        top = flat.amax(1, keepdim=True)
        probabilities = flat.softmax(-1).masked_fill(~top.isfinite(), 1.0)
        drawn = torch.multinomial(probabilities, min(M, K * V), generator=request.generator)
        index = request.decoder.agreed(drawn)
        values, order = torch.where(top.isfinite(), flat.gather(1, index), top).sort(descending=True)
        index = index.gather(1, order)  # the best come first here too: only the first K may end
    else:
        # The best of all are among the best of each beam: short rows to look through, and one pass over scores.
        values, token = _topk(scores, min(M, V))
        index = token + V * torch.arange(K, device=token.device)[:, None]
        values, pick = (values + running.scores[..., None]).flatten(1).topk(min(M, values[0].numel()))
        index = index.flatten(1).gather(1, pick)
    found = running.take(index // V)
    found.scores, found.lengths = values, found.lengths.fill_(step + 1)
    found.ids[..., request.input_ids.shape[1] + step] = index % V
    found.logprobs[..., step] = logprobs.flatten(1).gather(1, index)
    found.sources[..., step] = index // V
    return found


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


def _ended(texts: Texts, config: GenerationConfig, length: int, which: Tensor) -> Texts:
    """Makes hypotheses of the first K texts where ``which [B, M]`` is True; their length is ``length``."""
    first = Texts(*(tensor[:, : config.num_beams] for tensor in vars(texts).values()))
    scores = first.scores / length**config.length_penalty
    return replace(first, scores=scores.masked_fill(~which[:, : config.num_beams], -torch.inf))


def _may_improve(running: Tensor, worst: Tensor, length: int, config: GenerationConfig) -> Tensor:
    """Whether a row's best running beam may still pass the worst of its K finished hypotheses; ``[B]``."""
    if config.early_stopping is True:
        return (worst == -torch.inf) & (running > -torch.inf)
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_new_tokens
    return running / length**config.length_penalty > worst


def _compact(cache: KVCache, prompt_length: int, visible: Tensor) -> Tensor:
    """Frees slots that no running beam sees, if those are the most. Returns ``visible`` of the slots that stay."""
    alive = visible.any(1)  # [B, C]
    count = int(alive.sum(1).max())
    if 2 * count > alive.shape[1]:
        return visible
    slots = alive.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    cache.compact(prompt_length, slots)
    return visible.gather(2, slots[:, None].expand(-1, visible.shape[1], -1))


def _output(request: Request, finished: Texts, seen: list[dict[str, Any]]) -> GenerationOutput:
    T, R = request.input_ids.shape[1], request.config.num_return_sequences
    best = Texts(*(tensor[:, :R] for tensor in vars(finished).values()))
    nothing = best.scores == -torch.inf
    lengths, reasons = best.lengths.masked_fill(nothing, 0), best.reasons.masked_fill(nothing, EXHAUSTED)
    N = int(lengths.max())
    at = torch.arange(T + N, device=lengths.device)
    ids = best.ids[..., : T + N].where(at < T + lengths[..., None], request.pad_token_id)

    def along(name: str) -> Any:
        """What the steps have seen, ``[B, K, X]`` each, as ``[B * R, N, X]`` along the hypotheses."""
        sources = best.sources[..., None].expand(-1, -1, -1, seen[0][name].shape[2])
        rows = [parts[name].gather(1, sources[:, :, step]) for step, parts in enumerate(seen)]
        return torch.stack(rows, 2)[:, :, :N].flatten(0, 1)

    return GenerationOutput(
        ids.flatten(0, 1),
        tuple(lengths.flatten().tolist()),
        tuple(STOP_REASONS[reason] for reason in reasons.flatten().tolist()),
        best.scores.flatten(),
        logprobs=best.logprobs[..., :N].flatten(0, 1) if request.config.output_logprobs else None,
        **{name: along(name) for name in seen[0]},
    )

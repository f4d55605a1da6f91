"""``generate``, and greedy decoding and sampling: one loop over prefill and single steps.

Shapes: B prompts, R rows (a prompt's continuations side by side), T prompt tokens (padding included), N new tokens, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minopt.generation.beam import beam_search
from minopt.generation.config import GenerationConfig
from minopt.generation.logits import Rule
from minopt.generation.lookup import PromptLookup
from minopt.generation.request import (
    EXHAUSTED,
    RUNNING,
    STOP_REASONS,
    Criterion,
    Decoder,
    GenerationOutput,
    Request,
    prepare,
    refuse,
)


@dataclass(frozen=True)
class Step:
    """One step of all rows.

    Attributes:
        tokens: ``[R]``, padding in rows without a new one.
        is_new: ``[R]``, whether a row got a token.
        reasons: ``[R]``, the number in ``STOP_REASONS`` of a row that has ended, now or before; else 0.
        scores, logprobs, top_token_ids, top_logprobs: as in ``GenerationOutput``, of this step.
        drafted_tokens, accepted_tokens: as in ``GenerationOutput``, so far.
    """

    tokens: Tensor
    is_new: Tensor
    reasons: Tensor
    scores: Tensor | None = None
    logprobs: Tensor | None = None
    top_token_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    drafted_tokens: tuple[int, ...] | None = None
    accepted_tokens: tuple[int, ...] | None = None


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    *,
    logits_processor: Rule | Sequence[Rule] | None = None,
    stopping_criteria: Criterion | Sequence[Criterion] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> GenerationOutput:
    """Continues each row of ``input_ids``. A model in ``train()`` mode drops out here too: call ``eval()`` first.

    Args:
        decoder: usually an ``OPT``.
        input_ids: ``[B, T]`` integer ids on any device, shorter prompts padded on the left.
        attention_mask: ``[B, T]``, 1 = real, 0 = padding; ``None`` if nothing is padded.
        config: how; ``None`` is ``GenerationConfig()``.
        logits_processor: your own rules, functions of the tokens so far ``[R, S]`` and their float32 scores ``[R, V]``
            (log-probabilities in beam search) to new scores; transformers' processors are such functions.
        stopping_criteria: functions of the tokens so far ``[R, S]`` and ``None`` to booleans ``[R]``, True = the row
            ends here; transformers' criteria are such functions.
        generator: source of the draws, on the decoder's device; instead of ``seed``.
        **options: single options of ``GenerationConfig``, over ``config``'s.

    Returns:
        A ``GenerationOutput``, its tensors on the decoder's device.

    Raises:
        ValueError: if an option is unknown or makes no sense, ids are outside of the vocabulary, the prompt and
            ``max_new_tokens`` exceed the model's positions, padding is not on the left, or there is a generator
            beside a seed or without sampling; nothing has run then. And if scores are no numbers (NaN).
    """
    if not isinstance(config, GenerationConfig | None):
        raise ValueError(f"config: expected a minopt.GenerationConfig, got {type(config).__name__}.")
    config = (config or GenerationConfig()).replace(**options)
    request = prepare(decoder, input_ids, attention_mask, config, logits_processor, stopping_criteria, generator)
    return run(request)


def run(request: Request) -> GenerationOutput:
    """What ``generate`` does once its arguments are checked."""
    request, config = request.on_device(), request.config
    if config.num_beams > 1:
        return beam_search(request)
    steps = list(decode_steps(request))
    lengths = torch.stack([step.is_new for step in steps]).sum(0).tolist()

    def stacked(name: str) -> Tensor | None:
        values = [getattr(step, name) for step in steps]
        return None if values[0] is None else torch.stack(values, dim=1)[:, : max(lengths)]

    tokens = stacked("tokens")
    assert tokens is not None
    return GenerationOutput(
        torch.cat([request.input_ids.repeat_interleave(config.num_return_sequences, dim=0), tokens], dim=1),
        tuple(lengths),
        tuple(STOP_REASONS[reason] for reason in steps[-1].reasons.tolist()),
        **{name: stacked(name) for name in ("scores", "logprobs", "top_token_ids", "top_logprobs")},
        drafted_tokens=steps[-1].drafted_tokens,
        accepted_tokens=steps[-1].accepted_tokens,
    )


@torch.inference_mode()
def decode_steps(request: Request) -> Iterator[Step]:
    """The loop of greedy decoding and sampling: yields each step as it is made, until every row has ended."""
    decoder, config, copies = request.decoder, request.config, request.config.num_return_sequences
    (B, T), N = request.input_ids.shape, config.max_new_tokens
    rules, stopper = request.rules(copies), request.stopper()
    cache = decoder.new_cache(B, T + N)
    logits = decoder.prefill(request.input_ids, request.attention_mask, cache)
    sequences = torch.nn.functional.pad(request.input_ids, (0, N), value=request.pad_token_id)
    mask = None if request.attention_mask is None else torch.nn.functional.pad(request.attention_mask, (0, N), value=1)
    if copies > 1:
        cache.expand(copies)
        logits, sequences = (t.repeat_interleave(copies, dim=0) for t in (logits, sequences))
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
    reasons = torch.zeros(B * copies, dtype=torch.int8, device=decoder.device)
    running = is_new = reasons == RUNNING
    lookup = None if config.prompt_lookup_num_tokens is None else PromptLookup(request, cache)
    all_run = goes_on = True
    for length in range(T, T + N):
        scores = logits.float()
        for rule in rules:
            scores = rule(sequences[:, :length], scores)
        best, tokens = scores.max(-1)
        if config.do_sample:
            tokens = _draw(scores, request.generator)
        found = _asked_for(config, logits, scores, tokens)
        sequences[:, length] = tokens
        ends = stopper(tokens, length + 1 - T, sequences[:, : length + 1])
        if not (all_run and _all_go_on(best, ends)):  # seldom: until a row ends, the tensors of before hold
            has_token = best.abs() < torch.inf
            broken = running & ~has_token & (best != -torch.inf)
            is_new = running & has_token
            tokens = tokens.where(is_new, request.pad_token_id)
            sequences[:, length] = tokens
            reasons = torch.where(running, ends.masked_fill(~has_token, EXHAUSTED), reasons)
            running, all_run = reasons == RUNNING, False
            goes_on, is_broken = torch.stack([running, broken]).any(1).tolist()
            refuse(is_broken, length - T)
        if lookup is not None:
            found |= lookup.counts()
        yield Step(tokens, is_new, reasons, **found)
        if not goes_on:
            return
        if lookup is not None:
            logits = lookup.read(tokens, running)
        else:
            logits = decoder.decode_step(tokens[:, None], None if mask is None else mask[:, : length + 1], cache)


def _asked_for(config: GenerationConfig, logits: Tensor, scores: Tensor, tokens: Tensor) -> dict[str, Any]:
    """The parts of a ``Step`` that the configuration asks for."""
    found = {}
    if config.output_scores:
        found["scores"] = scores.clone()  # without rules it is the decoder's own tensor
    if config.output_logprobs or config.top_logprobs:
        logprobs = logits.float().log_softmax(-1)
        if config.output_logprobs:
            found["logprobs"] = logprobs.gather(1, tokens[:, None])[:, 0]
        if config.top_logprobs:
            found["top_logprobs"], found["top_token_ids"] = logprobs.topk(config.top_logprobs)
    return found


def _all_go_on(best: Tensor, ends: Tensor) -> bool:
    """Whether each row has a token and goes on: looked up on the host, where it costs less than a few small kernels."""
    return all(-math.inf < score < math.inf for score in best.tolist()) and not any(ends.tolist())


def _draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token of each row, by its probability. Rows whose scores are no numbers draw any, which is not used.

    By the inverse of the cumulated distribution, in float64: one random number a row, where ``torch.multinomial`` takes
    one for each token of the vocabulary.
    """
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator)
    # The first token whose sum exceeds the number: never one without probability.
    drawn = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp(max=scores.shape[1] - 1)

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

from minopt.generation.beams import beam_search
from minopt.generation.drafts import PromptLookup
from minopt.generation.draws import draw, random_numbers
from minopt.generation.options import GenerationConfig, with_defaults
from minopt.generation.request import (
    EXHAUSTED,
    RUNNING,
    STOP_REASONS,
    Criterion,
    Decoder,
    GenerationOutput,
    Request,
    Stopper,
    prepare,
    refuse,
)
from minopt.generation.rules import Rule
from minopt.masks import positions, step_mask, with_new_tokens

# Steps from one look of the host at what came out to the next, on devices that would have to wait for it.
LOOK_EVERY = 8


@dataclass(frozen=True)
class Step:
    """One step of all rows.

    Attributes:
        tokens: ``[R]``, padding in rows without a new one.
        is_new: ``[R]``, whether a row got a token.
        reasons: ``[R]``, the number in ``STOP_REASONS`` of a row that has ended, now or before; else 0.
        asked_for: this step's part of ``scores``, ``logprobs``, ``top_token_ids`` and ``top_logprobs`` of a
            ``GenerationOutput``, if the options ask for them.
        drafts: ``drafted_tokens`` and ``accepted_tokens`` of a ``GenerationOutput`` so far, with prompt lookup.
    """

    tokens: Tensor
    is_new: Tensor
    reasons: Tensor
    asked_for: dict[str, Any]
    drafts: dict[str, Any]


def generate(
    decoder: Decoder,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    logits_processor: Rule | Sequence[Rule] | None = None,
    stopping_criteria: Criterion | Sequence[Criterion] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> GenerationOutput:
    """Continues each row of ``input_ids``. Dropout is active if the model is in training mode: call ``eval()`` first.

    Args:
        decoder: usually an ``OPT``.
        input_ids: ``[B, T]`` integer ids on any device, shorter prompts padded on the left.
        attention_mask: ``[B, T]``, 1 = real, 0 = padding; ``None`` if nothing is padded.
        config: the options; ``None`` is ``GenerationConfig()``.
        inputs_embeds: ``[B, T, E]`` floats in place of ``input_ids``, for soft prompts and the like (see
            ``OPT.hidden_states``). The output, rules and criteria then have the new tokens alone.
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
    config = with_defaults({}, options, config)
    more = logits_processor, stopping_criteria, generator
    return run(prepare(decoder, input_ids, attention_mask, config, *more, inputs_embeds=inputs_embeds))


def run(request: Request) -> GenerationOutput:
    """Does what ``generate`` does once its arguments are checked."""
    request = request.on_device()
    if request.config.num_beams > 1:
        return beam_search(request)
    steps = list(decode_steps(request, steps_between_looks(request)))
    lengths, last = torch.stack([step.is_new for step in steps]).sum(0).tolist(), steps[-1]

    def stacked(parts: list[Tensor]) -> Any:
        return torch.stack(parts, dim=1)[:, : max(lengths)]

    prompts = request.input_ids.repeat_interleave(request.config.num_return_sequences, dim=0)
    return GenerationOutput(
        torch.cat([prompts, stacked([step.tokens for step in steps])], dim=1),
        tuple(lengths),
        tuple(STOP_REASONS[reason] for reason in last.reasons.tolist()),
        **{name: stacked([step.asked_for[name] for step in steps]) for name in last.asked_for},
        **last.drafts,
    )


def steps_between_looks(request: Request) -> int:
    """How many steps may pass until the host looks whether any row goes on.

    One on a CPU, where this costs nothing. One if a user's function or the clock must not see a step after the last
    one, or if the host has to know each token.
    """
    config = request.config
    must_look = bool(request.logits_processor or request.stopping_criteria or config.max_time is not None)
    must_look |= request.decoder.device.type == "cpu" or config.prompt_lookup_num_tokens is not None
    return 1 if must_look else LOOK_EVERY


@torch.inference_mode()
def decode_steps(request: Request, look_every: int = 1) -> Iterator[Step]:
    """The loop of greedy decoding and sampling: yields each step as it is made, until every row has ended.

    The host checks every ``look_every`` steps whether all rows have ended and whether scores are numbers. So up to
    ``look_every - 1`` steps without a new token may follow the last one.
    """
    decoder, config, copies = request.decoder, request.config, request.config.num_return_sequences
    (B, begin), T, N = request.input_ids.shape, request.prompt_length, config.max_new_tokens
    device = decoder.device
    rules, stopper = request.rules(copies), Stopper(request)
    cache = decoder.new_cache(B * copies, T + N)
    prompts = cache.first_rows(B)
    logits = request.read_prompts(prompts)
    cache.repeat_rows(prompts)
    sequences = torch.nn.functional.pad(request.input_ids, (0, N), value=request.pad_token_id)
    real = with_new_tokens(request.attention_mask, N)
    position_ids = positions(real, T, 1, device).expand(B, 1)
    if copies > 1:
        logits, sequences, position_ids = (
            t.repeat_interleave(copies, dim=0) for t in (logits, sequences, position_ids)
        )
        real = None if real is None else real.repeat_interleave(copies, dim=0)
    lookup = None if config.prompt_lookup_num_tokens is None else PromptLookup(request, cache)
    draws = random_numbers(N, B * copies, request) if config.do_sample else None
    reasons = torch.zeros(B * copies, dtype=torch.int8, device=device)
    running = is_new = reasons == RUNNING
    none_has_ended = look_every == 1 and device.type == "cpu"  # which only there is known without waiting
    broken_at = torch.full((B * copies,), N, device=device)  # the step in which a row's scores are no numbers
    for step in range(N):
        length = begin + step
        scores = logits.float()
        for rule in rules:
            scores = rule(sequences[:, :length], scores)
        best, tokens = scores.max(-1)
        if draws is not None:
            tokens = draw(scores, draws[step])
        asked_for = _asked_for(config, logits, scores, tokens)
        sequences[:, length] = tokens
        ends, any_runs = stopper(tokens, step + 1, sequences[:, : length + 1]), True
        none_has_ended = none_has_ended and _all_go_on(best, ends)
        if not none_has_ended:
            running, has_token = reasons == RUNNING, best.abs() < torch.inf
            is_broken = running & ~has_token & (best != -torch.inf)  # -inf: the rules left no token
            broken_at = torch.where(is_broken, step, broken_at)
            reasons = torch.where(running, ends.masked_fill(~has_token, EXHAUSTED), reasons)
            is_new, running = running & has_token, reasons == RUNNING
            tokens = tokens.where(is_new, request.pad_token_id)
            sequences[:, length] = tokens
            if (step + 1) % look_every == 0 or step == N - 1:
                any_runs, first_broken = torch.stack([running.any(), broken_at.min()]).tolist()
                refuse(first_broken < N, first_broken)
        yield Step(tokens, is_new, reasons, asked_for, {} if lookup is None else lookup.counts())
        if not any_runs:
            return
        if lookup is not None:
            logits = lookup.read(tokens, running)
        else:
            logits = decoder.read(tokens[:, None], position_ids, step_mask(real, T + step + 1), None, cache)
            position_ids = position_ids + 1


def _all_go_on(best: Tensor, ends: Tensor) -> bool:
    """Whether each row has a token and goes on, in Python: on a CPU that is faster than a dozen small kernels."""
    return all(-math.inf < score < math.inf for score in best.tolist()) and not any(ends.tolist())


def _asked_for(config: GenerationConfig, logits: Tensor, scores: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The parts of a ``Step`` that the configuration asks for."""
    parts = {}
    if config.output_scores:
        parts["scores"] = scores.clone()  # without rules it is the decoder's own tensor
    if config.output_logprobs or config.top_logprobs:
        logprobs = logits.float().log_softmax(-1)
        if config.output_logprobs:
            parts["logprobs"] = logprobs.gather(1, tokens[:, None])[:, 0]
        if config.top_logprobs:
            parts["top_logprobs"], parts["top_token_ids"] = logprobs.topk(config.top_logprobs)
    return parts

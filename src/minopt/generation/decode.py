"""``generate``, and greedy decoding and sampling: one loop over prefill and single steps.

Shapes: B prompts, R rows (a prompt's continuations side by side), T prompt tokens (padding included), N new tokens, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.beams import beam_search
from minopt.generation.decoder import Decoder
from minopt.generation.drafts import Drafts
from minopt.generation.draws import draw, random_numbers
from minopt.generation.options import GenerationConfig, with_defaults
from minopt.generation.request import (
    EXHAUSTED,
    RUNNING,
    STOP_REASONS,
    Criterion,
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
        drafts: ``drafted_tokens`` and ``accepted_tokens`` of a ``GenerationOutput`` so far, with drafts.
    """

    tokens: Tensor
    is_new: Tensor
    reasons: Tensor
    asked_for: dict[str, Any]
    drafts: dict[str, Any] = field(default_factory=dict)


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
    draft: Any = None,
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
        draft: a smaller model with the same vocabulary, which says how the text may go on. The decoder reads all of
            that in one pass, and chooses as it would without, also when it samples.
        **options: single options of ``GenerationConfig``, over ``config``'s.

    Returns:
        A ``GenerationOutput``, its tensors on the decoder's device.

    Raises:
        ValueError: if an option is unknown or makes no sense, ids are outside of the vocabulary, the prompt and
            ``max_new_tokens`` exceed the model's positions, padding is not on the left, there is a generator
            beside a seed or without sampling, or the draft does not fit; nothing has run then. And if scores are no
            numbers (NaN).
    """
    config = with_defaults({}, options, config)
    more = logits_processor, stopping_criteria, generator
    return run(prepare(decoder, input_ids, attention_mask, config, *more, inputs_embeds=inputs_embeds, draft=draft))


def run(request: Request) -> GenerationOutput:
    """Does what ``generate`` does once its arguments are checked."""
    request = request.on_device()
    if request.config.num_beams > 1:
        return beam_search(request)
    steps = list(decode_steps(request, steps_between_looks(request)))
    prompts = request.input_ids.repeat_interleave(request.config.num_return_sequences, dim=0)
    return output_of(prompts, stacked(steps), steps[-1].reasons, **steps[-1].drafts)


def stacked(steps: Sequence[Step]) -> dict[str, Tensor]:
    """All that steps hold of each new token, ``[R, N, ...]`` each, by its name."""
    every = [{"tokens": step.tokens, "is_new": step.is_new, **step.asked_for} for step in steps]
    return {name: torch.stack([parts[name] for parts in every], dim=1) for name in every[0]}


def output_of(prompts: Tensor, parts: dict[str, Tensor], reasons: Tensor, **drafts: Any) -> GenerationOutput:
    """What was found for rows with these prompts ``[R, T]``; ``parts`` is what ``stacked`` gives."""
    lengths = parts["is_new"].sum(1).tolist()
    new = {name: part[:, : max(lengths)] for name, part in parts.items() if name != "is_new"}
    sequences = torch.cat([prompts, new.pop("tokens")], dim=1)
    names = tuple(STOP_REASONS[reason] for reason in reasons.tolist())
    more: dict[str, Any] = new | drafts
    return GenerationOutput(sequences, tuple(lengths), names, **more)


def steps_between_looks(request: Request) -> int:
    """How many steps may pass until the host looks whether any row goes on.

    One on a CPU, where this costs nothing. One if a user's function or the clock must not see a step after the last
    one, or if the host has to know each token.
    """
    config = request.config
    must_look = bool(request.logits_processor or request.stopping_criteria or config.max_time is not None)
    must_look |= request.decoder.device.type == "cpu" or request.reads_ahead
    return 1 if must_look else LOOK_EVERY


@torch.inference_mode()
def decode_steps(request: Request, look_every: int = 1) -> Iterator[Step]:
    """The loop of greedy decoding and sampling: yields each step as it is made, until every row has ended.

    The host checks every ``look_every`` steps whether all rows have ended and whether scores are numbers. So up to
    ``look_every - 1`` steps without a new token may follow the last one.
    """
    decoder, T, N = request.decoder, request.prompt_length, request.config.max_new_tokens
    rows = Rows(request, look_every)
    cache = decoder.new_cache(len(rows.sequences), T + N)
    logits, real, position_ids = rows.begin(cache)
    drafts = Drafts(request, cache, rows.sequences, rows.draws) if request.reads_ahead else None
    while True:
        step = rows.step(logits)
        yield step if drafts is None else replace(step, drafts=drafts.counts())
        if not rows.any_runs or rows.count == N:  # on tensors without numbers, rows always run
            return
        if drafts is not None:
            logits = drafts.read(step.tokens, rows.running)
        else:
            logits = decoder.read(step.tokens[:, None], position_ids, step_mask(real, T + rows.count), None, cache)
            position_ids = position_ids + 1


class Rows:
    """Rows that begin together: turns the logits after their newest tokens into the next tokens.

    Attributes:
        sequences: ``[R, T + N]`` the ids so far, those of the prompts included.
        running: ``[R]``, whether a row goes on.
        any_runs: whether any does, as far as the host has looked.
        none_has_ended: whether all do, known without waiting.
        draws: the random numbers of sampling, ``[N, R, 1]``.
        count: steps so far.
    """

    def __init__(self, request: Request, look_every: int = 1) -> None:
        config, copies, device = request.config, request.config.num_return_sequences, request.decoder.device
        self.request, self.look_every, self.count, self.any_runs = request, look_every, 0, True
        self._stopper, self._padding = Stopper(request), request.padding(copies)  # the clock runs from here on
        self._rules = request.rules(self._padding)
        sequences = torch.nn.functional.pad(request.input_ids, (0, config.max_new_tokens), value=request.pad_token_id)
        self.sequences = sequences.repeat_interleave(copies, dim=0) if copies > 1 else sequences
        R = len(self.sequences)
        self.draws = random_numbers(config.max_new_tokens, R, request) if config.do_sample else None
        self._reasons = torch.zeros(R, dtype=torch.int8, device=device)
        self.running = self._is_new = self._reasons == RUNNING
        self.none_has_ended = look_every == 1 and device.type == "cpu"  # which only there is known without waiting
        # The step in which a row's scores are no numbers.
        self._broken_at = torch.full((R,), config.max_new_tokens, device=device)

    def begin(self, cache: KVCache) -> tuple[Tensor, Tensor | None, Tensor]:
        """Reads the prompts into an empty cache of these rows.

        Returns:
            The logits ``[R, V]`` after them, which tokens are real (``[R, T + N]``, ``None`` for all), and the
            positions ``[R, 1]`` of the next tokens.
        """
        request, copies = self.request, self.request.config.num_return_sequences
        B, T = len(request.input_ids), request.prompt_length
        prompts = cache.rows(0, B)
        logits = request.read_prompts(prompts)
        cache.repeat_rows(prompts)
        real = with_new_tokens(request.attention_mask, request.config.max_new_tokens)
        position_ids = positions(real, T, 1, request.decoder.device).expand(B, 1)
        if copies > 1:
            logits, position_ids = (t.repeat_interleave(copies, dim=0) for t in (logits, position_ids))
            real = None if real is None else real.repeat_interleave(copies, dim=0)
        return logits, real, position_ids

    def step(self, logits: Tensor) -> Step:
        """The next step, from the logits ``[R, V]`` after the newest tokens."""
        config, sequences, step = self.request.config, self.sequences, self.count
        length = self.request.input_ids.shape[1] + step
        self.count = step + 1
        scores = logits.float()
        for rule in self._rules:
            scores = rule(sequences[:, :length], scores)
        best, tokens = scores.max(-1)
        if self.draws is not None:
            tokens = draw(scores, self.draws[step])
        asked_for = _asked_for(config, logits, scores, tokens)
        sequences[:, length] = tokens
        ends = self._stopper(tokens, step + 1, sequences[:, : length + 1])
        self.none_has_ended = self.none_has_ended and _all_go_on(best, ends)
        if not self.none_has_ended:
            running, has_token = self._reasons == RUNNING, best.abs() < torch.inf
            is_broken = running & ~has_token & (best != -torch.inf)  # -inf: the rules left no token
            self._broken_at = torch.where(is_broken, step, self._broken_at)
            self._reasons = torch.where(running, ends.masked_fill(~has_token, EXHAUSTED), self._reasons)
            self._is_new, self.running = running & has_token, self._reasons == RUNNING
            tokens = tokens.where(self._is_new, self.request.pad_token_id)
            sequences[:, length] = tokens
            if (step + 1) % self.look_every == 0 or step == config.max_new_tokens - 1:
                self.any_runs, first_broken = torch.stack([self.running.any(), self._broken_at.min()]).tolist()
                refuse(first_broken < config.max_new_tokens, first_broken)
        return Step(tokens, self._is_new, self._reasons, asked_for)

    def keep(self, index: Tensor) -> None:
        """Goes on with some of the rows alone, on a CPU."""
        self.sequences, self._padding, self._reasons = (
            tensor[index] for tensor in (self.sequences, self._padding, self._reasons)
        )
        self._is_new, self._broken_at = self._is_new[index], self._broken_at[index]
        self.draws = None if self.draws is None else self.draws[:, index]
        self._rules, self.running = self.request.rules(self._padding), self._reasons == RUNNING
        self.none_has_ended = bool(self.running.all())


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

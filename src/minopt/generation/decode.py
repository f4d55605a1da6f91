"""Greedy decoding and sampling on token ids: one loop over prefill and single steps.

Shapes: B rows, T prompt tokens (padding included), N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minopt.config import OPTConfig
from minopt.generation.config import GenerationConfig
from minopt.generation.logits import build_rules


class Decoder(Protocol):
    """What generation drives: an ``OPT``, or a program that does the same."""

    config: OPTConfig

    @property
    def device(self) -> torch.device:
        """Where ids must be."""

    def new_cache(self, batch_size: int, capacity: int) -> Any:
        """State for ``batch_size`` rows of up to ``capacity`` tokens; only the decoder looks inside."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
        """Reads prompts ``[B, T]``; returns the logits ``[B, V]`` behind their last token."""

    def decode_step(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
        """Reads one more token a row, ``[B, 1]``; returns the logits ``[B, V]`` behind it."""


@dataclass(frozen=True)
class GenerationOutput:
    """What ``generate`` found.

    Attributes:
        sequences: ``[B, T + N]`` int64: the prompt as given, then the new tokens; a row that ended goes on in padding.
        lengths: how many new tokens each row has, the one that ended it included.
        stop_reasons: ``"eos"`` or ``"length"``, a row each.
        scores: ``[B, N, V]`` float32, after all rules, if ``output_scores`` asked for it.
        logprobs: ``[B, N]`` float32, if ``output_logprobs`` asked for it: of each new token under the model's own
            distribution, before any rule. Without a meaning behind a row's length.
    """

    sequences: Tensor
    lengths: tuple[int, ...]
    stop_reasons: tuple[str, ...]
    scores: Tensor | None = None
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One new token a row: ``tokens [B]``, ``ended [B]`` (True from a row's eos on), and what was asked for."""

    tokens: Tensor
    ended: Tensor
    scores: Tensor | None
    logprobs: Tensor | None


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> GenerationOutput:
    """Continues each row of ``input_ids``. A model in ``train()`` mode drops out here too: call ``eval()`` first.

    Args:
        decoder: usually an ``OPT``.
        input_ids: ``[B, T]`` integer ids on any device, shorter prompts padded on the left.
        attention_mask: ``[B, T]``, 1 = real, 0 = padding; ``None`` if nothing is padded.
        config: how; ``None`` is ``GenerationConfig()``.
        generator: source of the draws, on the decoder's device; instead of ``seed``.
        **options: single options of ``GenerationConfig``, over ``config``'s.

    Returns:
        A ``GenerationOutput``, its tensors on the decoder's device.

    Raises:
        ValueError: if an option is unknown or makes no sense, ids are outside of the vocabulary, the prompt and
            ``max_new_tokens`` exceed the model's positions, padding is not on the left, or there is a generator
            beside a seed or without sampling. Nothing has run then.
    """
    config = (config or GenerationConfig()).replace(**options)
    input_ids, attention_mask = check_prompt(decoder, input_ids, attention_mask, config, generator)
    steps = list(decode_steps(decoder, input_ids, attention_mask, config, generator))
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    ended = torch.stack([step.ended for step in steps], dim=1)
    # A row's length is the number of steps before which it had not ended.
    lengths = tuple((1 + (~ended[:, :-1]).sum(1)).tolist())
    stop_reasons = tuple("eos" if end else "length" for end in ended[:, -1].tolist())
    scores = [step.scores for step in steps if step.scores is not None]
    logprobs = [step.logprobs for step in steps if step.logprobs is not None]
    return GenerationOutput(
        torch.cat([input_ids, tokens], dim=1),
        lengths,
        stop_reasons,
        torch.stack(scores, dim=1) if scores else None,
        torch.stack(logprobs, dim=1) if logprobs else None,
    )


@torch.inference_mode()
def decode_steps(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """The loop: yields each step's tokens as they come, until every row has ended or has ``max_new_tokens``.

    Takes what ``check_prompt`` returns; the other arguments are ``generate``'s.
    """
    B, T = input_ids.shape
    eos_token_ids = _eos_token_ids(decoder, config)
    pad = _pad_token_id(decoder, config)
    rules = build_rules(config, T, eos_token_ids, decoder.device)
    eos = torch.tensor(eos_token_ids, device=decoder.device, dtype=torch.long)
    generator = _generator(decoder, config, generator)
    N = config.max_new_tokens
    sequences = torch.cat([input_ids, input_ids.new_full((B, N), pad)], dim=1)
    mask = None
    if attention_mask is not None:
        mask = torch.cat([attention_mask, attention_mask.new_ones((B, N))], dim=1)
    cache = decoder.new_cache(B, T + N)
    ended = torch.zeros(B, dtype=torch.bool, device=decoder.device)
    logits = decoder.prefill(input_ids, attention_mask, cache)
    for length in range(T, T + N):
        scores = logits.float()
        for rule in rules:
            scores = rule(sequences[:, :length], scores)
        tokens = _draw(scores, generator) if config.do_sample else scores.argmax(-1)
        logprobs = None
        if config.output_logprobs:
            logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        tokens = tokens.masked_fill(ended, pad)
        ended = ended | (tokens[:, None] == eos).any(1)
        sequences[:, length] = tokens
        yield Step(tokens, ended, scores if config.output_scores else None, logprobs)
        if length + 1 == T + N or (eos_token_ids and bool(ended.all())):
            return
        logits = decoder.decode_step(tokens[:, None], None if mask is None else mask[:, : length + 1], cache)


def check_prompt(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Prompt (int64) and mask (bool) on the decoder's device.

    Raises:
        ValueError: as ``generate`` says.
    """
    if generator is not None and config.seed is not None:
        raise ValueError("generation: give a seed or a generator, not both.")
    if generator is not None and not config.do_sample:
        raise ValueError("generation: a generator acts on sampling only, and do_sample is off.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: expected [batch, tokens] with at least one of each, got {list(input_ids.shape)}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}.")
    least, most = (int(i) for i in input_ids.aminmax())
    rows = decoder.config.vocab_size
    if least < 0 or most >= rows:
        raise ValueError(
            f"input_ids: expected ids from 0 to {rows - 1}, got {least if least < 0 else most}. "
            "Do the tokenizer and the model belong together?"
        )
    longest = input_ids.shape[1]
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}."
            )
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: expected padding on the left, got some at the end of a row.")
        longest = int(attention_mask.bool().sum(1).max())
    limit = decoder.config.max_position_embeddings
    if longest + config.max_new_tokens > limit:
        raise ValueError(
            f"prompt: {longest} tokens + max_new_tokens {config.max_new_tokens} = {longest + config.max_new_tokens} "
            f"positions, the model has {limit}. Shorten the prompt, or ask for at most {max(0, limit - longest)}."
        )
    named = (*config.suppress_tokens, *_eos_token_ids(decoder, config), _pad_token_id(decoder, config))
    outside = [i for i in named if i >= rows]
    if outside:
        raise ValueError(f"generation: expected ids from 0 to {rows - 1} in options, got {outside[0]}.")
    excluded = {*config.suppress_tokens, *(_eos_token_ids(decoder, config) if config.min_new_tokens > 0 else ())}
    if len(excluded) == rows:
        raise ValueError(f"generation: suppress_tokens holds all {rows} ids, which leaves nothing to generate.")
    mask = None if attention_mask is None else attention_mask.bool().to(decoder.device)
    return input_ids.to(decoder.device, torch.long), mask


def _draw(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _generator(decoder: Decoder, config: GenerationConfig, generator: torch.Generator | None) -> torch.Generator | None:
    if config.seed is None:
        return generator
    return torch.Generator(decoder.device).manual_seed(config.seed)


def _eos_token_ids(decoder: Decoder, config: GenerationConfig) -> tuple[int, ...]:
    if config.eos_token_id is None:
        return decoder.config.eos_token_ids
    return config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)


def _pad_token_id(decoder: Decoder, config: GenerationConfig) -> int:
    """What fills a row that has ended: any id would do, for nobody reads it."""
    ids = (config.pad_token_id, decoder.config.pad_token_id, *_eos_token_ids(decoder, config), 0)
    return next(i for i in ids if i is not None)

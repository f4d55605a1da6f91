"""A checked call of ``generate``, which greedy decoding, sampling and beam search share.

Shapes: B prompts, R rows (a prompt's continuations or beams side by side), T prompt tokens (padding included), S tokens
so far, N new tokens, K beams, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.config import OPTConfig
from minopt.generation.decoder import Decoder, Draft, checked_draft
from minopt.generation.options import GenerationConfig
from minopt.generation.rules import Rule, build_rules
from minopt.masks import causal_mask, positions
from minopt.wrapped import decoder_of

Criterion = Callable[[Tensor, Any], Tensor]

# Why a row has ended, by the number that stands for it in tensors; 0 is a row that goes on.
STOP_REASONS = ("", "eos", "stop", "time", "length", "exhausted")
RUNNING, EOS, STOP, TIME, LENGTH, EXHAUSTED = range(6)


@dataclass(frozen=True)
class GenerationOutput:
    """What ``generate`` found. R is B times ``num_return_sequences``: a prompt's continuations stand side by side.

    Each new token has its numbers, if the options ask for them. Numbers after a row's length have no meaning.
    """

    sequences: Tensor
    """``[R, T + N]`` int64: the prompt as given (or its kept end), the new tokens, then padding. ``[R, N]`` where the
    prompt was embeddings."""
    lengths: tuple[int, ...]
    """The number of new tokens of each row, the one that ended it included."""
    stop_reasons: tuple[str, ...]
    """One a row: ``"eos"``, ``"stop"`` (a stop string or criterion), ``"time"``, ``"length"``; or ``"exhausted"``: the
    rules left no token to go on with. A beam search that has fewer hypotheses than ``num_return_sequences`` adds empty
    ones, with the reason ``"exhausted"`` and the score ``-inf``."""
    sequences_scores: Tensor | None = None
    """``[R]`` float32, beam search only: see ``GenerationConfig.length_penalty``. Best first."""
    scores: Tensor | None = None
    """``[R, N, V]`` float32, after all rules. Those of beam search are log-probabilities of the token's beam."""
    logprobs: Tensor | None = None
    """``[R, N]`` float32, of each new token under the model's own distribution, before any rule."""
    top_token_ids: Tensor | None = None
    """``[R, N, top_logprobs]`` int64, the most probable tokens of each step in falling order, before any rule."""
    top_logprobs: Tensor | None = None
    """``[R, N, top_logprobs]`` float32, the log-probabilities of those."""
    drafted_tokens: tuple[int, ...] | None = None
    """With a draft or ``prompt_lookup_num_tokens``, how many tokens were drafted for each row."""
    accepted_tokens: tuple[int, ...] | None = None
    """How many of them were right. Each saves a pass of the model, of which a row alone takes one a token."""


@dataclass(frozen=True)
class Request:
    """A checked call: ids ``[B, T]`` int64, and a boolean mask of the same shape or ``None`` without padding.

    Where ``inputs_embeds`` ``[B, T, E]`` are the prompts, ids are ``[B, 0]``: rules and criteria see new tokens alone.
    """

    decoder: Decoder
    config: GenerationConfig
    input_ids: Tensor
    attention_mask: Tensor | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    logits_processor: tuple[Rule, ...]
    stopping_criteria: tuple[Criterion, ...]
    generator: torch.Generator | None
    inputs_embeds: Tensor | None = None
    draft: Draft | None = None

    @property
    def reads_ahead(self) -> bool:
        """Whether tokens are drafted."""
        return self.draft is not None or self.config.prompt_lookup_num_tokens is not None

    @property
    def prompt_length(self) -> int:
        """T: how many tokens of the cache the prompts take, padding included."""
        return (self.input_ids if self.inputs_embeds is None else self.inputs_embeds).shape[1]

    def on_device(self) -> Request:
        """The same with its tensors on the decoder's device."""
        mask, embeds, device = self.attention_mask, self.inputs_embeds, self.decoder.device
        mask = None if mask is None else mask.to(device)
        embeds = None if embeds is None else embeds.to(device, self.decoder.dtype)
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=mask, inputs_embeds=embeds)

    def padding(self, copies: int) -> Tensor:
        """How many ids of ``B * copies`` rows are padding: int64, on the ids' device."""
        ids, mask = self.input_ids, self.attention_mask if self.inputs_embeds is None else None
        return (ids.new_zeros(len(ids)) if mask is None else (~mask).sum(1)).repeat_interleave(copies)

    def rules(self, padding: Tensor) -> list[Rule]:
        """The rules on scores of rows with so much padding."""
        return build_rules(self.config, self.input_ids.shape[1], padding, self.eos_token_ids, self.logits_processor)

    def read_prompts(self, cache: KVCache) -> Tensor:
        """Reads the prompts into an empty cache; returns the logits ``[B, V]`` after them."""
        B, T, mask, device = len(self.input_ids), self.prompt_length, self.attention_mask, self.input_ids.device
        position_ids, attended = positions(mask, 0, T, device).expand(B, T), causal_mask(mask, 0, T, T, device)
        last = torch.arange(T - 1, B * T, T, device=device)
        inputs = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return self.decoder.read(inputs, position_ids, attended, last, cache)


class Stopper:
    """Says which rows end with their newest token, and why. The clock of ``max_time`` runs from here on."""

    def __init__(self, request: Request) -> None:
        self.request, seconds = request, request.config.max_time
        self.eos = torch.tensor(request.eos_token_ids, device=request.decoder.device, dtype=torch.long)
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def __call__(self, tokens: Tensor, count: int, sequences: Tensor) -> Tensor:
        """The number in ``STOP_REASONS`` of each row, in the shape of ``tokens``.

        Args:
            tokens: the newest of each row.
            count: new tokens of each row.
            sequences: all tokens of each row, ``[R, S]``.
        """
        config, criteria = self.request.config, self.request.stopping_criteria
        reasons = torch.isin(tokens, self.eos).view(torch.int8)  # True is EOS
        if count >= config.min_new_tokens:
            for criterion in criteria:
                reasons = reasons.masked_fill((reasons == RUNNING) & _checked(criterion(sequences, None), tokens), STOP)
        if count == config.max_new_tokens:
            reasons = reasons.masked_fill(reasons == RUNNING, LENGTH)
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            reasons = reasons.masked_fill(reasons == RUNNING, TIME)
        # Clocks and a user's functions may say something else in each process.
        return reasons if self.deadline is None and not criteria else self.request.decoder.agreed(reasons)


def _checked(found: Any, tokens: Tensor) -> Tensor:
    """A criterion's answer, checked: one boolean a row."""
    if not isinstance(found, Tensor | bool) or (isinstance(found, Tensor) and found.numel() not in (1, tokens.numel())):
        got = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(f"stopping_criteria: expected a boolean for each of {tokens.numel()} rows, got {got}.")
    stops = torch.as_tensor(found, dtype=torch.bool, device=tokens.device)
    return stops.reshape(-1).expand(tokens.numel()).reshape(tokens.shape)


def prepare(
    decoder: Decoder,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    logits_processor: Rule | Sequence[Rule] | None = None,
    stopping_criteria: Criterion | Sequence[Criterion] | None = None,
    generator: torch.Generator | None = None,
    bos_token_id: int | None = None,
    inputs_embeds: Tensor | None = None,
    draft: Any = None,
) -> Request:
    """Checks the arguments of ``generate``, and raises what it raises. Nothing runs or goes to the decoder's device.

    ``bos_token_id`` stays in front of a prompt whose end is kept; ``None`` is the model's.
    """
    decoder = decoder_of(decoder)
    model = decoder.config
    generator = _generator(decoder.device, config, generator)
    if inputs_embeds is None:
        _check_prompt(model.vocab_size, input_ids, attention_mask)
        assert input_ids is not None
    else:
        input_ids = _no_ids(model, input_ids, inputs_embeds, attention_mask, config)
    rows = len(input_ids) * (config.num_return_sequences if config.num_beams == 1 else 1)
    if decoder.max_batch is not None and rows > decoder.max_batch:
        raise ValueError(
            f"batch: the program was exported for at most {decoder.max_batch} rows, got {rows}. Run fewer prompts "
            "or continuations at once (batch_size), or export it with a larger --max-batch."
        )
    bos = model.bos_token_id if bos_token_id is None else bos_token_id
    mask = attention_mask
    if inputs_embeds is None:
        input_ids, mask = _fit(model.max_position_embeddings, input_ids, attention_mask, config, bos)
    eos = model.eos_token_ids if config.eos_token_id is None else config.eos_token_id
    eos = eos if isinstance(eos, tuple) else (eos,)
    # What fills a row that has ended: any id would do, for it has no meaning.
    pad = next(i for i in (config.pad_token_id, model.pad_token_id, *eos, 0) if i is not None)
    _check_ids(model.vocab_size, config, eos, pad)
    mask = None if mask is None or bool(mask.all()) else mask.bool()
    if draft is not None:
        longest = input_ids.shape[1] if mask is None else int(mask.sum(1).max())
        draft = checked_draft(draft, decoder, config, rows, longest, inputs_embeds is not None)
    rules, criteria = _callables(logits_processor=logits_processor), _callables(stopping_criteria=stopping_criteria)
    return Request(decoder, config, input_ids.long(), mask, eos, pad, rules, criteria, generator, inputs_embeds, draft)


def _generator(device: torch.device, config: GenerationConfig, given: torch.Generator | None) -> torch.Generator | None:
    """The generator that a call gives, or one from its seed."""
    if given is None:
        return None if config.seed is None else torch.Generator(device).manual_seed(config.seed)
    if config.seed is not None:
        raise ValueError("generation: give a seed or a generator, not both.")
    if not config.do_sample:
        raise ValueError("generation: a generator acts on sampling only, and do_sample is off.")
    if given.device.type != device.type:
        raise ValueError(
            f"generator: expected one on {device}, got one on {given.device}. "
            f"Make it with torch.Generator({device.type!r}), or give a seed."
        )
    return given


def _callables(**argument: Any) -> tuple[Any, ...]:
    ((name, given),) = argument.items()
    several = () if given is None else tuple(given) if isinstance(given, Sequence) and not callable(given) else (given,)
    if wrong := [type(item).__name__ for item in several if not callable(item)]:
        raise ValueError(f"{name}: expected a function of (input_ids, scores) or a list of them, got {wrong[0]}.")
    return several


def _no_ids(
    model: OPTConfig, input_ids: Tensor | None, embeds: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> Tensor:
    """The ids ``[B, 0]`` of prompts that are embeddings, once those are checked."""
    if input_ids is not None:
        raise ValueError(
            "input_ids, inputs_embeds: expected one, got both. Embed the ids: model.embed_tokens(input_ids)."
        )
    is_tensor = isinstance(embeds, Tensor)
    if (
        not is_tensor
        or not embeds.is_floating_point()
        or embeds.ndim != 3
        or 0 in embeds.shape[:2]
        or (embeds.shape[2] != model.embed_dim)
    ):
        got = f"{list(embeds.shape)} of {embeds.dtype}" if is_tensor else type(embeds).__name__
        raise ValueError(f"inputs_embeds: expected floats [batch, tokens, {model.embed_dim}], got {got}.")
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "prompt_lookup_num_tokens: copies ids of the prompt, and inputs_embeds have none. Leave it out."
        )
    _check_mask(attention_mask, list(embeds.shape[:2]), "inputs_embeds")
    lengths = [embeds.shape[1]] if attention_mask is None else attention_mask.bool().sum(1).tolist()
    check_room(model.max_position_embeddings, max(lengths), config.replace(truncate_prompt=False))
    return torch.zeros(len(embeds), 0, dtype=torch.long, device=embeds.device)


def _check_prompt(vocab_size: int, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or not isinstance(attention_mask, Tensor | None):
        wrong = attention_mask if isinstance(input_ids, Tensor) else input_ids
        raise ValueError(f"input_ids: expected ids and mask as tensors, got {type(wrong).__name__}. Use torch.tensor.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: expected [batch, tokens] with at least one of each, got {list(input_ids.shape)}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}.")
    least, most = (int(i) for i in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"input_ids: expected ids from 0 to {vocab_size - 1}, got {least if least < 0 else most}. "
            "Do the tokenizer and the model belong together?"
        )
    _check_mask(attention_mask, list(input_ids.shape), "input_ids")


def _check_mask(attention_mask: Tensor | None, shape: list[int], name: str) -> None:
    if attention_mask is None:
        return
    real = attention_mask.bool()
    if list(real.shape) != shape:
        raise ValueError(f"attention_mask: expected the shape of {name} {shape}, got {list(real.shape)}.")
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left only, got some after a token.")


def check_room(limit: int, tokens: int, config: GenerationConfig) -> None:
    """Raises ``ValueError`` if a prompt of so many tokens and the new ones exceed the model's positions."""
    room, new = limit - config.max_new_tokens, config.max_new_tokens
    if tokens > room and not (config.truncate_prompt and room > 0):
        ask = f", or ask for at most {limit - tokens}" if limit > tokens else ""
        cut = "" if config.truncate_prompt else ", or set truncate_prompt"
        raise ValueError(
            f"prompt: {tokens} tokens + max_new_tokens {new} = {tokens + new} positions, the model has {limit}. "
            f"Shorten the prompt{ask}{cut}."
        )


def _fit(
    limit: int, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig, bos: int | None
) -> tuple[Tensor, Tensor | None]:
    """Cuts prompts so that the new tokens have room: their ends stay, after the bos if they began with it."""
    lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()).sum(1)
    longest, room = int(lengths.max()), limit - config.max_new_tokens
    check_room(limit, longest, config)
    if longest <= room:
        return input_ids, attention_mask
    first = input_ids.gather(1, (input_ids.shape[1] - lengths)[:, None])[:, 0]
    input_ids = input_ids[:, -room:].clone()
    if bos is not None and room > 1:
        input_ids[:, 0] = input_ids[:, 0].where((lengths <= room) | (first != bos), bos)
    return input_ids, None if attention_mask is None else attention_mask[:, -room:]


def _check_ids(vocab_size: int, config: GenerationConfig, eos: tuple[int, ...], pad: int) -> None:
    """Checks of options that depend on the model's vocabulary."""
    if config.stop_strings:
        raise ValueError(
            "stop_strings: minopt.generate sees ids, not text. Call LanguageModel.generate, or give stopping_criteria."
        )
    V, beams, most_beams = vocab_size, config.num_beams, 2**24 // vocab_size
    words = [i for ids in (*config.bad_words_ids, *(ids for ids, _ in config.sequence_bias)) for i in ids]
    forced = config.forced_bos_token_id or 0
    ids_of = {"suppress_tokens": config.suppress_tokens, "forced_bos_token_id": (forced,), "eos_token_id": eos,
              "bad_words_ids or sequence_bias": words, "pad_token_id": (pad,)}  # fmt: skip
    problem = ""
    if outside := [f"{name} has {i}" for name, ids in ids_of.items() for i in ids if i >= V]:
        problem = f"expected ids from 0 to {V - 1}, the vocabulary, and {outside[0]}"
    elif config.do_sample and beams > most_beams:
        problem = f"num_beams is {beams}, and torch draws among at most 2**24 candidates: at most {most_beams} beams"
    elif config.top_logprobs > V:
        problem = f"top_logprobs is {config.top_logprobs}, and there are {V} tokens"
    elif ending := [ids[0] for ids in config.bad_words_ids if len(ids) == 1 and ids[0] in eos]:
        problem = f"bad_words_ids holds {ending[0]}, which ends a text (transformers would ignore it). "
        problem += "To never end, leave eos_token_id empty, or set suppress_tokens"
    elif len({*config.suppress_tokens, *(eos if config.min_new_tokens > 0 else ())}) == V:
        problem = f"suppress_tokens holds all {V} ids, which leaves nothing to generate"
    if problem:
        raise ValueError(f"generation: {problem}.")


def refuse(is_broken: bool, step: int) -> None:
    """Raises ``ValueError`` if scores are broken: no token can be chosen among NaN or infinity."""
    if is_broken:
        raise ValueError(
            f"scores: expected numbers, got NaN or infinity at new token {step}. In float16 a model may overflow: load "
            "it as bfloat16 or float32. Otherwise its weights are damaged (see minopt inspect --check), or a "
            "logits_processor gives such scores."
        )

"""Text in, text out: a model and its tokenizer, as ``minopt.load`` returns them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from minopt.checkpoint.save import save_model
from minopt.evaluation.perplexity import window_perplexity
from minopt.generation.batches import cut_batches
from minopt.generation.decode import decode_steps, run
from minopt.generation.options import GenerationConfig, with_defaults
from minopt.generation.request import STOP_REASONS, Decoder, GenerationOutput, Request, check_room, prepare
from minopt.generation.scoring import token_logprobs
from minopt.model import OPT
from minopt.progress import bar
from minopt.tokenizer import StopStrings, Tokenizer, pad_left
from minopt.wrapped import decoder_of

# What a few float32 rows of OPT's vocabulary weigh, in tokens of opt-125m's cache.
SCORES_IN_TOKENS = 8


@dataclass(frozen=True)
class GeneratedText:
    """One continuation, with what is known about it.

    Attributes:
        text: the continuation, after its prompt if ``echo`` asked for that; without the stop string that ended it.
        token_ids: the new tokens, those that ended the text included.
        logprobs: natural log-probability of each of them under the model's own distribution, if asked for.
        stop_reason: see ``GenerationOutput``.
        score: of beam search; ``None`` otherwise.
        top_logprobs: for each new token the ids and log-probabilities that were most probable in its place, if the
            option of that name asked for them.
        drafted_tokens, accepted_tokens: with ``prompt_lookup_num_tokens``, see ``GenerationOutput``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: str
    score: float | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True)
class ScoredText:
    """How probable a text is.

    Attributes:
        text: what is scored: the whole text, or a continuation.
        token_ids: its tokens.
        logprobs: natural log-probability of each, after all before it (those of the prompt too); ``None`` for a
            text's first token, before which there is nothing.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """The log-probability of the text: their sum."""
        return sum(value for value in self.logprobs if value is not None)

    @property
    def mean(self) -> float:
        """Their mean, with which texts of different lengths compare; NaN where no token has one."""
        count = sum(value is not None for value in self.logprobs)
        return self.total / count if count else math.nan


class LanguageModel:
    """A model that reads and writes text.

    Args:
        model: on any device, or an exported program.
        tokenizer: ``None`` where the checkpoint has no tokenizer files; methods on text then say so.
        generation_defaults: options of ``GenerationConfig`` that hold unless a call gives others; ``load`` takes them
            from ``generation_config.json``.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        generation_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.decoder: Decoder = decoder_of(model)
        self.tokenizer = tokenizer
        self.generation_defaults = dict(generation_defaults or {})

    def __repr__(self) -> str:
        kind, config = type(self.decoder).__name__, self.decoder.config
        size = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, vocabulary of {config.vocab_size}"
        return f"LanguageModel({kind} of {size}, on {self.decoder.device}; tokenizer: {self.tokenizer!r})"

    @property
    def model(self) -> OPT:
        """The model itself.

        Raises:
            ValueError: if this is an exported program.
        """
        return self.decoder.as_opt()

    @overload
    def generate(self, prompt: str, *, return_details: Literal[False] = ..., **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], *, return_details: Literal[False] = ..., **options: Any) -> list[str]: ...

    @overload
    def generate(self, prompt: str, *, return_details: Literal[True], **options: Any) -> GeneratedText: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, return_details: Literal[True], **options: Any
    ) -> list[GeneratedText]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        echo: bool = False,
        return_details: bool = False,
        show_progress: bool = True,
        **options: Any,
    ) -> Any:
        """Continues a text, or each of many.

        Args:
            prompt: one text, or a list of any number of them; ``""`` starts from the beginning-of-text token: the
                tokenizer's, or the model's if the tokenizer has none.
            echo: put the prompt before its continuation.
            return_details: return a ``GeneratedText`` for each continuation instead of its text.
            show_progress: draw a bar on stderr, if that is a terminal and there is more than one batch.
            **options: as ``generate_each`` takes them.

        Returns:
            The continuation, or a list of them in the order of the prompts. With ``num_return_sequences`` above 1, a
            list of that many in place of each.

        Raises:
            ValueError: as ``minopt.generate`` does, or if there is no tokenizer.
        """
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ValueError(
                f"prompt: expected a text or a list of them, got {type(prompt).__name__}. Put several into a list."
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if return_details:
            options["output_logprobs"] = True
        else:
            _refuse_details(options)
        batches = self._batches(prompts, **options)
        found: list[Any] = [None] * len(prompts)
        for index, records in _run_each(batches, show_progress):
            if echo:
                records = [replace(record, text=prompts[index] + record.text) for record in records]
            results = records if return_details else [record.text for record in records]
            found[index] = results if batches[0].request.config.num_return_sequences > 1 else results[0]
        return found[0] if isinstance(prompt, str) else found

    def generate_each(
        self, prompts: Sequence[str], *, in_order: bool = False, show_progress: bool = False, **options: Any
    ) -> Iterator[tuple[int, list[GeneratedText]]]:
        """Continues many texts, and gives each result as soon as it is there.

        Args:
            prompts: any number of texts.
            in_order: give results in the order of the prompts. Batches are then cut from the next few hundred prompts,
                and a result waits for those before it.
            show_progress: draw a bar on stderr, if that is a terminal and there is more than one batch.
            **options: those of ``GenerationConfig`` (``max_new_tokens``, ``num_beams``, ``top_p``, ...), over
                ``generation_defaults`` or, if given, ``config``; the arguments ``logits_processor``,
                ``stopping_criteria`` and ``generator`` of ``minopt.generate``, which see the rows of one batch after
                the other; ``add_bos`` of ``Tokenizer.encode``; ``skip_special_tokens``, which leaves special tokens
                out of the texts (by default); and ``batch_size`` and ``max_batch_tokens`` of
                ``generation.batches.cut_batches``: prompts run in batches of like length, by default of 8,192 tokens,
                new ones and padding included, or of one prompt with ``prompt_lookup_num_tokens``.

        Returns:
            An iterator of a prompt's index and its continuations; without ``in_order`` the longest prompts come first.

        Raises:
            ValueError: as ``generate`` does, before anything runs.
        """
        results = _run_each(self._batches(prompts, in_order=in_order, **options), show_progress)
        return _in_order(results) if in_order else results

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Continues a text piece by piece, as the tokens come: greedy or sampled.

        Args:
            prompt: one text.
            **options: as ``generate_each`` takes them.

        Returns:
            An iterator of pieces that add up to what ``generate`` returns; each is whole characters.

        Raises:
            ValueError: as ``generate`` does, before the first piece is asked for; or if beams or several continuations
                are asked for.
        """
        _check_prompt(prompt)
        _refuse_details(options)
        (batch,) = self._batches([prompt], **options)
        config = batch.request.config
        for name in ("num_beams", "num_return_sequences"):
            if getattr(config, name) > 1:
                raise ValueError(
                    f"{name}: a stream has one continuation, got {getattr(config, name)}. Set it to 1, or use generate."
                )
        return _stream(batch)

    @overload
    def score(self, text: str, continuations: None = ..., **options: Any) -> ScoredText: ...

    @overload
    def score(self, text: str, continuations: Sequence[str], **options: Any) -> list[ScoredText]: ...

    @overload
    def score(self, text: Sequence[str], continuations: None = ..., **options: Any) -> list[ScoredText]: ...

    def score(
        self,
        text: str | Sequence[str],
        continuations: Sequence[str] | None = None,
        *,
        add_bos: bool | None = None,
        show_progress: bool = True,
        **limits: Any,
    ) -> Any:
        """Says how probable texts are, or continuations of a prompt: to rank answers, say.

        A prompt and its continuation are encoded as one text. A token that reaches from one into the other counts as
        the continuation's. An empty prompt is the beginning-of-text token, as in ``generate``.

        Args:
            text: one text, or a list of any number of them; with ``continuations``, the prompt.
            continuations: texts that may follow ``text``.
            add_bos: see ``Tokenizer.encode``.
            show_progress: draw a bar on stderr, if that is a terminal and there is more than one batch.
            **limits: ``batch_size`` and ``max_batch_tokens``, see ``generate_each``.

        Returns:
            A ``ScoredText``; a list of them, in order, for several texts or continuations.

        Raises:
            ValueError: if a text has no tokens or more than the model has positions, or there is no tokenizer.
        """
        tokenizer = self._tokenizer()
        if continuations is not None:
            if not isinstance(text, str) or isinstance(continuations, str) or not isinstance(continuations, Sequence):
                raise ValueError("score: expected one prompt and a list of continuations.")
            texts = [_checked("continuation", c) for c in continuations]
            pairs = tokenizer.encode_continuations(text, texts, add_bos)
            bos = tokenizer.beginning(self.decoder.config)
            if text == "" and add_bos is None and bos is not None and not tokenizer.encode(""):
                pairs = [([bos, *ids], start + 1) for ids, start in pairs]  # as generate("") goes on
        else:
            if not isinstance(text, Sequence):
                raise ValueError(f"score: expected a text or several, got {type(text).__name__}.")
            texts = [_checked("text", t) for t in ([text] if isinstance(text, str) else text)]
            pairs = [(ids, 0) for ids in tokenizer.encode_each(texts, add_bos)]
        for t, (ids, start) in zip(texts, pairs, strict=True):
            if start == len(ids):
                raise ValueError(f"score: expected some text, got {t!r}, which has no tokens.")
        found: list[Any] = [None] * len(texts)
        batches = cut_batches([len(ids) for ids, _ in pairs], **{"batch_size": self._most_rows(), **limits})
        with bar(len(texts), "text", shown=show_progress and len(batches) > 1) as drawn:
            for batch in batches:
                rows = [pairs[i][0] for i in batch]
                values = token_logprobs(self.decoder, rows, [max(1, pairs[i][1]) for i in batch])
                for i, logprobs in zip(batch, values, strict=True):
                    ids, start = pairs[i]
                    first: list[float | None] = [None] if start == 0 else []
                    found[i] = ScoredText(texts[i], tuple(ids[start:]), tuple(first + logprobs.tolist()))
                drawn.update(len(batch))
        return found if continuations is not None or not isinstance(text, str) else found[0]

    def perplexity(
        self, text: str, *, window: int | None = None, stride: int | None = None, add_bos: bool | None = None
    ) -> float:
        """Perplexity of a text of any length, as ``minopt evaluate --task perplexity`` measures it.

        Args:
            text: may be longer than the model's positions.
            window, stride: tokens read at once, and by how many the window moves on. By default windows do not overlap,
                and what does not fill one at the end is left out; see ``evaluation.perplexity.window_perplexity``.
            add_bos: see ``Tokenizer.encode``.

        Raises:
            ValueError: if the text has fewer than two tokens, or window or stride make no sense.
        """
        ids = self._tokenizer().encode(_checked("text", text), add_bos)
        if len(ids) < 2:
            raise ValueError(f"perplexity: expected a text of at least two tokens, got {text!r}.")
        return window_perplexity(self.decoder, ids, window, stride).perplexity

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a folder that transformers opens too; see ``minopt.save_model``, also for what it raises."""
        save_model(self.model, folder, self.tokenizer, self.generation_defaults, force=force)

    @cached_property
    def _rows_without_token(self) -> tuple[int, ...]:
        return self._tokenizer().ids_without_token(self.decoder.config.vocab_size)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: the model's folder has none (tokenizer.json, or vocab.json and merges.txt). "
                "Copy its files there, or call minopt.generate with token ids."
            )
        return self.tokenizer

    def _batches(
        self,
        prompts: Sequence[str],
        *,
        config: GenerationConfig | None = None,
        add_bos: bool | None = None,
        skip_special_tokens: bool = True,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        in_order: bool = False,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> list[_Batch]:
        """All that is to run, checked."""
        tokenizer = self._tokenizer()
        if not isinstance(config, GenerationConfig | None):
            raise ValueError(f"config: expected a minopt.GenerationConfig, got {type(config).__name__}.")
        config = with_defaults(self.generation_defaults, options) if config is None else config.replace(**options)
        if not isinstance(skip_special_tokens, bool):
            raise ValueError(f"skip_special_tokens: expected True or False, got {skip_special_tokens!r}.")
        if config.output_scores:
            raise ValueError("output_scores: there is no place for them beside texts. Call minopt.generate with ids.")
        if isinstance(prompts, str):
            raise ValueError("prompts: expected a list of texts, got one. Put it into a list.")
        if config.seed is not None and generator is None:  # one for all batches, or each would draw the same
            generator = torch.Generator(self.decoder.device).manual_seed(config.seed)
            config = config.replace(seed=None)
        strings = config.stop_strings
        config = config.replace(stop_strings=(), suppress_tokens=config.suppress_tokens + self._rows_without_token)
        rows = self._encode(prompts, add_bos)
        for number, row in enumerate(rows, 1):
            with _where(number, len(rows)):
                check_room(self.decoder.config.max_position_embeddings, len(row), config)
        if config.prompt_lookup_num_tokens is not None and batch_size is None and max_batch_tokens is None:
            batch_size = 1  # rows of a batch wait for each other's drafts
        batches = []
        if batch_size is None:
            batch_size = self._most_rows(config.num_return_sequences if config.num_beams == 1 else 1)
        costs = [self._cost(len(row), config) for row in rows]
        for indices in cut_batches(costs, batch_size, max_batch_tokens, in_order):
            input_ids, mask = pad_left([rows[i] for i in indices], self.decoder.config.pad_token_id)
            request = prepare(
                self.decoder, input_ids, mask, config, logits_processor, stopping_criteria, generator,
                tokenizer.beginning(self.decoder.config),
            )  # fmt: skip
            width = request.input_ids.shape[1]
            stops = tokenizer.stop_strings(strings, width, skip_special_tokens) if strings else None
            if stops is not None:
                request = replace(request, stopping_criteria=(*request.stopping_criteria, stops))
            batches.append(_Batch(indices, request, stops, tokenizer, skip_special_tokens))
        return batches

    def _most_rows(self, copies: int = 1) -> int | None:
        """How many texts an exported program takes at once, ``copies`` rows each; ``None`` is any number."""
        most = self.decoder.max_batch
        return None if most is None else max(1, most // copies)

    def _cost(self, tokens: int, config: GenerationConfig) -> int:
        """Tokens that a prompt's keys and values take, new ones included, and its scores as so many more."""
        if config.truncate_prompt:
            tokens = min(tokens, self.decoder.config.max_position_embeddings - config.max_new_tokens)
        new = config.max_new_tokens + SCORES_IN_TOKENS
        if config.num_beams > 1:
            return tokens + config.num_beams * new  # beams share the prompt
        return (tokens + new) * config.num_return_sequences

    def _encode(self, prompts: Sequence[str], add_bos: bool | None) -> list[list[int]]:
        """Ids of prompts, at least one of each."""
        tokenizer = self._tokenizer()
        for number, text in enumerate(prompts, 1):
            with _where(number, len(prompts)):
                _check_prompt(text)
                tokenizer.check([text])
        rows = tokenizer.encode_each(prompts, add_bos)
        if all(rows):
            return rows
        bos = tokenizer.beginning(self.decoder.config)
        if bos is None:
            raise ValueError("prompt: empty, and the model has no beginning-of-text token. Give it some text.")
        return [row or [bos] for row in rows]


@dataclass(frozen=True)
class _Batch:
    """Prompts that run together, by their indices in the caller's list."""

    indices: list[int]
    request: Request
    stops: StopStrings | None
    tokenizer: Tokenizer
    skip_special_tokens: bool

    def text(self, ids: list[int], stop_reason: str) -> str:
        """Text of a row's new ids."""
        cut = self.stops.cut(ids) if self.stops is not None and stop_reason in ("stop", "eos") else None
        return self.tokenizer.decode(ids, self.skip_special_tokens) if cut is None else cut


def _run_each(batches: list[_Batch], show_progress: bool) -> Iterator[tuple[int, list[GeneratedText]]]:
    """Runs batches in turn; gives each prompt's index and continuations."""
    count = sum(len(batch.indices) for batch in batches)
    with bar(count, "prompt", shown=show_progress and len(batches) > 1) as drawn:
        for batch in batches:
            output, copies = run(batch.request), batch.request.config.num_return_sequences
            rows = [_generated_text(batch, output, row) for row in range(len(output.lengths))]
            for at, index in enumerate(batch.indices):
                yield index, rows[at * copies : (at + 1) * copies]
                drawn.update()


def _in_order(results: Iterator[tuple[int, list[GeneratedText]]]) -> Iterator[tuple[int, list[GeneratedText]]]:
    """The same by rising index."""
    waiting: dict[int, list[GeneratedText]] = {}
    count = 0
    for index, records in results:
        waiting[index] = records
        while count in waiting:
            yield count, waiting.pop(count)
            count += 1


def _generated_text(batch: _Batch, output: GenerationOutput, row: int) -> GeneratedText:
    begin, length, reason = batch.request.input_ids.shape[1], output.lengths[row], output.stop_reasons[row]
    ids = output.sequences[row, begin : begin + length].tolist()
    top: list[Any] = []
    if output.top_token_ids is not None and output.top_logprobs is not None:
        steps = zip(
            output.top_token_ids[row, :length].tolist(), output.top_logprobs[row, :length].tolist(), strict=True
        )
        top = [tuple(zip(tokens, values, strict=True)) for tokens, values in steps]
    return GeneratedText(
        batch.text(ids, reason),
        tuple(ids),
        () if output.logprobs is None else tuple(output.logprobs[row, :length].tolist()),
        reason,
        None if output.sequences_scores is None else output.sequences_scores[row].item(),
        tuple(top),
        None if output.drafted_tokens is None else output.drafted_tokens[row],
        None if output.accepted_tokens is None else output.accepted_tokens[row],
    )


def _stream(batch: _Batch) -> Iterator[str]:
    # What may be the beginning of a stop string waits until it is known whether it is.
    decoder = batch.tokenizer.stream_decoder(batch.skip_special_tokens, batch.stops)
    ids, given, reason = list[int](), 0, ""
    for step in decode_steps(batch.request.on_device()):
        reason = STOP_REASONS[int(step.reasons)]
        ready = ""
        if bool(step.is_new):
            ids.append(int(step.tokens))
            ready = decoder.push(ids[-1])
        if reason:
            break
        given += len(ready)
        if ready:
            yield ready
    if rest := batch.text(ids, reason)[given:]:
        yield rest


def _check_prompt(text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"prompt: expected a text, got {type(text).__name__}. A list of texts goes to generate.")


@contextmanager
def _where(number: int, count: int) -> Iterator[None]:
    """Adds to an error which of several prompts it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (Prompt {number} of {count}.)" if count > 1 else str(error)) from None


def _refuse_details(options: Mapping[str, Any]) -> None:
    if given := [name for name in ("output_logprobs", "top_logprobs") if options.get(name)]:
        raise ValueError(f"{given[0]}: there is no place for them beside texts. Use generate with return_details=True.")


def _checked(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a text, got {type(text).__name__}.")
    return text

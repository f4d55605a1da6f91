"""Text in, text out: a model and its tokenizer, as ``minopt.load`` returns them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, overload

import torch

from minopt.checkpoint.names import parameter_shapes
from minopt.checkpoint.save import save_model
from minopt.evaluation.perplexity import window_perplexity
from minopt.generation.batches import cut_batches
from minopt.generation.continuous import Prompts
from minopt.generation.decoder import Decoder, Draft
from minopt.generation.options import GenerationConfig, with_defaults
from minopt.generation.request import Request, check_room, prepare
from minopt.generation.scoring import token_logprobs
from minopt.generation.texts import GeneratedText, Texts, in_rising_order
from minopt.model import OPT
from minopt.progress import bar
from minopt.stops import Pieces, StopStrings
from minopt.tokenizer import Tokenizer, pad_left
from minopt.wrapped import decoder_of


@dataclass(frozen=True)
class ScoredText:
    """The probability of a text, or of a continuation after its prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # natural, of each id after all before it; None for the first id of all

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
        model: an ``OPT`` on any device, or an exported program.
        tokenizer: ``None`` where the checkpoint has no tokenizer files; methods on text then say so.
        generation_defaults: options of ``GenerationConfig`` that hold unless a call gives others; ``load`` takes them
            from ``generation_config.json``.
        draft: says how one text may go on, unless a call gives another draft, prompt lookup or beams; ``load`` makes
            it. Several prompts run in full batches instead, which are faster.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        generation_defaults: Mapping[str, Any] | None = None,
        draft: Draft | None = None,
    ) -> None:
        self.decoder: Decoder = decoder_of(model)
        self.tokenizer = tokenizer
        self.generation_defaults, self.draft = dict(generation_defaults or {}), draft

    def __repr__(self) -> str:
        kind, config = type(self.decoder).__name__, self.decoder.config
        size = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, vocabulary of {config.vocab_size}"
        return f"LanguageModel({kind} of {size}, on {self.decoder.device}; tokenizer: {self.tokenizer!r})"

    def _repr_html_(self) -> str:
        """A table for notebooks; without colours, which are the theme's."""
        config = self.decoder.config
        rows = {
            "form": type(self.decoder).__name__,
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "vocabulary": f"{config.vocab_size:,}",
            "parameters": f"{sum(map(math.prod, parameter_shapes(config).values())):,}",
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": self.decoder.device,
            "tokenizer": repr(self.tokenizer),
        }
        cells = (f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
        return f"<table><caption>LanguageModel</caption>{''.join(cells)}</table>"

    @property
    def model(self) -> OPT:
        """The model itself. ``ValueError`` if this is an exported program."""
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
            show_progress, **options: see ``generate_each``.

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
        texts = self._texts(prompts, **options)
        found: list[Any] = [None] * len(prompts)
        for index, records in texts.run_each(show_progress):
            if echo:
                records = [replace(record, text=prompts[index] + record.text) for record in records]
            results = records if return_details else [record.text for record in records]
            found[index] = results if texts.prompts.config.num_return_sequences > 1 else results[0]
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
                ``generation_defaults`` or, if given, ``config``; ``logits_processor``, ``stopping_criteria`` and
                ``generator`` of ``minopt.generate``, which see prompts that began together; its ``draft``, which may
                be a ``LanguageModel`` with the same tokenizer; ``add_bos`` of
                ``Tokenizer.encode``; ``skip_special_tokens=False`` shows special tokens in the texts; and
                ``batch_size`` and ``max_batch_tokens`` of ``generation.batches.cut_batches``, by default 8,192 tokens,
                new ones and padding included, or one prompt with a draft or ``prompt_lookup_num_tokens``.

        Returns:
            An iterator of a prompt's index and its continuations; without ``in_order`` the longest prompts come first.

        Raises:
            ValueError: as ``generate`` does, before anything runs.
        """
        results = self._texts(prompts, in_order=in_order, **options).run_each(show_progress)
        return in_rising_order(results) if in_order else results

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Continues a text piece by piece, as the tokens come: greedy or sampled. Options are as in ``generate_each``.

        Returns:
            An iterator of pieces that add up to what ``generate`` returns; each is whole characters.

        Raises:
            ValueError: as ``generate`` does, before the first piece is asked for; also for several beams or results.
        """
        _check_text("prompt", prompt, " A list of texts goes to generate.")
        _refuse_details(options)
        texts = self._texts([prompt], **options)
        config = texts.prompts.config
        for name in ("num_beams", "num_return_sequences"):
            if (count := getattr(config, name)) > 1:
                raise ValueError(f"{name}: a stream has one continuation, got {count}. Set it to 1, or use generate.")
        return texts.stream()

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
        inputs_embeds: torch.Tensor | None = None,
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
            inputs_embeds: floats ``[tokens, E]`` that stand before each text, such as a soft prompt.
            show_progress, batch_size, max_batch_tokens: see ``generate_each``.

        Returns:
            A ``ScoredText``; a list of them, in order, for several texts or continuations.

        Raises:
            ValueError: if a text has no tokens or more than the model has positions, or there is no tokenizer.
        """
        texts, pairs = self._texts_to_score(text, continuations, add_bos)
        found: list[Any] = [None] * len(texts)
        before = 0 if inputs_embeds is None else len(inputs_embeds)
        lengths = [before + len(ids) for ids, _ in pairs]
        batches = cut_batches(lengths, **{"batch_size": self.decoder.max_batch, **limits})
        with bar(len(texts), "text", shown=show_progress and len(batches) > 1) as drawn:
            for batch in batches:
                rows, starts = zip(*(pairs[i] for i in batch), strict=True)
                values = token_logprobs(self.decoder, rows, [max(1, start) for start in starts], inputs_embeds)
                for i, ids, start, logprobs in zip(batch, rows, starts, values, strict=True):
                    first = () if start else (None,)
                    found[i] = ScoredText(texts[i], tuple(ids[start:]), (*first, *logprobs.tolist()))
                drawn.update(len(batch))
        return found if continuations is not None or not isinstance(text, str) else found[0]

    def _texts_to_score(
        self, text: str | Sequence[str], continuations: Sequence[str] | None, add_bos: bool | None
    ) -> tuple[list[str], list[tuple[list[int], int]]]:
        """The texts; for each, the ids of prompt and text, and the index of the first id that is scored."""
        tokenizer, what, given = self._tokenizer(), "text", [text] if isinstance(text, str) else text
        if continuations is not None:
            what, given = "continuation", continuations
            if not isinstance(text, str) or isinstance(given, str) or not isinstance(given, Sequence):
                raise ValueError("score: expected one prompt and a list of continuations.")
        if not isinstance(given, Sequence):
            raise ValueError(f"score: expected a text or several, got {type(given).__name__}.")
        texts = list(given)
        for t in texts:
            _check_text(what, t)
        if continuations is None or not isinstance(text, str):
            pairs = [(ids, 0) for ids in tokenizer.encode_each(texts, add_bos)]
        else:
            pairs = tokenizer.encode_continuations(text, texts, add_bos)
            bos = tokenizer.beginning(self.decoder.config)
            if text == "" and add_bos is None and bos is not None and not tokenizer.encode(""):
                pairs = [([bos, *ids], start + 1) for ids, start in pairs]  # as generate("") goes on
        for t, (ids, start) in zip(texts, pairs, strict=True):
            if start == len(ids):
                raise ValueError(f"score: expected some text, got {t!r}, which has no tokens.")
        return texts, pairs

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
        _check_text("text", text)
        ids = self._tokenizer().encode(text, add_bos)
        if len(ids) < 2:
            raise ValueError(f"perplexity: expected a text of at least two tokens, got {text!r}.")
        return window_perplexity(self.decoder, ids, window, stride).perplexity

    def add_tokens(self, tokens: Sequence[str], *, special: bool = False) -> list[int]:
        """Adds tokens to the tokenizer, and rows for them to the model's token table.

        New rows are the mean of those of all earlier tokens, so that texts without the new tokens keep almost the
        probabilities that they had (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
        Rows without a token (OPT's table has 7) are used first; then the table grows to a multiple of 8, with a new
        parameter, so that an optimizer has to be made anew.

        Args:
            tokens: their texts. One that the tokenizer has already keeps its id and its row.
            special: whether they are left out when ids are decoded, as ``</s>`` is.

        Returns:
            The id of each.

        Raises:
            ValueError: if the model is made for inference (load it with ``optimize=False``), or has no tokenizer.
        """
        ids: list[int] = import_module("minopt.methods.tokens").add_tokens(self, tokens, special)
        return ids

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a folder that transformers opens too; see ``minopt.save_model``, also for what it raises."""
        save_model(self.model, folder, self.tokenizer, self.generation_defaults, force=force)

    def _draft_for(self, draft: Any, config: GenerationConfig, prompts: int) -> Any:
        """The draft of a call: what it gives, else the model's own where drafts apply."""
        if draft is None:
            applies = prompts == 1 and config.num_beams == 1 and config.prompt_lookup_num_tokens is None
            return self.draft if applies else None
        if isinstance(draft, LanguageModel) and draft.tokenizer is not None:
            ours, theirs = (t.backend.get_vocab() for t in (self._tokenizer(), draft.tokenizer))
            if wrong := sorted(token for token, _ in ours.items() ^ theirs.items()):
                raise ValueError(
                    f"draft: expected the model's tokenizer, got one with other ids, such as that of {wrong[0]!r}. "
                    "Take a model that was trained with the same tokenizer."
                )
        return draft

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

    def _texts(
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
        draft: Any = None,
        **options: Any,
    ) -> Texts:
        """All that is to run, checked."""
        tokenizer, decoder = self._tokenizer(), self.decoder
        config = with_defaults(self.generation_defaults, options, config)
        if not isinstance(skip_special_tokens, bool):
            raise ValueError(f"skip_special_tokens: expected True or False, got {skip_special_tokens!r}.")
        if config.output_scores:
            raise ValueError("output_scores: cannot be returned with texts. Call minopt.generate with ids.")
        if isinstance(prompts, str):
            raise ValueError("prompts: expected a list of texts, got one. Put it into a list.")
        draft = self._draft_for(draft, config, len(prompts))
        if config.seed is not None and generator is None:  # one for all batches, or each would draw the same
            generator = torch.Generator(decoder.device).manual_seed(config.seed)
            config = config.replace(seed=None)
        strings = config.stop_strings
        config = config.replace(stop_strings=(), suppress_tokens=config.suppress_tokens + self._rows_without_token)
        for number, text in enumerate(prompts, 1):
            with _where(number, len(prompts)):
                _check_text("prompt", text, " A list of texts goes to generate.")
                tokenizer.check([text])
        bos = tokenizer.beginning(decoder.config)
        rows = tokenizer.encode_each(prompts, add_bos)
        if bos is None and not all(rows):
            raise ValueError("prompt: empty, and the model has no beginning-of-text token. Give it some text.")
        rows = [row or [bos or 0] for row in rows]
        for number, row in enumerate(rows, 1):
            with _where(number, len(rows)):
                check_room(decoder.config.max_position_embeddings, len(row), config)
        pieces = Pieces(tokenizer, skip_special_tokens)

        def request_of(indices: list[int]) -> Request:
            input_ids, mask = pad_left([rows[i] for i in indices], decoder.config.pad_token_id)
            more = logits_processor, stopping_criteria, generator, bos
            request = prepare(decoder, input_ids, mask, config, *more, draft=draft)
            if not strings:
                return request
            stops = StopStrings(pieces, strings, request.input_ids.shape[1])
            return replace(request, stopping_criteria=(*request.stopping_criteria, stops))

        limits = batch_size, max_batch_tokens, in_order, draft is not None
        many = Prompts(decoder, config, [*map(len, rows)], request_of, *limits)
        for batch in many.batches:
            request_of(batch)
        return Texts(many, StopStrings(pieces, strings, 0) if strings else None, tokenizer, skip_special_tokens)


@contextmanager
def _where(number: int, count: int) -> Iterator[None]:
    """Adds to an error which of several prompts it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (Prompt {number} of {count}.)" if count > 1 else str(error)) from None


def _refuse_details(options: Mapping[str, Any]) -> None:
    for name in ("output_logprobs", "top_logprobs"):
        if options.get(name):
            raise ValueError(f"{name}: cannot be returned with plain text. Use generate with return_details=True.")


def _check_text(name: str, text: object, hint: str = "") -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a text, got {type(text).__name__}.{hint}")

"""Text in, text out: a model and its tokenizer, as ``minopt.load`` returns them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from minopt.checkpoint.hub import find_model
from minopt.checkpoint.load import load_checkpoint, resolve_device, resolve_dtype
from minopt.checkpoint.save import save_model
from minopt.checkpoint.source import open_checkpoint
from minopt.config import OPTConfig
from minopt.generation.config import GenerationConfig
from minopt.generation.decode import check_prompt, decode_steps, generate
from minopt.model import OPT
from minopt.tokenizer import Tokenizer, pad_left

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedText:
    """One continuation, with what is known about it.

    Attributes:
        text: the continuation, after its prompt if ``echo`` asked for that.
        token_ids: the new tokens, the one that ended the text included.
        logprobs: natural log-probability of each of them under the model's own distribution.
        stop_reason: ``"eos"`` or ``"length"``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: str


class LanguageModel:
    """A model that reads and writes text.

    Args:
        model: on any device.
        tokenizer: ``None`` where the checkpoint has no tokenizer files; methods on text then say so.
    """

    def __init__(self, model: OPT, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @overload
    def generate(
        self, prompt: str, *, echo: bool = ..., return_details: Literal[False] = ..., **options: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, echo: bool = ..., return_details: Literal[False] = ..., **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompt: str, *, echo: bool = ..., return_details: Literal[True], **options: Any
    ) -> GeneratedText: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, echo: bool = ..., return_details: Literal[True], **options: Any
    ) -> list[GeneratedText]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        echo: bool = False,
        return_details: bool = False,
        add_bos: bool | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> str | GeneratedText | list[str] | list[GeneratedText]:
        """Continues a text, or each of several in one batch.

        Args:
            prompt: one text, or a list of them; ``""`` starts from the beginning-of-text token.
            echo: put the prompt before its continuation.
            return_details: return a ``GeneratedText`` for each prompt instead of its text.
            add_bos: see ``Tokenizer.encode``.
            generator: see ``minopt.generate``.
            **options: of ``GenerationConfig``: ``max_new_tokens``, ``do_sample``, ``top_p``, ...

        Returns:
            The continuation, or a list of them in the order of the prompts. Special tokens are left out of it.

        Raises:
            ValueError: as ``minopt.generate`` does, or if there is no tokenizer.
        """
        if not isinstance(prompt, Sequence):
            raise ValueError(f"prompt: expected a text or several, got {type(prompt).__name__}.")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokenizer, config = self._text_tools(options)
        if not texts:
            return []
        input_ids, mask = pad_left([self._encode(text, add_bos) for text in texts], self.model.config.pad_token_id)
        config = config.replace(output_logprobs=return_details)
        output = generate(self.model, input_ids, mask, config, generator=generator)
        results: list[Any] = []
        for row, text in enumerate(texts):
            end = input_ids.shape[1] + output.lengths[row]
            ids = output.sequences[row, input_ids.shape[1] : end].tolist()
            continuation = (text if echo else "") + tokenizer.decode(ids)
            if return_details:
                assert output.logprobs is not None
                logprobs = tuple(output.logprobs[row, : len(ids)].tolist())
                results.append(GeneratedText(continuation, tuple(ids), logprobs, output.stop_reasons[row]))
            else:
                results.append(continuation)
        return results[0] if isinstance(prompt, str) else results

    def stream(
        self, prompt: str, *, add_bos: bool | None = None, generator: torch.Generator | None = None, **options: Any
    ) -> Iterator[str]:
        """Continues a text piece by piece, as the tokens come.

        Args:
            prompt, add_bos, generator, **options: see ``generate``.

        Returns:
            An iterator of pieces that add up to what ``generate`` returns; each is whole characters.

        Raises:
            ValueError: as ``generate`` does, before the first piece is asked for.
        """
        tokenizer, config = self._text_tools(options)
        input_ids = torch.tensor([self._encode(prompt, add_bos)])
        input_ids, _ = check_prompt(self.model, input_ids, None, config, generator)

        def pieces() -> Iterator[str]:
            decoder = tokenizer.stream_decoder()
            for step in decode_steps(self.model, input_ids, None, config, generator):
                if piece := decoder.push(int(step.tokens)):
                    yield piece
            if piece := decoder.finish():
                yield piece

        return pieces()

    def save(self, folder: str | Path) -> None:
        """Writes a folder that transformers opens too; see ``minopt.save_model``, also for what it raises."""
        save_model(self.model, folder, self.tokenizer)

    @cached_property
    def _rows_without_token(self) -> tuple[int, ...]:
        """Rows of the model's vocabulary that stand for no text: OPT's table is padded from 50,265 to 50,272."""
        assert self.tokenizer is not None
        used = set(self.tokenizer.backend.get_vocab(with_added_tokens=True).values())
        return tuple(i for i in range(self.model.config.vocab_size) if i not in used)

    def _text_tools(self, options: dict[str, Any]) -> tuple[Tokenizer, GenerationConfig]:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: the model's folder has none (tokenizer.json, or vocab.json and merges.txt). "
                "Copy its files there, or call minopt.generate with token ids."
            )
        config = GenerationConfig().replace(**options)
        if config.output_scores:
            raise ValueError("output_scores: there is no place for them beside texts. Call minopt.generate with ids.")
        if config.output_logprobs:
            raise ValueError("output_logprobs: there is no place for them beside texts. Use return_details=True.")
        return self.tokenizer, config.replace(suppress_tokens=config.suppress_tokens + self._rows_without_token)

    def _encode(self, text: str, add_bos: bool | None) -> list[int]:
        assert self.tokenizer is not None
        if not isinstance(text, str):
            raise ValueError(f"prompt: expected a text, got {type(text).__name__}. A list of texts goes to generate.")
        ids = self.tokenizer.encode(text, add_bos)
        if ids:
            return ids
        bos = self.model.config.bos_token_id
        if bos is None:
            raise ValueError("prompt: empty, and the model has no beginning-of-text token. Give it some text.")
        return [bos]


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """Loads a model with its tokenizer: ``minopt.load("facebook/opt-125m").generate("Today is")``.

    Args and Raises: see ``minopt.load_model``; and ``ValueError`` if the tokenizer's files cannot be read.

    Args:
        tokenizer: the folder of its files; ``None`` looks beside the weights, then one folder up.

    Returns:
        A ``LanguageModel``; its ``tokenizer`` is ``None`` where the checkpoint has no tokenizer files.
    """
    target, number_type = resolve_device(device), resolve_dtype(dtype)
    path = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config)
    folder = Tokenizer.find(checkpoint.found.folder) if tokenizer is None else Path(tokenizer).expanduser()
    reader = None if folder is None else Tokenizer.load(folder)
    model = load_checkpoint(checkpoint, target, number_type)
    if reader is not None:
        _warn_of_conflicts(model.config, reader, checkpoint.found.folder)
    return LanguageModel(model, reader)


def _warn_of_conflicts(config: OPTConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Config files that name another token than the tokenizer does have been published (transformers issue 17431)."""
    if len(tokenizer) > config.vocab_size:
        logger.warning(
            "%s: the tokenizer has %d tokens, the model %d rows for them. Is it this model's?",
            folder, len(tokenizer), config.vocab_size,
        )  # fmt: skip
    for name, known in (
        ("bos", (config.bos_token_id,)),
        ("eos", config.eos_token_ids),
        ("pad", (config.pad_token_id,)),
    ):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None and known not in ((), (None,)) and token_id not in known:
            logger.warning(
                "%s: %s_token_id is %s in config.json and %s in the tokenizer's files. Texts begin as the tokenizer "
                "says; padding and the end of generation follow config.json.",
                folder, name, known[0], token_id,
            )  # fmt: skip

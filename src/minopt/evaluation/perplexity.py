"""Perplexity of a text as the published WikiText-2 figures of OPT are measured: windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minopt.config import is_int
from minopt.generation.scoring import token_logprobs
from minopt.model import OPT


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood of a token, in nats.
        tokens: that were scored: one less than the window for each.
        windows: that were read.
    """

    perplexity: float
    tokens: int
    windows: int


def wikitext_text(lines: Iterable[str]) -> str:
    r"""The text that published WikiText-2 perplexities of OPT are measured on, out of the raw file.

    The protocol joins the rows of the hub's wikitext-2-raw-v1 test split by two newlines (IST-DASLab/gptq,
    datautils.py). Those rows are the lines of ``wiki.test.raw``, each with its own newline, and ``""`` for each line
    that is only white space.

    Args:
        lines: of ``wiki.test.raw`` with their newlines, as a file opened with ``encoding="utf-8"`` gives them
            (``str.splitlines`` does not: it splits at other characters too).

    Returns:
        The text, to be encoded in one piece, with ``</s>`` in front as OPT's tokenizer does by default.
    """
    return "\n\n".join(line if line.strip() else "" for line in lines)


def window_perplexity(model: OPT, input_ids: Sequence[int], window: int | None = None) -> PerplexityResult:
    """Perplexity of a text in windows that do not overlap; see ``window_losses``, also for what it raises.

    Args:
        model: on any device, in ``eval()`` mode.
        input_ids: of the text, ``[T]``.
        window: tokens; ``None`` is the model's number of positions, 2048 for OPT.
    """
    window = model.config.max_position_embeddings if window is None else window
    return perplexity_of(window_losses(model, input_ids, window), window)


def perplexity_of(losses: Sequence[float], window: int) -> PerplexityResult:
    """What the losses of all windows of a text, as ``window_losses`` gives them, come to."""
    return PerplexityResult(math.exp(math.fsum(losses) / len(losses)), len(losses) * (window - 1), len(losses))


def window_losses(model: OPT, input_ids: Sequence[int], window: int, *, first: int = 0, every: int = 1) -> list[float]:
    """Losses of a text in windows that do not overlap, from its first token on.

    Each window is read alone and scores all of its tokens but the first. Tokens at the end that do not fill a window
    are left out. As IST-DASLab/gptq does (``opt_eval`` of opt.py, with the text of datautils.py); the figures
    of the GPTQ paper (arXiv 2210.17323) ran in float16, so expect differences of about 0.02. Logits are compared in
    float32, and exist for a few hundred positions at a time.

    Args:
        model: on any device, in ``eval()`` mode: dropout counts otherwise.
        input_ids: of the text, ``[T]``.
        window: tokens, at most the model's number of positions (2048 for OPT).
        first, every: windows ``first``, ``first + every`` and so on: a process' share.

    Returns:
        Of each window the mean over its targets, in nats.

    Raises:
        ValueError: if the window makes no sense, if the text does not fill one, and as ``token_logprobs`` does.
    """
    limit = model.config.max_position_embeddings
    if not is_int(window) or not 2 <= window <= limit:
        raise ValueError(f"window: expected 2 to the model's {limit} positions, got {window!r}. Change --window.")
    windows = len(input_ids) // window
    if windows == 0:
        raise ValueError(
            f"text: expected at least the {window} tokens of one window, got {len(input_ids)}. "
            "Give a longer text, or a smaller --window."
        )
    rows = [input_ids[i * window : (i + 1) * window] for i in range(first, windows, every)]
    # One at a time: a window of 2048 fills any device, and memory does not depend on the text.
    return [-token_logprobs(model, [row], [1])[0].double().mean().item() for row in rows]

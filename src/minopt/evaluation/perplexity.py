"""Perplexity of a text, by default as the published WikiText-2 figures of OPT are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minopt.config import is_int
from minopt.generation.request import Decoder
from minopt.generation.scoring import token_logprobs


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood of a token, in nats.
        tokens: that were scored.
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


def window_perplexity(
    model: Decoder, input_ids: Sequence[int], window: int | None = None, stride: int | None = None
) -> PerplexityResult:
    """Perplexity of a text of any length; see ``window_losses``, also for what it raises."""
    return perplexity_of(window_losses(model, input_ids, window, stride))


def perplexity_of(losses: Sequence[Sequence[float]]) -> PerplexityResult:
    """What the losses of all windows of a text, as ``window_losses`` gives them, come to."""
    tokens = sum(map(len, losses))
    return PerplexityResult(math.exp(math.fsum(map(math.fsum, losses)) / tokens), tokens, len(losses))


def window_losses(
    model: Decoder,
    input_ids: Sequence[int],
    window: int | None = None,
    stride: int | None = None,
    *,
    first: int = 0,
    every: int = 1,
) -> list[list[float]]:
    """Losses of a text's tokens, in windows of ``window`` tokens that begin every ``stride`` tokens.

    Each window is read alone. Each token is scored once, in the first window that has it, unless that begins with it.

    By default windows do not overlap, as published figures are measured (IST-DASLab/gptq, ``opt_eval`` of opt.py, with
    the text of datautils.py): tokens at the end that do not fill a window are left out, unless they are the whole
    text. The figures of the GPTQ paper (arXiv 2210.17323) ran in float16, so expect differences of about 0.02. With a
    smaller stride windows overlap, each token but the first is scored, behind at least ``window - stride`` others but
    at the beginning: closer to the truth, and slower.

    Args:
        model: on any device, in ``eval()`` mode: dropout counts otherwise; or another decoder, an exported program say.
        input_ids: of the text, ``[T]``.
        window: tokens; ``None`` is the model's number of positions, 2048 for OPT.
        stride: tokens; ``None`` is the window.
        first, every: windows ``first``, ``first + every`` and so on: a process' share.

    Returns:
        Of each window the negative log-likelihoods of the tokens that it scores, in nats.

    Raises:
        ValueError: if window or stride make no sense, if the text has fewer than two tokens, and as
            ``token_logprobs`` does.
    """
    limit, length = model.config.max_position_embeddings, len(input_ids)
    window = limit if window is None else window
    if not is_int(window) or not 2 <= window <= limit:
        raise ValueError(f"window: expected 2 to the model's {limit} positions, got {window!r}. Change it.")
    stride = window if stride is None else stride
    if not is_int(stride) or not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to the window's {window} tokens, got {stride!r}. Change it.")
    if length < 2:
        raise ValueError(f"text: expected at least two tokens, got {length}. Give it a longer one.")
    count = 1 + max(0, length - window) // stride  # of full windows, or the text is a shorter one
    if stride < window and (count - 1) * stride + window < length:
        count += 1
    starts = [1, *[max(1, window - stride)] * (count - 1)]
    mine = range(first, count, every)
    rows = [input_ids[i * stride : i * stride + window] for i in mine]
    losses: list[list[float]] = []
    # Few at a time: a window of 2048 fills any device, and memory does not depend on the text.
    at_once = min(max(1, 2048 // window), getattr(model, "max_batch", None) or 2048)
    for at in range(0, len(rows), at_once):
        part = token_logprobs(model, rows[at : at + at_once], [starts[i] for i in mine[at : at + at_once]])
        losses += [(-row.double()).tolist() for row in part]
    return losses

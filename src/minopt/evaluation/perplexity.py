"""Perplexity of a text, by default as the published WikiText-2 figures of OPT are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minopt.config import is_int
from minopt.distributed import World
from minopt.generation.decoder import Decoder
from minopt.generation.scoring import token_logprobs


@dataclass(frozen=True)
class PerplexityResult:
    """``exp`` of the mean negative log-likelihood of scored tokens, in nats; their number, and that of windows."""

    perplexity: float
    tokens: int
    windows: int


def wikitext_text(lines: Iterable[str]) -> str:
    r"""The text that published WikiText-2 perplexities of OPT are measured on, to be encoded in one piece.

    The protocol joins the rows of the hub's wikitext-2-raw-v1 test split by two newlines (IST-DASLab/gptq,
    datautils.py). Those rows are the lines of ``wiki.test.raw``, each with its newline, or ``""`` if it is blank.
    """
    return "\n\n".join(line if line.strip() else "" for line in lines)


def window_perplexity(
    model: Decoder,
    input_ids: Sequence[int],
    window: int | None = None,
    stride: int | None = None,
    world: World | None = None,
) -> PerplexityResult:
    """Perplexity of a text of any length, in windows of ``window`` tokens that begin every ``stride`` tokens.

    Each window is read alone. Each token is scored once, in the first window that has it; its first token has no score.
    By default windows do not overlap, as published figures are measured (IST-DASLab/gptq, ``opt_eval`` of opt.py):
    tokens at the end that do not fill a window are left out, unless they are the whole text. The figures of the GPTQ
    paper (arXiv 2210.17323) ran in float16, so expect differences of about 0.02. With a smaller stride all tokens but
    the first are scored, each after at least ``window - stride`` others: closer to the truth, and slower.

    Args:
        model: any form of the decoder; a plain model in ``eval()`` mode, or dropout acts.
        input_ids: the text's ids, ``[T]``, at least two.
        window: tokens; ``None`` is the model's number of positions, 2048 for OPT.
        stride: tokens; ``None`` is the window.
        world: processes that share the windows; each calls this, and gets the same result.

    Raises:
        ValueError: if window, stride or text make no sense, and as ``token_logprobs`` does.
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
    mine = range(count) if world is None else range(world.rank, count, world.size)
    # Few at a time: a window of 2048 fills any device, and memory does not depend on the text.
    at_once = min(max(1, 2048 // window), model.max_batch or 2048)
    total, tokens = 0.0, 0.0
    for at in range(0, len(mine), at_once):
        batch = mine[at : at + at_once]
        rows = [input_ids[i * stride : i * stride + window] for i in batch]
        for logprobs in token_logprobs(model, rows, [max(1, window - stride) if i else 1 for i in batch]):
            total, tokens = total + logprobs.double().sum().item(), tokens + len(logprobs)
    if world is not None:
        total, tokens = world.sum(total, tokens)
    return PerplexityResult(math.exp(-total / tokens), int(tokens), count)

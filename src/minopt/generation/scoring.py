"""Log-probabilities of given texts: for ranking answers, and for perplexity.

Shapes: B rows, P tokens that all rows begin with, L tokens of the longest row, N tokens scored in a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.decoder import Decoder
from minopt.masks import positions
from minopt.wrapped import decoder_of

# Tokens scored in one pass, whose logits are in memory together: 51 MB of OPT's vocabulary in float32. On a CPU longer
# passes are slower; a GPU is busy only in long ones.
CHUNK, CHUNK_ON_GPU = 256, 2048

# The least number of tokens that reading a common beginning once must save: about what one more pass costs.
SHARED = 32


def token_logprobs(
    model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int], inputs_embeds: Tensor | None = None
) -> list[Tensor]:
    """Natural log-probabilities of tokens, each after those before it in its row. Rows are read as one batch.

    What all rows begin with is read once. Dropout is active if the model is in training mode: call ``eval()`` first.

    Args:
        model: an ``OPT`` on any device, or another decoder, such as an exported program.
        rows: ids, of any lengths.
        starts: each row's index of the first token that is scored; at least 1, for a first token has no score.
        inputs_embeds: floats ``[tokens, E]`` that stand before each row, such as a soft prompt.

    Returns:
        For each row float32 ``[length - start]``, on the CPU.

    Raises:
        ValueError: if a row is empty or longer than the model's positions, a start is outside of its row, or an id
            outside of the vocabulary; nothing has run then.
    """
    _check(model, rows, starts, 0, inputs_embeds)
    return _scored(model, rows, starts, None, inputs_embeds)


def greedy_logprobs(
    model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """As ``token_logprobs``, and for each token, as booleans, whether it is the most probable one.

    A row may have one token more than the model has positions: its last token is not read.
    """
    _check(model, rows, starts, most_unread=1)
    are_best: list[Tensor] = []
    return list(zip(_scored(model, rows, starts, are_best), are_best, strict=True))


@torch.inference_mode()
def _scored(
    model: Decoder,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    are_best: list[Tensor] | None,
    inputs_embeds: Tensor | None = None,
) -> list[Tensor]:
    """The log-probabilities of rows; appends to a list, if there is one, which tokens are the most probable."""
    if not rows:
        return []
    model = decoder_of(model)
    before = 0 if inputs_embeds is None else len(inputs_embeds)
    B, L, P = len(rows), max(map(len, rows)), _common(rows)
    # Padded on the right, where causal attention needs no mask.
    ids = torch.tensor([[*row, *[0] * (L - len(row))] for row in rows])
    ends, at = torch.tensor([[len(row)] for row in rows]), torch.arange(L)
    is_scored = (at >= torch.tensor(starts)[:, None]) & (at < ends)  # [B, L]
    last = int((at * is_scored).max())
    logprobs, is_best = torch.zeros(B, L), None if are_best is None else torch.zeros(B, L, dtype=torch.bool)
    cache, P = model.new_cache(B, before + max(1, last)), min(P, last) if (B - 1) * P >= SHARED else 0
    if before + P > 0:
        shared = cache.rows(0, 1)
        if inputs_embeds is not None:
            embeds = inputs_embeds.to(model.device, model.dtype)[None]
            first = torch.zeros(1, dtype=torch.long, device=model.device)  # not every kernel takes no rows
            model.read(embeds, positions(None, 0, before, model.device)[None], None, first, shared)
        _score(model, shared, ids, is_scored, logprobs, is_best, 0, P)
        cache.repeat_rows(shared)
    _score(model, cache, ids, is_scored, logprobs, is_best, P, last)
    spans = [(i, slice(start, len(row))) for i, (row, start) in enumerate(zip(rows, starts, strict=True))]
    if are_best is not None and is_best is not None:
        are_best += [is_best[span] for span in spans]
    return [logprobs[span] for span in spans]


def _score(
    model: Decoder, cache: KVCache, ids: Tensor, is_scored: Tensor, logprobs: Tensor, is_best: Tensor | None,
    begin: int, end: int,
) -> None:  # fmt: skip
    """Reads tokens ``begin`` to ``end``, and fills in the log-probabilities of what follows each of them.

    ``ids``, ``is_scored``, ``logprobs`` and ``is_best`` are ``[B, L]``. A cache of one row reads what all B rows begin
    with.
    """
    R, L = cache.batch_size, ids.shape[1]
    ids, is_scored, logprobs = (t.view(R, -1, L) for t in (ids, is_scored, logprobs))  # of a read row, C scored ones
    wanted = is_scored.any(1)  # [R, L]
    chunk = CHUNK if model.device.type == "cpu" else CHUNK_ON_GPU
    for first, stop in _passes(wanted.sum(0).tolist(), begin, end, chunk):
        wanted[-1, stop] |= not wanted[:, first + 1 : stop + 1].any()  # not every kernel takes no rows
        row, at = wanted[:, first + 1 : stop + 1].nonzero().unbind(1)
        read = ids[:, 0, first:stop].to(model.device)
        position_ids = positions(None, cache.length, stop - first, model.device).expand(R, -1)
        logits = model.read(read, position_ids, None, (row * (stop - first) + at).to(model.device), cache).float()
        target = ids[row, :, first + 1 + at]  # [N, C]
        found = logits.gather(1, target.to(model.device)) - logits.logsumexp(1, keepdim=True)
        logprobs[row, :, first + 1 + at] = found.cpu()
        if is_best is not None:
            is_best.view(R, -1, L)[row, :, first + 1 + at] = target == logits.argmax(1, keepdim=True).cpu()


def _passes(scored: list[int], begin: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cuts tokens ``begin`` to ``end`` of all rows where ``chunk`` of those that follow are scored."""
    count = 0
    for at in range(begin, end):
        if at > begin and count + scored[at + 1] > chunk:
            yield begin, at
            begin, count = at, 0
        count += scored[at + 1]
    if begin < end:
        yield begin, end


def _check(
    model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int], most_unread: int, embeds: Tensor | None = None
) -> None:
    config = decoder_of(model).config
    most, V, E, behind = config.max_position_embeddings, config.vocab_size, config.embed_dim, ""
    limit = most
    if embeds is not None:
        if embeds.ndim != 2 or embeds.shape[1] != E or len(embeds) == 0 or not embeds.is_floating_point():
            shape = f"{list(embeds.shape)} of {embeds.dtype}"
            raise ValueError(f"inputs_embeds: expected floats [tokens, {E}], got {shape}.")
        limit, behind = limit - len(embeds), f" behind {len(embeds)} embeddings"
    for row, start in zip(rows, starts, strict=True):
        if len(row) > limit + most_unread:
            raise ValueError(f"text: {len(row)} tokens{behind}, the model has {most} positions. Shorten "
                             "it, or cut it in two.")  # fmt: skip
        if not 1 <= start <= len(row):
            raise ValueError(f"starts: expected 1 to the row's {len(row)} tokens, got {start}.")
        if (least := min(row)) < 0 or max(row) >= V:
            got = least if least < 0 else max(row)
            raise ValueError(f"ids: expected 0 to {V - 1}, got {got}. Do the tokenizer and the model belong together?")


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, leaving at least one of each."""
    first, last = min(map(list, rows)), max(map(list, rows))  # in lexicographic order: all others lie between
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)

"""Log-probabilities of given text: for ranking answers, and for perplexity.

Shapes: B rows, P tokens that all rows begin with, L tokens of the longest row, E word_embed_proj_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minopt.generation.request import Decoder
from minopt.model import OPT
from minopt.wrapped import decoder_of

# Positions whose logits are in memory at once: 51 MB of OPT's vocabulary in float32.
CHUNK = 256

# From how many tokens on it pays to read a common beginning once: about what a pass over the weights costs.
SHARED = 32


@torch.inference_mode()
def token_logprobs(model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Natural log-probabilities of tokens, each after those before it in its row. Rows are read as one batch.

    What all rows begin with is read once. A model in ``train()`` mode drops out here too.

    Args:
        model: on any device; or another decoder, such as an exported program.
        rows: ids, of any lengths.
        starts: of each row, the index of the first token that is scored; at least 1, for a first token has none.

    Returns:
        For each row float32 ``[length - start]``, on the CPU.

    Raises:
        ValueError: if a row is empty or longer than the model's positions, a start is outside of its row, or an id
            outside of the vocabulary; nothing has run then.
    """
    if not rows:
        return []
    model = decoder_of(model)
    _check(model, rows, starts)
    if not isinstance(model, OPT):
        return _in_chunks(model, rows, starts)
    P = _common(rows)
    P = P if (len(rows) - 1) * P >= SHARED else 0
    hidden = _hidden(model, rows, P, min(starts))  # [B, L - min(starts), E]
    lengths = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    # Which of those stand before a token that is asked for, one row after the other.
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    at = torch.cat([torch.arange(start, len(row)) for row, start in zip(rows, starts, strict=True)]) - min(starts)
    wanted = torch.tensor([i for row, start in zip(rows, starts, strict=True) for i in row[start:]])
    found = []
    for chunk in torch.split(torch.arange(len(at)), CHUNK):
        logits = model.head(hidden[row_of[chunk], at[chunk]]).float()  # [CHUNK, V]
        target = wanted[chunk].to(logits.device)
        found.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
    return list(torch.split(torch.cat(found).cpu(), lengths))


def _check(model: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for row, start in zip(rows, starts, strict=True):
        if len(row) > limit:
            raise ValueError(f"text: {len(row)} tokens, the model has {limit} positions. Shorten it, or cut it in two.")
        if not 1 <= start <= len(row):
            raise ValueError(f"starts: expected 1 to the row's {len(row)} tokens, got {start}.")
        if min(row) < 0 or max(row) >= vocab_size:
            raise ValueError(
                f"ids: expected 0 to {vocab_size - 1}, got {min(row) if min(row) < 0 else max(row)}. "
                "Do the tokenizer and the model belong together?"
            )


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, leaving at least one of each."""
    first, last = min(map(list, rows)), max(map(list, rows))  # in lexicographic order: all others lie between
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _in_chunks(decoder: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Reads a few tokens of all rows at a time, as beams are read, which gives the logits behind each of them."""
    B, L, device = len(rows), max(len(row) for row in rows), decoder.device
    ids = torch.tensor([[*row, *[0] * (L - len(row))] for row in rows], device=device)
    cache = decoder.new_cache(B, L)
    found = [torch.zeros(B, 0)]
    for begin in range(0, L - 1, max(1, CHUNK // B)):
        chunk = ids[:, begin : min(begin + max(1, CHUNK // B), L - 1)]
        T, end = chunk.shape[1], begin + chunk.shape[1]
        mask = torch.ones(T, end, dtype=torch.bool, device=device).tril(begin).expand(B, -1, -1)
        positions = torch.arange(begin, end, device=device).expand(B, -1)
        logits = decoder.decode_beams(chunk, mask, positions, cache).float()  # [B, T, V]
        target = ids[:, begin + 1 : end + 1, None]
        found.append((logits.gather(2, target)[..., 0] - logits.logsumexp(2)).cpu())
    logprobs = torch.cat(found, 1)  # [B, L - 1]
    return [logprobs[i, start - 1 : len(row) - 1] for i, (row, start) in enumerate(zip(rows, starts, strict=True))]


def _hidden(model: OPT, rows: Sequence[Sequence[int]], P: int, first: int) -> Tensor:
    """Hidden states behind tokens ``first - 1`` to ``L - 2`` at least, ``[B, L - first or one more, E]``."""
    L = max(len(row) for row in rows)
    # Padded on the right, where causal attention has nothing to be hidden from.
    rest = torch.tensor([[*row[P:], *[0] * (L - len(row))] for row in rows], device=model.device)
    if P == 0:
        return model.hidden_states(rest[:, : max(1, L - 1)])[:, first - 1 :]
    cache = model.new_cache(1, L)
    shared = model.hidden_states(torch.tensor([list(rows[0][:P])], device=model.device), cache=cache)
    cache.expand(len(rows))
    own = model.hidden_states(rest, cache=cache)
    shared = shared[:, first - 1 :].expand(len(rows), -1, -1)
    return torch.cat([shared, own[:, max(0, first - 1 - P) :]], dim=1)

"""New tokens: in the tokenizer, and as rows of the token table.

Shapes: V vocab_size, E word_embed_proj_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import AddedToken
from torch import nn

from minopt.inference.frozen import Frozen, refuse
from minopt.text import LanguageModel

_MULTIPLE = 8  # rows of the table, as in the published models: GPUs are slow on others


def add_tokens(lm: LanguageModel, tokens: Sequence[str], special: bool) -> list[int]:
    """See ``LanguageModel.add_tokens``."""
    is_list = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not is_list or not all(isinstance(text, str) and text.strip() for text in tokens):
        raise ValueError(f"tokens: expected a list of texts, none of them blank, got {tokens!r}.")
    model, tokenizer = lm.model, lm.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the model's folder has none to add tokens to. Copy its files there.")
    if isinstance(model, Frozen):
        refuse("its token table cannot get new rows")
    used = set(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    add = tokenizer.backend.add_special_tokens if special else tokenizer.backend.add_tokens
    add([AddedToken(text, special=special, normalized=not special) for text in tokens])
    by_text = tokenizer.backend.get_vocab(with_added_tokens=True)
    ids = [by_text[text] for text in tokens]
    tokenizer.settings.pop("added_tokens_decoder", None)  # transformers would believe it, and not tokenizer.json
    if new := sorted({*ids} - used):
        _give_rows(lm, new, sorted(i for i in used if i < model.config.vocab_size))
    return ids


@torch.no_grad()
def _give_rows(lm: LanguageModel, new: list[int], known: list[int]) -> None:
    """Sets the rows of new tokens, and makes the table longer where it has none."""
    table = lm.model.embed_tokens
    old = table.weight
    mean = old[known].mean(0, dtype=torch.promote_types(old.dtype, torch.float32)).to(old.dtype)
    if (rows := new[-1] + 1) > len(old):
        rows += -rows % _MULTIPLE
        weight = torch.cat([old, mean.expand(rows - len(old), -1)])
        table.weight, table.num_embeddings = nn.Parameter(weight, old.requires_grad), rows
        lm.model.config = replace(lm.model.config, vocab_size=rows)
    table.weight[new] = mean
    lm.__dict__.pop("_rows_without_token", None)

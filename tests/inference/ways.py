"""Every way to generate, to compare two forms of a model."""

from __future__ import annotations

from typing import Any

import torch

import minopt
from minopt import LanguageModel
from tests.conftest import read_next

IDS = torch.tensor([[0, 0, 0, 9, 30, 41, 7], [2, 8, 8, 50, 60, 4, 11]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "sampling": {"do_sample": True, "seed": 3},
    "sampling beams": {"do_sample": True, "num_beams": 2, "seed": 3},
}


def results(lm: LanguageModel) -> dict[str, Any]:
    """What a model, whole or divided, says."""
    decoder = lm.decoder
    with torch.inference_mode():
        cache = decoder.new_cache(2, 9)
        logits = [read_next(decoder, IDS, MASK, cache)]
        logits.append(read_next(decoder, IDS[:, :1], torch.nn.functional.pad(MASK, (0, 1), value=1), cache))
    found: dict[str, Any] = {"logits": torch.stack(logits)}
    for name, options in WAYS.items():
        ids, mask = (IDS[1:], None) if "prompt_lookup_num_tokens" in options else (IDS, MASK)
        found[name] = minopt.generate(decoder, ids, mask, max_new_tokens=12, eos_token_id=(), **options).sequences
    return found

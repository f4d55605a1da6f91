"""How far a model is from the published numbers of opt-125m and opt-350m, which are in published.json.

They come from the tests of metaseq, transformers and CTranslate2, which run on the published weights: a model that
holds them all has OPT's weights, layout and arithmetic right. Shapes as in ``model.py``; N values of a check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from minopt.config import OPTConfig
from minopt.generation.decode import generate
from minopt.model import OPT
from minopt.tokenizer import Tokenizer, pad_left

# Of torch.allclose and numpy.isclose: the sources compare with these, and name only the absolute tolerance.
RELATIVE_TOLERANCE = 1e-5

# What tells a size. Not do_layer_norm_before and the like: a model that has them wrong should be compared, and fail.
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim",
          "max_position_embeddings", "word_embed_proj_dim")  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A record of published.json: N values, and what a model has to be given to compare its own."""

    name: str
    source: str
    measure: str  # see _measured
    expected: list[Any]  # numbers, ids or texts
    tolerance: float | None = None  # absolute, RELATIVE_TOLERANCE comes on top; ids and texts have none
    input_ids: Sequence[Sequence[int]] = ()  # rows of one batch
    prompts: Sequence[str] = ()  # the same as texts
    max_new_tokens: int = 0
    note: str = ""  # what the ids mean, or where the tolerance comes from


@dataclass(frozen=True)
class Comparison:
    """One check, and what a model gave."""

    name: str  # as source and expected, the check's own
    source: str
    expected: list[Any]
    got: list[Any]  # the model's values; None for those that are not finite
    worst: int  # index of the value furthest off, relative to what is allowed; of ids and texts the first wrong one
    largest_difference: float | None  # absolute, at worst; None for ids and texts
    tolerance: float | None  # likewise
    passed: bool  # whether every value holds


def published() -> dict[str, list[Check]]:
    """The checks of each size that has some, by the name of its preset."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {size: [Check(**check) for check in checks] for size, checks in content.items()}


def published_for(config: OPTConfig) -> list[Check]:
    """The checks of the size that has a model's shape. Raises ``ValueError``, which lists the sizes, if none has it."""
    for size, checks in published().items():
        preset = OPTConfig.preset(size)
        if all(getattr(config, name) == getattr(preset, name) for name in _SHAPE):
            return checks
    shape = ", ".join(f"{name} {getattr(config, name)}" for name in _SHAPE)
    raise ValueError(
        f"reference: expected the shape of {' or '.join(published())}, which have published numbers, got {shape}. "
        "Give one of those models."
    )


@torch.inference_mode()
def compare_with_published(
    model: OPT, tokenizer: Tokenizer | None = None, checks: Sequence[Check] | None = None
) -> list[Comparison]:
    """Compares a model, float32 and in ``eval()`` mode, with published numbers; ``None`` means those of its size.

    On a GPU leave TF32 off, as torch does by default. The tokenizer encodes published texts; other checks need none.

    Raises:
        ValueError: if there are no published numbers for the size, or the model or the tokenizer is not as it must be.
            Nothing has run then.
    """
    checks = published_for(model.config) if checks is None else checks
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if dtypes:
        raise ValueError(
            f"model: expected float32, which the published tolerances are for, got {', '.join(sorted(dtypes))}. "
            "Load it with dtype float32."
        )
    if model.training:
        raise ValueError("model: expected eval mode, got training mode, in which dropout acts. Call model.eval().")
    if tokenizer is None and any(check.prompts for check in checks):
        raise ValueError(
            "tokenizer: expected one, got none; some of the published checks are texts. "
            "Copy tokenizer.json, or vocab.json and merges.txt, into the model's folder."
        )
    return [compare(check, _measured(model, tokenizer, check)) for check in checks]


def _measured(model: OPT, tokenizer: Tokenizer | None, check: Check) -> list[Any]:
    """The model's own N values; rows of ids run as one batch that is padded on the right, texts on the left."""
    if check.measure == "greedy_texts":  # the prompts and what greedy decoding adds, without special tokens
        assert tokenizer is not None
        prompts = [tokenizer.encode(prompt) for prompt in check.prompts]
        input_ids, mask = pad_left(prompts, None)
        sequences = generate(model, input_ids, mask, max_new_tokens=check.max_new_tokens).sequences
        starts = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        return [tokenizer.decode(row[start:]) for row, start in zip(sequences, starts, strict=True)]
    rows = [torch.tensor(row, device=model.device) for row in check.input_ids]
    ids = pad_sequence(rows, batch_first=True)  # [B, T]
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    if check.measure == "greedy_ids":  # what greedy decoding adds to one row, past an end of text too
        output = generate(model, ids, max_new_tokens=check.max_new_tokens, eos_token_id=())
        return output.sequences[0, ids.shape[1] :].tolist()
    hidden = model.hidden_states(ids, None if bool(real.all()) else real)
    logits = model.head(hidden).float()  # [B, T, V]
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][real[:, 1:]]
    loss = -logprobs.mean()[None]  # what transformers returns for ``labels=input_ids``
    return {
        "hidden_states_corner": hidden[0, :3, :3].flatten(),  # 3 features of 3 positions of the first row
        "largest_probabilities": logits.softmax(-1).amax(-1)[real],
        "most_probable_ids": logits.argmax(-1)[real],
        "mean_logits": logits.mean(-1)[real],  # over all rows of the vocabulary, those without a token too
        "token_logprobs": logprobs,  # in nats, of each token that has one before it
        "loss": loss,
        "perplexity": loss.exp(),
    }[check.measure].tolist()


def compare(check: Check, got: list[Any]) -> Comparison:
    """One check against a model's values. Raises ``ValueError`` if they are not as many."""
    if len(got) != len(check.expected):
        raise ValueError(f"{check.name}: {len(check.expected)} values are published, the model gave {len(got)}.")
    begin = (check.name, check.source, check.expected)
    if check.tolerance is None:
        differ = [a != b for a, b in zip(check.expected, got, strict=True)]
        return Comparison(*begin, got, differ.index(True) if any(differ) else 0, None, None, not any(differ))
    expected = torch.tensor(check.expected, dtype=torch.float64)
    difference = (torch.tensor(got, dtype=torch.float64) - expected).abs().nan_to_num(nan=math.inf)
    allowed = check.tolerance + RELATIVE_TOLERANCE * expected.abs()
    worst, passed = int((difference / allowed).argmax()), bool((difference <= allowed).all())
    largest, *finite = (value if math.isfinite(value) else None for value in (difference[worst].item(), *got))
    return Comparison(*begin, finite, worst, largest, allowed[worst].item(), passed)


def format_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as a table of ASCII, at most 110 wide, each with its worst value; sources and verdict below it."""
    lines = [("check", "expected", "got", "difference", "allowed", "verdict"), *map(_cells, comparisons)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ("<", ">", ">", ">", ">", "<")
    rows = ([f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in lines)
    table = ["  ".join(row).rstrip() for row in rows]
    sources = dict.fromkeys(f"  {comparison.source}" for comparison in comparisons)  # each once, in order
    note = "of several values the one furthest off is shown, of a text what is around the error; published in"
    verdict = f"{sum(comparison.passed for comparison in comparisons)} of {len(comparisons)} hold"
    return "\n".join([*table, "", note, *sources, "", verdict])


def _cells(c: Comparison) -> tuple[str, ...]:
    """A line of the table."""
    expected, got, verdict = c.expected[c.worst], c.got[c.worst], "holds" if c.passed else "fails"
    if c.tolerance is not None:
        difference = "nan" if c.largest_difference is None else f"{c.largest_difference:.3g}"
        numbers = ("nan" if value is None else f"{value:.7g}" for value in (expected, got))
        return (c.name, *numbers, difference, f"{c.tolerance:.3g}", verdict)
    differ = sum(a != b for a, b in zip(c.expected, c.got, strict=True))
    texts = [ascii(value).strip("'\"") for value in (expected, got)]
    common = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, min(common - 4, max(map(len, texts)) - 20))
    return (c.name, *(text[start : start + 20] for text in texts), f"{differ} of {len(c.got)}", "none", verdict)

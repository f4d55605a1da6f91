"""Published numbers of opt-125m and opt-350m, and how far a loaded model is from each.

They come from the tests of metaseq, transformers and CTranslate2, which run on the published weights: a model that
holds them all has OPT's weights, layout and arithmetic right. Shapes as in ``model.py``; N values of a check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minopt.config import OPTConfig
from minopt.generation.decode import generate
from minopt.model import OPT
from minopt.tokenizer import Tokenizer, pad_left

# Of torch.allclose and numpy.isclose: the sources compare with these, and name only the absolute tolerance.
RELATIVE_TOLERANCE = 1e-5

# What tells a size. Not do_layer_norm_before and the like: a model that has them wrong is one to compare, and to fail.
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim",
          "max_position_embeddings", "word_embed_proj_dim")  # fmt: skip

_CELL = 20  # characters of a value in the table


# Measures: (model, input_ids [B, T], real [B, T]) -> [N]. Rows are padded on the right; ``real`` is False there.


def token_logprobs(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """Natural log-probability of each token that has one before it."""
    logprobs = model(input_ids, _mask(real))[:, :-1].float().log_softmax(-1)
    return logprobs.gather(2, input_ids[:, 1:, None])[..., 0][real[:, 1:]]


def loss(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy of those tokens, in nats: what transformers returns for ``labels=input_ids``."""
    return -token_logprobs(model, input_ids, real).mean()[None]


def perplexity(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """``exp(loss)``."""
    return loss(model, input_ids, real).exp()


def largest_probabilities(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """Probability of the most probable next token, at each position."""
    return model(input_ids, _mask(real)).float().softmax(-1).amax(-1)[real]


def most_probable_ids(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """The most probable next token, at each position."""
    return model(input_ids, _mask(real)).argmax(-1)[real]


def mean_logits(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """Mean over the vocabulary, at each position; all rows of it, the seven without a token too."""
    return model(input_ids, _mask(real)).float().mean(-1)[real]


def hidden_states_corner(model: OPT, input_ids: Tensor, real: Tensor) -> Tensor:
    """The first 3 features of the first 3 positions of the first row, one position after another."""
    return model.hidden_states(input_ids, _mask(real))[0, :3, :3].flatten()


def greedy_ids(model: OPT, input_ids: Tensor, real: Tensor, *, max_new_tokens: int) -> Tensor:
    """The tokens that greedy decoding adds to one row."""
    output = generate(model, input_ids, max_new_tokens=max_new_tokens, eos_token_id=())  # always as many
    return output.sequences[0, input_ids.shape[1] :]


def _mask(real: Tensor) -> Tensor | None:
    return None if bool(real.all()) else real


@dataclass(frozen=True)
class PublishedValues:
    """Numbers or ids that a model gives for token ids.

    Attributes:
        name: of the check, short enough for a table.
        source: where the values are published.
        rows: input ids; rows of several lengths run as one batch padded on the right, whose padding is not compared.
        measure: one of the functions above.
        expected: N values.
        tolerance: the absolute one; ``RELATIVE_TOLERANCE`` of the expected value comes on top. ``None`` is for ids,
            which must be the same.
    """

    name: str
    source: str
    rows: tuple[tuple[int, ...], ...]
    measure: Callable[[OPT, Tensor, Tensor], Tensor]
    expected: tuple[float, ...]
    tolerance: float | None = None


@dataclass(frozen=True)
class PublishedTexts:
    """Texts that greedy decoding gives, prompts included and special tokens left out.

    Attributes:
        name: of the check, short enough for a table.
        source: where the texts are published.
        prompts: encoded as the tokenizer's files say, several as one batch padded on the left.
        max_new_tokens: how many tokens to add to each.
        expected: a text for each prompt.
    """

    name: str
    source: str
    prompts: tuple[str, ...]
    max_new_tokens: int
    expected: tuple[str, ...]


Published = PublishedValues | PublishedTexts


@dataclass(frozen=True)
class Comparison:
    """One published check, held against a model.

    Attributes:
        name: of the check.
        expected: the published values: numbers, ids or texts.
        got: the model's, as many.
        worst: index of the value that is furthest off, in parts of what is allowed there; of the first that differs
            where they must be the same.
        largest_difference: absolute, at ``worst``; NaN if the model gave that; ``None`` for ids and texts.
        tolerance: what is allowed at ``worst``; ``None`` for ids and texts.
        passed: whether every value holds.
        source: where the values are published.
    """

    name: str
    expected: tuple[float, ...] | tuple[str, ...]
    got: tuple[float, ...] | tuple[str, ...]
    worst: int
    largest_difference: float | None
    tolerance: float | None
    passed: bool
    source: str


def published_size(config: OPTConfig) -> str:
    """The key of ``PUBLISHED`` whose model has this shape, for example ``"opt-125m"``.

    Raises:
        ValueError: for any other shape; the message lists the sizes that have published numbers.
    """
    for size in PUBLISHED:
        preset = OPTConfig.preset(size)
        if all(getattr(config, name) == getattr(preset, name) for name in _SHAPE):
            return size
    shape = ", ".join(f"{name} {getattr(config, name)}" for name in _SHAPE)
    raise ValueError(
        f"reference: expected the shape of {' or '.join(PUBLISHED)}, which have published numbers, got {shape}. "
        "Give one of those models."
    )


@torch.inference_mode()
def compare_with_published(
    model: OPT, tokenizer: Tokenizer | None = None, published: Sequence[Published] | None = None
) -> tuple[Comparison, ...]:
    """Holds a model against published numbers.

    On a GPU leave TF32 off, as torch does by itself: transformers' tolerances are for float32 products.

    Args:
        model: in float32 and ``eval()`` mode, on any device.
        tokenizer: for published texts; the others need none.
        published: the checks; ``None`` means those of ``PUBLISHED`` for the model's size.

    Returns:
        A ``Comparison`` for each check, in their order.

    Raises:
        ValueError: if there are no published numbers for the size, the model is not in float32 or in training mode,
            or there are texts and no tokenizer. Nothing has run then.
    """
    checks = PUBLISHED[published_size(model.config)] if published is None else published
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if dtypes:
        raise ValueError(
            f"model: expected float32, which the published tolerances are for, got {', '.join(sorted(dtypes))}. "
            "Load it with dtype float32."
        )
    if model.training:
        raise ValueError("model: expected eval mode, got training mode, where dropout draws. Call model.eval().")
    if tokenizer is None and any(isinstance(check, PublishedTexts) for check in checks):
        raise ValueError(
            "tokenizer: expected one, got none; some of the published checks are texts. "
            "Copy tokenizer.json, or vocab.json and merges.txt, into the model's folder."
        )
    return tuple(_compare(model, tokenizer, check) for check in checks)


def _compare(model: OPT, tokenizer: Tokenizer | None, check: Published) -> Comparison:
    got: tuple[Any, ...]
    if isinstance(check, PublishedTexts):
        assert tokenizer is not None
        got, tolerance = _greedy_texts(model, tokenizer, check), None
    else:
        got, tolerance = _values(model, check), check.tolerance
    if len(got) != len(check.expected):
        raise ValueError(f"{check.name}: {len(check.expected)} values are published, the model gave {len(got)}.")
    if tolerance is None:
        differ = [a != b for a, b in zip(check.expected, got, strict=True)]
        worst = differ.index(True) if any(differ) else 0
        return Comparison(check.name, check.expected, got, worst, None, None, not any(differ), check.source)
    expected = torch.tensor(check.expected, dtype=torch.float64)
    difference = (torch.tensor(got, dtype=torch.float64) - expected).abs()
    allowed = tolerance + RELATIVE_TOLERANCE * expected.abs()
    passed = bool((difference <= allowed).all())  # NaN is not
    worst = int((difference / allowed).nan_to_num(nan=math.inf).argmax())
    largest, limit = float(difference[worst]), float(allowed[worst])
    return Comparison(check.name, check.expected, got, worst, largest, limit, passed, check.source)


def _values(model: OPT, check: PublishedValues) -> tuple[float, ...]:
    width = max(map(len, check.rows))
    padded = [[*row, *[0] * (width - len(row))] for row in check.rows]  # any id would do: it is masked
    real = [[i < len(row) for i in range(width)] for row in check.rows]
    place = model.device
    return tuple(check.measure(model, torch.tensor(padded, device=place), torch.tensor(real, device=place)).tolist())


def _greedy_texts(model: OPT, tokenizer: Tokenizer, check: PublishedTexts) -> tuple[str, ...]:
    prompts = [tokenizer.encode(prompt) for prompt in check.prompts]
    input_ids, mask = pad_left(prompts, None)
    sequences = generate(model, input_ids, mask, max_new_tokens=check.max_new_tokens).sequences
    padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
    return tuple(tokenizer.decode(row[start:]) for row, start in zip(sequences, padding, strict=True))


def format_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as a table of plain ASCII, 110 wide at most, with the sources and the verdict below it.

    Of several values it shows the worst; of a text the part around the first difference, or the end.
    """
    head = ("check", "expected", "got", "difference", "allowed", "verdict")
    lines = [head, *(_cells(comparison) for comparison in comparisons)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = []
    for name, *values, verdict in lines:
        aligned = [value.rjust(width) for value, width in zip(values, widths[1:], strict=False)]
        table.append("  ".join([name.ljust(widths[0]), *aligned, verdict]))
    sources = dict.fromkeys(comparison.source for comparison in comparisons)  # each once, in order
    count = sum(comparison.passed for comparison in comparisons)
    notes = [
        "",
        "of several values the one furthest off is shown; published in",
        *(f"  {source}" for source in sources),
    ]
    return "\n".join([*table, *notes, "", f"{count} of {len(comparisons)} hold"])


def as_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as what ``json.dumps`` takes, a dict each with the names of its attributes as keys.

    Numbers that are not finite become ``None``: JSON has none.
    """
    return [
        {
            name: [_finite(v) for v in value] if isinstance(value, tuple) else _finite(value)
            for name, value in asdict(comparison).items()
        }
        for comparison in comparisons
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(comparison: Comparison) -> tuple[str, ...]:
    """One line of the table."""
    expected, got = comparison.expected[comparison.worst], comparison.got[comparison.worst]
    verdict = "holds" if comparison.passed else "fails"
    if comparison.largest_difference is None:
        differ = sum(a != b for a, b in zip(comparison.expected, comparison.got, strict=True))
        texts = _around_difference(_plain(expected), _plain(got))
        return (comparison.name, *texts, f"{differ} of {len(comparison.got)}", "none", verdict)
    numbers = (f"{value:.7g}" for value in (expected, got))
    return (comparison.name, *numbers, f"{comparison.largest_difference:.3g}", f"{comparison.tolerance:.3g}", verdict)


def _plain(value: float | str) -> str:
    """An id, or a text with line ends and all beyond ASCII escaped."""
    return ascii(value)[1:-1] if isinstance(value, str) else str(value)


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """The same part of two texts, short enough for a cell: where they part, with some of what stands before."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, min(common - 4, max(len(a), len(b)) - _CELL + 3))
    return _clip(a, start), _clip(b, start)


def _clip(text: str, start: int) -> str:
    text = "..." + text[start:] if start > 3 else text
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."


_METASEQ = "metaseq, gpu_tests/test_hub_utils.py: test_generator_interface"
_TRANSFORMERS = "transformers, tests/models/opt/test_modeling_opt.py: "
_PULL_17785 = "transformers, pull request 17785 (Add final_layer_norm to OPT model)"
_CTRANSLATE2 = "CTranslate2, python/tests/test_transformers.py: test_transformers_generation"

# "</s>The man turned on the faucet so the toilet filled with water."
_FAUCET = ((2, 133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4),)

_HELLO = ((2, 31414, 127, 766, 16),)  # "</s>Hello my name is"

# The four prompts of transformers' tests, the first with one word more: this test puts no </s> before them, to be
# "identical to Metaseq".
_WITHOUT_BOS = (
    (5625, 16, 10, 2721, 183, 8, 38, 236, 7),  # "Today is a beautiful day and I want to"
    (1121, 5, 343, 9),  # "In the city of"
    (32826, 16, 5, 812, 9, 1470, 8),  # "Paris is the capital of France and"
    (14721, 43990, 8, 1830, 4247, 33, 551),  # "Computers and mobile phones have taken"
)


def _prompt(name: str, source: str, prompt: str, max_new_tokens: int, continuation: str) -> PublishedTexts:
    return PublishedTexts(name, source, (prompt,), max_new_tokens, (prompt + continuation,))


def _four_prompts(source: str, city: str) -> tuple[PublishedTexts, ...]:
    """The prompts of transformers' generation tests, one by one up to 10 tokens, the first ``</s>`` included."""
    return (
        _prompt("greedy: Today is a beautiful day", source, "Today is a beautiful day and I want", 1, " to"),
        _prompt("greedy: In the city of", source, "In the city of", 5, city),
        _prompt("greedy: Paris is the capital", source, "Paris is the capital of France and", 2, " the capital"),
        _prompt("greedy: Computers and mobile", source, "Computers and mobile phones have taken", 2, " over the"),
    )


_OPT_125M: tuple[Published, ...] = (
    # Of a float16 model, with metaseq's tolerance for that. Its test_generator_interface_with_metrics has other values
    # for the same tokens, up to 0.0065 away: what float16 leaves open.
    PublishedValues(
        "log-probabilities of 15 tokens",
        _METASEQ,
        _FAUCET,
        token_logprobs,
        (-2.4363, -6.0242, -7.7129, -4.2071, -1.1884, -6.6526, -0.9852, -0.0452, -4.7183, -2.6682, -4.9607, -7.0027,
         -1.1464, -1.3687, -1.1196),
        1e-2,
    ),
    *_four_prompts(_TRANSFORMERS + "test_generation_pre_attn_layer_norm", " New York, the city"),
    # Printed, not tested, so without a tolerance: that of transformers' logits, 1e-4, for the loss and what follows
    # from it; the derivative of exp for the perplexity.
    PublishedValues("loss of a prompt", _PULL_17785, _HELLO, loss, (4.0513148,), 1e-4),
    PublishedValues("perplexity of it", _PULL_17785, _HELLO, perplexity, (57.472973,), 57.5e-4),
    PublishedValues(
        "largest probability, each position",
        _PULL_17785,
        _HELLO,
        largest_probabilities,
        (0.23982257, 0.23258895, 0.33315504, 0.9362957, 0.00967377),
        1e-4,
    ),
    PublishedValues("most probable id, each position", _PULL_17785, _HELLO, most_probable_ids, (100, 6, 766, 16, 1236)),
)  # fmt: skip

_OPT_350M: tuple[Published, ...] = (
    PublishedValues(
        "hidden states, 3 x 3 of them",
        _TRANSFORMERS + "test_inference_no_head",
        ((0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2),),
        hidden_states_corner,
        (-0.28726277, -1.9241608, -0.3058734, -1.2737825, -0.13332152, -0.18766522, 0.41159445, 0.1191957, -1.3107123),
        5e-5,
    ),
    PublishedValues(
        "mean logits, 4 rows padded right",
        _TRANSFORMERS + "test_logits",
        _WITHOUT_BOS,
        mean_logits,
        (1.3851, -13.8923, -10.5229, -10.7533, -0.2309, -10.2384, -0.5365, -9.0947, -5.1670,
         -4.7073, -10.6276, -3.9415, -21.5242,
         0.6247, -3.4229, -8.9179, -1.4297, -14.1650, 1.4146, -9.0218,
         6.4783, -1.9913, -10.7926, -2.3336, 1.5092, -0.9974, -6.8213),
        1e-4,
    ),
    *_four_prompts(_TRANSFORMERS + "test_generation_post_attn_layer_norm", " San Francisco, the city"),
    PublishedTexts(
        "greedy: a left-padded batch of 2",
        _TRANSFORMERS + "test_batch_generation",
        ("Hello, my dog is a little", "Today, I"),
        12,
        ("Hello, my dog is a little bit of a dork.\nI'm a little bit",
         "Today, I was in the middle of a conversation with a friend about the"),
    ),
    # "\nThe following is a list of the most popular"
    PublishedValues("greedy: 10 ids from </s> alone", _CTRANSLATE2, ((2,),), partial(greedy_ids, max_new_tokens=10),
                    (50118, 133, 511, 16, 10, 889, 9, 5, 144, 1406)),
)  # fmt: skip

PUBLISHED: Mapping[str, tuple[Published, ...]] = MappingProxyType({"opt-125m": _OPT_125M, "opt-350m": _OPT_350M})
"""The published checks of each size that has some, under the name of its preset."""

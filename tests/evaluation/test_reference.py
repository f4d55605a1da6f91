"""Published numbers: a model that is the reference holds them all, any other fails with the figures that say so.

The real weights are not here. Small models stand in, with what transformers' OPT computes from the same weights in the
place of the published values; the published values themselves are checked against the tokenizer and each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import minopt
from minopt import OPT, OPTConfig, Tokenizer
from minopt.evaluation import reference
from minopt.evaluation.reference import (
    PUBLISHED,
    Comparison,
    Published,
    PublishedTexts,
    PublishedValues,
    as_records,
    compare_with_published,
    format_table,
    published_size,
)
from tests.conftest import build_ours, build_reference

VOCAB = 2048  # of the embedded checkpoint, whose tokenizer reads and writes the texts here
ROW = ((2, 310, 41, 900, 1755, 7, 7, 66),)
ROWS = ((5, 1200, 37, 444), (2000, 8), (12, 13, 14, 15, 16, 17))
PROMPTS = ("The sea was calm, and the old", "Today, I")
NUMBERS = ("logprobs", "hidden", "mean logits", "loss", "perplexity", "probabilities")
EXACT = ("ids", "greedy ids", "texts")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(minopt.DEMO)


@pytest.fixture(scope="module")
def opt_125m() -> OPT:
    """An untrained model of that size."""
    torch.manual_seed(0)
    return OPT(OPTConfig.preset("opt-125m"), dtype=torch.float32).eval()


@torch.no_grad()
def published_by(model: Any) -> tuple[Published, ...]:
    """Checks of every kind whose expected values are transformers'."""
    ids = torch.tensor(ROW)
    output = model(ids, labels=ids, output_hidden_states=True)
    probabilities = output.logits.softmax(-1)[0]
    logprobs = [float(probabilities[i].log()[token]) for i, token in enumerate(ROW[0][1:])]
    alone = [model(torch.tensor([row])).logits[0].mean(-1) for row in ROWS]
    corner = model.model(ids).last_hidden_state[0, :3, :3]
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)[0, len(ROW[0]) :]
    texts = transformers.AutoTokenizer.from_pretrained(minopt.DEMO, padding_side="left")
    batch = texts(list(PROMPTS), return_tensors="pt", padding=True, return_token_type_ids=False)
    written = texts.batch_decode(model.generate(**batch, max_new_tokens=9, do_sample=False), skip_special_tokens=True)

    def check(name: str, rows: Any, measure: Any, expected: Any, tolerance: float | None = 1e-4) -> PublishedValues:
        return PublishedValues(name, "transformers", rows, measure, tuple(expected), tolerance)

    return (
        check("logprobs", ROW, reference.token_logprobs, logprobs),
        check("hidden", ROW, reference.hidden_states_corner, corner.flatten().tolist()),
        check("mean logits", ROWS, reference.mean_logits, torch.cat(alone).tolist()),
        check("loss", ROW, reference.loss, [float(output.loss)]),
        check("perplexity", ROW, reference.perplexity, [math.exp(output.loss)]),
        check("probabilities", ROW, reference.largest_probabilities, probabilities.amax(-1).tolist()),
        check("ids", ROW, reference.most_probable_ids, output.logits[0].argmax(-1).tolist(), None),
        check("greedy ids", ROW, partial(reference.greedy_ids, max_new_tokens=6), greedy.tolist(), None),
        PublishedTexts("texts", "transformers", PROMPTS, 9, tuple(written)),
    )


@pytest.fixture(scope="module", params=["125m", "350m"])
def pair(request: pytest.FixtureRequest) -> tuple[OPT, tuple[Published, ...]]:
    """minopt's model, pre-norm or post-norm with projections, and what transformers says of it."""
    model = build_reference(request.param, vocab_size=VOCAB)
    return build_ours(model), published_by(model)


Pair = tuple[OPT, tuple[Published, ...]]


def failing(comparisons: Sequence[Comparison]) -> set[str]:
    return {comparison.name for comparison in comparisons if not comparison.passed}


def test_the_model_of_the_published_values_holds_them_all(pair: Pair, tokenizer: Tokenizer) -> None:
    comparisons = compare_with_published(pair[0], tokenizer, pair[1])
    assert [comparison.name for comparison in comparisons] == [*NUMBERS, *EXACT]
    assert failing(comparisons) == set()
    assert [len(comparison.got) for comparison in comparisons] == [7, 9, 12, 1, 1, 8, 8, 6, 2]
    for comparison, check in zip(comparisons, pair[1], strict=True):
        assert (comparison.expected, comparison.source) == (check.expected, "transformers")
    assert all(type(value) is int for value in comparisons[6].got + comparisons[7].got)
    assert format_table(comparisons).endswith("published in\n  transformers\n\n9 of 9 hold")


@pytest.mark.parametrize("style", ["125m", "350m"])
def test_a_model_of_other_weights_holds_none(style: str, tokenizer: Tokenizer) -> None:
    published = published_by(build_reference(style, vocab_size=VOCAB))
    other = build_ours(build_reference(style, vocab_size=VOCAB, seed=1))
    comparisons = compare_with_published(other, tokenizer, published)
    assert failing(comparisons) == {*NUMBERS, *EXACT}
    for comparison in comparisons[:6]:
        expected, got = comparison.expected[comparison.worst], comparison.got[comparison.worst]
        assert comparison.largest_difference == pytest.approx(abs(expected - got), rel=1e-12)  # type: ignore[operator]
        assert comparison.largest_difference > 10 * comparison.tolerance  # type: ignore[operator]


def shift_positions(model: OPT) -> None:
    table = model.embed_positions.weight
    table.copy_(table.roll(1, 0))


def swap_norms(model: OPT) -> None:
    layer = model.layers[0]
    layer.self_attn_layer_norm, layer.final_layer_norm = layer.final_layer_norm, layer.self_attn_layer_norm


@pytest.mark.parametrize("change", [shift_positions, swap_norms, lambda model: model.layers[1].fc1.bias.zero_()])
@pytest.mark.parametrize("style", ["125m", "350m"])
@torch.no_grad()
def test_one_mistake_in_a_model_fails_every_number(style: str, change: Callable[[OPT], None]) -> None:
    model = build_reference(style, vocab_size=VOCAB)
    ours, published = build_ours(model), published_by(model)[:6]
    change(ours)
    assert failing(compare_with_published(ours, None, published)) == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_holds_just_within_its_tolerance_and_fails_just_beyond(
    name: str, which: int, sign: int, pair: Pair
) -> None:
    model, published = pair
    check = next(check for check in published if check.name == name)
    assert isinstance(check, PublishedValues)
    got = compare_with_published(model, None, [check])[0].got
    for part, holds in ((0.98, True), (1.02, False)):
        moved = list(got)
        moved[which] = got[which] + sign * part * (1e-3 + 1e-5 * abs(got[which]))  # type: ignore[operator, arg-type]
        expected = tuple(moved)
        (comparison,) = compare_with_published(model, None, [replace(check, expected=expected, tolerance=1e-3)])
        assert comparison.passed is holds
        assert comparison.worst == range(len(got))[which]
        assert comparison.tolerance == 1e-3 + 1e-5 * abs(moved[which])  # type: ignore[arg-type]
        assert comparison.largest_difference == pytest.approx(part * comparison.tolerance, rel=1e-3)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("which", [0, -1])
def test_ids_and_texts_hold_if_they_are_the_same_and_fail_if_one_differs(
    name: str, which: int, pair: Pair, tokenizer: Tokenizer
) -> None:
    model, published = pair
    check = next(check for check in published if check.name == name)
    moved: list[Any] = list(check.expected)
    moved[which] = moved[which] + ("." if name == "texts" else 1)
    (comparison,) = compare_with_published(model, tokenizer, [replace(check, expected=tuple(moved))])
    assert not comparison.passed
    assert comparison.worst == range(len(moved))[which]
    assert comparison.got == check.expected
    assert comparison.largest_difference is comparison.tolerance is None


def test_texts_are_of_prompts_read_as_the_tokenizer_says_each_as_alone(pair: Pair, tokenizer: Tokenizer) -> None:
    model, check = pair[0], pair[1][-1]
    (batch,) = compare_with_published(model, tokenizer, [check])
    alone = [replace(check, prompts=(prompt,), expected=(text,)) for prompt, text in zip(PROMPTS, batch.got)]  # noqa: B905
    assert failing(compare_with_published(model, tokenizer, alone)) == set()
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(batch.got, PROMPTS))  # noqa: B905
    assert all(text == tokenizer.decode(tokenizer.encode(text)) for text in PROMPTS)


@pytest.mark.parametrize(
    "measure",
    [reference.token_logprobs, reference.largest_probabilities, reference.most_probable_ids, reference.mean_logits],
)
def test_rows_padded_on_the_right_give_what_each_gives_alone(measure: Any, pair: Pair) -> None:
    alone = []
    for row in ROWS:
        numbers = measure(pair[0], torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
        alone += numbers.tolist()
    check = PublishedValues("rows", "here", ROWS, measure, tuple(alone), 1e-4)
    assert compare_with_published(pair[0], None, [check])[0].passed


def test_greedy_ids_go_on_behind_an_end_of_text(pair: Pair) -> None:
    model, published = pair
    check = published[-2]
    model.config, config = replace(model.config, eos_token_id=check.expected[0]), model.config  # type: ignore[arg-type]
    try:
        assert compare_with_published(model, None, [check])[0].passed
    finally:
        model.config = config


def test_a_model_of_nans_fails_and_stays_json(opt_125m: OPT) -> None:
    model = OPT(replace(opt_125m.config, num_hidden_layers=1)).eval()
    torch.nn.init.constant_(model.layers[0].fc1.bias, float("nan"))
    numbers = [check for check in PUBLISHED["opt-125m"] if isinstance(check, PublishedValues)]
    comparisons = compare_with_published(model, None, numbers)
    assert not any(comparison.passed for comparison in comparisons)
    assert math.isnan(comparisons[0].largest_difference)  # type: ignore[arg-type]
    assert "nan  " in format_table(comparisons)
    (record, *_) = json.loads(json.dumps(as_records(comparisons), allow_nan=False))
    assert record["got"] == [None] * 15
    assert record["largest_difference"] is None


def test_one_value_that_is_no_number_fails_the_check_and_is_the_worst(pair: Pair) -> None:
    def measure(model: OPT, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, float("nan"), 4.5])

    check = PublishedValues("numbers", "here", ROW, measure, (1.0, 2.0, 3.0, 4.0), 1e-3)
    (comparison,) = compare_with_published(pair[0], None, [check])
    assert (comparison.passed, comparison.worst) == (False, 2)


def test_the_worst_is_the_value_furthest_off_in_parts_of_what_it_may_be(pair: Pair) -> None:
    def measure(model: OPT, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1e6 + 8.0, 2.0005], dtype=torch.float64)

    check = PublishedValues("numbers", "here", ROW, measure, (1e6, 2.0), 1e-4)
    (comparison,) = compare_with_published(pair[0], None, [check])
    assert (comparison.passed, comparison.worst) == (False, 1)
    assert comparison.largest_difference == pytest.approx(5e-4)
    assert comparison.tolerance == pytest.approx(1.2e-4)


# The table of published values


@pytest.mark.parametrize(("size", "count"), [("opt-125m", 9), ("opt-350m", 8)])
def test_each_check_has_a_name_of_its_own_a_source_and_values_for_what_it_reads(size: str, count: int) -> None:
    assert len({check.name for check in PUBLISHED[size]}) == len(PUBLISHED[size]) == count
    config = replace(OPTConfig.preset(size), num_hidden_layers=1)
    model = OPT(config).eval()
    for check in PUBLISHED[size]:
        assert check.source.startswith(("metaseq, ", "transformers, ", "CTranslate2, "))
        if isinstance(check, PublishedValues):  # a ValueError would say that their number does not fit
            assert not compare_with_published(model, None, [check])[0].passed
            assert (check.tolerance is None) == all(isinstance(value, int) for value in check.expected)


def check_named(size: str, start: str) -> Any:
    (found,) = (check for check in PUBLISHED[size] if check.name.startswith(start))
    return found


def test_published_numbers_agree_with_what_their_sources_say_beside_them() -> None:
    # The mean score that metaseq's test_generator_hub_interface records for the same tokens.
    logprobs = check_named("opt-125m", "log-probabilities").expected
    assert sum(logprobs) / 15 == pytest.approx(-3.4824333190917969, abs=5e-5)
    # Pull request 17785 prints logarithms of the same probabilities, and the perplexity of the same loss.
    logarithms = [-1.4278558, -1.4584825, -1.0991473, -0.06582398, -4.6383367]
    largest = check_named("opt-125m", "largest").expected
    assert [math.log(p) for p in largest] == pytest.approx(logarithms, abs=1e-6)
    loss, perplexity = check_named("opt-125m", "loss"), check_named("opt-125m", "perplexity")
    assert math.exp(loss.expected[0]) == pytest.approx(perplexity.expected[0], rel=1e-7)
    assert perplexity.tolerance == pytest.approx(loss.tolerance * perplexity.expected[0], rel=1e-3)


def test_published_ids_are_those_of_their_texts(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "opt-tokenizer")
    assert check_named("opt-125m", "log-probabilities").rows == (
        tuple(tokenizer.encode("The man turned on the faucet so the toilet filled with water.")),
    )
    for start in ("loss", "perplexity", "largest", "most probable"):
        assert check_named("opt-125m", start).rows == (tuple(tokenizer.encode("Hello my name is")),)
    assert tokenizer.decode(check_named("opt-125m", "most probable").expected) == "I, name is j"
    hidden = check_named("opt-350m", "hidden states")
    assert hidden.rows == ((0, *tokenizer.encode("Hello world! cécé herlolip</s>", add_bos=False)),)
    prompts = ["Today is a beautiful day and I want to", "In the city of", "Paris is the capital of France and",
               "Computers and mobile phones have taken"]  # fmt: skip
    means = check_named("opt-350m", "mean logits")
    assert means.rows == tuple(tuple(tokenizer.encode(prompt, add_bos=False)) for prompt in prompts)
    alone = check_named("opt-350m", "greedy: 10 ids")
    assert alone.rows == (tuple(tokenizer.encode("")),)
    assert alone.expected == tuple(tokenizer.encode("\nThe following is a list of the most popular", add_bos=False))


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m"])
def test_published_texts_have_the_length_that_their_tests_ask_for(size: str, shared_data: Path) -> None:
    """``max_length``, which counts the prompt: 10, and for the batch 20 with its padding, the default then."""
    tokenizer = Tokenizer.load(shared_data / "opt-tokenizer")
    for check in PUBLISHED[size]:
        if isinstance(check, PublishedTexts):
            prompts = [tokenizer.encode(prompt) for prompt in check.prompts]
            assert max(map(len, prompts)) + check.max_new_tokens == (20 if "batch" in check.name else 10)
            for prompt, text in zip(prompts, check.expected, strict=True):
                ids = tokenizer.encode(text)
                assert ids[: len(prompt)] == prompt
                assert len(ids) == len(prompt) + check.max_new_tokens


def test_an_untrained_opt_125m_holds_none(opt_125m: OPT, shared_data: Path) -> None:
    comparisons = compare_with_published(opt_125m, Tokenizer.load(shared_data / "opt-tokenizer"))
    assert [comparison.name for comparison in comparisons] == [check.name for check in PUBLISHED["opt-125m"]]
    assert not any(comparison.passed for comparison in comparisons)
    assert all(len(comparison.got) == len(comparison.expected) for comparison in comparisons)
    loss = next(comparison for comparison in comparisons if comparison.name.startswith("loss"))
    assert loss.got[0] == pytest.approx(math.log(50272), abs=0.5)  # knows nothing: all rows alike
    table = format_table(comparisons)
    assert table.endswith("\n0 of 9 hold")
    assert max(map(len, table.splitlines())) <= 110


def test_the_checks_of_opt_350m_run_on_a_shallow_one(shared_data: Path) -> None:
    model = OPT(replace(OPTConfig.preset("opt-350m"), num_hidden_layers=1)).eval()
    tokenizer = Tokenizer.load(shared_data / "opt-tokenizer")
    comparisons = compare_with_published(model, tokenizer, PUBLISHED["opt-350m"])
    table = format_table(comparisons)
    assert table.endswith("\n0 of 8 hold")
    assert max(map(len, table.splitlines())) <= 110
    batch = next(comparison for comparison in comparisons if "batch" in comparison.name)
    for text, prompt in zip(batch.got, ("Hello, my dog is a little", "Today, I"), strict=True):
        assert text.startswith(prompt)  # type: ignore[union-attr]


# Refusals, on models without memory: nothing can have run


def on_meta(size: str = "opt-125m", dtype: torch.dtype = torch.float32, **changes: Any) -> OPT:
    return OPT(replace(OPTConfig.preset(size), **changes), device="meta", dtype=dtype).eval()


def test_the_size_follows_from_the_shape_alone() -> None:
    assert published_size(OPTConfig.preset("opt-125m")) == "opt-125m"
    assert published_size(OPTConfig.preset("opt-350m")) == "opt-350m"
    wrong = {"do_layer_norm_before": True, "activation_function": "gelu", "init_std": 0.02, "eos_token_id": None}
    assert published_size(replace(OPTConfig.preset("opt-350m"), **wrong)) == "opt-350m"


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("opt-1.3b", {}),
        ("galactica-125m", {}),
        ("opt-125m", {"vocab_size": 50265}),
        ("opt-125m", {"num_hidden_layers": 11}),
        ("opt-125m", {"num_attention_heads": 6}),
        ("opt-125m", {"ffn_dim": 3000}),
        ("opt-125m", {"max_position_embeddings": 1024}),
        ("opt-350m", {"word_embed_proj_dim": 1024}),
    ],
)
def test_another_size_is_refused_with_the_sizes_that_have_numbers(size: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="reference: expected the shape of opt-125m or opt-350m, which have") as caught:
        compare_with_published(on_meta(size, **changes))
    config = replace(OPTConfig.preset(size), **changes)  # type: ignore[arg-type]
    assert f"hidden_size {config.hidden_size}, num_hidden_layers {config.num_hidden_layers}," in str(caught.value)
    assert str(caught.value).endswith(f"word_embed_proj_dim {config.embed_dim}. Give one of those models.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_not_in_float32_is_refused(dtype: torch.dtype) -> None:
    message = rf"expected float32, which the published tolerances are for, got {dtype}\. Load it with dtype float32\."
    with pytest.raises(ValueError, match=message):
        compare_with_published(on_meta(dtype=dtype))


def test_a_model_that_is_partly_in_another_dtype_is_refused() -> None:
    model = on_meta()
    model.layers[3].fc2.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16\. Load it"):
        compare_with_published(model)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected eval mode, got training mode, .* Call model\.eval\(\)"):
        compare_with_published(on_meta().train())


def test_texts_without_a_tokenizer_are_refused() -> None:
    message = r"tokenizer: expected one, got none; some of the published checks are texts\. Copy tokenizer\.json, or"
    with pytest.raises(ValueError, match=message):
        compare_with_published(on_meta())


def test_another_number_of_values_than_published_is_refused(pair: Pair) -> None:
    check = PublishedValues("a check", "here", ROW, reference.loss, (1.0, 2.0), 1e-4)
    with pytest.raises(ValueError, match="a check: 2 values are published, the model gave 1"):
        compare_with_published(pair[0], None, [check])


# What a terminal and a program are given

COMPARISONS = (
    Comparison("loss", (4.0513148,), (4.05131,), 0, 4.8e-6, 0.00014051, True, "pull request 1"),
    Comparison("hidden states", (1.0, -12.345678), (1.0, 2.5), 1, 14.845678, 0.00017345, False, "test_a"),
    Comparison("ids", (100, 6, 7), (100, 5, 8), 1, None, None, False, "test_a"),
    Comparison(
        "a city",
        ("In the city of New York, the city",),
        ("In the city of New Orleans.\n\u2014",),
        0,
        None,
        None,
        False,
        "test_b",
    ),
    Comparison("a dog", ("My dog is a little",), ("My dog is a little",), 0, None, None, True, "test_b"),
)


def test_the_table_shows_the_worst_of_each_check_its_sources_and_the_verdict() -> None:
    assert format_table(COMPARISONS).splitlines() == [
        "check                      expected                   got  difference   allowed  verdict",
        "loss                       4.051315               4.05131     4.8e-06  0.000141  holds",
        "hidden states             -12.34568                   2.5        14.8  0.000173  fails",
        "ids                               6                     5      2 of 3      none  fails",
        "a city         ...New York, the ...  ...New Orleans.\\n...      1 of 1      none  fails",
        "a dog            My dog is a little    My dog is a little      0 of 1      none  holds",
        "",
        "of several values the one furthest off is shown; published in",
        "  pull request 1",
        "  test_a",
        "  test_b",
        "",
        "2 of 5 hold",
    ]


@pytest.mark.parametrize(
    ("expected", "got", "shown"),
    [
        ("short", "short", ("short", "short")),
        ("short", "shirt", ("short", "shirt")),
        ("a text that ends here", "a text that ends here and goes on", ("... here", "... here and goes on")),
        ("x" * 30, "x" * 30, ("..." + "x" * 17, "..." + "x" * 17)),
        ("x" * 30, "y" * 30, ("x" * 17 + "...", "y" * 17 + "...")),
        ("tab\there", "tab here", (r"tab\there", "tab here")),
        ("caf\u00e9", "cafe", (r"caf\xe9", "cafe")),
        ("it's", 'it"s', ("it's", 'it"s')),
    ],
)
def test_a_text_is_shown_around_the_first_difference_in_ascii(expected: str, got: str, shown: tuple[str, str]) -> None:
    comparison = Comparison("x", (expected,), (got,), 0, None, None, expected == got, "here")
    line = format_table([comparison]).splitlines()[1]
    assert line.isascii()
    assert tuple(cell.strip() for cell in line.split("  ") if cell.strip())[1:3] == shown


def test_records_are_json_with_every_attribute() -> None:
    records = json.loads(json.dumps(as_records(COMPARISONS), allow_nan=False))
    assert records[1] == {
        "name": "hidden states",
        "expected": [1.0, -12.345678],
        "got": [1.0, 2.5],
        "worst": 1,
        "largest_difference": 14.845678,
        "tolerance": 0.00017345,
        "passed": False,
        "source": "test_a",
    }
    assert records[2]["largest_difference"] is None
    assert records[3]["got"] == ["In the city of New Orleans.\n\u2014"]

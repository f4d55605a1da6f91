"""Published numbers: a model that is the reference holds them all, any other fails with the figures that say so.

The real weights are not here. Small models stand in, with what transformers' OPT computes from the same weights in the
place of the published values; the published values themselves are checked against the tokenizer and each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import minopt
from minopt import OPT, OPTConfig, Tokenizer
from minopt.evaluation.harness import (
    Check,
    Comparison,
    compare,
    compare_with_published,
    format_table,
    published,
    published_for,
)
from tests.conftest import build_ours, build_reference

VOCAB = 2048  # of the embedded checkpoint, whose tokenizer reads and writes the texts here
ROW = [[2, 310, 41, 900, 1755, 7, 7, 66]]
ROWS = [[5, 1200, 37, 444], [2000, 8], [12, 13, 14, 15, 16, 17]]
PROMPTS = ["The sea was calm, and the old", "Today, I"]
NUMBERS = {"token_logprobs": 7, "hidden_states_corner": 9, "mean_logits": 12, "loss": 1, "perplexity": 1,
           "largest_probabilities": 8}  # fmt: skip
EXACT = {"most_probable_ids": 8, "greedy_ids": 6, "greedy_texts": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(minopt.DEMO)


@torch.no_grad()
def checks_by(model: Any) -> list[Check]:
    """Checks of every kind whose expected values are transformers'."""
    ids = torch.tensor(ROW)
    output = model(ids, labels=ids, output_hidden_states=True)
    probabilities = output.logits.softmax(-1)[0]
    texts = transformers.AutoTokenizer.from_pretrained(minopt.DEMO, padding_side="left")
    batch = texts(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    written = model.generate(**batch, max_new_tokens=9, do_sample=False)
    values = {
        "token_logprobs": [float(probabilities[i].log()[token]) for i, token in enumerate(ROW[0][1:])],
        "hidden_states_corner": model.model(ids).last_hidden_state[0, :3, :3].flatten().tolist(),
        "mean_logits": torch.cat([model(torch.tensor([row])).logits[0].mean(-1) for row in ROWS]).tolist(),
        "loss": [float(output.loss)],
        "perplexity": [math.exp(output.loss)],
        "largest_probabilities": probabilities.amax(-1).tolist(),
        "most_probable_ids": output.logits[0].argmax(-1).tolist(),
        "greedy_ids": model.generate(ids, max_new_tokens=6, do_sample=False)[0, len(ROW[0]) :].tolist(),
        "greedy_texts": texts.batch_decode(written, skip_special_tokens=True),
    }
    checks = [Check(name, "transformers", name, expected, 1e-4 if name in NUMBERS else None, ROW, max_new_tokens=6)
              for name, expected in values.items()]  # fmt: skip
    changes: dict[str, Any] = {"mean_logits": {"input_ids": ROWS},
                               "greedy_texts": {"input_ids": (), "prompts": PROMPTS, "max_new_tokens": 9}}  # fmt: skip
    return [replace(check, **changes.get(check.name, {})) for check in checks]


Pair = tuple[OPT, list[Check]]


@pytest.fixture(scope="module", params=["125m", "350m"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """minopt's model, pre-norm or post-norm with projections, and what transformers says of it."""
    model = build_reference(request.param, vocab_size=VOCAB)
    return build_ours(model), checks_by(model)


def failing(comparisons: list[Comparison]) -> set[str]:
    return {comparison.name for comparison in comparisons if not comparison.passed}


def test_the_model_of_the_published_values_holds_them_all(pair: Pair, tokenizer: Tokenizer) -> None:
    comparisons = compare_with_published(pair[0], tokenizer, pair[1])
    assert failing(comparisons) == set()
    assert {comparison.name: len(comparison.got) for comparison in comparisons} == NUMBERS | EXACT
    assert all(type(value) is int for comparison in comparisons[6:8] for value in comparison.got)
    assert format_table(comparisons).endswith("published in\n  transformers\n\n9 of 9 hold")


@pytest.mark.parametrize("style", ["125m", "350m"])
def test_a_model_of_other_weights_holds_none(style: str, tokenizer: Tokenizer) -> None:
    checks = checks_by(build_reference(style, vocab_size=VOCAB))
    other = build_ours(build_reference(style, vocab_size=VOCAB, seed=1))
    comparisons = compare_with_published(other, tokenizer, checks)
    assert failing(comparisons) == {*NUMBERS, *EXACT}
    for comparison in comparisons[:6]:
        assert comparison.largest_difference is not None
        assert comparison.tolerance is not None
        assert comparison.largest_difference > 10 * comparison.tolerance


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
    ours, checks = build_ours(model), checks_by(model)[:6]
    change(ours)
    assert failing(compare_with_published(ours, None, checks)) == {*NUMBERS}


def test_texts_of_a_batch_are_those_of_each_prompt_alone_and_greedy_ids_go_on_behind_an_end_of_text(
    pair: Pair, tokenizer: Tokenizer
) -> None:
    model, (*_, ids, texts) = pair
    alone = [replace(texts, prompts=[prompt], expected=[text])
             for prompt, text in zip(PROMPTS, texts.expected, strict=True)]  # fmt: skip
    assert failing(compare_with_published(model, tokenizer, alone)) == set()
    model.config, config = replace(model.config, eos_token_id=ids.expected[0]), model.config
    try:
        assert compare_with_published(model, None, [ids])[0].passed
    finally:
        model.config = config


NAN = float("nan")


@pytest.mark.parametrize(
    ("expected", "tolerance", "got", "passed", "worst"),
    [
        ([1.0, -200.0], 1e-3, [1.0, -200.0 + 0.98 * 3e-3], True, 1),  # 1e-5 of the value comes on top
        ([1.0, -200.0], 1e-3, [1.0, -200.0 + 1.02 * 3e-3], False, 1),
        ([1.0, -200.0], 1e-3, [1.0 - 0.98 * 1.01e-3, -200.0], True, 0),
        ([1.0, -200.0], 1e-3, [1.0 - 1.02 * 1.01e-3, -200.0], False, 0),
        ([1.0, 2.0, 3.0, 4.0], 1e-3, [1.0, 2.0, NAN, 4.5], False, 2),
        ([1e6, 2.0], 1e-4, [1e6 + 8.0, 2.0005], False, 1),  # relative to what is allowed
        ([5, 6, 7], None, [5, 6, 7], True, 0),
        ([5, 6, 7], None, [5, 6, 8], False, 2),
        (["a", "b"], None, ["a.", "b"], False, 0),
    ],
)
def test_each_value_must_be_within_its_tolerance_or_the_same(
    expected: list[Any], tolerance: float | None, got: list[Any], passed: bool, worst: int
) -> None:
    comparison = compare(Check("x", "here", "loss", expected, tolerance), got)
    assert (comparison.passed, comparison.worst, comparison.expected) == (passed, worst, expected)
    with pytest.raises(ValueError, match=f"x: {len(got) + 1} values are published, the model gave {len(got)}"):
        compare(Check("x", "here", "loss", [*expected, expected[0]], tolerance), got)
    if tolerance is None or NAN in got:
        assert comparison.largest_difference is None
    else:
        assert comparison.largest_difference == pytest.approx(abs(got[worst] - expected[worst]))
        assert comparison.tolerance == pytest.approx(tolerance + 1e-5 * abs(expected[worst]))


def test_a_model_of_nans_fails_and_stays_json() -> None:
    model = OPT(replace(OPTConfig.preset("opt-125m"), num_hidden_layers=1)).eval()
    torch.nn.init.constant_(model.layers[0].fc1.bias, NAN)
    numbers = [check for check in published()["opt-125m"] if not check.prompts]
    comparisons = compare_with_published(model, None, numbers)
    assert not any(comparison.passed for comparison in comparisons)
    assert "nan  " in format_table(comparisons)
    record = json.loads(json.dumps(asdict(comparisons[0]), allow_nan=False))
    assert (record["got"], record["largest_difference"]) == ([None] * 15, None)
    assert record.keys() >= {"name", "source", "expected", "worst", "tolerance", "passed"}


# published.json


def test_published_numbers_agree_with_what_their_sources_say_beside_them() -> None:
    checks = {check.measure: check for check in published()["opt-125m"]}
    # The mean score that metaseq's test_generator_hub_interface records for the same tokens.
    assert sum(checks["token_logprobs"].expected) / 15 == pytest.approx(-3.4824333190917969, abs=5e-5)
    # Pull request 17785 prints logarithms of the same probabilities, and the perplexity of the same loss.
    logarithms = [-1.4278558, -1.4584825, -1.0991473, -0.06582398, -4.6383367]
    assert [math.log(p) for p in checks["largest_probabilities"].expected] == pytest.approx(logarithms, abs=1e-6)
    loss, perplexity = checks["loss"], checks["perplexity"]
    assert math.exp(loss.expected[0]) == pytest.approx(perplexity.expected[0], rel=1e-7)
    assert perplexity.tolerance == pytest.approx(loss.tolerance * perplexity.expected[0], rel=1e-3)  # type: ignore[operator]


def test_published_ids_are_those_of_their_texts(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "opt-tokenizer")
    small = {check.measure: check for check in published()["opt-125m"]}
    large = {check.measure: check for check in published()["opt-350m"]}
    faucet = "The man turned on the faucet so the toilet filled with water."
    assert small["token_logprobs"].input_ids == [tokenizer.encode(faucet)]
    for measure in ("loss", "perplexity", "largest_probabilities", "most_probable_ids"):
        assert small[measure].input_ids == [tokenizer.encode("Hello my name is")]
    assert tokenizer.decode(small["most_probable_ids"].expected) == "I, name is j"
    hello = tokenizer.encode("Hello world! cécé herlolip</s>", add_bos=False)
    assert large["hidden_states_corner"].input_ids == [[0, *hello]]
    prompts = ["Today is a beautiful day and I want to", "In the city of", "Paris is the capital of France and",
               "Computers and mobile phones have taken"]  # fmt: skip
    assert large["mean_logits"].input_ids == [tokenizer.encode(prompt, add_bos=False) for prompt in prompts]
    assert large["greedy_ids"].input_ids == [tokenizer.encode("")]
    continued = "\nThe following is a list of the most popular"
    assert large["greedy_ids"].expected == tokenizer.encode(continued, add_bos=False)


@pytest.mark.parametrize(("size", "count"), [("opt-125m", 9), ("opt-350m", 8)])
def test_each_check_runs_and_fails_on_an_untrained_model(size: str, count: int, shared_data: Path) -> None:
    """With as many values as are published, or ``compare`` would refuse them."""
    tokenizer, checks = Tokenizer.load(shared_data / "opt-tokenizer"), published()[size]
    assert len({check.name for check in checks}) == len(checks) == count
    for check in checks:
        assert check.source.startswith(("metaseq, ", "transformers, ", "CTranslate2, "))
        assert (check.tolerance is None) == all(isinstance(value, (int, str)) for value in check.expected)
        if check.prompts:  # ``max_length``, which counts the prompt: 10, and 20 for the batch with its padding
            prompts, texts = ([tokenizer.encode(t) for t in texts] for texts in (check.prompts, check.expected))
            assert max(map(len, prompts)) + check.max_new_tokens == (20 if "batch" in check.name else 10)
            for prompt, text in zip(prompts, texts, strict=True):
                assert text[: len(prompt)] == prompt
                assert len(text) == len(prompt) + check.max_new_tokens
    torch.manual_seed(0)
    model = OPT(replace(OPTConfig.preset(size), num_hidden_layers=1)).eval()
    comparisons = compare_with_published(model, tokenizer, checks)
    for comparison, check in zip(comparisons, checks, strict=True):
        assert all(text.startswith(prompt) for text, prompt in zip(comparison.got, check.prompts, strict=False))
        if check.measure == "loss":
            assert comparison.got[0] == pytest.approx(math.log(50272), abs=0.5)  # knows nothing: all rows alike
    table = format_table(comparisons)
    assert table.endswith(f"\n0 of {count} hold")
    assert max(map(len, table.splitlines())) <= 110


# Refusals, on models without memory: nothing can have run


def on_meta(size: str = "opt-125m", dtype: torch.dtype = torch.float32, **changes: Any) -> OPT:
    return OPT(replace(OPTConfig.preset(size), **changes), device="meta", dtype=dtype).eval()


def test_the_size_follows_from_the_shape_alone() -> None:
    wrong = {"do_layer_norm_before": True, "activation_function": "gelu", "init_std": 0.02, "eos_token_id": None}
    assert published_for(replace(OPTConfig.preset("opt-350m"), **wrong)) == published()["opt-350m"]


@pytest.mark.parametrize(
    ("size", "changes"),
    [("galactica-125m", {}), ("opt-125m", {"num_hidden_layers": 11}), ("opt-125m", {"num_attention_heads": 6}),
     ("opt-350m", {"word_embed_proj_dim": 1024})],
)  # fmt: skip
def test_another_size_is_refused_with_the_sizes_that_have_numbers(size: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="reference: expected the shape of opt-125m or opt-350m, which have") as caught:
        compare_with_published(on_meta(size, **changes))
    config = replace(OPTConfig.preset(size), **changes)  # type: ignore[arg-type]
    assert f"hidden_size {config.hidden_size}, num_hidden_layers {config.num_hidden_layers}," in str(caught.value)
    assert str(caught.value).endswith(f"word_embed_proj_dim {config.embed_dim}. Give one of those models.")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: on_meta(dtype=torch.float16), r"expected float32, which the published .* got torch\.float16\. Load"),
        (lambda: on_meta(dtype=torch.float64), r"got torch\.float64\. Load it with dtype float32\."),
        (lambda: on_meta().train(), r"expected eval mode, got training mode, .* Call model\.eval\(\)"),
        (on_meta, r"tokenizer: expected one, got none; some of the published checks are texts\. Copy tokenizer\.json,"),
    ],
)
def test_a_model_that_cannot_be_compared_is_refused(build: Callable[[], OPT], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_with_published(build())


def test_the_table_shows_the_worst_of_each_check_its_sources_and_the_verdict() -> None:
    city = ["In the city of New York, the city"], ["In the city of New Orleans.\n\u2014"]
    dog = ["My dog is a little"]
    comparisons = [
        Comparison("loss", "pull request 1", [4.0513148], [4.05131], 0, 4.8e-6, 0.00014051, True),
        Comparison("hidden states", "test_a", [1.0, -12.345678], [1.0, 2.5], 1, 14.845678, 0.00017345, False),
        Comparison("ids", "test_a", [100, 6, 7], [100, 5, 8], 1, None, None, False),
        Comparison("a city", "test_b", *city, 0, None, None, False),
        Comparison("a dog", "test_b", dog, dog, 0, None, None, True),
    ]
    assert format_table(comparisons).splitlines() == [
        "check                    expected                   got  difference   allowed  verdict",
        "loss                     4.051315               4.05131     4.8e-06  0.000141  holds",
        "hidden states           -12.34568                   2.5        14.8  0.000173  fails",
        "ids                             6                     5      2 of 3      none  fails",
        r"a city         New York, the city  New Orleans.\n\u2014      1 of 1      none  fails",
        "a dog          My dog is a little    My dog is a little      0 of 1      none  holds",
        "",
        "of several values the one furthest off is shown, of a text what is around the error; published in",
        "  pull request 1",
        "  test_a",
        "  test_b",
        "",
        "2 of 5 hold",
    ]

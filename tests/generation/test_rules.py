"""The rules on scores: against transformers' processors, against their definitions, and what draws from them give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from minopt import GenerationConfig, generate
from minopt.generation.rules import NUCLEUS, Rule, build_rules, keep_min_p, keep_top_p
from tests.conftest import build_reference
from tests.generation.decoders import Fake

V, PAD, EOS = 24, 1, (2, 9)
INF = torch.inf
NO_PADDING = torch.zeros(3, dtype=torch.long)


def random_ids(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """Of few tokens, so that they come again and again; the pad id is one of them."""
    return torch.randint(0, 5, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_scores(rows: int = 3, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def all_scores() -> dict[str, Tensor]:
    ties = random_scores().round()
    ties[1] = 0.5  # a row of one value only
    excluded = random_scores().masked_fill(random_scores(seed=1) > 0, -INF)
    nothing_left = random_scores()
    nothing_left[2] = -INF
    return {"random": random_scores(), "ties": ties, "some excluded": excluded, "nothing left": nothing_left}


IDS, SCORES = random_ids(), all_scores()


def apply(rules: Sequence[Rule], ids: Tensor, scores: Tensor) -> Tensor:
    for rule in rules:
        scores = rule(ids, scores)
    return scores


def sampling(**options: Any) -> dict[str, Any]:
    return {"do_sample": True, "top_k": 0} | options


# --- each rule alone is transformers'


ONE_BIAS = [[[3], -1.7]]
BIASES = [[[4, 6], 2.3], [[7], 0.9], [[0, 3, 5], -1.1], [[1, 8], -INF], [[10], -0.4]]
BIASES_OF_ONE_TOKEN = [[[1, 5], 0.1], [[5], 0.7], [[2, 5], 1.3], [[3, 1, 5], 0.3], [[4, 1, 5], -0.9], [[0, 5], 0.77]]
BAD_WORDS = [[[7], [0]], [[1, 3], [4, 4], [0, 1]], [[6], [2, 2], [3, 1, 0], [1, 1, 5], [2]]]


class ForcedAmongTheAllowed(transformers.ForcedBOSTokenLogitsProcessor):
    """The one rule that is not transformers': what an earlier rule excludes is not forced."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores).masked_fill(scores == -INF, -INF)


# Values of each option, and the processor that must agree. A filter has a second argument, how many tokens always stay.
RULES: dict[str, tuple[Sequence[Any], Callable[[Any], Any]]] = {
    "sequence_bias": ([ONE_BIAS, BIASES, BIASES_OF_ONE_TOKEN], transformers.SequenceBiasLogitsProcessor),
    "repetition_penalty": ([0.6, 1.3, 10.0], transformers.RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": ([1, 2, 3, 4], transformers.NoRepeatNGramLogitsProcessor),
    "bad_words_ids": (BAD_WORDS, lambda words: transformers.NoBadWordsLogitsProcessor(words, eos_token_id=None)),
    "min_new_tokens": (
        [1, 2, 5],
        lambda least: transformers.MinNewTokensLengthLogitsProcessor(1, least, torch.tensor(EOS)),
    ),
    "forced_bos_token_id": ([7], ForcedAmongTheAllowed),
    "suppress_tokens": ([[0, 7, V - 1]], transformers.SuppressTokensLogitsProcessor),
    "temperature": ([0.1, 0.7, 1.5], transformers.TemperatureLogitsWarper),
}
FILTERS: dict[str, tuple[Sequence[Any], Callable[..., Any]]] = {
    "top_k": ([1, 2, 5, V - 1, V, 1000], transformers.TopKLogitsWarper),
    "top_p": ([1e-9, 0.1, 0.5, 0.9, 0.99], transformers.TopPLogitsWarper),
    "min_p": ([0.0, 0.01, 0.2, 0.9, 1.0], transformers.MinPLogitsWarper),
}


def cases(table: dict[str, tuple[Sequence[Any], Callable[..., Any]]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, (values, _) in table.items() for value in values]


def options_of(name: str, value: Any) -> dict[str, Any]:
    return sampling(**{name: value}) if name == "temperature" or name in FILTERS else {name: value}


ALL_OPTIONS = {f"{name} {value}": options_of(name, value) for name, value in cases(RULES | FILTERS)}


@pytest.mark.parametrize(("name", "value"), cases(RULES), ids=str)
def test_each_rule_is_the_processor_of_transformers(name: str, value: Any) -> None:
    (rule,) = build_rules(GenerationConfig(**options_of(name, value)), 1, NO_PADDING, EOS)
    acted = 0
    for length in range(1, IDS.shape[1] + 1):
        for kind, scores in SCORES.items():
            found, theirs = rule(IDS[:, :length], scores), RULES[name][1](value)
            assert torch.equal(found, theirs(IDS[:, :length], scores.clone())), (length, kind)
            acted += not torch.equal(found, scores)
    assert acted >= 2  # else two that do nothing were compared


@pytest.mark.parametrize("eos", [(), (2,), (2, 9), (2, 9, 4, 5)], ids=["no eos", "1 eos", "2 eos", "4 eos"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("name", "value"), cases(FILTERS))
def test_each_filter_is_that_of_transformers(name: str, value: float, num_beams: int, eos: tuple[int, ...]) -> None:
    """Beams keep one token more than can end them, however narrow the filter."""
    least = 1 if num_beams == 1 else max(2, len(eos) + 1)
    (rule,) = build_rules(GenerationConfig(**options_of(name, value), num_beams=num_beams), 4, NO_PADDING, eos)
    for kind, scores in SCORES.items():
        found, theirs = rule(IDS, scores), FILTERS[name][1](value, min_tokens_to_keep=least)
        assert torch.equal(found, theirs(IDS, scores.clone())), kind
        assert (found.isfinite().sum(1) >= scores.isfinite().sum(1).clamp(max=least)).all()


@pytest.mark.parametrize(
    ("options", "eos"),
    [({}, EOS), (sampling(), EOS), ({"min_new_tokens": 3}, ()), ({"num_beams": 4}, EOS)],
    ids=["greedy", "unlimited sampling", "a minimum without eos", "beams"],
)
def test_where_nothing_is_asked_for_there_is_no_rule(options: dict[str, Any], eos: tuple[int, ...]) -> None:
    assert build_rules(GenerationConfig(**options), 4, NO_PADDING, eos) == []


# --- chains: the order is transformers' too


RULE_OPTIONS: dict[str, list[Any]] = {
    "sequence_bias": [BIASES, [[[0, 4], 1.7], [[11], -2.2], [[2, 2, 3], 3.1]]],
    "repetition_penalty": [0.7, 1.2, 2.5],
    "no_repeat_ngram_size": [1, 2, 3, 4],
    "bad_words_ids": [[[7], [1, 3]], [[0, 1], [2, 2, 4], [6]]],
    "min_new_tokens": [1, 3, 20],
    "forced_bos_token_id": [2, 10, 13],
    "suppress_tokens": [[0, 7, V - 1], [6, 3]],
}
FILTER_OPTIONS: dict[str, list[Any]] = {
    "temperature": [0.4, 0.8, 1.6],
    "top_k": [2, 6, 15],
    "top_p": [0.21, 0.71, 0.96],  # no sum of equal probabilities, where rounding in float32 decides in transformers
    "min_p": [0.02, 0.1, 0.5],
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "drawn beams": {"do_sample": True, "num_beams": 3},
}


def draw_chains(count: int = 120) -> list[tuple[str, int, tuple[int, ...], dict[str, Any]]]:
    """Mode, prompt length, eos and options, drawn with a fixed seed."""
    draw, chains = random.Random(0), []
    for index in range(count):
        mode = list(MODES)[index % len(MODES)]
        options = {name: draw.choice(values) for name, values in RULE_OPTIONS.items() if draw.random() < 0.5}
        if "do_sample" in MODES[mode]:
            options |= {name: draw.choice(values) for name, values in FILTER_OPTIONS.items() if draw.random() < 0.6}
        chains.append((mode, draw.choice([1, 1, 3, 6]), draw.choice([(), (2,), (2, 9, 14)]), MODES[mode] | options))
    return chains


CHAINS = draw_chains()


@pytest.fixture(scope="module")
def reference() -> Any:
    """A model of transformers' without an eos of its own."""
    return build_reference("125m", vocab_size=V, eos_token_id=None)


def of_transformers(
    reference: Any, prompt_length: int, eos: Sequence[int], user: Sequence[Any] = (), **options: Any
) -> Any:
    """The processors that its ``generate`` would use, in its order."""
    config, _ = reference._prepare_generation_config(None, **options, **({"eos_token_id": list(eos)} if eos else {}))
    reference._prepare_special_tokens(config, device="cpu")
    processors = reference._get_logits_processor(
        config,
        input_ids_seq_length=prompt_length,
        encoder_input_ids=IDS[:, :prompt_length],
        logits_processor=transformers.LogitsProcessorList(user),
        device="cpu",
        model_kwargs={"attention_mask": torch.ones(3, prompt_length)},
    )
    forced = transformers.ForcedBOSTokenLogitsProcessor
    return transformers.LogitsProcessorList(
        ForcedAmongTheAllowed(p.bos_token_id) if type(p) is forced else p for p in processors
    )


def outcomes(rules: Sequence[Rule], prompt_length: int) -> list[Tensor]:
    """Scores of several steps after all rules."""
    steps = range(prompt_length, prompt_length + 5)
    return [apply(rules, IDS[:, :length], scores.clone()) for length in steps for scores in SCORES.values()]


def differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def build(prompt_length: int, eos: Sequence[int], options: dict[str, Any], user: Sequence[Rule] = ()) -> list[Rule]:
    return build_rules(GenerationConfig(**options), prompt_length, NO_PADDING, eos, user)


@pytest.mark.parametrize(
    "index", range(len(CHAINS)), ids=[f"{i} {mode}, {len(o)} options" for i, (mode, _, _, o) in enumerate(CHAINS)]
)
def test_chained_rules_are_those_of_transformers_in_its_order(reference: Any, index: int) -> None:
    _, prompt_length, eos, options = CHAINS[index]
    ours, theirs = build(prompt_length, eos, options), of_transformers(reference, prompt_length, eos, **options)
    assert len(ours) == len(theirs)
    assert not differ(outcomes(ours, prompt_length), outcomes(theirs, prompt_length))


@pytest.mark.parametrize("name", [*RULE_OPTIONS, *FILTER_OPTIONS])
def test_each_option_makes_a_difference_in_the_chains_above(name: str) -> None:
    """A negative control: an option that a chain loses shows."""
    shown = 0
    for _, prompt_length, eos, options in CHAINS:
        rest = {key: value for key, value in options.items() if key != name}
        complete, without = build(prompt_length, eos, options), build(prompt_length, eos, rest)
        shown += differ(outcomes(complete, prompt_length), outcomes(without, prompt_length))
    assert shown >= 10


ORDERED: list[dict[str, Any]] = [
    {"sequence_bias": [[[0], 2.5], [[1], -2.5]], "repetition_penalty": 1.7},
    {"sequence_bias": [[[6], 1.0]], "forced_bos_token_id": 6},
    {"repetition_penalty": 1.7, **sampling(top_k=3)},
    {"suppress_tokens": [int(SCORES["random"][0].argmax())], **sampling(top_k=3)},
    {"suppress_tokens": [int(SCORES["random"][0].argmax())], **sampling(min_p=0.15)},
    sampling(temperature=1.8, top_p=0.8),
    sampling(temperature=1.8, min_p=0.15),
    sampling(top_k=3, top_p=0.8),
    sampling(top_p=0.8, min_p=0.15),
]


@pytest.mark.parametrize("options", ORDERED, ids=", ".join)
def test_two_rules_in_the_other_order_give_other_scores(reference: Any, options: dict[str, Any]) -> None:
    """A negative control of the order that the chains above have."""
    ours, theirs = build(1, (2,), options), of_transformers(reference, 1, (2,), **options)
    assert len(ours) == 2
    assert not differ(outcomes(ours, 1), outcomes(theirs, 1))
    assert differ(outcomes(ours, 1), outcomes(ours[::-1], 1))


# --- rules that transformers does not have


def exact_scores() -> Tensor:
    """Multiples of 1/8, and some ``-inf``: sums of them and of such penalties are exact in any order."""
    return ((random_scores() * 8).round() / 8).masked_fill(random_scores(seed=3) > 4, -INF)


@pytest.mark.parametrize("prompt_length", [1, 5, 12])
@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (1.5, 0.375), (-0.5, 1.0), (2.0, -0.125)])
def test_presence_and_frequency_penalties_are_those_of_openai(
    prompt_length: int, presence: float, frequency: float
) -> None:
    """``mu - c * frequency - (c > 0) * presence`` with c counted in what was generated, not in the prompt."""
    config = GenerationConfig(presence_penalty=presence, frequency_penalty=frequency)
    (rule,) = build_rules(config, prompt_length, NO_PADDING, EOS)
    scores = exact_scores()
    assert scores.isinf().any()
    for length in range(prompt_length, IDS.shape[1] + 1):
        expected = scores.clone()
        for row in range(3):
            generated = IDS[row, prompt_length:length].tolist()
            for token in range(V):
                count = generated.count(token)
                expected[row, token] -= count * frequency + (presence if count > 0 else 0.0)
        found = rule(IDS[:, :length], scores)
        assert torch.equal(found, expected)
        assert torch.equal(found, scores) == (length == prompt_length)


def test_presence_and_frequency_act_on_what_the_repetition_penalty_leaves() -> None:
    options = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25, "no_repeat_ngram_size": 2}
    chain = build(4, EOS, options)
    alone = [rule for name, value in options.items() for rule in build(4, EOS, {name: value})]
    assert len(chain) == 3  # the two penalties are one rule
    assert not differ(outcomes(chain, 4), outcomes(alone, 4))
    assert differ(outcomes(chain, 4), outcomes([alone[1], alone[0], *alone[2:]], 4))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_an_ngram_is_banned_only_if_it_would_come_twice_where_it_is_counted(size: int, include_prompt: bool) -> None:
    """By brute force: a token is banned if, with it, the counted part would have the same n-gram at two places."""
    ids, prompt_length = random_ids(length=32, seed=5) % 3, 8
    options = {"no_repeat_ngram_size": size, "no_repeat_ngram_include_prompt": include_prompt}
    (rule,) = build_rules(GenerationConfig(**options), prompt_length, NO_PADDING, EOS)
    banned = 0
    for length in range(prompt_length, ids.shape[1] + 1):
        found = rule(ids[:, :length], SCORES["random"])
        for row in range(3):
            counted = ids[row, 0 if include_prompt else prompt_length : length].tolist()
            ngrams = {tuple(counted[i : i + size]) for i in range(len(counted) - size + 1)}
            for token in range(V):
                last = tuple([*counted, token][-size:])
                is_banned = found[row, token].item() == -INF
                assert is_banned == (last in ngrams), (length, row, token)
                assert is_banned or found[row, token] == SCORES["random"][row, token]
                banned += is_banned
    assert banned > 20


# --- padding is no text


LENGTHS = (7, 4, 1)
PADDING = torch.tensor([max(LENGTHS) - length for length in LENGTHS])


def padded_batch() -> Tensor:
    """``[3, 12]``: prompts of ``LENGTHS`` behind padding and five more tokens, among which is the pad id."""
    ids = torch.full((3, 12), PAD)
    for row, padding in enumerate(PADDING.tolist()):
        ids[row, padding:] = random_ids(1, 12 - padding, seed=20 + row)[0]
    ids[1].masked_fill_(ids[1] == PAD, 0)[: PADDING[1]] = PAD  # in this row it comes late, so that its padding shows
    ids[:, 8] = PAD
    return ids


# Real tokens behind padding, and what sequences that begin in it would bias.
BEHIND_PADDING = [
    [*padded_batch()[row, PADDING[row] - count : max(LENGTHS)].tolist(), last]
    for row, count, last in ((1, 1, 7), (1, 3, 8), (2, 1, 10), (2, 2, 11))
]
ABOUT_PADDING: dict[str, dict[str, Any]] = {
    "bias behind padding": {"sequence_bias": [[ids, 0.7 * len(ids) - 3] for ids in BEHIND_PADDING]},
    "bad words behind padding": {"bad_words_ids": [*BEHIND_PADDING, [PAD, 6]]},
    "presence and frequency": {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    "ngrams of what is generated": {"no_repeat_ngram_size": 1, "no_repeat_ngram_include_prompt": False},
    "all at once": sampling(
        sequence_bias=BIASES, repetition_penalty=1.3, presence_penalty=0.7, no_repeat_ngram_size=2,
        bad_words_ids=BEHIND_PADDING, min_new_tokens=2, suppress_tokens=[5], temperature=0.8, top_k=12, top_p=0.9,
        min_p=0.01,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_OPTIONS | ABOUT_PADDING)
def test_a_padded_row_gets_the_scores_of_the_row_alone(name: str) -> None:
    config, ids = GenerationConfig(**(ALL_OPTIONS | ABOUT_PADDING)[name]), padded_batch()
    together = build_rules(config, max(LENGTHS), PADDING, EOS)
    for kind, scores in SCORES.items():
        for new in range(6):
            found = apply(together, ids[:, : max(LENGTHS) + new], scores)
            for row, (length, padding) in enumerate(zip(LENGTHS, PADDING.tolist(), strict=True)):
                rules = build_rules(config, length, torch.zeros(1, dtype=torch.long), EOS)
                alone = apply(rules, ids[row : row + 1, padding : padding + length + new], scores[row : row + 1])
                assert torch.equal(found[row], alone[0]), (kind, new, row)


@pytest.mark.parametrize(
    "name",
    ["bias behind padding", "bad words behind padding", "repetition_penalty 1.3", "no_repeat_ngram_size 1",
     "forced_bos_token_id 7"],
)  # fmt: skip
def test_padding_matters_to_the_test_above(name: str) -> None:
    """A negative control: rules that take padding for text give padded rows other scores, and the full row the same."""
    config, ids = GenerationConfig(**(ALL_OPTIONS | ABOUT_PADDING)[name]), padded_batch()
    told, untold = (build_rules(config, max(LENGTHS), padding, EOS) for padding in (PADDING, NO_PADDING))
    same = torch.stack(
        [
            (apply(told, ids[:, :length], SCORES["random"]) == apply(untold, ids[:, :length], SCORES["random"])).all(1)
            for length in range(max(LENGTHS), ids.shape[1] + 1)
        ]
    ).all(0)
    assert same.tolist() == [True, name == "forced_bos_token_id 7", False]


# --- users' rules


class Doubled(transformers.LogitsProcessor):
    """A rule that commutes with few others, and writes down what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append((input_ids.clone(), scores.clone()))
        return 2 * scores - 1


@pytest.mark.parametrize("mode", ["sampling", "drawn beams"])
def test_users_rules_act_behind_the_others_and_before_the_filters(reference: Any, mode: str) -> None:
    built_in = {name: values[0] for name, values in RULE_OPTIONS.items() if name != "forced_bos_token_id"}
    filters = {name: values[1] for name, values in FILTER_OPTIONS.items()} | MODES[mode]
    user, theirs = Doubled(), Doubled()
    ours = build(4, EOS, built_in | filters, [user, lambda ids, scores: scores + 3])
    before, after = build(4, EOS, built_in), build(4, EOS, filters)
    assert len(ours) == len(before) + 2 + len(after)
    found = outcomes(ours, 4)
    given = [scores for _, scores in user.seen]
    assert not differ(given, outcomes(before, 4))
    assert not differ(found, [apply(after, IDS, (2 * scores - 1) + 3) for scores in given])
    other = of_transformers(reference, 4, EOS, [theirs], **built_in, **filters)
    assert not differ(outcomes(build(4, EOS, built_in | filters, [Doubled()]), 4), outcomes(other, 4))
    assert differ(outcomes(build(4, EOS, built_in | filters), 4), outcomes(other, 4))  # the negative control


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_rule_that_writes_into_its_scores_leaves_the_log_probabilities_alone(num_beams: int) -> None:
    """They are the model's own, before any rule; many of transformers' users write such rules."""
    logits = random_scores(1)[0]
    decoder, best = Fake(lambda past: logits, vocab_size=len(logits)), int(logits.argmax())

    def exclude(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, best] = -INF
        return scores

    found = generate(
        decoder, torch.tensor([[5], [6]]), logits_processor=exclude, max_new_tokens=1, num_beams=num_beams,
        output_logprobs=True, top_logprobs=2,
    )  # fmt: skip
    expected = random_scores(1)[0].log_softmax(0)
    tokens = found.sequences[:, 1]
    assert best not in tokens.tolist()
    assert found.logprobs is not None
    assert found.top_token_ids is not None
    assert torch.equal(logits, random_scores(1)[0])
    assert found.top_token_ids[:, 0].tolist() == [expected.topk(2).indices.tolist()] * 2
    torch.testing.assert_close(found.logprobs[:, 0], expected[tokens], rtol=1e-6, atol=1e-6)


# --- purity


@pytest.mark.parametrize("name", ALL_OPTIONS | ABOUT_PADDING)
def test_no_rule_changes_what_it_is_given_or_remembers_it(name: str) -> None:
    padding, ids = PADDING.clone(), padded_batch()
    rules = build_rules(GenerationConfig(**(ALL_OPTIONS | ABOUT_PADDING)[name]), max(LENGTHS), padding, EOS)
    for kept in SCORES.values():
        scores = kept.clone()
        versions = [t._version for t in (ids, scores, padding)]
        first = [apply(rules, ids[:, :length], scores) for length in range(7, 13)]
        backwards = [apply(rules, ids[:, :length], scores) for length in reversed(range(7, 13))]
        assert torch.equal(ids, padded_batch())
        assert torch.equal(scores, kept)
        assert torch.equal(padding, PADDING)
        assert [t._version for t in (ids, scores, padding)] == versions
        assert not differ(first, backwards[::-1])


# --- filters of large vocabularies


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_transformers(p: float, least: int) -> None:
    """Of peaked rows, whose nucleus is found without a sort, and of flat ones."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5000, generator=generator)
    for sharpness in (0.1, 3.0, 8.0):
        theirs = transformers.TopPLogitsWarper(p, min_tokens_to_keep=least)(IDS, sharpness * scores)
        assert torch.equal(keep_top_p(sharpness * scores, p, least), theirs)
    assert (theirs.isfinite().sum(1) < NUCLEUS).all()
    few = scores.masked_fill(scores < 3, -INF)
    assert torch.equal(keep_top_p(few, p, least), transformers.TopPLogitsWarper(p, min_tokens_to_keep=least)(IDS, few))


@pytest.mark.parametrize("count", [50, 1000, 3000, 15_000])
def test_a_nucleus_is_exact_close_to_its_edge(count: int) -> None:
    """In float32 the sum of thousands of tokens is off by enough to keep one more or fewer."""
    scores = 0.1 * torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    sums = scores.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    for row, total in zip(scores.split(1), sums[:, count - 1].tolist(), strict=True):
        assert keep_top_p(row, total * (1 - 1e-9)).isfinite().sum() == count
        assert keep_top_p(row, total * (1 + 1e-9)).isfinite().sum() == count + 1


@pytest.mark.parametrize("size", [10, 2000])
def test_equal_probabilities_that_add_up_to_p_are_the_nucleus(size: int) -> None:
    scores = torch.full((1, size), 0.7)
    for tenths in range(1, 10):
        assert keep_top_p(scores, tenths / 10).isfinite().sum() == size * tenths // 10


def test_min_p_is_exact_close_to_its_edge() -> None:
    scores = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    ratios = (scores[:, 7].double() - scores.amax(1).double()).exp()
    for row, ratio in zip(scores.split(1), ratios.tolist(), strict=True):
        assert keep_min_p(row, ratio * (1 - 1e-9))[0, 7].isfinite()
        assert ratio == 1 or not keep_min_p(row, ratio * (1 + 1e-9))[0, 7].isfinite()

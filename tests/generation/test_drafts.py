"""Drafts, of the text itself and of smaller models: what decoding gives without them, in fewer passes."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minopt
from minopt import GenerationConfig, GenerationOutput, OPTConfig, generate
from minopt.generation.decode import decode_steps
from minopt.generation.decoder import Draft
from minopt.generation.drafts import Drafts, Text
from minopt.generation.request import prepare
from tests.conftest import build_ours, build_reference, lively, pad_left
from tests.generation.decoders import Watched
from tests.generation.test_decode import random_prompts
from tests.generation.test_properties import (
    SHAPE,
    Case,
    Hashing,
    build_table,
    check,
    ends_with_odd,
    nothing_behind_even,
    search,
    sensible,
)

# --- what is drafted


@search(300)
@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=20), size=st.integers(1, 5), count=st.integers(0, 6))
def test_a_draft_follows_the_latest_of_the_longest_earlier_matches(ids: list[int], size: int, count: int) -> None:
    """By definition: each n-gram, longest first, at each earlier place, last first; what is drafted counts as text."""
    expected: list[int] = []
    for n in range(min(size, len(ids) - 1), 0, -1):
        ends = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[-n:]]
        if ends:
            expected = ids[:]
            for place in range(ends[-1], ends[-1] + count):
                expected.append(expected[place])
            expected = expected[len(ids) :]
            break
    assert Text(ids).draft(size, count) == expected


# --- decoders whose texts repeat themselves, and count what they are asked


class Repeating(Hashing):
    """Logits that the last two tokens decide, so that a text soon runs in a circle."""

    def hashed(self, past: Sequence[int]) -> Tensor:
        return super().hashed(past[-2:]) if len(past) > 1 else super().hashed(past)


def repeating(vocab_size: int, positions: int, style: str, seed: int, eos: Any, pad: int | None) -> Repeating:
    config = OPTConfig(
        **SHAPE, vocab_size=vocab_size, max_position_embeddings=positions, eos_token_id=eos, pad_token_id=pad,
        bos_token_id=None,
    )  # fmt: skip
    return Repeating(build_table(vocab_size, style, seed), config)


def assert_same(found: GenerationOutput, plain: GenerationOutput, tolerance: float = 0.0) -> None:
    """In all that has a meaning."""
    assert torch.equal(found.sequences, plain.sequences)
    assert (found.lengths, found.stop_reasons) == (plain.lengths, plain.stop_reasons)
    for name in ("scores", "logprobs", "top_token_ids", "top_logprobs"):
        ours, theirs = getattr(found, name), getattr(plain, name)
        assert (ours is None) == (theirs is None)
        for row, length in enumerate(plain.lengths if theirs is not None else ()):
            torch.testing.assert_close(ours[row, :length], theirs[row, :length], rtol=tolerance, atol=tolerance)


# --- nothing else changes


def now_and_then(ids: Tensor, scores: Any) -> Tensor:
    """A criterion that lets a text go on for a while."""
    return ids.sum(1) % 11 == 0


def nothing_now_and_then(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill((ids.sum(1) % 13 == 0)[:, None], -torch.inf)


def nearly(decoder: Any, share: float, seed: int = 0) -> Watched:
    """A decoder that draws and chooses as another one in that share of places."""
    other = Repeating(decoder.table.clone(), decoder.config)
    wrong = torch.rand(len(other.table), generator=torch.Generator().manual_seed(seed)) >= share
    other.table[wrong] = -other.table[wrong].nan_to_num(neginf=0.0)
    return Watched(other)


@pytest.fixture(autouse=True)
def is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models spend their time in calls of operators, where no draft would pay."""
    monkeypatch.setattr(Draft, "cost_for", lambda self, other: 0.2)


HOWS = ("lookup", "model", "own weights")


def test_every_call_gives_what_it_gives_without_in_as_many_fewer_passes() -> None:
    """All rules, ends and outputs, in padded batches too; and the search meets what it should."""
    met: Counter[str] = Counter()

    @search(400)
    @given(
        case=sensible(), how=st.sampled_from(HOWS), most=st.sampled_from((1, 2, 3, 10)), size=st.sampled_from((1, 2, 5))
    )
    def is_the_same(case: Case, how: str, most: int, size: int) -> None:
        copies = case.options.get("num_return_sequences") if case.options["num_beams"] == 1 else None
        for name in ("num_beams", "num_return_sequences", "length_penalty", "early_stopping", "max_time"):
            case.options.pop(name, None)
        if copies is not None:
            case.options["num_return_sequences"] = copies
        case.options["max_new_tokens"] += 15  # time for a circle
        case.decoder = (case.decoder[0], case.decoder[1] + 15, *case.decoder[2:])
        case.processors = [nothing_now_and_then if rule is nothing_behind_even else rule for rule in case.processors]
        case.criteria = [now_and_then if criterion is ends_with_odd else criterion for criterion in case.criteria]
        decoder = Watched(repeating(*case.decoder))
        plain = case.run(decoder)
        assert (plain.drafted_tokens, plain.accepted_tokens) == (None, None)
        before, draft = len(decoder.reads), nearly(decoder.decoder, share=0.8)
        drafts: dict[str, Any] = {"draft": Draft(draft, shares_cache=how == "own weights")}
        if how == "lookup":
            drafts = {"prompt_lookup_num_tokens": most, "max_matching_ngram_size": size}
        found = dataclasses.replace(case, options=case.options | drafts).run(decoder)
        assert_same(found, plain)
        check(case, decoder, found)
        assert found.drafted_tokens is not None
        assert found.accepted_tokens is not None
        assert all(0 <= a <= d for a, d in zip(found.accepted_tokens, found.drafted_tokens, strict=True))
        passes, spared = len(decoder.reads) - before, max(found.accepted_tokens)
        assert passes + spared == before
        met[f"spared by {how}"] += spared > 0
        met["spared by all of a batch"] += min(found.accepted_tokens) > 0 and len(found.lengths) > 1
        met["drafted in vain"] += max(found.drafted_tokens) > spared == 0
        met["padded"] += len({*map(len, case.prompts)}) > 1 and spared > 0
        met["room left"] += case.decoder[1] > max(map(len, case.prompts)) + case.options["max_new_tokens"]
        met["full"] += case.decoder[1] == max(map(len, case.prompts)) + max(found.lengths) and spared > 0
        met.update(f"{reason} after a draft" for reason in set(found.stop_reasons) if spared)
        met.update(f"{name} after a draft" for name, value in case.options.items() if value and spared)

    is_the_same()
    reasons = [f"{reason} after a draft" for reason in ("eos", "stop", "length", "exhausted")]
    rules = [
        "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "sequence_bias",
        "bad_words_ids", "suppress_tokens", "forced_bos_token_id", "no_repeat_ngram_size", "output_scores",
        "output_logprobs", "top_logprobs", "truncate_prompt", "do_sample", "temperature", "top_k", "top_p", "min_p",
        "num_return_sequences",
    ]  # fmt: skip
    spared = [f"spared by {how}" for how in HOWS]
    wanted = (*spared, "spared by all of a batch", "drafted in vain", "padded", "room left", "full", *reasons)
    assert [what for what in (*wanted, *(f"{rule} after a draft" for rule in rules)) if not met[what]] == []


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "outputs": {"output_scores": True, "output_logprobs": True, "top_logprobs": 3},
    "ngrams of what is new": {"no_repeat_ngram_size": 4, "no_repeat_ngram_include_prompt": False},
    "ends": {"eos_token_id": tuple(range(0, 90, 5)), "min_new_tokens": 15, "repetition_penalty": 1.1},
}


def circling(kind: str) -> Any:
    """A reference whose next token follows mostly from the last one, and little from where that stands."""
    reference = build_reference(kind, eos_token_id=None)
    with torch.no_grad():
        reference.model.decoder.embed_positions.weight.mul_(0.01)
        for layer in reference.model.decoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.1)
    return reference


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_models_of_each_kind_give_what_they_give_without(kind: str, name: str, batch_size: int) -> None:
    """On prompts that repeat themselves and on random ones; prompts and new tokens fill all positions."""
    accepted = []
    for reference in (circling(kind), lively(kind, torch.float32)):
        ours = Watched(build_ours(reference))
        repeated = [prompt.repeat(9)[:29] for prompt in random_prompts(3, longest=6, seed=1)]
        for prompts in (repeated[:batch_size], random_prompts(batch_size, seed=2)):
            ids, mask = pad_left(prompts)
            new = {"max_new_tokens": 64 - ids.shape[1]}
            plain = generate(ours, ids, mask, **new, **OPTIONS[name])
            before = len(ours.reads)
            found = generate(ours, ids, mask, **new, **OPTIONS[name], prompt_lookup_num_tokens=8)
            assert_same(found, plain, 1e-5)
            assert found.accepted_tokens is not None
            assert len(ours.reads) == 2 * before - max(found.accepted_tokens)
            ours.reads.clear()
            accepted.append(max(found.accepted_tokens) / before)
    assert name not in ("plain", "outputs") or accepted[0] > 0.6
    assert min(accepted) < 0.3


# --- passes


def circle(*ids: int, vocab_size: int = 60) -> Repeating:
    """A decoder that says one token after the other, and the first one after the last."""
    decoder = repeating(vocab_size, 64, "random", 0, None, 1)
    follows = dict(zip(ids, (*ids[1:], ids[0]), strict=True))
    decoder.logits = lambda past: torch.eye(vocab_size)[follows[past[-1]]]  # type: ignore[method-assign]
    return decoder


@pytest.mark.parametrize("new", range(1, 40))
def test_a_draft_ends_with_the_new_tokens(new: int) -> None:
    """A circle of three from the first token on: drafts of 2, 6, 14, 15, ... tokens, all of them right."""
    decoder = Watched(circle(4, 5, 6))
    ids = torch.tensor([[4, 5, 6, 4]])
    found = generate(decoder, ids, max_new_tokens=new, prompt_lookup_num_tokens=15)
    assert_same(found, generate(circle(4, 5, 6), ids, max_new_tokens=new))
    left, draft, passes, drafted = new - 1, 2, 1, 0
    while left:
        count = min(draft, left - 1)
        left, passes, drafted, draft = left - count - 1, passes + 1, drafted + count, min(15, 2 * count + 2)
    assert (found.drafted_tokens, found.accepted_tokens) == ((drafted,), (drafted,))
    assert len(decoder.reads) == passes


def test_drafts_are_full_where_a_long_pass_takes_no_longer() -> None:
    for decoder, count in ((circle(4, 5), 2), (Watched(circle(4, 5), "cuda"), 7)):
        config = GenerationConfig(max_new_tokens=12, prompt_lookup_num_tokens=7)
        request = prepare(decoder, torch.tensor([[4, 5, 4]]), None, config)
        cache = decoder.new_cache(1, 15)
        request.read_prompts(cache)
        sequences = torch.nn.functional.pad(request.input_ids, (0, 12))
        sequences[:, 3] = 5
        lookup = Drafts(dataclasses.replace(request, decoder=decoder), cache, sequences, None)
        lookup.read(torch.tensor([5]), torch.tensor([True]))
        assert lookup.counts()["drafted_tokens"] == (count,)


def test_a_wrong_draft_costs_no_token_and_makes_the_next_one_short() -> None:
    """2 3 4 5 2 stands for 6 the second time: the draft 3 4 is wrong, as is the next one."""
    decoder = Watched(circle(*range(2, 50)))
    ids = torch.tensor([[2, 3, 40, 41, 42, 2, 3, 43, 44, 45, 2]])
    found = generate(decoder, ids, max_new_tokens=4, prompt_lookup_num_tokens=10)
    assert found.sequences[0, -4:].tolist() == [3, 4, 5, 6]
    assert (found.drafted_tokens, found.accepted_tokens) == ((2,), (0,))  # 43 44; behind 4, nothing is known
    assert [read.input_ids.shape[1] for read in decoder.reads] == [11, 3, 1, 1]


def test_rows_of_a_batch_read_ahead_together_and_alone_once_others_have_ended() -> None:
    """The second row is in a circle at once, the first is new until its end; padding is no text of either."""
    decoder, options = Watched(circle(*range(2, 12))), {"eos_token_id": 9, "max_new_tokens": 20}
    decoder.decoder.logits = lambda past: torch.eye(60)[{30: 31, 31: 30}.get(past[-1], past[-1] + 1)]
    ids, mask = torch.tensor([[6, 5, 6, 4], [30, 31, 30, 31]]), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    found = generate(decoder, ids, mask, prompt_lookup_num_tokens=10, **options)
    assert (found.lengths, found.stop_reasons) == ((5, 20), ("eos", "length"))
    assert found.drafted_tokens == found.accepted_tokens == (0, 2 + 6 + 4)
    assert len(decoder.reads) == 20 - 12


# --- whoever looks on sees what it sees without


def test_own_functions_are_called_as_without() -> None:
    def watched(**options: Any) -> tuple[list[Any], GenerationOutput]:
        seen: list[Any] = []

        def rule(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(("rule", ids.tolist(), scores.tolist()))
            scores[:, 3] -= 2  # its own copy
            return scores

        def criterion(ids: Tensor, scores: Any) -> Tensor:
            seen.append(("criterion", ids.tolist()))
            return ids[:, -4:].eq(torch.tensor([4, 5, 6, 4])).all(1) & (ids.shape[1] > 20)

        found = generate(
            circle(4, 5, 6), torch.tensor([[4, 5, 6, 4]]), max_new_tokens=30, logits_processor=rule,
            stopping_criteria=criterion, **options,
        )  # fmt: skip
        return seen, found

    (seen, found), (seen_without, plain) = watched(prompt_lookup_num_tokens=10), watched()
    assert_same(found, plain)
    assert found.stop_reasons == ("stop",)
    assert found.accepted_tokens is not None
    assert found.accepted_tokens[0] > 10
    assert seen == seen_without


@pytest.mark.parametrize("seconds", [0.5, 3.0, 7.5, 100])
def test_the_clock_is_looked_at_for_each_token(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: Any) -> GenerationOutput:
        clock = iter(range(1000))
        monkeypatch.setattr("minopt.generation.request.time.monotonic", lambda: float(next(clock)))
        return generate(circle(4, 5), torch.tensor([[4, 5]]), max_new_tokens=12, max_time=seconds, **options)

    assert_same(run(prompt_lookup_num_tokens=10), run())


def test_steps_come_one_by_one_and_say_what_has_been_accepted_so_far() -> None:
    decoder, config = Watched(circle(4, 5, 6)), GenerationConfig(max_new_tokens=9, prompt_lookup_num_tokens=3)
    seen = [
        (int(step.tokens), step.drafts["drafted_tokens"], step.drafts["accepted_tokens"], len(decoder.reads))
        for step in decode_steps(prepare(decoder, torch.tensor([[4, 5, 6]]), None, config))
    ]
    assert seen == [
        (4, (0,), (0,), 1),
        (5, (2,), (0,), 2), (6, (2,), (1,), 2), (4, (2,), (2,), 2),
        (5, (5,), (2,), 3), (6, (5,), (3,), 3), (4, (5,), (4,), 3), (5, (5,), (5,), 3),
        (6, (5,), (5,), 4),
    ]  # fmt: skip


@pytest.mark.parametrize("step", range(5))
def test_scores_that_are_no_numbers_are_refused_where_they_are_chosen_from(step: int) -> None:
    decoder = circle(4, 5)
    said, damaged = decoder.logits, 4 + step
    decoder.logits = lambda past: said(past) / (0 if len(past) == damaged else 1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"got NaN or infinity at new token {step}"):
        generate(decoder, torch.tensor([[4, 5, 4, 5]]), max_new_tokens=6, prompt_lookup_num_tokens=10)
    if step:  # in a draft, but behind the last new token
        found = generate(decoder, torch.tensor([[4, 5, 4, 5]]), max_new_tokens=step, prompt_lookup_num_tokens=10)
        assert found.lengths == (step,)


# --- texts


@functools.cache
def demo() -> minopt.LanguageModel:
    return minopt.load(minopt.DEMO, device="cpu", dtype="float32")


LISTED = "The captain looked at the sea. The men looked at the sea. The captain said: the sea, the sea. "
TEXT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 3, "min_new_tokens": 20, "suppress_tokens": (17,)},
    {"stop_strings": ("sea. ", "\n\n"), "min_new_tokens": 5},
]


@pytest.mark.parametrize("options", TEXT_OPTIONS, ids=str)
def test_texts_are_the_same_alone_in_lists_and_streamed(options: dict[str, Any]) -> None:
    lm, prompts = demo(), [LISTED, LISTED * 3, "It was", "", "One. Two. Three. One. Two."]
    options = options | {"max_new_tokens": 40}
    lookup = options | {"prompt_lookup_num_tokens": 6}
    plain = lm.generate(prompts, return_details=True, **options)
    for limits in ({}, {"batch_size": 3}):
        found = lm.generate(prompts, return_details=True, show_progress=False, **lookup, **limits)
        for ours, theirs in zip(found, plain, strict=True):
            assert (ours.text, ours.token_ids, ours.stop_reason) == (theirs.text, theirs.token_ids, theirs.stop_reason)
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
            assert (theirs.drafted_tokens, theirs.accepted_tokens) == (None, None)
            assert 0 <= ours.accepted_tokens <= ours.drafted_tokens
    assert sum(record.accepted_tokens for record in found) > 0 or "no_repeat_ngram_size" in options
    for prompt, theirs in zip(prompts, plain, strict=True):
        assert "".join(lm.stream(prompt, **lookup)) == theirs.text
        assert lm.generate(prompt, **lookup) == theirs.text


def test_in_16_bits_tokens_are_the_same_up_to_a_near_tie() -> None:
    """The first other token, if there is one, has a score within a few of bfloat16's steps of 1/32 of the best."""
    lm = minopt.load(minopt.DEMO, device="cpu", dtype="bfloat16")
    assert lm.tokenizer is not None
    same = 0
    for text in (LISTED, LISTED * 2, "It was", "One. Two. Three. One. Two.", "He said that he said that he"):
        ids = torch.tensor([lm.tokenizer.encode(text)])
        plain = generate(lm.model, ids, max_new_tokens=40, eos_token_id=(), output_scores=True)
        found = generate(lm.model, ids, max_new_tokens=40, eos_token_id=(), prompt_lookup_num_tokens=8)
        assert plain.scores is not None
        for scores, ours, theirs in zip(
            plain.scores[0], found.sequences[0, -40:], plain.sequences[0, -40:], strict=True
        ):
            if ours != theirs:
                assert scores[theirs] - scores[ours] <= 4 / 32
                break
            same += 1
    assert same > 100

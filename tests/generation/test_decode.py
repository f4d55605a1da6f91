"""Greedy decoding and sampling: against transformers' generate, against scripted logits, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

from minopt import GenerationConfig, GenerationOutput, generate
from minopt.generation.decode import decode_steps
from minopt.generation.request import STOP_REASONS, prepare
from tests.conftest import build_ours, build_reference, error, lively, pad_left
from tests.generation.decoders import Script, V, say

NEW, PAD = 30, 1


def random_prompts(count: int = 20, longest: int = 20, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, V, (length,), generator=generator) for length in lengths]


def of_transformers(reference: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    return reference.generate(
        ids, attention_mask=mask, pad_token_id=PAD, return_dict_in_generate=True,
        **({"max_new_tokens": NEW, "do_sample": False} | options),
    )  # fmt: skip


# --- greedy decoding is transformers'


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_tokens_are_those_of_transformers(kind: str, batch_size: int) -> None:
    reference, prompts = lively(kind), random_prompts()
    ours, seen = build_ours(reference), set()
    for first in range(0, len(prompts), batch_size):
        ids, mask = pad_left(prompts[first : first + batch_size])
        theirs = of_transformers(reference, ids, mask).sequences
        found = generate(ours, ids, mask, max_new_tokens=NEW)
        assert torch.equal(found.sequences, theirs)
        assert found.sequences.dtype == torch.long
        assert found.lengths == (NEW,) * len(ids)
        assert found.stop_reasons == ("length",) * len(ids)
        seen |= {tuple(row) for row in theirs[:, -NEW:].tolist()}
        if batch_size == 1:
            assert torch.equal(generate(ours, ids, max_new_tokens=NEW).sequences, theirs)
    assert len({token for row in seen for token in row}) >= 10  # else this says little
    assert len(seen) == len(prompts)


RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {},  # with words that the texts have
    "sequence_bias": {},
    "forced_bos_token_id": {"forced_bos_token_id": 40},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "forced_bos_token_id": 40, "min_new_tokens": 5},
}


@pytest.mark.parametrize("name", RULES)
def test_rules_act_in_a_padded_batch_as_in_transformers_on_each_row_alone(kind: str, name: str) -> None:
    """Alone, for transformers takes padding for text that the row already has."""
    reference, new = lively(kind), 16
    prompts = [*random_prompts(3, seed=2), torch.tensor([5])]
    ours, (ids, mask), options = build_ours(reference), pad_left(prompts), dict(RULES[name])
    plain = generate(ours, ids, mask, max_new_tokens=new).sequences[:, -new:].tolist()
    if name in ("bad_words_ids", "all"):
        options["bad_words_ids"] = [[plain[0][0]], [prompts[1][-1].item(), plain[1][0]], plain[2][3:6]]
    if name in ("sequence_bias", "all"):
        options["sequence_bias"] = [[[plain[0][2]], -5.0], [plain[1][1:3], -10000.0], [[plain[2][4], 50], 30.0]]
    found = generate(ours, ids, mask, max_new_tokens=new, **options).sequences[:, -new:]
    for prompt, row in zip(prompts, found, strict=True):
        theirs = of_transformers(reference, prompt[None], torch.ones(1, len(prompt)), max_new_tokens=new, **options)
        assert torch.equal(row, theirs.sequences[0, -new:])
    assert found.tolist() != plain


# --- scores and log-probabilities


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 20, "top_p": 0.8, "suppress_tokens": [7, 8], "min_new_tokens": 1},
        {"top_k": 0, "min_p": 0.2},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2,
         "bad_words_ids": [[11], [12]], "sequence_bias": [[[13], 2.5]], "suppress_tokens": [7, 8]},
    ],
    ids=["top_k and top_p", "min_p", "all"],
)  # fmt: skip
def test_the_first_scores_of_sampling_are_those_of_transformers(kind: str, options: dict[str, Any]) -> None:
    """Before anything is drawn, so that the order of all rules shows, as its ``generate`` has them."""
    reference = lively(kind)
    ids = torch.stack(
        [prompt.repeat(12)[:12] for prompt in random_prompts(4)]
    )  # of one length: padding is no text here
    mask = torch.ones_like(ids)
    options |= {"max_new_tokens": 1, "eos_token_id": [9], "do_sample": True, "temperature": 1.7}
    theirs = of_transformers(reference, ids, mask, output_scores=True, **options)
    found = generate(build_ours(reference), ids, mask, output_scores=True, **options)
    assert found.scores is not None
    assert 4 < found.scores.isfinite().sum() < 4 * 30
    assert error(found.scores, torch.stack(theirs.scores, dim=1)) <= 1e-6


# --- sampling


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of counts, in standard deviations above its mean (degrees of freedom: tokens - 1)."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    freedom = len(counts) - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.8])
def test_draws_have_the_probabilities_of_the_scores(temperature: float) -> None:
    """6,000 draws at each of two steps, the rows of two kinds."""
    steps = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(0))
    decoder = Script(steps.repeat(1, 6000, 1))  # [N, B, V]: rows of the two kinds alternate
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "eos_token_id": (), "max_new_tokens": 2, "seed": 1}
    found = generate(decoder, torch.ones(12000, 1).long(), temperature=temperature, **options).sequences[:, 1:]
    for step in range(2):
        for which in range(2):
            counts = torch.bincount(found[which::2, step], minlength=12)
            assert chi_square(counts, (steps[step, which] / temperature).softmax(0)) < 4
            assert chi_square(counts, (steps[step, which] / (1.3 * temperature)).softmax(0)) > 4
            assert chi_square(counts, (steps[step, 1 - which] / temperature).softmax(0)) > 4


def test_what_a_row_draws_says_nothing_of_its_next_draw_nor_of_other_rows() -> None:
    options: dict[str, Any] = {"do_sample": True, "eos_token_id": (), "max_new_tokens": 2, "seed": 1}
    found = generate(Script(torch.zeros(2, 8000, 5)), torch.ones(8000, 1).long(), **options).sequences[:, 1:]
    for first, second in ((found[:, 0], found[:, 1]), (found[:-1, 0], found[1:, 0])):
        assert chi_square(torch.bincount(5 * first + second, minlength=25), torch.full((25,), 1 / 25)) < 4


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_same_seed_draws_the_same_tokens(kind: str, num_beams: int) -> None:
    ours = build_ours(lively(kind))
    ids, mask = pad_left(random_prompts(4))

    def draw(**options: Any) -> list[list[int]]:
        options |= {"max_new_tokens": 12, "do_sample": True, "num_beams": num_beams}
        return generate(ours, ids, mask, **options).sequences.tolist()

    state = torch.get_rng_state()
    generate(ours, ids, mask, max_new_tokens=2)  # draws nothing
    seeded = draw(seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    assert draw(seed=7) == seeded == draw(generator=torch.Generator().manual_seed(7))
    assert draw(seed=8) != seeded
    generator = torch.Generator().manual_seed(7)
    assert draw(generator=generator) == seeded
    assert draw(generator=generator) != seeded  # it goes on where it was
    torch.manual_seed(7)
    unseeded = draw()
    assert draw() != unseeded
    torch.manual_seed(7)
    assert draw() == unseeded


# --- several continuations of a prompt


def test_a_prompt_is_read_once_for_all_its_continuations() -> None:
    decoder = Script(torch.zeros(3, 2, V))
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": (), "seed": 0}
    ids, mask = torch.tensor([[1, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    found = generate(decoder, ids, mask, num_return_sequences=3, **options)
    assert found.sequences[:, :2].tolist() == [[1, 5]] * 3 + [[6, 7]] * 3
    assert (found.lengths, found.stop_reasons) == ((3,) * 6, ("length",) * 6)
    assert len({tuple(row) for row in found.sequences[:, 2:].tolist()}) == 6
    new = found.sequences[:, 2:, None].tolist()
    first, second = [row[0] for row in new], [row[1] for row in new]
    assert [read.input_ids.tolist() for read in decoder.reads] == [ids.tolist(), first, second]
    assert [(cache.capacity, cache.copies) for cache in decoder.caches] == [(5, 3)]


def test_continuations_are_those_of_as_many_equal_prompts(kind: str) -> None:
    """With the same draws, and rules that look at each continuation and at padding."""
    ours = build_ours(lively(kind))
    ids, mask = pad_left(random_prompts(3))
    options: dict[str, Any] = {
        "do_sample": True, "max_new_tokens": 12, "eos_token_id": list(range(20)), "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2, "output_scores": True, "output_logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    found = generate(ours, ids, mask, num_return_sequences=4, generator=torch.Generator().manual_seed(3), **options)
    copied = ids.repeat_interleave(4, dim=0), mask.repeat_interleave(4, dim=0)
    wanted = generate(ours, *copied, generator=torch.Generator().manual_seed(3), **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (found.lengths, found.stop_reasons) == (wanted.lengths, wanted.stop_reasons)
    assert len(set(found.lengths)) > 1
    for name in ("scores", "logprobs", "top_logprobs"):
        for ours_, theirs, length in zip(getattr(found, name), getattr(wanted, name), found.lengths, strict=True):
            assert error(ours_[:length], theirs[:length]) <= 1e-6


# --- prompts that are too long


@pytest.mark.parametrize("room", [1, 9, 20])
def test_a_prompt_that_is_too_long_keeps_its_end_and_the_bos_that_it_began_with(kind: str, room: int) -> None:
    """In a padded batch, each row as if that had been given; a row that fits stays whole."""
    ours, new = build_ours(lively(kind)), 64 - room
    bos = ours.config.bos_token_id
    assert bos is not None
    prompts = [random_prompts(1, seed=seed)[0].repeat(64)[:length] for seed, length in enumerate((70, 25, 5, 64, 9))]
    for prompt in prompts:
        prompt[prompt == bos] = 7
    prompts[3][0] = prompts[4][0] = bos
    ids, mask = pad_left(prompts)
    found = generate(ours, ids, mask, max_new_tokens=new, truncate_prompt=True)
    assert found.lengths == (new,) * 5
    for row, prompt in enumerate(prompts):
        kept = prompt[-room:].clone()
        if row >= 3 and 1 < room < len(prompt):
            kept[0] = bos
        assert torch.equal(found.sequences[row, max(0, room - len(prompt)) : room], kept)
        alone = generate(ours, kept[None], max_new_tokens=new).sequences[0, -new:]
        assert torch.equal(found.sequences[row, room:], alone)
    without_mask = generate(ours, ids, max_new_tokens=new, truncate_prompt=True).sequences[:, :room]
    expected = ids[:, -room:].clone()
    if room > 1:
        expected[ids[:, 0] == bos, 0] = bos
    assert torch.equal(without_mask, expected)


# --- rules of the user's


def test_processors_of_transformers_work_as_they_are() -> None:
    logits = torch.randn(4, 2, V, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6], [7, 8]])
    top = logits[0].argmax(-1).tolist()
    one = transformers.SuppressTokensLogitsProcessor(top)
    two = transformers.RepetitionPenaltyLogitsProcessor(100.0)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": (), "output_scores": True}
    wanted = generate(Script(logits), ids, repetition_penalty=100.0, suppress_tokens=top, **options)
    plain = generate(Script(logits), ids, **options)
    assert not torch.equal(plain.sequences, wanted.sequences)
    for several in ([two, one], (two, one), transformers.LogitsProcessorList([two, one])):
        found = generate(Script(logits), ids, logits_processor=several, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.scores is not None
        assert wanted.scores is not None
        assert torch.equal(found.scores, wanted.scores)
    found = generate(Script(logits), ids, logits_processor=one, **options)
    assert torch.equal(found.sequences, generate(Script(logits), ids, suppress_tokens=top, **options).sequences)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("given", [5, [5], "ab", [len, None], torch.ones(1), map(len, [])])
def test_what_cannot_be_called_is_refused(name: str, given: Any) -> None:
    decoder = say([[10], [11]])
    with pytest.raises(
        ValueError, match=rf"{name}: expected a function of \(input_ids, scores\) or a list of them, got "
    ):
        generate(decoder, torch.ones(2, 1).long(), max_new_tokens=1, **{name: given})
    assert decoder.calls == 0


# --- what ends rows beside an eos


def ends_with(*tokens: int) -> Callable[[Tensor, Any], Tensor]:
    return lambda ids, scores: torch.isin(ids[:, -1], torch.tensor(tokens))


ROWS = [[10, 11, 12, 13, 14], [20, 21, 2, 22, 23], [30, 31, 32, 33, 34]]


@pytest.mark.parametrize(
    ("criteria", "options", "lengths", "reasons"),
    [
        (ends_with(11, 32), {}, (2, 3, 3), ("stop", "eos", "stop")),
        ([ends_with(11), ends_with(34)], {}, (2, 3, 5), ("stop", "eos", "stop")),
        ([ends_with(11), ends_with(34)], {"min_new_tokens": 3}, (5, 5, 5), ("length", "length", "stop")),
        (ends_with(2, 14), {}, (5, 3, 5), ("stop", "eos", "length")),  # an eos goes before, a length behind
        (lambda ids, scores: ids.shape[1] >= 5, {}, (3, 3, 3), ("stop", "eos", "stop")),
        (lambda ids, scores: True, {}, (1, 1, 1), ("stop",) * 3),
        (lambda ids, scores: torch.tensor(True), {"min_new_tokens": 2}, (2, 2, 2), ("stop",) * 3),
        (lambda ids, scores: torch.tensor([0, 1, 0]), {}, (5, 1, 5), ("length", "stop", "length")),
        (lambda ids, scores: False, {}, (5, 3, 5), ("length", "eos", "length")),
        (transformers.MaxLengthCriteria(4), {}, (2, 2, 2), ("stop",) * 3),
        ([transformers.MaxLengthCriteria(6), ends_with(11)], {}, (2, 3, 4), ("stop", "eos", "stop")),
        (transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(5), ends_with(11)]), {}, (2, 3, 3),
         ("stop", "eos", "stop")),
        (transformers.EosTokenCriteria(31), {}, (5, 3, 2), ("length", "eos", "stop")),
        (transformers.MaxTimeCriteria(0.0), {}, (1, 1, 1), ("stop",) * 3),
    ],
)  # fmt: skip
def test_criteria_end_rows(
    criteria: Any, options: dict[str, Any], lengths: tuple[int, ...], reasons: tuple[str, ...]
) -> None:
    if "min_new_tokens" in options:  # the script's eos would be excluded, and its next best token is 0
        options = options | {"eos_token_id": ()}
    found = generate(say(ROWS), torch.full((3, 2), 5), max_new_tokens=5, stopping_criteria=criteria, **options)
    assert (found.lengths, found.stop_reasons) == (lengths, reasons)
    for row, said, length in zip(found.sequences.tolist(), ROWS, lengths, strict=True):
        assert row == [5, 5, *said[:length], *[PAD] * (max(lengths) - length)]


def test_criteria_are_asked_from_the_minimum_on_and_see_all_tokens() -> None:
    asked: list[list[list[int]]] = []

    def criterion(ids: Tensor, scores: Any) -> Tensor:
        assert scores is None
        asked.append(ids.tolist())
        return torch.zeros(2, dtype=torch.bool)

    generate(say([[10, 11, 12, 13], [20, 21, 22, 23]]), torch.tensor([[5], [6]]), max_new_tokens=4, min_new_tokens=3,
             stopping_criteria=criterion)  # fmt: skip
    assert asked == [[[5, 10, 11, 12], [6, 20, 21, 22]], [[5, 10, 11, 12, 13], [6, 20, 21, 22, 23]]]


@pytest.mark.parametrize(("seconds", "length"), [(0.5, 1), (1.0, 1), (2.5, 3), (4.0, 4), (5.0, 5), (100, 5)])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_no_step_begins_after_max_time(
    seconds: float, length: int, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is a second later; there is always one token, and a row that has ended stays as it is."""
    clock = iter(range(1000))
    monkeypatch.setattr("minopt.generation.request.time.monotonic", lambda: float(next(clock)))
    decoder = say([[10, 11, 12, 13, 14], [2, 20, 21, 22, 23]])
    decoder.written *= 100
    found = generate(decoder, torch.ones(2, 1).long(), max_new_tokens=5, max_time=seconds, do_sample=do_sample)
    assert found.lengths == (length, 1)
    assert found.stop_reasons == ("time" if length < 5 else "length", "eos")
    assert decoder.calls == 1 + length


# --- rows that are left without any token


def nothing_behind(*tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, scores: scores.masked_fill(torch.isin(ids[:, -1], torch.tensor(tokens))[:, None], -torch.inf)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize(
    ("last", "lengths", "reasons"),
    [
        ((6,), (4, 0, 3), ("length", "exhausted", "eos")),
        ((5, 21), (0, 2, 3), ("exhausted", "exhausted", "eos")),
        ((5, 6, 7), (0, 0, 0), ("exhausted",) * 3),
        ((12, 20, 31), (3, 1, 2), ("exhausted",) * 3),
        ((13, 2), (4, 4, 3), ("length", "length", "eos")),
    ],
)
def test_a_row_without_any_token_left_ends_and_the_others_go_on(
    last: tuple[int, ...], lengths: tuple[int, ...], reasons: tuple[str, ...], do_sample: bool
) -> None:
    rows = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 2, 33]]
    decoder = say(rows)
    decoder.written *= 100
    found = generate(
        decoder, torch.tensor([[4, 5], [4, 6], [4, 7]]), max_new_tokens=4, logits_processor=nothing_behind(*last),
        do_sample=do_sample,
    )  # fmt: skip
    assert (found.lengths, found.stop_reasons) == (lengths, reasons)
    width = max(lengths)
    for row, said, length in zip(found.sequences[:, 2:].tolist(), rows, lengths, strict=True):
        assert row == [*said[:length], *[PAD] * (width - length)]


# --- the loop, seen by a decoder


def test_any_decoder_can_be_driven() -> None:
    """What it is told: a prompt, then a token a row; masks where there is padding; nothing after the last one."""
    decoder = say([[10, 11, 12], [20, 21, 22]])
    ids, mask = torch.tensor([[1, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    for given in (mask.bool(), mask.float(), mask):
        decoder.reads.clear()
        decoder.caches.clear()
        found = generate(decoder, ids, given, max_new_tokens=3)
        assert found.sequences.tolist() == [[1, 5, 10, 11, 12], [6, 7, 20, 21, 22]]
    told = [(read.input_ids.tolist(), read.position_ids.tolist()) for read in decoder.reads]
    assert told == [([[1, 5], [6, 7]], [[-1, 0], [0, 1]]), ([[10], [20]], [[1], [2]]), ([[11], [21]], [[2], [3]])]
    masks = [read.mask[:, 0, -1].long().tolist() for read in decoder.reads if read.mask is not None]
    assert masks == [[[0, 1], [1, 1]], [[0, 1, 1], [1, 1, 1]], [[0, 1, 1, 1], [1, 1, 1, 1]]]
    assert [None if read.wanted is None else read.wanted.tolist() for read in decoder.reads] == [[1, 3], None, None]
    assert [cache.capacity for cache in decoder.caches] == [5]
    decoder.reads.clear()
    generate(decoder, ids, torch.ones(2, 2), max_new_tokens=3)
    assert [read.mask for read in decoder.reads] == [None] * 3


def test_rows_end_alone_and_all_together_stop() -> None:
    decoder = say([[10, 2, 30, 31, 32], [20, 21, 22, 2, 33], [2, 40, 41, 42, 43]])
    found = generate(decoder, torch.ones(3, 1).long(), max_new_tokens=5)
    assert found.sequences.tolist() == [[1, 10, 2, 1, 1], [1, 20, 21, 22, 2], [1, 2, 1, 1, 1]]
    assert (found.lengths, found.stop_reasons) == ((2, 4, 1), ("eos", "eos", "eos"))
    assert [read.input_ids.tolist() for read in decoder.reads[1:]] == [
        [[10], [20], [2]],
        [[2], [21], [1]],
        [[1], [22], [1]],
    ]


@pytest.mark.parametrize(
    ("model", "options", "tail"),
    [
        ({}, {}, [2, 1, 1]),
        ({}, {"pad_token_id": 9}, [2, 9, 9]),
        ({"pad_token_id": None}, {}, [2, 2, 2]),
        ({"eos_token_id": (4, 2)}, {}, [2, 1, 1]),
        ({"eos_token_id": None}, {}, [2, 30, 31]),
        ({}, {"eos_token_id": ()}, [2, 30, 31]),
        ({}, {"eos_token_id": []}, [2, 30, 31]),
        ({}, {"eos_token_id": 30}, [2, 30, 1]),
        ({"eos_token_id": 4, "pad_token_id": None}, {"eos_token_id": (30, 2)}, [2, 30, 30]),
        ({"eos_token_id": 4, "pad_token_id": 2}, {"eos_token_id": 30}, [2, 30, 2]),
    ],
)
def test_options_go_before_the_models_ids(model: dict[str, Any], options: dict[str, Any], tail: list[int]) -> None:
    decoder = say([[10, 2, 30, 31], [20, 21, 22, 23]], **model)
    found = generate(decoder, torch.ones(2, 1).long(), max_new_tokens=4, **options)
    assert found.sequences[0].tolist() == [1, 10, *tail]
    assert found.sequences[1].tolist() == [1, 20, 21, 22, 23]


def test_a_config_and_single_options_go_together() -> None:
    decoder, ids = say([[10] * 20, [11] * 20]), torch.ones(2, 1).long()
    assert generate(decoder, ids).lengths == (20, 20)
    config = GenerationConfig(max_new_tokens=5)
    assert generate(decoder, ids, config=config).lengths == (5, 5)
    assert generate(decoder, ids, config=config, max_new_tokens=3, output_scores=True).lengths == (3, 3)
    assert config == GenerationConfig(max_new_tokens=5)


def test_steps_come_as_they_are_made() -> None:
    decoder, config = say([[10, 2, 30], [20, 21, 22]]), GenerationConfig(max_new_tokens=3)
    steps = decode_steps(prepare(decoder, torch.ones(2, 1).int(), None, config))
    assert decoder.calls == 0
    going_on = [
        ([10, 20], [True, True], ["", ""]),
        ([2, 21], [True, True], ["eos", ""]),
        ([1, 22], [False, True], ["eos", "length"]),
    ]
    for count, (tokens, is_new, reasons) in enumerate(going_on):
        step = next(steps)
        assert (step.tokens.tolist(), step.is_new.tolist()) == (tokens, is_new)
        assert [STOP_REASONS[reason] for reason in step.reasons] == reasons
        assert decoder.calls == 2 + count
    assert list(steps) == []


def test_the_outputs_can_be_worked_on() -> None:
    """They come from inference mode, and are ordinary tensors."""
    found = generate(say([[10, 11], [12, 13]]), torch.ones(2, 1).int(), max_new_tokens=2, output_scores=True,
                     output_logprobs=True, top_logprobs=3)  # fmt: skip
    assert {field.name for field in dataclasses.fields(GenerationOutput)} == set(vars(found))
    for tensor in (found.sequences, found.scores, found.logprobs, found.top_token_ids, found.top_logprobs):
        assert tensor is not None
        assert not tensor.is_inference()
    assert found.sequences.dtype == torch.long


# --- what is refused, before the decoder is called


def test_the_last_position_may_be_used(kind: str) -> None:
    """Prompt and new tokens fill the 64 positions exactly; padding takes none of them."""
    reference = lively(kind)
    ours = build_ours(reference)
    prompts = [random_prompts(1, seed=seed)[0].repeat(64)[:length] for seed, length in enumerate((34, 20))]
    ids, mask = pad_left(prompts)
    theirs = of_transformers(reference, ids, mask).sequences
    found = generate(ours, ids, mask, max_new_tokens=NEW).sequences
    assert found.shape == (2, 64)
    assert torch.equal(found, theirs)
    wide = torch.cat([torch.full((2, 9), PAD), ids], dim=1), torch.cat([torch.zeros(2, 9).long(), mask], dim=1)
    assert torch.equal(generate(ours, *wide, max_new_tokens=NEW).sequences[:, 9:], theirs)


REFUSED: list[tuple[str, Tensor, Tensor | None, dict[str, Any], str]] = [
    ("one token too many", torch.ones(2, 45), None, {},
     r"prompt: 45 tokens \+ max_new_tokens 20 = 65 positions, the model has 64\. .*at most 19, or set truncate_prompt"),
    ("one real token too many", torch.ones(2, 50), (torch.arange(50) > 4).repeat(2, 1), {},
     r"prompt: 45 tokens \+ max_new_tokens 20 = 65 positions, the model has 64"),
    ("a prompt longer than the model", torch.ones(2, 70), None, {},
     r"prompt: 70 tokens .* = 90 positions, the model has 64\. Shorten the prompt, or set truncate_prompt\.$"),
    ("id behind the vocabulary", torch.tensor([[5, 96], [4, 4]]), None, {}, "expected ids from 0 to 95, got 96"),
    ("negative id", torch.tensor([[5, 4], [4, -1]]), None, {}, "expected ids from 0 to 95, got -1"),
    ("float ids", torch.ones(2, 3).float(), None, {}, "input_ids: expected integers, got torch.float32"),
    ("bool ids", torch.ones(2, 3).bool(), None, {}, "input_ids: expected integers, got torch.bool"),
    ("no rows", torch.ones(0, 3), None, {}, r"expected \[batch, tokens\] with at least one of each, got \[0, 3\]"),
    ("no tokens", torch.ones(2, 0), None, {}, r"expected \[batch, tokens\] with at least one of each, got \[2, 0\]"),
    ("one dim", torch.ones(3), None, {}, r"expected \[batch, tokens\] with at least one of each, got \[3\]"),
    ("right padding", torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]]), {}, "expected padding on the left"),
    ("a row of padding", torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), {}, "expected padding on the left"),
    ("mask of other width", torch.ones(2, 3), torch.ones(2, 4), {},
     r"attention_mask: expected the shape of input_ids \[2, 3\], got \[2, 4\]"),
    ("mask of one dim", torch.ones(2, 3), torch.ones(3), {}, r"expected the shape of input_ids \[2, 3\], got \[3\]"),
    ("seed and generator", torch.ones(2, 3), None,
     {"do_sample": True, "seed": 1, "generator": torch.Generator()}, "give a seed or a generator, not both"),
    ("unknown option", torch.ones(2, 3), None, {"num_beans": 4}, "unknown option num_beans; there are max_new_tokens"),
    ("nonsense option", torch.ones(2, 3), None, {"max_new_tokens": 0}, "max_new_tokens must be"),
    ("no config", torch.ones(2, 3), None, {"config": {}}, r"config: expected a minopt\.GenerationConfig, got dict"),
    ("a mask that is no tensor", torch.ones(2, 3), [[1, 1, 1]] * 2, {},  # type: ignore[list-item]
     r"input_ids: expected ids and mask as tensors, got list\. Use torch\.tensor"),
    ("a generator of another device", torch.ones(2, 3), None,
     {"do_sample": True, "generator": mock.Mock(spec=torch.Generator, device=torch.device("cuda"))},
     r"generator: expected one on cpu, got one on cuda\. Make it with"),
    ("nothing left to generate", torch.ones(2, 3), None, {"suppress_tokens": range(96)},
     "suppress_tokens holds all 96 ids, which leaves nothing to generate"),
    *((f"{name} behind the vocabulary", torch.ones(2, 3), None, {name: value},
       "generation: expected ids from 0 to 95, the vocabulary, and ")
      for name, value in (("suppress_tokens", (5, 96)), ("eos_token_id", 96), ("eos_token_id", (4, 96)),
                          ("pad_token_id", 96), ("forced_bos_token_id", 96), ("bad_words_ids", [[5], [4, 96, 5]]),
                          ("sequence_bias", {(96, 5): 1.0}))),
    ("a hole in the mask", torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), {},
     "attention_mask: expected padding on the left only, got some after a token"),
    ("generator without sampling", torch.ones(2, 3), None, {"generator": torch.Generator()},
     "a generator acts on sampling only, and do_sample is off"),
    ("no room even for a cut prompt", torch.ones(2, 3), None, {"max_new_tokens": 64, "truncate_prompt": True},
     r"prompt: 3 tokens \+ max_new_tokens 64 = 67 positions, the model has 64\. .*, or ask for at most 61\.$"),
    ("stop strings for ids", torch.ones(2, 3), None, {"stop_strings": "x"},
     "stop_strings: minopt.generate sees ids, not text. Call LanguageModel.generate, or give stopping_criteria"),
    ("more top tokens than there are", torch.ones(2, 3), None, {"top_logprobs": 97},
     "top_logprobs is 97, and there are 96 tokens"),
    ("more beams than can be drawn among", torch.ones(2, 3), None, {"num_beams": 2**24 // 96 + 1, "do_sample": True},
     r"num_beams is 174763, and torch draws among at most 2\*\*24 candidates: at most 174762 beams"),
    ("the model's eos as a bad word", torch.ones(2, 3), None, {"bad_words_ids": [[5], [2]]},
     r"bad_words_ids holds 2, which ends a text .*leave eos_token_id empty, or set suppress_tokens"),
    ("the option's eos as a bad word", torch.ones(2, 3), None, {"bad_words_ids": [[5, 2], [7]], "eos_token_id": [9, 7]},
     "bad_words_ids holds 7, which ends a text"),
    ("nothing left but an eos that may not come", torch.ones(2, 3), None,
     {"suppress_tokens": [i for i in range(96) if i != 2], "min_new_tokens": 1}, "which leaves nothing to generate"),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "mask", "options", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_work_is_refused_before_anything_runs(
    ids: Tensor, mask: Tensor | None, options: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    decoder = say([[10] * 20, [11] * 20])
    keep = request.node.callspec.id in ("float ids", "bool ids")
    with pytest.raises(ValueError, match=message):
        generate(decoder, ids if keep else ids.long(), mask, **options)
    assert decoder.calls == 0


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    ("rule", "got"),
    [
        (lambda ids, scores: None, "NoneType"),
        (lambda ids, scores: scores[:, :5], r"torch\.float32 \[\d, 5\]"),
        (lambda ids, scores: scores.argmax(-1), r"torch\.int64 \[\d\]"),
        (lambda ids, scores: scores.long(), r"torch\.int64 \[\d, 96\]"),
    ],
)
def test_a_rule_that_returns_no_scores_is_told(rule: Any, got: str, num_beams: int) -> None:
    ours = build_ours(build_reference("125m"))
    with pytest.raises(ValueError, match=rf"logits_processor: expected it to return scores, float .*, got {got}\.$"):
        generate(ours, torch.tensor([[5]]), max_new_tokens=1, num_beams=num_beams, logits_processor=rule)


@pytest.mark.parametrize("found", [None, torch.ones(7).bool()], ids=["nothing", "of another batch"])
def test_a_criterion_that_returns_no_booleans_is_told(found: Any) -> None:
    with pytest.raises(ValueError, match="stopping_criteria: expected a boolean for each of 2 rows, got "):
        generate(say([[10], [20]]), torch.ones(2, 1).long(), max_new_tokens=1, stopping_criteria=lambda ids, _: found)

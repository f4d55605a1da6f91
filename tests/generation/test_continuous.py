"""Prompts that have ended leave, and waiting ones join: each gives what it gives alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from minopt import OPT, GenerationConfig, generate
from minopt.generation import continuous
from minopt.generation.continuous import SCORES_IN_TOKENS, Prompts
from minopt.generation.request import Request, prepare
from minopt.tokenizer import pad_left
from tests.conftest import build_ours, lively
from tests.generation.decoders import Watched, say

NEW = 12


def ends_by_text(ids: Tensor, scores: Any = None) -> Tensor:
    """A criterion: rows end after 1 to 12 tokens, by what stands in them; padding counts for nothing."""
    return (ids * (ids != 1)).sum(1) % 7 == 0


def prompts_of(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[2, *(numbers.randint(5, 95) for _ in range(numbers.randint(1, longest)))] for _ in range(count)]


def many(
    decoder: Any, rows: list[list[int]], limits: dict[str, Any], criteria: Any = None, rules: Any = None,
    generator: Any = None, **options: Any,
) -> Prompts:  # fmt: skip
    config = GenerationConfig(**({"max_new_tokens": NEW} | options))

    def request_of(indices: list[int]) -> Request:
        ids, mask = pad_left([rows[i] for i in indices], 1)
        return prepare(decoder, ids, mask, config, rules, criteria, generator)

    return Prompts(decoder, config, [*map(len, rows)], request_of, **limits)


def results(prompts: Prompts) -> dict[int, list[Any]]:
    """What was found for each prompt: of each continuation the new ids, the reason, and what else was asked for."""
    found: dict[int, list[Any]] = {}
    for indices, request, output in prompts.run():
        copies = len(output.lengths) // len(indices)
        for row, (length, reason) in enumerate(zip(output.lengths, output.stop_reasons, strict=True)):
            begin = request.input_ids.shape[1]
            more = [t[row, :length] for t in (output.logprobs, output.top_logprobs, output.scores) if t is not None]
            record = (output.sequences[row, begin : begin + length].tolist(), reason, more)
            assert output.sequences[row, begin + length :].eq(request.pad_token_id).all()
            found.setdefault(indices[row // copies], []).append(record)
    return found


def alone(decoder: Any, row: list[int], **options: Any) -> list[Any]:
    output = generate(decoder, torch.tensor([row]), **({"max_new_tokens": NEW} | options))
    begin, copies = len(row), range(len(output.lengths))
    more = [t for t in (output.logprobs, output.top_logprobs, output.scores) if t is not None]
    return [
        (output.sequences[i, begin : begin + output.lengths[i]].tolist(), output.stop_reasons[i],
         [t[i, : output.lengths[i]] for t in more])
        for i in copies
    ]  # fmt: skip


def same(found: list[Any], expected: list[Any]) -> None:
    assert [record[:2] for record in found] == [record[:2] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours[2], theirs[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A list that fills with the rows and slots of the cache, and the tokens of a row, in each read."""
    seen, read = [], OPT.read

    def spied(model: OPT, *args: Any) -> Tensor:
        seen.append((args[-1].batch_size, args[-1].capacity, args[0].shape[1]))
        assert all(t.is_contiguous() for t in (*args[-1].keys, *args[-1].values))  # as programs want them
        return read(model, *args)

    monkeypatch.setattr(OPT, "read", spied)
    return seen


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "criterion": {"stopping_criteria": ends_by_text},
    "rules": {
        "stopping_criteria": ends_by_text, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 3,
        "frequency_penalty": 0.2, "suppress_tokens": (5, 6), "bad_words_ids": [[7], [8, 9]], "forced_bos_token_id": 11,
        "logits_processor": lambda ids, scores: scores - 0.1 * (torch.arange(scores.shape[1]) % 3),
    },
    "details": {"stopping_criteria": ends_by_text, "output_logprobs": True, "top_logprobs": 3, "output_scores": True},
    "copies": {"stopping_criteria": ends_by_text, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "limits", [{"batch_size": 5}, {"max_batch_tokens": 400}, {"max_batch_tokens": 300, "in_order": True}], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_prompt_gives_what_it_gives_alone(kind: str, name: str, limits: dict[str, Any]) -> None:
    decoder, rows, options = build_ours(lively(kind)), prompts_of(40), OPTIONS[name]
    more = {"criteria": options.get("stopping_criteria"), "rules": options.get("logits_processor")}
    rest = {key: v for key, v in options.items() if key not in ("stopping_criteria", "logits_processor")}
    found = results(many(decoder, rows, limits, **more, **rest))
    assert sorted(found) == [*range(40)]
    for index, row in enumerate(rows):
        same(found[index], alone(decoder, row, **options))
    lengths = {len(record[0]) for records in found.values() for record in records}
    assert name == "plain" or len(lengths) > 5  # they do not end together


def test_the_pass_stays_full_and_within_its_limits(widths: list[tuple[int, int, int]]) -> None:
    """Fewer steps than batch by batch, no cache above the limit, and an eighth of the rows at most has ended."""
    decoder, rows = build_ours(lively("125m")), prompts_of(60)
    for limits, copies in (({"batch_size": 8}, 1), ({"max_batch_tokens": 500}, 1), ({"max_batch_tokens": 500}, 2)):
        sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 2} if copies == 2 else {}
        prompts = many(decoder, rows, limits, ends_by_text, **sampled)
        widths.clear()
        results(prompts)
        for count, capacity, _ in widths:
            assert count <= limits.get("batch_size", 99)
            assert count * (capacity + SCORES_IN_TOKENS) <= limits.get("max_batch_tokens", 1e9)
        steps = sum(tokens == 1 for *_, tokens in widths)
        widths.clear()
        for batch in prompts.batches:
            continuous.run(prompts.request_of(batch))
        assert steps < 0.8 * sum(tokens == 1 for *_, tokens in widths)


def test_a_prompt_that_is_too_long_for_the_limit_runs_alone_and_the_others_after_it(
    widths: list[tuple[int, int, int]],
) -> None:
    decoder, rows = build_ours(lively("125m")), [[2, 5], [2, *range(5, 45)], [2, 6, 7], [2] * 30]
    found = results(many(decoder, rows, {"max_batch_tokens": 50, "in_order": True}))
    assert {count for count, capacity, _ in widths if capacity > 42} == {1}
    for index, row in enumerate(rows):
        same(found[index], alone(decoder, row))


def test_a_seed_repeats_and_draws_anew_for_each_prompt() -> None:
    decoder, rows = build_ours(lively("125m")), [[2, 9, 9]] * 12

    def drawn(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        found = results(many(decoder, rows, {"batch_size": 4}, ends_by_text, generator=generator, do_sample=True))
        return [found[i][0][0] for i in range(12)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({tuple(ids) for ids in drawn(1)}) > 6


def test_the_clock_runs_for_those_that_began_together(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, clock = build_ours(lively("125m")), iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    found = results(many(decoder, prompts_of(12), {"batch_size": 3}, max_time=6.0))
    assert {record[1] for records in found.values() for record in records} == {"time"}
    assert min(len(records[0][0]) for records in found.values()) >= 1


def test_an_error_in_the_middle_comes_through_and_earlier_results_stay() -> None:
    decoder, calls = build_ours(lively("125m")), iter(range(100))

    def fails_late(ids: Tensor, scores: Any) -> Tensor:
        if next(calls) == 30:
            raise RuntimeError("of the user")
        return ends_by_text(ids)

    found = []
    with pytest.raises(RuntimeError, match="of the user"):
        found.extend(many(decoder, prompts_of(40), {"batch_size": 4}, fails_late).run())
    assert found

    def breaks(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(ids[:, -1:] % 5 == 0, torch.nan)

    with pytest.raises(ValueError, match="scores: expected numbers, got NaN"):
        list(many(decoder, prompts_of(40), {"batch_size": 4}, ends_by_text, breaks).run())


@pytest.mark.parametrize(
    "change", [{"device": "cuda"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=lambda c: next(iter(c))
)
def test_gpus_beams_and_drafts_run_batch_by_batch(change: dict[str, Any]) -> None:
    """CUDA graphs want the same rows in each step, and their host does not know which rows have ended."""
    decoder = say([[9, 8, 7]] * 6)
    watched = Watched(decoder, change.pop("device", None))
    prompts = many(decoder, [[2, 5]] * 6, {"batch_size": 3}, max_new_tokens=3, **change)
    object.__setattr__(prompts, "decoder", watched)
    assert [(indices, len(output.lengths)) for indices, _, output in prompts.run()] == [([0, 1, 2], 3), ([3, 4, 5], 3)]


def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that join are read in the memory of those that have left, which is as large as the limit says."""
    decoder, storages, read = build_ours(lively("125m")), dict[int, int](), OPT.read

    def spied(model: OPT, *args: Any) -> Tensor:
        storage = args[-1].keys[0].untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return read(model, *args)

    monkeypatch.setattr(OPT, "read", spied)
    assert len(results(many(decoder, prompts_of(300, 8), {"max_batch_tokens": 250}, ends_by_text))) == 300
    assert len(storages) <= 2  # a second one, where fewer tokens are left over by other rows
    assert max(storages.values()) <= 250 * 32 * 8


def test_rows_move_within_a_cache() -> None:
    torch.manual_seed(0)
    model = build_ours(lively("125m"))
    cache = model.new_cache(3, 10)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    before, cache.length = [t.clone() for t in (*cache.keys, *cache.values)], 8
    cache.move(5, torch.tensor([2, 4, 0]))
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        for row, to in enumerate((2, 4, 0)):
            assert torch.equal(new[row, :, to : to + 3], old[row, :, 5:8])
    cache.copy_rows(torch.tensor([2]), torch.tensor([0]))
    kept, place = [t[:2, :, :8].clone() for t in (*cache.keys, *cache.values)], cache.keys[0].data_ptr()
    assert all(
        torch.equal(t[0], t[1 + 1][:, :8])
        for t in [torch.cat([k, c[2:, :, :8]]) for k, c in zip(kept, (*cache.keys, *cache.values), strict=True)]
    )
    for shape, is_same in (((2, 9), True), ((3, 8), True), ((5, 12), False)):
        cache.reshape(2, *shape)
        assert (cache.batch_size, cache.capacity) == shape
        assert all(torch.equal(a, b[:2, :, :8]) for a, b in zip(kept, (*cache.keys, *cache.values), strict=True))
        assert (cache.keys[0].data_ptr() == place) == is_same

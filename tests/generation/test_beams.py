"""Beam search and beam sampling: against transformers' generate, brute force, plain forward passes, and odd ends."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from minopt import OPT, GenerationOutput, KVCache, generate
from tests.conftest import build_ours, build_reference, lively
from tests.generation.decoders import Table, V, Watched

PAD = 1
Prompts = list[list[int]]


def pad_left(prompts: Prompts) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def random_prompts(lengths: list[int], seed: int = 0) -> Prompts:
    draw = random.Random(seed)
    return [[draw.randrange(3, V) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Hypothesis:
    """One continuation: its tokens, its score, and the scores ``[N, V]`` among which each token was chosen."""

    tokens: tuple[int, ...]
    score: float
    scores: Tensor


def scores_of(found: GenerationOutput) -> Tensor:
    assert found.sequences_scores is not None
    return found.sequences_scores


def hypotheses(found: GenerationOutput, prompt_length: int) -> list[Hypothesis]:
    """Of minopt; what stands behind them is padding, and nothing is wider than the longest."""
    assert found.scores is not None
    new = found.sequences[:, prompt_length:].tolist()
    assert len(new[0]) == found.scores.shape[1] == max(found.lengths)
    assert all(set(row[length:]) <= {PAD} for row, length in zip(new, found.lengths, strict=True))
    return [
        Hypothesis(tuple(row[:length]), score, scores[:length])
        for row, length, score, scores in zip(new, found.lengths, scores_of(found).tolist(), found.scores, strict=True)
    ]


def of_transformers(reference: Any, prompts: Prompts, **options: Any) -> list[Hypothesis]:
    """What transformers' ``generate`` finds for the prompts in one padded batch."""
    ids, mask = pad_left(prompts)
    found = reference.generate(
        ids, attention_mask=mask, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, **options
    )
    new, steps = found.sequences[:, ids.shape[1] :].tolist(), list(enumerate(found.scores))
    if options["num_beams"] == 1:
        eos = options["eos_token_id"] or []
        lengths = [next((n + 1 for n, token in enumerate(row) if token in eos), len(row)) for row in new]
        beams = [[row] * len(new[0]) for row in range(len(new))]
        totals = [math.nan] * len(new)
    else:
        lengths = (found.beam_indices >= 0).sum(1).tolist()
        beams, totals = found.beam_indices.tolist(), found.sequences_scores.tolist()
    return [
        Hypothesis(tuple(row[:length]), total, torch.stack([scores[beam[n]] for n, scores in steps[:length]]))
        if length
        else Hypothesis((), total, torch.zeros(0, V))
        for row, length, total, beam in zip(new, lengths, totals, beams, strict=True)
    ]


def as_ours(options: dict[str, Any]) -> dict[str, Any]:
    """Options of transformers as minopt has them: no eos is ``()``."""
    return {**options, "eos_token_id": options["eos_token_id"] or ()}


def are_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Infinite in the same places, and equal to that part of 1 or of themselves elsewhere."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# --- tokens and scores are transformers'


def frequent_tokens(reference: Any) -> list[int]:
    """Tokens that beams often choose behind their first two: as eos they end some early, others late, many never."""
    rows = of_transformers(
        reference, random_prompts([2, 5, 8, 3, 7, 4]), num_beams=4, num_return_sequences=4, max_new_tokens=16
    )
    counts = Counter(token for row in rows for token in set(row.tokens[2:]) if token > 2)
    return [token for token, _ in counts.most_common(12)]


def draw_options(draw: random.Random, beams: int, frequent: list[int]) -> dict[str, Any]:
    """Options for both libraries, drawn so that most of them do something."""
    longest = draw.randint(1, 14)
    eos = draw.sample(frequent, draw.choice([0, 1, 1, 1, 2, 3]))
    words = [draw.choices(frequent, k=draw.randint(1, 3)) for _ in range(draw.choice([0, 0, 1, 3]))]
    words = [ids for ids in words if len(ids) > 1 or ids[0] not in eos]
    options: dict[str, Any] = {
        "num_beams": beams,
        "max_new_tokens": longest,
        "eos_token_id": eos or None,
        "no_repeat_ngram_size": draw.choice([0, 0, 0, 0, 1, 2, 3, 4]),
    }
    if beams > 1:
        options["num_return_sequences"] = draw.randint(1, beams)
        options["length_penalty"] = draw.choice([0.0, 1.0, 2.0, draw.uniform(0, 2), draw.uniform(0, 2)])
        options["early_stopping"] = draw.choice([False, True, "never"])
    if draw.random() < 0.3:
        options["min_new_tokens"] = draw.randint(0, longest)
    if draw.random() < 0.3:
        options["repetition_penalty"] = draw.choice([0.8, 1.2, draw.uniform(1.0, 2.0)])
    if words:
        options["bad_words_ids"] = words
    if draw.random() < 0.2:
        options["suppress_tokens"] = draw.sample(frequent, 2)
    return options


def draw_prompts(draw: random.Random) -> Prompts:
    """One to four of unequal lengths; some say a thing twice, so that n-grams meet."""
    lengths = draw.sample(range(1, 13), draw.choice([1, 2, 3, 4]))
    prompts = [[draw.randrange(3, V) for _ in range(length)] for length in lengths]
    return [prompt[: (len(prompt) + 1) // 2] * 2 if draw.random() < 0.3 else prompt for prompt in prompts]


def by_rows(options: dict[str, Any]) -> bool:
    """Whether transformers takes padding for text under these options; no rule of minopt does."""
    return options["no_repeat_ngram_size"] > 0 or "repetition_penalty" in options


COMBINATIONS = 106  # of each kind

# How often each must have been among the combinations of a kind, or the comparison says little.
RICH = {
    "all": 100, "with beams": 85, "padded": 60, "padded in transformers": 12, "by eos": 100, "by length": 100,
    "both ends in a batch": 12, "unequal lengths": 30, "all ended early": 10,
    "longer behind shorter": 15,
    "min_new_tokens": 20, "repetition_penalty": 20, "bad_words_ids": 30, "torch.float32": 30, "torch.float64": 70,
    **{f"{beams} beams": 11 for beams in range(1, 9)}, **{f"{some} eos": 8 for some in range(4)},
    **{f"early_stopping {when}": 25 for when in (False, True, "never")},
    **{f"n-grams of {size}": 6 for size in range(5)},
}  # fmt: skip


def test_tokens_and_scores_are_those_of_transformers(kind: str) -> None:
    """In float64, and each third time in float32, where rounding decides otherwise once in a while."""
    draw, seen = random.Random(f"beams of {kind}"), Counter[str]()
    references = {dtype: lively(kind, dtype) for dtype in (torch.float32, torch.float64)}
    models = {dtype: build_ours(reference) for dtype, reference in references.items()}
    frequent = frequent_tokens(references[torch.float64])
    eos_lengths: set[int] = set()
    for n in range(COMBINATIONS):
        prompts, options = draw_prompts(draw), draw_options(draw, 1 + n % 8, frequent)
        dtype = torch.float64 if n % 3 else torch.float32
        alone = len(prompts) > 1 and by_rows(options)
        groups = [[prompt] for prompt in prompts] if alone else [prompts]
        theirs = [row for group in groups for row in of_transformers(references[dtype], group, **options)]
        ids, mask = pad_left(prompts)
        found = generate(models[dtype], ids, mask, **as_ours(options), output_scores=True)
        K, R, eos = options["num_beams"], options.get("num_return_sequences", 1), options["eos_token_id"] or []
        if K == 1:
            assert found.sequences_scores is None
            found = GenerationOutput(**{**vars(found), "sequences_scores": torch.full((len(ids),), math.nan)})
        ours = hypotheses(found, ids.shape[1])
        if dtype == torch.float32 and [row.tokens for row in ours] != [row.tokens for row in theirs]:
            seen["decided by rounding"] += 1
            continue
        assert [row.tokens for row in ours] == [row.tokens for row in theirs], (n, prompts, options)
        for row, other, reason in zip(ours, theirs, found.stop_reasons, strict=True):
            assert row.score == pytest.approx(other.score, rel=1e-5, abs=1e-5, nan_ok=True), (n, prompts, options)
            assert are_close(row.scores, other.scores), (n, prompts, options)
            assert (row.tokens[-1] in eos) == (reason == "eos")
            assert reason == "eos" or len(row.tokens) == options["max_new_tokens"]
            eos_lengths |= {len(row.tokens)} if reason == "eos" else set()
        assert all(len({row.tokens for row in ours[i : i + R]}) == R for i in range(0, len(ours), R))
        seen.update({
            "all": 1, "with beams": K > 1, str(dtype): 1, f"{K} beams": 1,
            f"early_stopping {options.get('early_stopping')}": 1,
            f"n-grams of {options['no_repeat_ngram_size']}": 1, f"{len(eos)} eos": 1,
            "padded": len(set(map(len, prompts))) > 1, "padded in transformers": len(groups[0]) > 1,
            "by eos": found.stop_reasons.count("eos"), "by length": found.stop_reasons.count("length"),
            "both ends in a batch": len(set(found.stop_reasons)) > 1, "unequal lengths": len(set(found.lengths)) > 1,
            "all ended early": max(found.lengths) < options["max_new_tokens"],
            "longer behind shorter": R > 1 and list(found.lengths) != sorted(found.lengths, reverse=True),
            **{name: name in options for name in ("min_new_tokens", "repetition_penalty", "bad_words_ids")},
        })  # fmt: skip
    poor = {name: seen[name] for name, least in RICH.items() if seen[name] < least}
    assert not poor, (poor, seen)
    assert len(eos_lengths) >= 10
    assert seen["decided by rounding"] <= 1


# --- beam sampling


@pytest.mark.parametrize("falling", [True, False], ids=["best first", "best last"])
def test_sampled_beams_are_those_of_transformers(kind: str, falling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same probabilities; where both draw the most probable ones, in this order or that: the best may end."""
    drawn_from: list[Tensor] = []

    def most_probable(probabilities: Tensor, num_samples: int, **_: Any) -> Tensor:
        drawn_from.append(probabilities)
        picks = probabilities.topk(num_samples).indices
        return picks if falling else picks.flip(-1)

    monkeypatch.setattr(torch, "multinomial", most_probable)
    reference, draw, seen = lively(kind), random.Random(kind), Counter[str]()
    ours, frequent = build_ours(reference), frequent_tokens(reference)
    for n in range(24):
        K = draw.randint(2, 6)
        options: dict[str, Any] = {
            "do_sample": True, "num_beams": K, "num_return_sequences": draw.randint(1, K),
            "max_new_tokens": draw.randint(2, 12), "eos_token_id": draw.sample(frequent, draw.randint(0, 2)) or None,
            "temperature": draw.choice([0.5, 1.0, 1.7]), "top_k": draw.choice([0, 3, 20]),
            "top_p": draw.choice([1.0, 0.5, 0.9]), "min_p": draw.choice([None, 0.05, 0.3]),
            "early_stopping": draw.choice([False, True, "never"]), "length_penalty": draw.choice([0.0, 1.0, 1.5]),
        }  # fmt: skip
        prompts = draw_prompts(draw)
        drawn_from.clear()
        theirs = of_transformers(reference, prompts, **options)
        steps = len(drawn_from)
        if any(row.score < -1e8 for row in theirs):  # filters have left it fewer texts than beams, see above
            seen["too few"] += 1
            continue
        ids, mask = pad_left(prompts)
        found = generate(ours, ids, mask, **as_ours(options), output_scores=True)
        assert all(map(are_close, drawn_from[steps:], drawn_from[:steps]))
        for row, other in zip(hypotheses(found, ids.shape[1]), theirs, strict=True):
            assert row.tokens == other.tokens, (n, prompts, options)
            assert row.score == pytest.approx(other.score, rel=1e-5), (n, prompts, options)
            assert are_close(row.scores, other.scores), (n, prompts, options)
        seen.update({
            "all": 1, "by eos": found.stop_reasons.count("eos"), "padded": len(prompts) > 1,
            "filtered": bool(found.scores is not None and found.scores.isinf().any()),
        })  # fmt: skip
    assert seen["all"] >= 18, seen
    assert min(seen[name] for name in ("by eos", "padded", "filtered")) >= 8, seen


def random_table(vocab_size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))


# --- brute force


@torch.no_grad()
def every_text(model: OPT, prompt: list[int], length: int, eos: int) -> dict[tuple[int, ...], float]:
    """The sum of log-probabilities of every text that ends with eos or at its length, by a plain forward pass."""
    texts = list(itertools.product(range(model.config.vocab_size), repeat=length))
    rows = torch.tensor([[*prompt, *text] for text in texts])
    logprobs = model(rows)[:, len(prompt) - 1 : -1].log_softmax(-1)
    sums = logprobs.gather(2, rows[:, len(prompt) :, None])[..., 0].cumsum(1).tolist()
    ends = [text.index(eos) + 1 if eos in text else length for text in texts]
    return {text[:end]: of_text[end - 1] for text, end, of_text in zip(texts, ends, sums, strict=True)}


@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize(("vocab_size", "length"), [(4, 5)])
def test_beams_that_are_wide_enough_find_the_best_of_all_texts_in_order(
    kind: str, vocab_size: int, length: int, length_penalty: float
) -> None:
    model = build_ours(lively(kind, vocab_size=vocab_size, eos_token_id=2))
    prompts = [[3, 0, 3, 3], [0, 3]]
    ids, mask = pad_left(prompts)
    K = vocab_size * (vocab_size - 1) ** (length - 1)  # every candidate of the last step
    found = generate(
        model, ids, mask, num_beams=K, num_return_sequences=K, max_new_tokens=length, output_scores=True,
        length_penalty=length_penalty, early_stopping="never",
    )  # fmt: skip
    ours = hypotheses(found, 4)
    for row, prompt in enumerate(prompts):
        texts = every_text(model, prompt, length, eos=2)
        assert len(texts) == K + sum((vocab_size - 1) ** n for n in range(length - 1))
        scores = {text: total / len(text) ** length_penalty for text, total in texts.items()}
        of_row = ours[K * row : K * row + K]
        assert len({h.tokens for h in of_row}) == K
        assert [h.score for h in of_row] == pytest.approx(sorted(scores.values(), reverse=True)[:K], rel=1e-5)
        assert [h.score for h in of_row] == pytest.approx([scores[h.tokens] for h in of_row], rel=1e-5)
        assert of_row[0].tokens == max(scores, key=lambda text: scores[text])
        assert {len(h.tokens) for h in of_row} >= {length - 1, length}


# --- the cache


class Beams(Watched):
    """A model whose prompt's keys and values have to stay as they are, and where."""

    def __init__(self, model: OPT) -> None:
        super().__init__(model)
        # Behind the prompt in each step: slots that there are, and those that a beam sees.
        self.slots: list[tuple[int, int]] = []

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        self.cache = self.decoder.new_cache(batch_size, capacity)
        return self.cache

    def read(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        is_step = bool(self.reads)
        logits = super().read(input_ids, position_ids, mask, wanted, cache)
        tensors, T = (*cache.keys, *cache.values), self.reads[0].input_ids.shape[1]
        if is_step:
            self.check_prompt()
            assert mask is not None
            visible = mask[:, 0, :, T:].any(1)
            self.slots.append((visible.shape[1], int(visible.sum(1).max())))
        else:
            self.prompt = [(t[:, :, :T].clone(), t.data_ptr()) for t in tensors]
        return logits

    def check_prompt(self) -> None:
        for (before, place), now in zip(self.prompt, (*self.cache.keys, *self.cache.values), strict=True):
            assert now.data_ptr() == place
            assert torch.equal(now[:, :, : before.shape[2]], before)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_slots_out_of_use_go_and_nothing_else_changes(
    kind: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 60 steps; the prompt is read once, a row each, and its keys and values are never written again."""
    prompts, steps, K = random_prompts([4, 11]), 60, 4
    ids, mask = pad_left(prompts)
    model = build_ours(lively(kind, max_position_embeddings=80))
    found: dict[int, GenerationOutput] = {}
    slots: dict[int, list[tuple[int, int]]] = {}
    for every in (1, 3, 16, 10**9):
        monkeypatch.setattr("minopt.generation.beams.COMPACT_EVERY", every)
        watched = Beams(model)
        found[every] = generate(
            watched, ids, mask, num_beams=K, num_return_sequences=K, max_new_tokens=steps, output_scores=True,
            repetition_penalty=penalty,
        )  # fmt: skip
        watched.check_prompt()
        assert [tuple(read.input_ids.shape) for read in watched.reads] == [(2, 11), *[(2, K)] * (steps - 1)]
        assert (watched.cache.batch_size, watched.cache.capacity) == (2, 11 + K * (steps - 1))
        slots[every] = watched.slots
    assert [there for there, _ in slots[10**9]] == [K * (n + 1) for n in range(steps - 1)]
    for every in (1, 3, 16):
        # A slot in sight does not go; looked for at each step, those out of sight are never more than those in sight.
        assert [seen for _, seen in slots[every]] == [seen for _, seen in slots[10**9]]
        assert max(there for there, _ in slots[every]) < K * (steps - 1)
        assert any(there < before for (before, _), (there, _) in itertools.pairwise(slots[every]))
    assert all(there - K <= 2 * (seen - K) for there, seen in slots[1])
    expected = hypotheses(found.pop(10**9), 11)
    assert len({row.tokens for row in expected}) == 2 * K
    assert len({token for row in expected for token in row.tokens}) >= 10
    for other in found.values():
        for row, wanted in zip(hypotheses(other, 11), expected, strict=True):
            assert row.tokens == wanted.tokens
            assert row.score == pytest.approx(wanted.score, rel=1e-6)
            assert are_close(row.scores, wanted.scores)


# --- rows do not see each other


def test_what_a_finished_row_would_go_on_with_does_not_matter() -> None:
    """Not even where it is no number: greedy decoding does not look at it either."""
    table = torch.full((8, 8), -5.0)
    table[3, [2, 6]] = 5.0  # both beams of 3 end at once
    table[3, [0, 7]] = 0.0  # these would go on
    table[[0, 7]] = torch.nan
    table[4:6, 4:6] = torch.tensor([[3.0, 5.0], [3.5, 5.5]])  # those of 4 stay with 4 and 5
    options: dict[str, Any] = {"eos_token_id": (2, 6), "max_new_tokens": 6}
    assert generate(Table(table), torch.tensor([[3], [4]]), **options).lengths == (1, 6)
    options |= {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True}
    alone = generate(Table(table), torch.tensor([[4]]), **options)
    both = generate(Table(table), torch.tensor([[3], [4]]), **options)
    assert both.lengths == (1, 1, 6, 6)
    assert torch.equal(both.sequences[2:], alone.sequences)


# --- odd ends


def ban_behind(length: int, marked: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A rule that leaves nothing from a length on; in rows that begin with a token, if one is marked."""

    def rule(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] < length:
            return scores
        rows = torch.ones(len(ids), dtype=torch.bool) if marked is None else ids[:, 0] == marked
        return scores.masked_fill(rows[:, None], -torch.inf)

    return rule


ODD = Table(random_table(12, seed=7, scale=2.0))
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}


@pytest.mark.parametrize("sampled", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_a_row_without_a_token_to_go_on_with_ends_with_its_beams(early_stopping: Any, sampled: bool) -> None:
    """And its neighbour does not notice."""
    ids = torch.tensor([[3, 4], [5, 4]])
    options = {**BEAMS, "early_stopping": early_stopping, "eos_token_id": 2}
    if not sampled:
        short, long = (hypotheses(generate(ODD, ids, **options, max_new_tokens=n), 2) for n in (3, 8))
        found = generate(ODD, ids, **options, max_new_tokens=8, logits_processor=ban_behind(2 + 3, marked=3))
        assert [(h.tokens, h.score) for h in hypotheses(found, 2)] == [
            (h.tokens, h.score) for h in (*short[:3], *long[3:])
        ]
        ends = tuple("eos" if h.tokens[-1] == 2 else "exhausted" for h in short[:3])
        assert found.stop_reasons[:3] == ends
        assert "exhausted" in ends
        assert "exhausted" not in found.stop_reasons[3:]
    found = generate(
        ODD, ids, **options, max_new_tokens=8, logits_processor=ban_behind(2 + 3), do_sample=sampled
    )  # all rows
    rows = hypotheses(found, 2)
    assert max(found.lengths) == 3
    for row, reason in zip(rows, found.stop_reasons, strict=True):
        assert (reason, len(row.tokens)) == ("exhausted", 3) if row.tokens[-1] != 2 else reason == "eos"
        assert math.isfinite(row.score)
    assert "exhausted" in found.stop_reasons


@pytest.mark.parametrize("length", [1, 2])
def test_more_beams_than_there_are_texts_give_each_once_and_then_empty_ones(length: int) -> None:
    table = Table(random_table(3))
    found = generate(table, torch.tensor([[0], [2]]), num_beams=11, num_return_sequences=11, max_new_tokens=length,
                     pad_token_id=1, output_scores=True)  # fmt: skip
    rows, real = hypotheses(found, 1), 3**length
    logprobs = table.table.log_softmax(-1)
    for row, first in ((0, 0), (1, 2)):
        texts = {
            text: sum(logprobs[a, b].item() for a, b in itertools.pairwise((first, *text))) / length
            for text in itertools.product(range(3), repeat=length)
        }
        of_row = rows[11 * row : 11 * row + 11]
        assert [h.tokens for h in of_row[:real]] == sorted(texts, key=lambda text: -texts[text])
        assert [h.score for h in of_row[:real]] == pytest.approx(sorted(texts.values(), reverse=True))
        assert all((h.tokens, h.score) == ((), -math.inf) for h in of_row[real:])
    reasons = ("length",) * real + ("exhausted",) * (11 - real)
    assert found.stop_reasons == reasons * 2


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_a_criterion_ends_a_text_as_an_eos_does(kind: str, early_stopping: Any) -> None:
    reference, prompts = lively(kind), random_prompts([5, 2])
    ids, mask = pad_left(prompts)
    model, stop = build_ours(reference), frequent_tokens(reference)[1]
    options = {**BEAMS, "early_stopping": early_stopping, "max_new_tokens": 12}
    seen: list[tuple[int, ...]] = []

    def criterion(tokens: Tensor, scores: None) -> Tensor:
        seen.append(tuple(tokens.shape))
        return tokens[:, -1] == stop

    by_eos = generate(model, ids, mask, **options, eos_token_id=stop)
    found = generate(model, ids, mask, **options, eos_token_id=(), stopping_criteria=criterion)
    assert found.stop_reasons == tuple("stop" if reason == "eos" else reason for reason in by_eos.stop_reasons)
    assert "stop" in found.stop_reasons
    assert torch.equal(found.sequences, by_eos.sequences)
    assert torch.equal(scores_of(found), scores_of(by_eos))
    assert seen == [(2 * 6, 5 + n) for n in range(1, len(seen) + 1)]  # twice as many candidates as beams
    theirs = of_transformers(
        reference, prompts, num_beams=3, num_return_sequences=3, max_new_tokens=12, early_stopping=early_stopping,
        stopping_criteria=transformers.StoppingCriteriaList([criterion]),
    )  # fmt: skip
    assert [h.tokens for h in hypotheses(found, 5)] == [h.tokens for h in theirs]


def test_when_time_is_up_the_running_beams_are_the_hypotheses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a second each time it is read: once at the start and once a step."""
    ids, clock = torch.tensor([[3, 4], [5, 4]]), itertools.count()
    expected = generate(ODD, ids, **BEAMS, max_new_tokens=4, eos_token_id=2)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    found = generate(ODD, ids, **BEAMS, max_new_tokens=30, eos_token_id=2, max_time=3.5)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(scores_of(found), scores_of(expected))
    assert found.stop_reasons == tuple("time" if r == "length" else r for r in expected.stop_reasons)
    assert "time" in found.stop_reasons


@pytest.mark.parametrize("sampled", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(("poisoned", "step"), [(4, 0), (6, 1)], ids=["behind the prompt", "behind a beam"])
def test_scores_that_are_no_numbers_are_refused_with_the_step(poisoned: int, step: int, sampled: bool) -> None:
    table = torch.zeros(8, 8)
    table[4, 6] = 9.0
    table[poisoned] = torch.nan
    ids = torch.tensor([[3, 3], [3, 4]])
    with pytest.raises(
        ValueError, match=rf"scores: expected numbers, got NaN or infinity at new token {step}\. In float16"
    ):
        generate(Table(table), ids, num_beams=2, max_new_tokens=5, do_sample=sampled)


# --- rules of the user's see every beam, and broken scores are told


def test_a_rule_of_the_users_sees_all_beams_of_all_prompts_at_every_step() -> None:
    """As transformers' processors that number rows, such as prefix constraints, rely on."""
    ours, ids = build_ours(build_reference("125m")), torch.tensor([[5, 6], [7, 8]])
    seen: list[tuple[torch.Size, list[int]]] = []

    def rule(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((scores.shape, input_ids[:, 0].tolist()))
        return scores

    generate(ours, ids, num_beams=3, max_new_tokens=4, logits_processor=rule, eos_token_id=())
    assert seen == [((6, 96), [5, 5, 5, 7, 7, 7])] * 4
    allowed = {0: [10, 11, 12], 1: [20, 21, 22]}
    constraint = transformers.PrefixConstrainedLogitsProcessor(lambda row, _: allowed[row], 3)
    found = generate(ours, ids, num_beams=3, max_new_tokens=4, logits_processor=constraint, eos_token_id=())
    for row, new in enumerate(found.sequences[:, 2:].tolist()):
        assert set(new) <= set(allowed[row])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_drawn_beams_refuse_broken_scores_that_they_do_not_draw(value: float) -> None:
    ours = build_ours(build_reference("125m"))

    def rule(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7] = value
        return scores.masked_fill(torch.arange(96) == 8, -torch.inf)

    options: dict[str, Any] = {"num_beams": 2, "do_sample": True, "top_k": 0, "max_new_tokens": 1}
    for seed in range(20):
        with pytest.raises(ValueError, match="scores: expected numbers, got NaN or infinity at new token 0"):
            generate(ours, torch.tensor([[5]]), logits_processor=rule, seed=seed, **options)


def test_nothing_depends_on_the_default_dtype() -> None:
    ours, ids = build_ours(build_reference("125m")), torch.tensor([[5, 6, 5, 6], [7, 8, 7, 8]])
    options: dict[str, Any] = {
        "num_beams": 3, "max_new_tokens": 8, "no_repeat_ngram_size": 2, "bad_words_ids": [[9], [5, 6]],
        "sequence_bias": [[[11], 1.5]], "output_logprobs": True,
    }  # fmt: skip
    expected = generate(ours, ids, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = generate(ours, ids, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.logprobs is not None
    assert expected.logprobs is not None
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)  # type: ignore[arg-type]

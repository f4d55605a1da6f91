"""Option sets of every kind: refused before anything runs, or kept by every row that comes out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minopt import OPT, GenerationConfig, GenerationOutput, OPTConfig, generate
from tests.generation.decoders import Fake, Watched

SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 8}


def search(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


# --- decoders whose logits follow from a row's own tokens


class Hashing(Fake):
    """Logits from a table, at a row that all of the real tokens so far decide."""

    def __init__(self, table: Tensor, config: OPTConfig) -> None:
        super().__init__(self.hashed)
        self.table, self.config = table, config

    def hashed(self, past: Sequence[int]) -> Tensor:
        return self.table[functools.reduce(lambda a, b: (31 * a + b + 7) % len(self.table), past, len(past))]


class Model(Watched):
    """A small OPT in float64; what it said is taken from one pass over the whole text, without a cache."""

    @property
    def calls(self) -> int:
        return len(self.reads)

    def logprobs(self, past: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.decoder(torch.tensor([past]))[0, -1].float().log_softmax(0)


def build_table(vocab_size: int, style: str, seed: int) -> Tensor:
    """97 rows of logits; none of them is all ``-inf``."""
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(97, vocab_size, generator=generator)
    if style == "ties":
        return table.round()
    if style == "equal":
        return torch.zeros_like(table)
    if style == "large":
        return 1e4 * table
    if style == "impossible tokens":
        hidden = torch.rand(table.shape, generator=generator) < 0.4
        return table.masked_fill(hidden & (table < table.amax(1, keepdim=True)), -math.inf)
    return table


STYLES = ("random", "random", "random", "ties", "equal", "large", "impossible tokens")


def build_decoder(vocab_size: int, positions: int, style: str, seed: int, eos: Any, pad: int | None) -> Any:
    config = OPTConfig(
        **SHAPE, vocab_size=vocab_size, max_position_embeddings=positions, eos_token_id=eos, pad_token_id=pad,
        bos_token_id=None, do_layer_norm_before=seed % 2 == 0,
    )  # fmt: skip
    if style != "model":
        return Hashing(build_table(vocab_size, style, seed), config)
    torch.manual_seed(seed)
    model = OPT(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return Model(model)


# --- the user's own rules and criteria; what they say of a row follows from its own tokens


def nothing_behind_even(ids: Tensor, scores: Tensor) -> Tensor:
    """Leaves rows that end with an even id nothing to go on with."""
    return scores.masked_fill((ids[:, -1] % 2 == 0)[:, None], -math.inf)


def less_of_the_last(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.scatter_add(1, ids[:, -1:], torch.full((len(ids), 1), -3.0))


def ends_with_odd(ids: Tensor, scores: Any) -> Tensor:
    return ids[:, -1] % 2 == 1


def always(ids: Tensor, scores: Any) -> bool:
    return True


def never(ids: Tensor, scores: Any) -> bool:
    return False


# --- cases


@dataclass
class Case:
    """A call of ``generate``."""

    decoder: tuple[int, int, str, int, Any, int | None]  # arguments of build_decoder
    prompts: list[list[int]]
    padding: tuple[int, int]  # its id, and how much more of it there is at the left of all prompts
    options: dict[str, Any]
    processors: list[Any]
    criteria: list[Any]
    spoil: str = ""  # what is wrong with the tensors

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        filler, more = self.padding
        width = max(map(len, self.prompts)) + more
        rows = [[filler] * (width - len(prompt)) + prompt for prompt in self.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        ids, given = torch.tensor(rows), torch.tensor(mask)
        if self.spoil == "hole":
            given[0, -1] = 0
        if self.spoil == "ids":
            ids[-1, -1] = self.decoder[0]
        if self.spoil == "negative":
            ids[-1, 0] = -1
        if self.spoil == "dtype":
            ids = ids.float()
        if self.spoil == "shape":
            given = given[:, 1:]
        if self.spoil == "empty":
            ids = ids[:0]
        return ids, None if bool(given.all()) and not self.spoil else given

    def run(self, decoder: Any) -> GenerationOutput:
        torch.manual_seed(0)
        return generate(
            decoder, *self.tensors(), logits_processor=self.processors, stopping_criteria=self.criteria, **self.options
        )

    def alone(self, row: int) -> Case:
        """One of its prompts, without padding."""
        return dataclasses.replace(self, prompts=[self.prompts[row]], padding=(0, 0))


BIASES = (-10000, -2.5, 0, 1.5, 10000, -math.inf)


@st.composite
def sensible(draw: Callable[..., Any], styles: Sequence[str] = STYLES, do_sample: bool | None = None) -> Case:
    """A call in which no option contradicts another."""
    vocab_size = draw(st.integers(2, 12))
    ids = st.integers(0, vocab_size - 1)
    some = st.lists(ids, max_size=3)
    words = st.lists(ids, min_size=1, max_size=3).map(tuple)
    eos = draw(st.one_of(st.none(), ids, st.lists(ids, max_size=3).map(tuple)))
    pad = draw(st.none() | ids)
    style, seed = draw(st.sampled_from(styles)), draw(st.integers(0, 5))
    new = draw(st.sampled_from((1, 2, 3, 4, 6, 9, 20)))
    sampled = draw(st.booleans()) if do_sample is None else do_sample
    beams = draw(st.sampled_from((1, 1, 2, 3, 5, vocab_size + 2)))
    choices: dict[str, st.SearchStrategy[Any]] = {
        "min_new_tokens": st.sampled_from(sorted({0, 1, new // 2, new})),
        "truncate_prompt": st.booleans(),
        "repetition_penalty": st.sampled_from((1e-4, 0.7, 1.0, 1.3, 1e4)),
        "presence_penalty": st.sampled_from((-1e4, -0.5, 0, 0.5, 10000)),
        "frequency_penalty": st.sampled_from((-1e4, -0.5, 0, 0.5, 10000)),
        "sequence_bias": st.dictionaries(words, st.sampled_from(BIASES), max_size=4),
        "bad_words_ids": st.lists(words.map(list), max_size=4),
        "suppress_tokens": st.none() | some,
        "forced_bos_token_id": ids,
        "eos_token_id": ids | some,
        "pad_token_id": ids,
        "stop_strings": st.sampled_from((None, ())),
        "max_time": st.sampled_from((1e-9, 1e-9, 1e6)),
        "output_scores": st.booleans(),
        "output_logprobs": st.booleans(),
        "top_logprobs": st.integers(0, vocab_size),
    }
    if size := draw(st.sampled_from((0, 0, 0, 1, 2, 3, 50))):
        choices["no_repeat_ngram_include_prompt"] = st.booleans()
    if beams > 1:
        choices["length_penalty"] = st.sampled_from((-5, -1.0, 0, 0.7, 1.0, 2.0, 5.0))
        choices["early_stopping"] = st.sampled_from((True, False, "never"))
        choices["num_return_sequences"] = st.integers(1, beams)
    if sampled:
        choices["temperature"] = st.sampled_from((1e-6, 0.5, 1, 2.0, 1e6))
        choices["top_k"] = st.sampled_from((0, 1, 2, 5, 1000))
        choices["top_p"] = st.sampled_from((1e-9, 0.3, 0.9, 1))
        choices["min_p"] = st.sampled_from((None, 0, 0.1, 0.9, 1))
        choices["seed"] = st.sampled_from((None, 0, 1, 2**64 - 1))
        if beams == 1:
            choices["num_return_sequences"] = st.sampled_from((1, 2, 5))
    options = draw(st.fixed_dictionaries({}, optional=choices))
    options |= {"max_new_tokens": new, "do_sample": sampled, "num_beams": beams, "no_repeat_ngram_size": size}
    ends, forced = eos_of(eos, options), options.get("forced_bos_token_id")
    options["bad_words_ids"] = [
        w for w in options.get("bad_words_ids", ()) if len(w) > 1 or w[0] not in (*ends, forced)
    ]
    if forced is not None:
        options.get("sequence_bias", {}).pop((forced,), None)
        options["suppress_tokens"] = [i for i in options.get("suppress_tokens") or () if i != forced]
    if options.get("min_new_tokens"):  # else nothing is left to generate
        options["suppress_tokens"] = [i for i in options.get("suppress_tokens") or () if i in ends]
        if len(set(ends)) == vocab_size or forced in ends:
            options["min_new_tokens"] = 0
    if len(set(options.get("suppress_tokens") or ())) == vocab_size:
        options["suppress_tokens"] = []
    padding = draw(st.tuples(ids, st.sampled_from((0, 0, 1, 4))))
    room = draw(st.sampled_from((1, 2, 5, 8)))
    longest = room + 4 if options.get("truncate_prompt") else room
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=longest), min_size=1, max_size=3))
    return Case(
        (vocab_size, new + room, style, seed, eos, pad), prompts, padding, options,
        draw(st.sampled_from(([], [], [nothing_behind_even], [less_of_the_last, nothing_behind_even]))),
        draw(st.sampled_from(([], [], [ends_with_odd], [never, always], [never]))),
    )  # fmt: skip


# Of every kind that a caller, a JSON file or a mistake may bring; for counts only what memory holds.
ODD = (
    None, True, False, -1, 0, 1, 2, 3, 11, 0.5, 1.0, -0.0, -1e-6, 1e-7, 1e7, 10001, -10001, 1e30, math.nan, math.inf,
    -math.inf, "", "a", "never", b"a", "1", (), [], [[]], [[], [1]], [0], (0, 1), (1, -1), [0.0], [True], range(12),
    [[0], [1, 0]], [["a"]], {}, {(0,): 1.0}, {(0,): 1e5}, {(): 1.0}, {0: 1.0}, [[[0], -math.inf]], [[[0], math.inf]],
    [[[0], 1.0], [[0], 2.0]], [[[0], None]], [None], ["a"], ["a", ""], {1, 2}, {"a": 1}, 1j, len, torch.tensor([1]),
    torch.Generator(),
)  # fmt: skip
NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig))
HUGE = (2**31, 2**63, 2**64, 10**40)
NEED_MEMORY = {"num_beams", "num_return_sequences"}


@st.composite
def odd(draw: Callable[..., Any]) -> Case:
    """A sensible call with some of its options, or its prompts, set to anything."""
    case: Case = draw(sensible((*STYLES, "model")))
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)):
        case.options[name] = draw(st.sampled_from(ODD if name in NEED_MEMORY else ODD + HUGE))
    if draw(st.integers(0, 9)) == 0:
        case.spoil = draw(st.sampled_from(("hole", "ids", "negative", "dtype", "shape", "empty")))
    return case


# --- what must be so


def eos_of(of_model: Any, options: dict[str, Any]) -> tuple[int, ...]:
    eos = of_model if options.get("eos_token_id") is None else options["eos_token_id"]
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def kept(case: Case, config: GenerationConfig) -> tuple[list[list[int]], list[list[int]]]:
    """The rows as they come back, padding included, and the prompts of real tokens."""
    rows, room = case.tensors()[0].tolist(), case.decoder[1] - config.max_new_tokens
    if max(map(len, case.prompts)) > room:
        return [row[-room:] for row in rows], [prompt[-room:] for prompt in case.prompts]
    return rows, case.prompts


def check(case: Case, decoder: Any, found: GenerationOutput) -> None:
    """Everything that an output promises, of every row of it."""
    config = GenerationConfig(**case.options)
    rows, prompts = kept(case, config)
    R, T, N = len(rows) * config.num_return_sequences, len(rows[0]), max(found.lengths)
    assert (found.sequences.shape, found.sequences.dtype) == ((R, T + N), torch.long)
    assert len(found.lengths) == len(found.stop_reasons) == R
    check_shapes(case, config, found, R, N)
    eos = eos_of(case.decoder[4], case.options)
    fillers = (config.pad_token_id, case.decoder[5], *eos, 0)
    pad = next(i for i in fillers if i is not None)
    for r, row in enumerate(found.sequences.tolist()):
        which, length, reason = r // config.num_return_sequences, found.lengths[r], found.stop_reasons[r]
        new = row[T : T + length]
        assert row[:T] == rows[which]
        assert row[T + length :] == [pad] * (N - length)
        check_end(case, config, eos, [*rows[which], *new], new, reason)
        check_tokens(config, prompts[which], new)
        check_numbers(decoder, config, found, r, [*prompts[which], *new], new)
    if config.num_beams > 1:
        check_beams(config, found, T)
        for prompt, length in zip(prompts, found.lengths[:: config.num_return_sequences], strict=True):
            assert length > 0 or starts_with_nothing(case, decoder, prompt)


def starts_with_nothing(case: Case, decoder: Any, prompt: list[int]) -> bool:
    """Whether the rules leave no token behind a prompt, so that it has no hypothesis at all."""
    options = case.options | {"max_new_tokens": 1, "min_new_tokens": min(1, case.options.get("min_new_tokens", 0))}
    first = dataclasses.replace(case, prompts=[prompt], padding=(0, 0), options=options)
    return first.run(decoder).stop_reasons[0] == "exhausted"


def check_shapes(case: Case, config: GenerationConfig, found: GenerationOutput, R: int, N: int) -> None:
    vocab_size, top = case.decoder[0], config.top_logprobs
    wanted = {
        "sequences_scores": ((R,), torch.float32, config.num_beams > 1),
        "scores": ((R, N, vocab_size), torch.float32, config.output_scores),
        "logprobs": ((R, N), torch.float32, config.output_logprobs),
        "top_token_ids": ((R, N, top), torch.long, top > 0),
        "top_logprobs": ((R, N, top), torch.float32, top > 0),
    }
    for name, (shape, dtype, is_wanted) in wanted.items():
        tensor = getattr(found, name)
        assert (tensor is not None) == is_wanted, name
        assert tensor is None or (tensor.shape, tensor.dtype) == (shape, dtype), name


def check_end(
    case: Case, config: GenerationConfig, eos: tuple[int, ...], row: list[int], new: list[int], reason: str
) -> None:
    """That a row ends where it should, for the reason that it gives."""
    least, most = config.min_new_tokens, config.max_new_tokens

    def stops(length: int) -> bool:
        ids = torch.tensor([row[: len(row) - len(new) + length]])
        return length >= least and any(bool(torch.as_tensor(c(ids, None)).all()) for c in case.criteria)

    assert len(new) <= most
    assert not set(new[:-1]) & set(eos)
    assert not any(stops(length) for length in range(1, len(new)))
    is_eos = bool(new) and new[-1] in eos
    assert is_eos == (reason == "eos")
    if is_eos:
        assert len(new) - 1 >= least
    if reason == "stop":
        assert len(new) >= least
        assert stops(len(new))
    elif new and not is_eos:
        assert not stops(len(new))
    if reason == "length":
        assert len(new) == most
    if reason == "time":
        assert config.max_time == 1e-9
        assert len(new) == 1 < most
    if reason == "exhausted":
        assert len(new) < most
    assert reason in ("eos", "stop", "length", "time", "exhausted")


def check_tokens(config: GenerationConfig, prompt: list[int], new: list[int]) -> None:
    """That nothing came that the rules exclude."""
    is_forced = config.forced_bos_token_id is not None and len(prompt) == 1
    if is_forced and new:
        assert new[0] == config.forced_bos_token_id
    row, size = prompt + new, config.no_repeat_ngram_size
    assert not set(new) & set(config.suppress_tokens)
    minus_infinity = [ids for ids, bias in config.sequence_bias if bias == -math.inf]
    for word in (*config.bad_words_ids, *minus_infinity):
        ends = range(max(len(word), len(prompt) + 1), len(row) + 1)
        assert not any(row[end - len(word) : end] == list(word) for end in ends)
    if size:
        counted = row if config.no_repeat_ngram_include_prompt else new
        first_new = len(counted) - len(new)
        ngrams = [tuple(counted[i : i + size]) for i in range(len(counted) - size + 1)]
        for i, ngram in enumerate(ngrams):
            assert i + size <= first_new or ngram not in ngrams[:i]


def check_numbers(
    decoder: Any, config: GenerationConfig, found: GenerationOutput, r: int, row: list[int], new: list[int]
) -> None:
    """That what was asked for beside the tokens belongs to them."""
    if found.scores is not None and new:
        scores = found.scores[r, : len(new)]
        own = scores.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert own.isfinite().all()
        assert config.do_sample or config.num_beams > 1 or torch.equal(own, scores.amax(1))
        if found.sequences_scores is not None:
            scale = len(new) ** config.length_penalty
            wanted, error = own.double().sum() / scale, 1e-5 * own.double().abs().sum() / scale + 1e-5 / scale
            assert abs(found.sequences_scores[r].double() - wanted) <= error
    if found.logprobs is None and found.top_logprobs is None:
        return
    for n, token in enumerate(new):
        logprobs = decoder.logprobs(row[: len(row) - len(new) + n])
        if found.logprobs is not None:
            torch.testing.assert_close(found.logprobs[r, n], logprobs[token])
        if found.top_logprobs is not None and found.top_token_ids is not None:
            values, ids = found.top_logprobs[r, n], found.top_token_ids[r, n]
            torch.testing.assert_close(values, logprobs.topk(len(values)).values)
            torch.testing.assert_close(logprobs[ids], values)
            assert len(set(ids.tolist())) == len(ids)


def check_beams(config: GenerationConfig, found: GenerationOutput, T: int) -> None:
    """That a prompt's hypotheses differ and come best first, and that none stands for what is not there."""
    assert found.sequences_scores is not None
    R, rows = config.num_return_sequences, found.sequences.tolist()
    for first in range(0, len(rows), R):
        scores = found.sequences_scores[first : first + R].tolist()
        lengths = found.lengths[first : first + R]
        reasons = found.stop_reasons[first : first + R]
        assert scores == sorted(scores, reverse=True)
        assert not any(map(math.isnan, scores))
        for score, length, reason in zip(scores, lengths, reasons, strict=True):
            assert (score == -math.inf) == (length == 0)
            assert length > 0 or reason == "exhausted"
        texts = [tuple(rows[first + i][T : T + length]) for i, length in enumerate(lengths) if length]
        assert len(set(texts)) == len(texts)


# --- the properties


@search(400)
@given(case=odd())
def test_any_call_is_refused_before_it_runs_or_keeps_its_promises(case: Case) -> None:
    decoder = build_decoder(*case.decoder)
    refusal, found = "", None
    try:
        found = case.run(decoder)
    except ValueError as error:
        refusal = str(error)
    if found is not None:
        assert not case.spoil
        check(case, decoder, found)
    else:
        assert decoder.calls == 0, refusal
        assert refusal.endswith((".", "?"))
        assert "\n" not in refusal


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": (5,)},
        {"bad_words_ids": [[5]]},
        {"bad_words_ids": [[4, 5]]},
        {"sequence_bias": {(5,): -math.inf}},
        {"sequence_bias": {(4, 5): -math.inf}},
        {"eos_token_id": 5, "min_new_tokens": 2},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_a_forced_token_is_refused_or_breaks_no_other_rule(options: dict[str, Any], num_beams: int) -> None:
    prompt = [5] if "no_repeat_ngram_size" in options else [4]
    options = {"forced_bos_token_id": 5, "max_new_tokens": 4, "num_beams": num_beams, **options}
    case = Case((7, 12, "random", 0, None, 1), [prompt, [2, 3]], (0, 0), options, [], [])
    decoder = build_decoder(*case.decoder)
    try:
        found = case.run(decoder)
    except ValueError:
        assert decoder.calls == 0
    else:
        check(case, decoder, found)


def test_what_contradicts_nothing_is_done() -> None:
    """And the search meets what it should: else it would say little."""
    met: Counter[Any] = Counter()

    @search(500)
    @given(case=sensible())
    def keeps_its_promises(case: Case) -> None:
        decoder = build_decoder(*case.decoder)
        found = case.run(decoder)
        check(case, decoder, found)
        is_beams, limit = case.options["num_beams"] > 1, case.decoder[1]
        met.update((reason, is_beams, case.options["do_sample"]) for reason in set(found.stop_reasons))
        met["cut"] += max(map(len, case.prompts)) + case.options["max_new_tokens"] > limit
        met["compacted"] += any(cache.compacted for cache in decoder.caches)
        met["more beams than tokens"] += case.options["num_beams"] > case.decoder[0]
        met["empty among others"] += 0 in found.lengths and any(found.lengths)

    keeps_its_promises()
    ends = itertools.product(("eos", "stop", "length", "time", "exhausted"), (False, True), (False, True))
    rare = [
        what for what in (*ends, "cut", "compacted", "more beams than tokens", "empty among others") if not met[what]
    ]
    assert rare == []


@search(60)
@given(case=sensible(("model",)))
def test_a_model_keeps_its_promises(case: Case) -> None:
    decoder = build_decoder(*case.decoder)
    check(case, decoder, case.run(decoder))


# A word that begins in the padding, and is none: search would find that rarely.
BEGINS_IN_PADDING = {"sequence_bias": {(0, 4, i): -10000.0 for i in range(1, 4)}, "max_new_tokens": 3}


@search(200)
@example(case=Case((5, 8, "random", 1, (), None), [[4], [1, 2, 3]], (0, 1), BEGINS_IN_PADDING, [], []))
@given(case=sensible(("random", "random", "impossible tokens", "model"), do_sample=False))
def test_rows_do_not_influence_each_other(case: Case) -> None:
    decoder = build_decoder(*case.decoder)
    together, R = case.run(decoder), case.options.get("num_return_sequences", 1)
    for row in range(len(case.prompts)):
        alone, of_row = case.alone(row).run(decoder), slice(row * R, row * R + R)
        N = max(alone.lengths)
        assert together.lengths[of_row] == alone.lengths
        assert together.stop_reasons[of_row] == alone.stop_reasons
        start = together.sequences.shape[1] - max(together.lengths)
        new = together.sequences[of_row, start : start + N]
        assert new.tolist() == alone.sequences[:, alone.sequences.shape[1] - N :].tolist()
        for name in ("sequences_scores", "scores", "logprobs", "top_logprobs"):
            if (theirs := getattr(alone, name)) is not None:
                for i, length in enumerate(alone.lengths):
                    ours = getattr(together, name)[row * R + i]
                    pair = (ours, theirs[i]) if name == "sequences_scores" else (ours[:length], theirs[i, :length])
                    torch.testing.assert_close(*pair)

"""Examples as tokens, cut where they may be; their order follows from seed and step; how they lie in a batch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

import minopt
from minopt import OPTConfig, Tokenizer
from minopt.evaluation.tasks import EvaluationConfig, seed_of
from minopt.training import batches as module
from minopt.training.batches import Batch, Row, Tokens, collate, microbatches, tokenise
from minopt.training.data import Example
from tests.texts import EMOJI, varied_texts

CPU = torch.device("cpu")
DEMO = Tokenizer.load(minopt.DEMO)
EOS = 2


def _demo_with(processor: Any, **settings: Any) -> Tokenizer:
    """The demo's tokenizer with other post-processing; ``None`` puts nothing in front."""
    backend = json.loads(DEMO.backend.to_str())
    backend = DEMO.backend.from_str(json.dumps(backend | {"post_processor": None}))
    if processor is not None:
        backend.post_processor = processor
    return Tokenizer(backend, DEMO.settings | settings)


_FRAME = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
TOKENIZERS = {
    "bos": DEMO,
    "nothing added": _demo_with(None, bos_token=None, eos_token=None),
    "bos and eos": _demo_with(processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", EOS)])),
    "offsets without spaces": _demo_with(processors.Sequence([processors.ByteLevel(trim_offsets=True), _FRAME])),
}


def tokens_of(data: list[Example] | str, tokenizer: Tokenizer = DEMO, src: int = 10**6, tgt: int = 10**6, *,
              eos: int | None = EOS, bos: int | None = None, training: bool = True) -> Tokens:  # fmt: skip
    model = replace(OPTConfig.preset("opt-125m"), eos_token_id=eos, bos_token_id=bos)
    return tokenise(data, tokenizer, model, EvaluationConfig(src_length=src, tgt_length=tgt), training=training)


def rows(tokens: Tokens) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row."""
    return [(ids[:start].tolist(), ids[start:].tolist()) for ids, start in tokens.rows]


def counts(tokens: Tokens) -> tuple[int, int, int]:
    return tokens.cut_prompts, tokens.cut_completions, tokens.dropped


def squad_example(context: str, answer: str, question: str = "Which?") -> Example:
    """An example of the task squad whose answer is the first such text in the context."""
    at = context.index(answer)
    prompt = f"{context}\nQuestion: {question}\nAnswer:"
    return Example(prompt, f" {answer}", (answer,), "", (0, len(context)), (at, at + len(answer)))


# --- what is not cut


@pytest.mark.parametrize(("name", "eos"), [*((name, EOS) for name in TOKENIZERS), ("nothing added", None)])
def test_rows_are_what_the_tokenizer_gives_for_prompt_and_completion(
    name: str, eos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 128)
    tokenizer, texts = TOKENIZERS[name], [text for text in varied_texts()[::3] if len(text) < 500]
    data = [Example(prompt, completion) for prompt, completion in zip(texts[1:], texts[:0:-1], strict=True)]
    assert len(data) > 500
    tokens, end = tokens_of(data, tokenizer, eos=eos), [] if eos is None else [eos]
    assert rows(tokens) == [
        (tokenizer.encode(e.prompt), tokenizer.encode(e.completion, add_bos=False) + end) for e in data
    ]
    assert counts(tokens) == (0, 0, 0)
    assert tokens.learned([5, 0]) == sum(len(rows(tokens)[i][1]) for i in (0, 5))


@pytest.mark.parametrize(
    ("name", "eos", "bos", "first"),
    [("bos", EOS, None, [2]), ("nothing added", 7, None, [7]), ("nothing added", None, None, [0]),
     ("nothing added", 7, 5, [5])],
)  # fmt: skip
def test_an_empty_prompt_has_a_first_token_from_which_the_next_is_learned(
    name: str, eos: int | None, bos: int | None, first: list[int]
) -> None:
    tokens = tokens_of([Example("", "one")], TOKENIZERS[name], eos=eos, bos=bos)
    assert rows(tokens) == [(first, DEMO.encode("one", add_bos=False) + ([] if eos is None else [eos]))]


# --- what is cut

PIECES = ["the", " cat", " sat", " On", " ", "  ", "\n", "\t", ".", ",", '"', "'s", " 42", "7", " na\u00efve", "\u00e9",
          " caf\u00e9", "e\u0301", "\u6f22\u5b57", " \u6f22", "\u05e9\u05dc\u05d5\u05dd", *EMOJI[:5]]  # fmt: skip
PREFIXES = ["", "context: ", 'answer: Ann context: "', "\u6f22: ", "("]
TAILS = ["\nQuestion: Who, na\u00efve?\nAnswer:", " question:", '" Who?', ". So?", "\u5b57?", ")"]

contexts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join)


@st.composite
def cuttable(draw: st.DrawFn) -> tuple[str, Example, str]:
    """What comes before the context, the example, and what comes after."""
    before, context, after = draw(st.sampled_from(PREFIXES)), draw(contexts), draw(st.sampled_from(TAILS))
    start = draw(st.integers(0, len(context) - 1))
    end = draw(st.integers(start + 1, min(len(context), start + 8)))
    at = len(before)
    spans = {"context": (at, at + len(context)), "answer": (at + start, at + end)}
    return before, Example(before + context + after, " x", **spans), after


def tokens_in(tokenizer: Tokenizer, example: Example, span: tuple[int, int]) -> tuple[int, int]:
    """How many tokens lie in a span of the prompt, and how many touch it."""
    offsets = tokenizer.backend.encode(example.prompt).offsets
    touching = [(start, end) for start, end in offsets if start < span[1] and end > span[0]]
    return sum(span[0] <= start and end <= span[1] for start, end in touching), len(touching)


def template_of(tokenizer: Tokenizer, example: Example) -> tuple[slice, slice]:
    """What stays in front and behind: the template's characters, and those of the context that share their tokens."""
    begin, end = len(example.prompt[: example.context[0]].rstrip()), example.context[1]
    offsets = tokenizer.backend.encode(example.prompt).offsets
    behind_front = max([begin, *(stop for start, stop in offsets if start < begin < stop)])
    return slice(behind_front), slice(min([end, *(start for start, stop in offsets if start < end < stop)]), None)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(parts=cuttable(), data=st.data())
def test_a_prompt_is_cut_in_its_context_alone_and_to_the_very_length(
    name: str, parts: tuple[str, Example, str], data: st.DataObject
) -> None:
    tokenizer, (before, example, after) = TOKENIZERS[name], parts
    full = tokenizer.encode(example.prompt)
    src = data.draw(st.integers(1, len(full) + 1))
    excess = len(full) - src
    inside, touching = tokens_in(tokenizer, example, example.context)
    in_answer = tokens_in(tokenizer, example, example.answer)[1]
    context, answer = (example.prompt[slice(*span)] for span in (example.context, example.answer))
    for training in (True, False):
        try:
            tokens = tokens_of([example], tokenizer, src, training=training)
        except ValueError:  # nothing is left
            assert training
            assert excess > inside - in_answer
            continue
        if excess <= 0:
            assert rows(tokens)[0][0] == full
            assert counts(tokens) == (0, 0, 0)
            continue
        assert counts(tokens) == (1, 0, 0)
        assert len(rows(tokens)[0][0]) == src
        assert excess <= touching or not training
        if excess > inside:  # so little is context that prediction leaves out the beginning of it all
            continue
        text = tokenizer.decode(rows(tokens)[0][0])
        left, right = (example.prompt[part] for part in template_of(tokenizer, example))
        assert text.startswith(left)
        assert text.endswith(right)
        # A token may hold one byte of several of a character, which decodes to U+FFFD.
        kept = text[len(left) : len(text) - len(right)].strip().strip("\ufffd")
        if training:
            assert kept.strip() in context
            if in_answer <= inside - excess:
                assert answer.strip() in text[len(before.rstrip()) : len(text) - len(after)]
        else:
            assert example.prompt[len(left) :].lstrip().startswith(kept.lstrip())


@pytest.mark.parametrize("place", [0, 3, 50, 99])
def test_as_much_stays_before_the_answer_as_behind_it(place: int) -> None:
    words = [" and"] * 100  # a token each
    words[place] = " Answer"
    example = squad_example("".join(words), " Answer")
    full, answer = DEMO.encode(example.prompt), DEMO.encode(" Answer", add_bos=False)
    for kept in range(len(answer), 100):
        src = len(full) - 99 - len(answer) + kept
        prompt = rows(tokens_of([example], src=src))[0][0]
        assert len(prompt) == src
        begin = prompt.index(answer[0])
        assert prompt[begin : begin + len(answer)] == answer
        left, right, room = begin - 1, kept - (begin - 1) - len(answer), kept - len(answer)
        assert left + right == room
        if place >= room and 99 - place >= room:
            assert abs(left - right) <= 1
        else:  # or all that there is on the side that has less
            assert left >= min(place, room // 2)
            assert right >= min(99 - place, room // 2)


@pytest.mark.parametrize("training", [True, False])
def test_where_the_answer_is_not_known_the_beginning_of_the_context_stays(training: bool) -> None:
    example = replace(squad_example("".join(f" w{i}" for i in range(60)), " w50"), answer=(0, 0))
    text = DEMO.decode(rows(tokens_of([example], src=60, training=training))[0][0])
    context = text.removesuffix("\nQuestion: Which?\nAnswer:")
    assert 20 < len(context) < len(text)
    assert example.prompt.startswith(context)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=50)
@given(text=contexts, data=st.data())
def test_a_prompt_without_a_context_keeps_its_bos_and_its_end(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    full = tokenizer.encode(text)
    first = 0 if name == "nothing added" else 1
    src = data.draw(st.integers(first + 1, len(full)))
    for training in (True, False):
        tokens = tokens_of([Example(text, "x")], tokenizer, src, training=training)
        assert rows(tokens)[0][0] == full[:first] + full[len(full) - src + first :]
        assert counts(tokens) == (int(src < len(full)), 0, 0)


def test_in_training_an_example_is_dropped_of_which_more_must_be_cut_than_may_be() -> None:
    fits, fixed = Example("b", " c"), len(DEMO.encode("\nQuestion: Which?\nAnswer:"))
    context = squad_example(" and" * 20, " and")
    long_answer = squad_example(" and" * 10 + " one two three four five" + " and" * 10, "one two three four five")
    least = fixed + tokens_in(DEMO, long_answer, long_answer.answer)[1]
    for example, src, dropped in ((context, fixed + 1, 0), (context, fixed - 1, 1), (context, fixed - 3, 1),
                                  (long_answer, least, 0), (long_answer, least - 1, 1)):  # fmt: skip
        tokens = tokens_of([fits, example, fits], src=src)
        assert (counts(tokens), len(tokens.rows)) == ((1 - dropped, 0, dropped), 3 - dropped)
        assert rows(tokens)[0] == rows(tokens)[-1] == rows(tokens_of([fits]))[0]
        predicted = tokens_of([fits, example, fits], src=src, training=False)
        assert (counts(predicted), len(rows(predicted)[1][0])) == ((1, 0, 0), src)
    assert "one two three four five\n" in DEMO.decode(rows(tokens_of([long_answer], src=least))[0][0])
    message = r"--train_file: expected at least one example, got none \(2 cannot be cut to --src_length 3 without"
    with pytest.raises(ValueError, match=message):
        tokens_of([context, long_answer], src=3)


@pytest.mark.parametrize("eos", [EOS, None])
def test_a_completion_that_is_too_long_is_cut_and_ends_without_eos(eos: int | None) -> None:
    tokenizer = TOKENIZERS["nothing added"]
    whole = DEMO.encode(" one two three", add_bos=False) + ([] if eos is None else [eos])
    for tgt in range(1, len(whole) + 2):
        tokens = tokens_of([Example("a", " one two three")] * 3, tokenizer, tgt=tgt, eos=eos)
        assert [c for _, c in rows(tokens)] == [whole[:tgt]] * 3
        assert counts(tokens) == (0, 3 * (tgt < len(whole)), 0)


@settings(deadline=None, max_examples=60)
@given(text=contexts, src=st.integers(1, 12), tgt=st.integers(1, 12))
def test_every_token_of_a_text_but_the_first_is_learned_exactly_once(text: str, src: int, tgt: int) -> None:
    ids, width = DEMO.encode(text), src + tgt
    tokens = tokens_of(text, src=src, tgt=tgt)
    assert [i for _, completion in rows(tokens) for i in completion] == ids[1:]
    assert {start for _, start in tokens.rows} <= {1}
    whole = [prompt + completion for prompt, completion in rows(tokens)]
    assert all(len(row) == width + 1 for row in whole[:-1])
    assert 2 <= len(whole[-1]) <= width + 1
    assert all(a[-1] == b[0] for a, b in pairwise(whole))  # known from the row before
    assert whole[0][0] == ids[0]
    assert counts(tokens) == (0, 0, 0)


def test_whatever_changes_the_tokens_changes_the_digest() -> None:
    data = [
        squad_example(" and so on" * 9 + " Ann", "Ann"),
        Example("b", " c" * 30),
        squad_example("Bo", "Bo", "w " * 99),
    ]
    made = tokens_of(data, DEMO, 40, 8).digest()
    assert tokens_of([replace(e, id="another", references=("x",)) for e in data], DEMO, 40, 8).digest() == made
    first, plain = replace(data[0], prompt=data[0].prompt + "?"), TOKENIZERS["nothing added"]
    others = [tokens_of([first, *data[1:]], DEMO, 40, 8), tokens_of(data[::-1], DEMO, 40, 8),
              tokens_of(data[:2], DEMO, 40, 9), tokens_of(data, DEMO, 41, 8), tokens_of(data, DEMO, 40, 8, eos=3),
              tokens_of([Example("b c", "")], plain, eos=None), tokens_of([Example("b", " c")], plain, eos=None),
              ]  # fmt: skip
    assert len({made, *(other.digest() for other in others)}) == 1 + len(others)


# --- the order

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=60)
Steps = list[list[list[int]]]  # of a step its microbatches, of which each has examples


def epoch_of(lengths: list[int], batch_size: int, seed: int, grouped: bool, epoch: int = 0, count: int = 1) -> Steps:
    """The steps of an epoch."""
    n = -(-len(lengths) // batch_size)
    return [*islice(microbatches(lengths, batch_size, count, seed, grouped=grouped, first_step=n * epoch), n)]


@settings(deadline=None)
@given(lengths=lengths_of, batch_size=st.integers(1, 70), count=st.integers(1, 12), seed=st.integers(0, 2**40),
       grouped=st.booleans(), epoch=st.integers(0, 9))  # fmt: skip
def test_every_example_comes_once_an_epoch_and_microbatches_share_steps_evenly_in_examples_and_tokens(
    lengths: list[int], batch_size: int, count: int, seed: int, grouped: bool, epoch: int
) -> None:
    steps = epoch_of(lengths, batch_size, seed, grouped, epoch, count)
    assert sorted(i for step in steps for part in step for i in part) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), batch_size)
    sizes = [sum(map(len, step)) for step in steps]
    assert sorted(sizes, reverse=True) == [batch_size] * full + [rest] * (rest > 0)
    assert grouped or sizes[-1] == min(sizes)
    for step in steps:
        assert len(step) == count
        assert max(map(len, step)) - min(map(len, step)) <= 1
        tokens = [sum(lengths[i] for i in part) for part in step]
        assert max(tokens) - min(tokens) <= max(lengths[i] for part in step for i in part)
    # The same wherever a run begins, and as examples whatever the number of processes.
    later = microbatches(lengths, batch_size, count, seed, grouped=grouped, first_step=epoch * len(steps) + 1)
    assert next(later) == [*steps, *epoch_of(lengths, batch_size, seed, grouped, epoch + 1, count)][1]
    alone = epoch_of(lengths, batch_size, seed, grouped, epoch)
    assert [sorted(chain(*step)) for step in steps] == [sorted(part) for (part,) in alone]


@pytest.mark.parametrize("grouped", [False, True])
def test_each_epoch_and_each_seed_has_an_order_of_its_own(grouped: bool) -> None:
    lengths = [1 + i % 3 for i in range(50)]
    orders = [epoch_of(lengths, 4, seed, grouped, epoch) for seed in range(20) for epoch in range(20)]
    firsts = [frozenset(order[0][0]) for order in orders]
    assert len(set(map(str, orders))) == len(orders)
    assert len(Counter(i for first in firsts for i in first)) == 50  # any example may come first
    assert len(set(firsts)) > 390  # and with any other


def padding(lengths: list[int], batch_size: int, grouped: bool) -> float:
    """The part of the padded rows of an epoch that holds nothing."""
    steps = [[lengths[i] for i in part] for (part,) in epoch_of(lengths, batch_size, 0, grouped)]
    return 1 - sum(map(sum, steps)) / sum(len(step) * max(step) for step in steps)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_grouped_examples_need_far_less_padding(batch_size: int) -> None:
    lengths = (20 + 280 * torch.rand(3001, generator=torch.Generator().manual_seed(0))).long().tolist()
    assert padding(lengths, batch_size, False) > 0.2
    assert padding(lengths, batch_size, True) < 0.05


def test_seeds_of_near_numbers_have_nothing_in_common_and_are_the_same_in_every_process() -> None:
    found = [seed_of(a, b) for a in range(40) for b in range(40)]
    assert len({*found, seed_of(), *map(seed_of, range(2000))}) == len(found) + 2001
    assert seed_of(1, 23) != seed_of(12, 3)
    assert all(0 <= seed < 2**63 for seed in found)
    assert all(10 < bin(a ^ b).count("1") < 53 for a, b in pairwise(found))
    assert seed_of(7, 1) == 9104834195603173698
    steps = microbatches(list(range(1, 400)), 3, 1, 7, grouped=True, first_step=300)
    assert next(steps) == [[208, 205, 201]]


# --- batches


def made_of(shapes: list[tuple[int, int]]) -> list[Row]:
    """Rows of a length and a start each; no token comes twice."""
    ends = [*accumulate(length for length, _ in shapes)]
    return [Row(torch.arange(end - n, end, dtype=torch.int32) + 1, s) for end, (n, s) in zip(ends, shapes, strict=True)]


def seen(batch: Batch) -> list[tuple[int, int]]:
    """Each token that counts and the one that is read before it."""
    return list(zip(batch.input_ids.flatten()[batch.at].tolist(), batch.targets.tolist(), strict=True))


row_shapes = st.integers(2, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@settings(deadline=None)
@given(shapes=st.lists(row_shapes, min_size=1, max_size=8))
def test_packed_and_padded_rows_learn_the_same_tokens_from_the_same(shapes: list[tuple[int, int]]) -> None:
    rows = made_of(shapes)
    expected = [(int(ids[n - 1]), int(ids[n])) for ids, start in rows for n in range(start, len(ids))]
    packed, padded = (collate(rows, CPU, packed=packed) for packed in (True, False))
    lengths = [len(ids) - 1 for ids, _ in rows]
    for batch in (packed, padded):
        assert seen(batch) == expected
        assert (batch.input_ids.dtype, batch.targets.dtype) == (torch.long, torch.long)
        assert batch.tokens == sum(lengths)
    assert padded.lengths is None
    assert padded.input_ids.tolist() == [[*ids[:-1].tolist(), *[0] * (max(lengths) + 1 - len(ids))] for ids, _ in rows]
    if len(set(lengths)) == 1:  # then nothing is gained by one row
        assert packed.lengths is None
        assert torch.equal(packed.input_ids, padded.input_ids)
    else:
        assert packed.lengths == tuple(lengths)
        assert packed.input_ids.tolist() == [[i for ids, _ in rows for i in ids[:-1].tolist()]]


@pytest.mark.parametrize("packed", [True, False])
def test_no_examples_are_a_batch_of_which_nothing_counts(packed: bool) -> None:
    batch = collate([], torch.device("meta"), packed=packed)
    assert list(batch.input_ids.shape) == [1, 1]
    assert (batch.lengths, len(batch.at), len(batch.targets), batch.tokens) == (None, 0, 0, 0)
    assert batch.at.dtype == batch.targets.dtype == torch.long
    assert all(tensor.is_meta for tensor in (batch.input_ids, batch.at, batch.targets))  # on the device that is given

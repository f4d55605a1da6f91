"""Examples as tokens: exactly the tokenizer's, cut where they may be, every token learned once, kept on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors

import minopt
from minopt import Tokenizer
from minopt.training import tokens as module
from minopt.training.data import TASKS, Example, read_data
from minopt.training.tokens import Tokens, tokenise
from tests.texts import EMOJI, varied_texts

DEMO = Tokenizer.load(minopt.DEMO)
EOS = 2


def _demo_with(processor: Any) -> Tokenizer:
    """The demo's tokenizer with other post-processing; ``None`` puts nothing in front."""
    backend = json.loads(DEMO.backend.to_str())
    tokenizer = Tokenizer(DEMO.backend.from_str(json.dumps(backend | {"post_processor": None})), DEMO.settings)
    if processor is not None:
        tokenizer.backend.post_processor = processor
    return tokenizer


_FRAME = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
TOKENIZERS = {
    "bos": DEMO,
    "nothing added": _demo_with(None),
    "bos and eos": _demo_with(processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", EOS)])),
    "offsets without spaces": _demo_with(processors.Sequence([processors.ByteLevel(trim_offsets=True), _FRAME])),
}


def tokens_of(data: list[Example] | str, tokenizer: Tokenizer = DEMO, src: int = 10**6, tgt: int = 10**6, *,
              eos: int | None = EOS, around_answer: bool = True) -> Tokens:  # fmt: skip
    return tokenise(data, tokenizer, src, tgt, eos_token_id=eos, around_answer=around_answer)


def rows(tokens: Tokens) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row."""
    pairs = [tokens.row(i) for i in range(len(tokens))]
    return [(ids[:start].tolist(), ids[start:].tolist()) for ids, start in pairs]


def same(a: Tokens, b: Tokens) -> bool:
    """Whether two hold the same, in the same dtypes."""
    tensors = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))
    return tensors and _counts(a) == _counts(b) and a.digest == b.digest


def _tensors(tokens: Tokens) -> list[torch.Tensor]:
    return [tokens.ids, tokens.ends, tokens.starts]


def _counts(tokens: Tokens) -> tuple[int, int, int]:
    return tokens.cut_prompts, tokens.cut_completions, tokens.dropped


def squad_example(context: str, answer: str, question: str = "Which?") -> Example:
    """An example of the task squad whose answer is the first such text in the context."""
    at = context.index(answer)
    prompt = f"{context}\nQuestion: {question}\nAnswer:"
    return Example(prompt, f" {answer}", (answer,), "", (0, len(context)), (at, at + len(answer)))


# --- what is not cut


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_are_what_the_tokenizer_gives_for_prompt_and_completion(
    name: str, eos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 128)
    tokenizer, texts = TOKENIZERS[name], [text for text in varied_texts()[::3] if len(text) < 500]
    assert "" not in texts[1:]
    data = [Example(prompt, completion) for prompt, completion in zip(texts[1:], texts[:0:-1], strict=True)]
    assert len(data) > 500
    tokens, end = tokens_of(data, tokenizer, eos=eos), [] if eos is None else [eos]
    assert len(tokens) == len(data)
    assert _counts(tokens) == (0, 0, 0)
    for example, (prompt, completion) in zip(data, rows(tokens), strict=True):
        assert prompt == tokenizer.encode(example.prompt)
        assert completion == tokenizer.encode(example.completion, add_bos=False) + end
    assert [tokens.prompt(i) for i in range(len(data))] == [prompt for prompt, _ in rows(tokens)]
    assert tokens.starts.tolist() == [len(prompt) for prompt, _ in rows(tokens)]
    assert tokens.lengths().tolist() == [len(prompt) + len(completion) for prompt, completion in rows(tokens)]
    assert tokens.learned() == sum(len(completion) for _, completion in rows(tokens))
    assert tokens.learned([5, 0]) == sum(len(rows(tokens)[i][1]) for i in (0, 5))
    assert tokens.learned([]) == 0


@pytest.mark.parametrize(
    ("name", "eos", "first"),
    [("bos", EOS, [2]), ("nothing added", EOS, [2]), ("nothing added", 7, [7]), ("nothing added", None, [0])],
)
def test_an_empty_prompt_has_a_first_token_from_which_the_next_is_learned(
    name: str, eos: int | None, first: list[int]
) -> None:
    tokens = tokens_of([Example("", "one")], TOKENIZERS[name], eos=eos)
    assert rows(tokens) == [(first, DEMO.encode("one", add_bos=False) + ([] if eos is None else [eos]))]


def test_no_examples_are_no_rows() -> None:
    for tokens in (tokens_of([]), tokens_of([]), tokens_of("")):  # the second is read from the cache
        assert (len(tokens), tokens.lengths().tolist(), tokens.learned()) == (0, [], 0)


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
    context, answer = (example.prompt[slice(*span)] for span in (example.context, example.answer))
    for around_answer in (True, False):
        tokens = tokens_of([example], tokenizer, src, around_answer=around_answer)
        if excess <= 0:
            assert tokens.prompt(0) == full
            assert _counts(tokens) == (0, 0, 0)
            continue
        if not len(tokens):
            assert around_answer
            assert excess > inside - tokens_in(tokenizer, example, example.answer)[1]
            assert _counts(tokens) == (0, 0, 1)
            continue
        assert _counts(tokens) == (1, 0, 0)
        assert len(tokens.prompt(0)) == src
        assert excess <= touching or not around_answer
        if excess > inside:  # so little is context that prediction leaves out the beginning of it all
            continue
        text = tokenizer.decode(tokens.prompt(0))
        left, right = (example.prompt[part] for part in template_of(tokenizer, example))
        assert text.startswith(left)
        assert text.endswith(right)
        # A token may hold one byte of several of a character, which decodes to U+FFFD.
        kept = text[len(left) : len(text) - len(right)].strip().strip("\ufffd")
        if around_answer:
            assert kept.strip() in context
            if tokens_in(tokenizer, example, example.answer)[1] <= inside - excess:
                assert answer.strip() in text[len(before.rstrip()) : len(text) - len(after)]
        else:
            assert example.prompt[len(left) :].lstrip().startswith(kept.lstrip())


@pytest.mark.parametrize("place", [0, 3, 50, 96, 99])
def test_as_much_stays_before_the_answer_as_behind_it(place: int) -> None:
    words = [" and"] * 100  # a token each
    words[place] = " Answer"
    example = squad_example("".join(words), " Answer")
    full = DEMO.encode(example.prompt)
    answer = DEMO.encode(" Answer", add_bos=False)
    for kept in range(len(answer), 100):
        src = len(full) - 99 - len(answer) + kept
        prompt = tokens_of([example], src=src).prompt(0)
        assert len(prompt) == src
        begin = prompt.index(answer[0])
        assert prompt[begin : begin + len(answer)] == answer
        left, right = begin - 1, kept - (begin - 1) - len(answer)
        room = kept - len(answer)
        assert left + right == room
        if place >= room and 99 - place >= room:
            assert abs(left - right) <= 1
        else:  # or all that there is on the side that has less
            assert left >= min(place, room // 2)
            assert right >= min(99 - place, room // 2)


@pytest.mark.parametrize("around_answer", [True, False])
def test_where_the_answer_is_not_known_the_beginning_of_the_context_stays(around_answer: bool) -> None:
    example = replace(squad_example("".join(f" w{i}" for i in range(60)), " w50"), answer=(0, 0))
    tokens = tokens_of([example], src=60, around_answer=around_answer)
    text = DEMO.decode(tokens.prompt(0))
    context = text.removesuffix("\nQuestion: Which?\nAnswer:")
    assert text != context
    assert len(context) > 20
    assert example.prompt.startswith(context)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=50)
@given(text=contexts, data=st.data())
def test_a_prompt_without_a_context_keeps_its_bos_and_its_end(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    full = tokenizer.encode(text)
    first = 0 if name == "nothing added" else 1
    src = data.draw(st.integers(first + 1, len(full)))
    for around_answer in (True, False):
        tokens = tokens_of([Example(text, "x")], tokenizer, src, around_answer=around_answer)
        assert tokens.prompt(0) == full[:first] + full[len(full) - src + first :]
        assert _counts(tokens) == (int(src < len(full)), 0, 0)


def test_in_training_an_example_is_dropped_that_needs_more_cut_than_its_context() -> None:
    example = squad_example(" and" * 20, " and")
    fixed = len(DEMO.encode("\nQuestion: Which?\nAnswer:"))
    fits = Example("b", " c")
    for src, dropped in ((fixed + 1, 0), (fixed - 1, 1), (fixed - 3, 1)):
        tokens = tokens_of([fits, example, fits], src=src)
        assert (tokens.dropped, tokens.cut_prompts, len(tokens)) == (dropped, 1 - dropped, 3 - dropped)
        assert rows(tokens)[0] == rows(tokens)[-1] == rows(tokens_of([fits]))[0]
        predicted = tokens_of([fits, example, fits], src=src, around_answer=False)
        assert (predicted.dropped, predicted.cut_prompts, len(predicted)) == (0, 1, 3)
        assert len(predicted.prompt(1)) == src
        assert predicted.prompt(1)[1:] == DEMO.encode(example.prompt)[1 - src :] or dropped == 0


def test_in_training_an_example_is_dropped_whose_answer_would_have_to_be_cut() -> None:
    example = squad_example(" and" * 10 + " one two three four five" + " and" * 10, "one two three four five")
    answer = tokens_in(DEMO, example, example.answer)[1]
    fixed = len(DEMO.encode("\nQuestion: Which?\nAnswer:"))
    kept = tokens_of([example], src=fixed + answer)
    assert kept.dropped == 0
    assert "one two three four five\n" in DEMO.decode(kept.prompt(0))
    assert tokens_of([example], src=fixed + answer - 1).dropped == 1
    assert tokens_of([example], src=fixed + answer - 1, around_answer=False).dropped == 0


@pytest.mark.parametrize("eos", [EOS, None])
def test_a_completion_that_is_too_long_is_cut_and_ends_without_eos(eos: int | None) -> None:
    completion = DEMO.encode(" one two three", add_bos=False)
    whole = completion + ([] if eos is None else [eos])
    for tgt in range(1, len(whole) + 2):
        tokens = tokens_of([Example("a", " one two three")] * 3, tgt=tgt, eos=eos)
        assert [c for _, c in rows(tokens)] == [whole[:tgt]] * 3
        assert _counts(tokens) == (0, 3 * (tgt < len(whole)), 0)


# --- a text


@settings(deadline=None, max_examples=60)
@given(text=contexts, src=st.integers(1, 12), tgt=st.integers(1, 12))
def test_every_token_of_a_text_but_the_first_is_learned_exactly_once(text: str, src: int, tgt: int) -> None:
    ids, width = DEMO.encode(text), src + tgt
    tokens = tokens_of(text, src=src, tgt=tgt)
    learned = [i for _, completion in rows(tokens) for i in completion]
    assert learned == ids[1:]
    assert tokens.starts.tolist() == [1] * len(tokens)
    whole = [prompt + completion for prompt, completion in rows(tokens)]
    assert all(len(row) == width + 1 for row in whole[:-1])
    assert 2 <= len(whole[-1]) <= width + 1
    assert all(a[-1] == b[0] for a, b in pairwise(whole))  # known from the row before
    assert whole[0][0] == ids[0]
    assert _counts(tokens) == (0, 0, 0)


# --- the cache

DATA = [squad_example(" and so on" * 9 + " Ann", "Ann"), Example("b", " c" * 30), squad_example("Bo", "Bo", "w " * 99)]
cached = partial(tokens_of, DATA, DEMO, 40, 8)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home").rglob("*.*"))


def encoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(Tokenizer, "encode_each", fail)


@pytest.mark.parametrize("data", [DATA, "a text\n of words" * 9, DATA[2:], []], ids=["some", "text", "dropped", "none"])
def test_the_second_call_reads_what_the_first_wrote(
    data: list[Example] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokens_of(data, DEMO, 40, 8)
    (path,) = files(tmp_path)
    assert path == tmp_path / "home" / "tokens" / f"{made.digest}.safetensors"
    encoding_fails(monkeypatch)
    assert same(tokens_of(data, DEMO, 40, 8), made)
    if data is DATA:
        assert _counts(made) == (1, 1, 1)
        with pytest.raises(AssertionError, match="encoded"):
            tokens_of(data, DEMO, 41, 8)


def test_whatever_changes_the_tokens_names_another_file(tmp_path: Path) -> None:
    made = cached()
    assert cached().digest == made.digest
    renamed = [replace(e, id="another", references=("x",)) for e in DATA]
    assert tokens_of(renamed, DEMO, 40, 8).digest == made.digest  # neither is in a row
    assert len(files(tmp_path)) == 1
    first = DATA[0]
    changed = [
        replace(first, prompt=first.prompt + "?"), replace(first, completion=" An"), replace(first, context=(0, 9)),
        replace(first, answer=(0, 3)), replace(first, prompt=first.prompt + " ", completion="Ann"),
    ]  # fmt: skip
    others = [tokens_of([e, *DATA[1:]], DEMO, 40, 8) for e in changed]
    others += [tokens_of(DATA[::-1], DEMO, 40, 8), tokens_of(DATA[:2], DEMO, 40, 8), tokens_of("b", DEMO, 40, 8)]
    others += [tokens_of(DATA, DEMO, 41, 8), tokens_of(DATA, DEMO, 40, 9), tokens_of(DATA, DEMO, 8, 40)]
    others += [cached(eos=None), cached(eos=3), cached(around_answer=False)]
    others += [tokens_of(DATA, tokenizer, 40, 8) for name, tokenizer in TOKENIZERS.items() if name != "bos"]
    assert len({made.digest, *(other.digest for other in others)}) == 1 + len(others) == len(files(tmp_path))


def _without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {key: tensor for key, tensor in load_file(path).items() if key != name}
        save_file(tensors, path, metadata={"counts": "[0, 0, 0]"})

    return damage


def _counts_are(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file(load_file(path), path, metadata=metadata)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "noise": lambda path: path.write_bytes(b"\xff" * 300),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no starts": _without("starts"),
    "no metadata": _counts_are(None),
    "no counts": _counts_are({"other": "1"}),
    "no JSON": _counts_are({"counts": "[1, "}),
    "two counts": _counts_are({"counts": "[1, 2]"}),
    "no list": _counts_are({"counts": "3"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cached()
    (path,) = files(tmp_path)
    DAMAGE[damage](path)
    assert same(cached(), made)
    if damage != "a folder":  # which nothing replaces
        encoding_fails(monkeypatch)
        assert same(cached(), made)
    assert files(tmp_path) == [path]


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = cached()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert same(cached(), made)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'file' / 'tokens'}: tokens cannot be kept there (")
    assert message.endswith("; they will be made again next time.")


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        made = cached()
    (message,) = caplog.messages
    assert "(" + "[Errno 28] No space left on device)" in message
    assert files(tmp_path) == []
    assert same(cached(), made)
    assert len(files(tmp_path)) == 1


# --- real data


@pytest.mark.parametrize(("task", "src", "around_answer"), [("squad", 160, True), ("squad-question", 200, False)])
def test_real_squad_lies_within_its_lengths_and_says_what_it_said(
    shared_data: Path, task: str, src: int, around_answer: bool
) -> None:
    tokenizer = Tokenizer.load(shared_data / "opt-tokenizer")
    data = read_data(shared_data / "squad" / "dev.json", TASKS[task], split="dev")[::9]
    tokens = tokens_of(data, tokenizer, src, 12, around_answer=around_answer)
    assert (len(tokens), tokens.dropped) == (len(data), 0)
    decode = partial(tokenizer.backend.decode_batch, skip_special_tokens=True)
    full, texts = tokenizer.encode_each([e.prompt for e in data]), decode([p for p, _ in rows(tokens)])
    completions = tokenizer.encode_each([e.completion for e in data], add_bos=False)
    cut = 0
    for example, ids, (prompt, completion), answer, text in zip(
        data, full, rows(tokens), completions, texts, strict=True
    ):
        assert completion == [*answer, EOS][:12]
        if len(ids) <= src:
            assert prompt == ids
            assert text == example.prompt
            continue
        cut += 1
        assert len(prompt) == src
        before, after = example.prompt[: example.context[0]].rstrip(), example.prompt[example.context[1] :]
        assert text.startswith(before)
        assert text.endswith(after)
        if around_answer:
            assert example.prompt[slice(*example.answer)] in text.removesuffix(after)
        else:
            assert example.prompt.startswith(text.removesuffix(after).rstrip("\ufffd"))
    assert cut == tokens.cut_prompts > len(data) // 10
    assert tokens.cut_completions == sum(len(answer) >= 12 for answer in completions) > 0

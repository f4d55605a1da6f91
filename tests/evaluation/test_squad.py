"""Exact match, F1 and ROUGE are the official ones: known outcomes, and second implementations written otherwise."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minopt.evaluation.squad import exact_match, f1, normalize_answer, rouge_l, rouge_n, score
from tests.test_imports import loaded_by

# Short texts of what normalisation treats apart, so that words recur.
pieces = st.sampled_from(["a", "A", "an", "the", "The", "b", "cat", "\u00e9", "\u0301", "\u4e2d", "7", ".", "'",
                          "\u2019", "_", "-", "$", "\u00a3", " ", " ", " ", "\t", "\u00a0", "\n"])  # fmt: skip
texts = st.lists(pieces, max_size=12).map("".join)
words = st.lists(st.sampled_from("uvwx"), max_size=7)


def official_words(text: str) -> list[str]:
    """Normalisation the other way round: characters one by one, articles as whole runs of word characters."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    runs = re.split(r"(\w+)", kept)
    return "".join(" " if run in {"a", "an", "the"} else run for run in runs).split()


def crossed_out(mine: Sequence[object], others: Sequence[object]) -> Fraction:
    """F-measure of two rows, in which each piece of one crosses out one of the other."""
    left = list(others)
    for piece in mine:
        if piece in left:
            left.remove(piece)
    same = len(others) - len(left)
    if same == 0:
        return Fraction(0)
    precision, recall = Fraction(same, len(mine)), Fraction(same, len(others))
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat,\tin a\nHat!", "cat in hat"),
        ("Athens and another theory", "athens and another theory"),
        ("the-end", "theend"),
        ("a_b don't", "ab dont"),
        ("don\u2019t \u201cgo\u201d \u2014 now a\u2019s", "don\u2019t \u201cgo\u201d \u2014 now \u2019s"),  # only ASCII
        ("\u00c9cole caf\u00e9\u00a0au\u3000lait", "\u00e9cole caf\u00e9 au lait"),
        (" the a an A. ", ""),
    ],
)
def test_known_answers_are_normalised_as_officially(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "overlap"),
    [
        ("The Denver Broncos.", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "Carolina Panthers"], 0, 2 / 3),
        ("Carolina Panthers", ["Denver Broncos", "Panthers Carolina"], 0, 1),
        ("b b", ["b c d"], 0, 2 / 5),  # a word counts as often as both have it
        ("", ["cat"], 0, 0),
        ("the", [""], 1, 1),
        ("cat", [""], 0, 0),
        ("cat", ("", "cat"), 1, 1),
        ("", ("the", "cat"), 0, 0),  # a reference of articles does not count beside others
        ("a", ("the", "!"), 1, 1),
    ],
)
def test_known_answers_score_as_officially(
    prediction: str, references: Sequence[str], exact: float, overlap: float
) -> None:
    assert exact_match(prediction, references) == exact
    assert f1(prediction, references) == pytest.approx(overlap, abs=1e-12)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_any_answer_scores_as_officially(prediction: str, references: list[str]) -> None:
    found, golds = official_words(prediction), [g for g in map(official_words, references) if g] or [[]]
    assert normalize_answer(prediction) == " ".join(found)
    assert exact_match(prediction, references) == (found in golds)
    best = max(crossed_out(found, gold) if found and gold else Fraction(found == gold) for gold in golds)
    assert f1(prediction, references) == pytest.approx(float(best), abs=1e-12)


# Sets of questions


def test_a_set_scores_the_mean_over_its_questions_in_percent() -> None:
    references = {"q1": ["Denver Broncos"], "q2": ("cat",), "q3": ["one two three", "one"], "q4": ["x"]}
    predictions = {"q1": "Broncos", "q2": "the cat", "q3": "two", "q4": "y", "of another set": "x"}
    result = score(predictions, references)
    assert result == pytest.approx({"exact_match": 25.0, "f1": 100 * (2 / 3 + 1 + 1 / 2 + 0) / 4})


def test_answerable_and_unanswerable_questions_are_also_scored_apart() -> None:
    references = {"y1": ["cat"], "n1": [""], "y2": ["red dog"], "n2": ("",), "y3": ["the"], "n3": ["", ""]}
    predictions = {"y1": "cat", "n1": "", "y2": "dog", "n2": "dog", "y3": "fish", "n3": "a"}
    assert score(predictions, references) == pytest.approx({
        "exact_match": 50.0, "f1": 100 * (1 + 2 / 3 + 2) / 6,
        "has_answer_exact_match": 100 / 3, "has_answer_f1": 100 * (1 + 2 / 3) / 3,
        "no_answer_exact_match": 200 / 3, "no_answer_f1": 200 / 3,
    })  # fmt: skip
    for one_kind in ({"q1": [""], "q2": [""]}, {"q1": ["", "cat"], "q2": ["dog"]}):
        assert score({"q1": "cat", "q2": ""}, one_kind).keys() == {"exact_match", "f1"}


def test_gold_answers_score_100_on_the_real_set(shared_data: Path) -> None:
    articles = json.loads((shared_data / "squad" / "dev.json").read_text(encoding="utf-8"))["data"]
    questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    references = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa in questions}
    assert len(references) > 5000
    for which in (0, -1):
        predictions = {key: answers[which] for key, answers in references.items()}
        assert score(predictions, references) == {"exact_match": 100.0, "f1": 100.0}
    wrong = dict.fromkeys(list(references)[: len(references) // 2], "xyzzy")
    half = 100 * (1 - len(wrong) / len(references))
    assert score(predictions | wrong, references) == pytest.approx({"exact_match": half, "f1": half})


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (9, r"one for each of 9 questions, got none for q1, q2, q3, q4, q5 and 3 more\. Add them; \"\" says"),
        (0, r"references: expected at least one question, got none\. Is it the right file\?"),
    ],
)
def test_sets_that_do_not_fit_are_refused(questions: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score({"q0": ""}, {f"q{i}": ["cat"] for i in range(questions)})


@pytest.mark.parametrize("metric", [exact_match, f1, rouge_l, partial(rouge_n, n=2)])
@pytest.mark.parametrize(("references", "got"), [([], "none"), ("cat", "a bare text"), ("", "none")])
def test_what_is_not_a_list_of_texts_is_refused(
    metric: Callable[[str, Sequence[str]], float], references: Sequence[str], got: str
) -> None:
    with pytest.raises(ValueError, match=rf"references: expected a list of at least one text, got {got}\. Give \["):
        metric("cat", references)


# ROUGE: n of ROUGE-N, 0 for ROUGE-L


def rouge(prediction: str, references: Sequence[str], n: int) -> float:
    return rouge_n(prediction, references, n) if n else rouge_l(prediction, references)


@pytest.mark.parametrize(
    ("prediction", "references", "n", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 0, 3 / 4),  # these three are of Lin 2004
        ("the gunman kill police", ["police killed the gunman"], 0, 2 / 4),
        ("the gunman police killed", ["police killed the gunman"], 0, 2 / 4),
        ("The cat's 2nd-best", ["the CAT s 2nd best!"], 0, 1),
        ("caf\u00e9 noir", ["caf noir"], 0, 1),  # what is not a-z or 0-9 parts tokens
        ("a b", ["c", "b", "a b c d e f g h"], 0, 2 / 3),
        ("running", ["run"], 0, 0),  # no stemming
        ("", [""], 0, 0),
        ("police kill the gunman", ["police killed the gunman"], 2, 1 / 3),
        ("the the the", ["The cat, the dog"], 1, 2 * 2 / 7),  # the third one is not in the reference
        ("a b", ["b a", "c a b"], 2, 2 / 3),
        ("cat", ["cat"], 2, 0),  # too short to hold any
        ("", [""], 1, 0),
        # Deeper than Python recurses.
        (" ".join(map(str, range(1500))), [" ".join(map(str, range(0, 1500, 3)))], 0, 2 * 500 / 2000),
    ],
)
def test_known_texts_have_a_known_rouge(prediction: str, references: list[str], n: int, expected: float) -> None:
    assert rouge(prediction, references, n) == pytest.approx(expected, abs=1e-12)


@given(words, st.lists(words, min_size=1, max_size=2), st.integers(0, 3))
def test_any_text_has_the_rouge_of_a_second_implementation(
    prediction: list[str], references: list[list[str]], n: int
) -> None:
    def subsequences(tokens: list[str]) -> set[tuple[str, ...]]:
        return {chosen for n in range(len(tokens) + 1) for chosen in itertools.combinations(tokens, n)}

    def f_measure(reference: list[str]) -> Fraction:
        if n:
            mine, others = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (prediction, reference))
            return crossed_out(mine, others)
        longest = max(map(len, subsequences(prediction) & subsequences(reference)))
        return Fraction(2 * longest, len(prediction) + len(reference)) if longest else Fraction(0)

    found = rouge(" ".join(prediction), [" ".join(reference) for reference in references], n)
    assert found == pytest.approx(float(max(map(f_measure, references))), abs=1e-12)


def test_the_metrics_load_without_torch() -> None:
    assert "torch" not in loaded_by("import minopt.evaluation.squad")

"""Exact match, F1 and ROUGE-L are the official ones: known outcomes, and second implementations written otherwise."""

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


def official_f1(prediction: str, reference: str) -> Fraction:
    """Each word of the prediction crosses out one of the reference's."""
    found, wanted = official_words(prediction), official_words(reference)
    if not found or not wanted:
        return Fraction(found == wanted)
    left = list(wanted)
    for word in found:
        if word in left:
            left.remove(word)
    same = len(wanted) - len(left)
    if same == 0:
        return Fraction(0)
    precision, recall = Fraction(same, len(found)), Fraction(same, len(wanted))
    return 2 * precision * recall / (precision + recall)


def official_golds(references: Sequence[str]) -> list[str]:
    return list(filter(official_words, references)) or [""]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat,\tin a\nHat!", "cat in hat"),
        ("an apple a day", "apple day"),
        ("Athens and another theory", "athens and another theory"),
        ("the-end", "theend"),
        ("t.h.e end", "end"),  # punctuation goes first
        ("A.", ""),
        ("a_b", "ab"),
        ("don't", "dont"),
        ("don\u2019t \u201cgo\u201d \u2014 now", "don\u2019t \u201cgo\u201d \u2014 now"),  # only ASCII punctuation
        ("a\u2019s", "\u2019s"),
        ("the\u2013end", "\u2013end"),
        ("1,000.50%", "100050"),
        ("$5 \u00a35", "5 \u00a35"),
        ("\u00c9cole \u00c0 la", "\u00e9cole \u00e0 la"),
        ("ana\u00efve a\u00efve", "ana\u00efve a\u00efve"),
        ("caf\u00e9\u00a0au\u3000lait", "caf\u00e9 au lait"),
        ("", ""),
        (" the a an ", ""),
    ],
)
def test_known_answers_are_normalised_as_officially(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@given(texts)
def test_any_text_is_normalised_as_officially(text: str) -> None:
    assert normalize_answer(text) == " ".join(official_words(text))


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "overlap"),
    [
        ("The Denver Broncos.", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "Carolina Panthers"], 0, 2 / 3),
        ("Carolina Panthers", ["Denver Broncos", "Panthers Carolina"], 0, 1),
        ("in the year 1999 in May", ["in 1999"], 0, 4 / 7),
        ("b b", ["b c d"], 0, 2 / 5),  # a word counts as often as both have it
        ("cat", ["dog"], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("", [""], 1, 1),
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
    golds = official_golds(references)
    assert exact_match(prediction, references) == any(official_words(prediction) == official_words(g) for g in golds)
    assert f1(prediction, references) == pytest.approx(float(max(official_f1(prediction, g) for g in golds)), abs=1e-12)


# Sets of questions


def test_a_set_scores_the_mean_over_its_questions_in_percent() -> None:
    references = {"q1": ["Denver Broncos"], "q2": ("cat",), "q3": ["one two three", "one"], "q4": ["x"]}
    predictions = {"q1": "Broncos", "q2": "the cat", "q3": "two", "q4": "y", "of another set": "x"}
    result = score(predictions, references)
    assert result == pytest.approx({"exact_match": 25.0, "f1": 100 * (2 / 3 + 1 + 1 / 2 + 0) / 4})


def test_answerable_and_unanswerable_questions_are_also_scored_apart() -> None:
    references = {"y1": ["cat"], "n1": [""], "y2": ["red dog"], "n2": ("",), "y3": ["the"], "n3": ["", ""]}
    predictions = {"y1": "cat", "n1": "", "y2": "dog", "n2": "dog", "y3": "fish", "n3": "a"}
    assert score(predictions, references) == pytest.approx(
        {
            "exact_match": 50.0,
            "f1": 100 * (1 + 2 / 3 + 2) / 6,
            "has_answer_exact_match": 100 / 3,
            "has_answer_f1": 100 * (1 + 2 / 3) / 3,
            "no_answer_exact_match": 200 / 3,
            "no_answer_f1": 200 / 3,
        }
    )


@pytest.mark.parametrize("references", [{"q1": [""], "q2": [""]}, {"q1": ["", "cat"], "q2": ["dog"]}])
def test_questions_of_one_kind_have_no_breakdown(references: dict[str, list[str]]) -> None:
    assert score({"q1": "cat", "q2": ""}, references).keys() == {"exact_match", "f1"}


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


def test_questions_without_a_prediction_are_named() -> None:
    references = {f"q{i}": ["cat"] for i in range(9)}
    with pytest.raises(ValueError, match=r"one for each of 9 questions, got none for q1, q2, q3, q4, q5 and 3 more\. "):
        score({"q0": "cat"}, references)
    with pytest.raises(ValueError, match=r"got none for q0, q8\. Add them; \"\" says that a question has no answer\."):
        score({f"q{i}": "" for i in range(1, 8)}, references)


def test_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"references: expected at least one question, got none\. Is it the right"):
        score({"q0": "cat"}, {})


@pytest.mark.parametrize("metric", [exact_match, f1, rouge_l, partial(rouge_n, n=2)])
@pytest.mark.parametrize(("references", "got"), [([], "none"), ((), "none"), ("cat", "a bare text"), ("", "none")])
def test_what_is_not_a_list_of_texts_is_refused(
    metric: Callable[[str, Sequence[str]], float], references: Sequence[str], got: str
) -> None:
    with pytest.raises(ValueError, match=rf"references: expected a list of at least one text, got {got}\. Give \["):
        metric("cat", references)


# ROUGE-L


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),  # these three are of Lin 2004
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("the gunman police killed", ["police killed the gunman"], 2 / 4),
        ("The cat's 2nd-best", ["the CAT s 2nd best!"], 1),
        ("caf\u00e9 noir", ["caf noir"], 1),  # what is not a-z or 0-9 parts tokens
        ("a b c d e f", ["a x f"], 2 * 2 / 9),
        ("a b", ["c", "b", "a b c d e f g h"], 2 / 3),
        ("running", ["run"], 0),  # no stemming
        ("", ["cat"], 0),
        ("", [""], 0),
        ("cat", ["?!", "dog"], 0),
    ],
)
def test_known_texts_have_the_published_rouge_l(prediction: str, references: Sequence[str], expected: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-12)


@given(words, st.lists(words, min_size=1, max_size=2))
def test_any_text_has_the_rouge_l_of_all_its_subsequences(prediction: list[str], references: list[list[str]]) -> None:
    def subsequences(tokens: list[str]) -> set[tuple[str, ...]]:
        return {chosen for n in range(len(tokens) + 1) for chosen in itertools.combinations(tokens, n)}

    def f_measure(reference: list[str]) -> float:
        longest = max(map(len, subsequences(prediction) & subsequences(reference)))
        if longest == 0:
            return 0.0
        precision, recall = longest / len(prediction), longest / len(reference)
        return 2 * precision * recall / (precision + recall)

    expected = max(map(f_measure, references))
    assert rouge_l(" ".join(prediction), [" ".join(r) for r in references]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "n", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 1, 3 / 4),
        ("police kill the gunman", ["police killed the gunman"], 2, 1 / 3),
        ("the the the", ["The cat, the dog"], 1, 2 * 2 / 7),  # the third one is not in the reference
        ("a b a b", ["a b"], 2, 2 / 4),
        ("a b", ["b a", "c a b"], 2, 2 / 3),
        ("cat", ["cat"], 2, 0),  # too short to hold any
        ("", [""], 1, 0),
        ("caf\u00e9 noir", ["caf noir"], 2, 1),
    ],
)
def test_known_texts_have_a_known_rouge_n(prediction: str, references: list[str], n: int, expected: float) -> None:
    assert rouge_n(prediction, references, n) == pytest.approx(expected, abs=1e-12)


@given(words, st.lists(words, min_size=1, max_size=2), st.integers(1, 3))
def test_any_text_has_the_rouge_n_of_its_ngrams_crossed_out_one_by_one(
    prediction: list[str], references: list[list[str]], n: int
) -> None:
    def f_measure(reference: list[str]) -> float:
        mine, left = ([t[i : i + n] for i in range(len(t)) if len(t[i : i + n]) == n] for t in (prediction, reference))
        count, common = len(left), 0
        for ngram in mine:
            if ngram in left:
                left.remove(ngram)
                common += 1
        if common == 0:
            return 0.0
        precision, recall = common / len(mine), common / count
        return 2 * precision * recall / (precision + recall)

    found = rouge_n(" ".join(prediction), [" ".join(r) for r in references], n)
    assert found == pytest.approx(max(map(f_measure, references)), abs=1e-12)


def test_long_texts_have_a_rouge_l_too() -> None:
    """Deeper than Python recurses."""
    numbers = [str(i) for i in range(1500)]
    assert rouge_l(" ".join(numbers), [" ".join(numbers[::3])]) == pytest.approx(2 * 500 / 2000)


def test_the_metrics_load_without_torch() -> None:
    assert "torch" not in loaded_by("import minopt.evaluation.squad")

"""Scores of texts without torch: SQuAD's exact match and F1 as its evaluate-v2.0.py has them, and ROUGE (Lin 2004).

ROUGE's tokens are those of google-research's rouge_score by default: runs of a-z and 0-9 in lower case, not stemmed.
All but ``score`` take ``references``: right answers, of which the best counts; ``("",)`` says that there is none.
They raise ``ValueError`` if there is no reference, or a bare text instead of a list.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from minopt.checkpoint.errors import some

UNANSWERABLE = "unanswerable"
"""The text that a model is trained to write where a question has no answer."""

Scores = Callable[[Mapping[str, str], Mapping[str, Sequence[str]]], dict[str, float]]
"""Scores generated texts: takes predictions and references, both by id, and gives metrics by name."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ROUGE_TOKEN = re.compile("[a-z0-9]+")


def normalize_answer(text: str) -> str:
    """A text in lower case, without ASCII punctuation, without the words a, an, the, and with single spaces.

    Punctuation goes first and leaves no space (``"the-end"`` is one word, ``"theend"``); articles leave one.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised references, else 0.0; ``""`` is no answer."""
    return float(normalize_answer(prediction) in _normalized(references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the normalised words that both have, 0.0 to 1.0; 1.0 where both have none."""
    words, others = normalize_answer(prediction).split(), [text.split() for text in _normalized(references)]
    return max(_overlap(words, other) if words and other else float(words == other) for other in others)


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` over a set of questions by their ids, means in percent (0 to 100) as officially.

    Where some questions have an answer and some have none (SQuAD 2.0), also those of each kind, as
    ``has_answer_exact_match``, ``has_answer_f1``, ``no_answer_exact_match``, ``no_answer_f1``. Predictions for other
    questions do not count; a question without one is a ``ValueError``.
    """
    if not references:
        raise ValueError("references: expected at least one question, got none. Is it the right file?")
    if missing := [key for key in references if key not in predictions]:
        raise ValueError(
            f"predictions: expected one for each of {len(references)} questions, got none for {some(missing)}. "
            'Add them; "" says that a question has no answer.'
        )
    groups = {"": list(references), "has_answer_": [], "no_answer_": []}
    for key, texts in references.items():
        groups["has_answer_" if any(texts) else "no_answer_"].append(key)
    if not groups["has_answer_"] or not groups["no_answer_"]:
        groups = {"": groups[""]}
    return {
        f"{prefix}{metric.__name__}": 100 * sum(metric(predictions[key], references[key]) for key in keys) / len(keys)
        for prefix, keys in groups.items()
        for metric in (exact_match, f1)
    }


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L, the F-measure of the longest common subsequence of tokens, 0.0 to 1.0; 0.0 where a side has none."""
    own, *others = _tokens(prediction, references)
    return max(_f_measure(_longest_common_subsequence(own, other), own, other) for other in others)


def rouge_n(prediction: str, references: Sequence[str], n: int) -> float:
    """ROUGE-N, the F-measure of the sequences of ``n`` tokens that both have, each as often as both have it."""
    own, *others = ([*zip(*(row[i:] for i in range(n)), strict=False)] for row in _tokens(prediction, references))
    return max(_overlap(own, other) for other in others)


def rouge_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``rouge_1``, ``rouge_2`` and ``rouge_l``, 0 to 1: means over all ids in ``references``. See ``score``."""
    texts = [(predictions[key], right) for key, right in references.items()]
    found = [(rouge_n(*pair, 1), rouge_n(*pair, 2), rouge_l(*pair)) for pair in texts]
    means = (sum(values) / len(values) for values in zip(*found, strict=True))
    return dict(zip(("rouge_1", "rouge_2", "rouge_l"), means, strict=True))


def _tokens(prediction: str, references: Sequence[str]) -> list[list[str]]:
    return [_ROUGE_TOKEN.findall(text.lower()) for text in (prediction, *_checked(references))]


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ValueError(
            f"references: expected a list of at least one text, got {'a bare text' if references else 'none'}. "
            'Give ["..."], or [""] for a question without an answer.'
        )
    return references


def _normalized(references: Sequence[str]) -> list[str]:
    """Without empty ones if others are left; v1.1's script has no such rule."""
    return [text for text in map(normalize_answer, _checked(references)) if text] or [""]


def _overlap(a: Sequence[object], b: Sequence[object]) -> float:
    return _f_measure((Counter(a) & Counter(b)).total(), a, b)


def _f_measure(common: int, a: Sequence[object], b: Sequence[object]) -> float:
    """``2PR / (P + R)`` for ``P = common / len(a)`` and ``R = common / len(b)``."""
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(a) + 1)  # of the table: with the first j tokens of a
    for token in b:
        diagonal = 0
        for j, other in enumerate(a, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]

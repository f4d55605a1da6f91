"""SQuAD's official metrics, exact match and F1, and ROUGE for answers of several sentences. No torch."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from minopt.checkpoint.errors import some

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ROUGE_TOKEN = re.compile("[a-z0-9]+")


def normalize_answer(text: str) -> str:
    """A text in lower case, without ASCII punctuation, without the words a, an, the, and with single spaces.

    In the order of the official evaluate-v2.0.py: punctuation goes without a trace (``"the-end"`` is one word,
    ``"theend"``), articles leave a space.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised references, else 0.0 (evaluate-v2.0.py).

    Args:
        prediction: the answer; ``""`` says that there is none.
        references: right answers, at least one; ``("",)`` where the question has none. Those of which normalisation
            leaves nothing do not count beside others: v1.1's script, which has no such rule, differs there alone.

    Raises:
        ValueError: if there is no reference, or a bare text instead of a sequence of them.
    """
    return float(normalize_answer(prediction) in _normalized(references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words that both have, of the best reference (evaluate-v2.0.py).

    Where either side has no words after normalisation it is 1.0 if both have none, else 0.0.

    Args:
        prediction: as in ``exact_match``.
        references: as in ``exact_match``.

    Returns:
        0.0 to 1.0.

    Raises:
        ValueError: as ``exact_match`` does.
    """
    words = normalize_answer(prediction).split()
    return max(_word_f1(words, reference.split()) for reference in _normalized(references))


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Both metrics over a set of questions, in percent as officially.

    Args:
        predictions: an answer for each question's id; those of other questions do not count.
        references: right answers for each id, as in ``exact_match``.

    Returns:
        ``exact_match`` and ``f1``, 0 to 100: means over all questions in ``references``. Where some questions have an
        answer and some have none (SQuAD 2.0), also ``has_answer_exact_match``, ``has_answer_f1``,
        ``no_answer_exact_match`` and ``no_answer_f1``: means over each kind.

    Raises:
        ValueError: if a question has no prediction, if there is no question, and as ``exact_match`` does.
    """
    if not references:
        raise ValueError("references: expected at least one question, got none. Is it the right file?")
    missing = [key for key in references if key not in predictions]
    if missing:
        raise ValueError(
            f"predictions: expected one for each of {len(references)} questions, got none for {some(missing)}. "
            'Add them; "" says that a question has no answer.'
        )
    groups = {"": list(references)}
    answerable = [key for key, texts in references.items() if any(texts)]
    if 0 < len(answerable) < len(references):
        groups["has_answer_"] = answerable
        groups["no_answer_"] = [key for key, texts in references.items() if not any(texts)]
    exact = {key: exact_match(predictions[key], texts) for key, texts in references.items()}
    overlap = {key: f1(predictions[key], texts) for key, texts in references.items()}
    return {
        prefix + name: 100 * sum(values[key] for key in keys) / len(keys)
        for prefix, keys in groups.items()
        for name, values in (("exact_match", exact), ("f1", overlap))
    }


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure of the best reference: ``2PR / (P + R)`` of the longest common subsequence (Lin 2004).

    Tokens are those of google-research's rouge_score by default: runs of a-z and 0-9 in lower case, not stemmed.

    Args:
        prediction: any text.
        references: at least one text.

    Returns:
        0.0 to 1.0; 0.0 where either side has no tokens.

    Raises:
        ValueError: as ``exact_match`` does.
    """
    tokens = _ROUGE_TOKEN.findall(prediction.lower())
    found = []
    for reference in _checked(references):
        others = _ROUGE_TOKEN.findall(reference.lower())
        found.append(_f_measure(_longest_common_subsequence(tokens, others), tokens, others))
    return max(found)


def rouge_n(prediction: str, references: Sequence[str], n: int) -> float:
    """ROUGE-N F-measure of the best reference: of the sequences of ``n`` tokens that both have (Lin 2004).

    A sequence counts as often as both sides have it. Tokens, arguments, result and errors are those of ``rouge_l``.
    """
    own, *others = (_ngrams(text, n) for text in (prediction, *_checked(references)))
    return max(_f_measure((Counter(own) & Counter(other)).total(), own, other) for other in others)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = _ROUGE_TOKEN.findall(text.lower())
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ValueError(
            f"references: expected a list of at least one text, got {'a bare text' if references else 'none'}. "
            'Give ["..."], or [""] for a question without an answer.'
        )
    return references


def _normalized(references: Sequence[str]) -> list[str]:
    return [text for text in map(normalize_answer, _checked(references)) if text] or [""]


def _word_f1(words: Sequence[str], others: Sequence[str]) -> float:
    if not words or not others:
        return float(words == others)
    return _f_measure((Counter(words) & Counter(others)).total(), words, others)


def _f_measure(common: int, a: Sequence[object], b: Sequence[object]) -> float:
    """``2PR / (P + R)`` for ``P = common / len(a)`` and ``R = common / len(b)``."""
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    short, long = sorted((a, b), key=len)
    row = [0] * (len(short) + 1)  # of the table: with the first j tokens of the short one
    for token in long:
        diagonal = 0
        for j, other in enumerate(short, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]

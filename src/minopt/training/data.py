"""Fine-tuning data: records of SQuAD or of JSON lines as pairs of prompt and completion, or plain text.

No tokens here: each example says which characters of its prompt may be cut if it is too long.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch.hub

from minopt.atomic import replacing
from minopt.checkpoint.errors import first_line, some
from minopt.evaluation.squad import UNANSWERABLE
from minopt.evaluation.tasks import TASKS, Task, fill
from minopt.progress import on_terminal

SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"

# Of the files as published there.
_SQUAD_SHA256 = {
    "train-v1.1.json": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    "train-v2.0.json": "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
    "dev-v2.0.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
}
_SQUAD_VERSIONS = {"squad": "v1.1", "squad-v2": "v2.0"}

# The parts of a file that are read: types, lists of one shape, and objects, where ? marks a key that may be missing.
_SQUAD = {"data": [{"paragraphs": [{"context": str, "qas": [{
    "id": str, "question": str, "is_impossible?": bool, "answers?": [{"text": str, "answer_start": int}],
}]}]}]}  # fmt: skip
_LINE = {"prompt": str, "completion": str, "id?": str}

_LINES = (".jsonl", ".ndjson")
_TEXTS = (".txt", ".raw")
_ENDINGS = (".json", *_LINES, *_TEXTS)
_FORMATS = (
    "A .json holds SQuAD (v1.1 or v2.0), a .jsonl or .ndjson one object a line with the texts prompt and completion, "
    "a .txt or .raw plain text."
)
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number", float: "a number",
          bool: "true or false", type(None): "null", type(...): "nothing"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A prompt and what is to follow it. Spans are the begin and end of characters of the prompt; empty for none."""

    prompt: str
    completion: str  # that the model learns to write, with the space or newline before it
    references: tuple[str, ...] = ()  # all right texts, for scoring; "" says that there is no answer. None: completion
    id: str = ""  # differs between the examples of a file
    context: tuple[int, int] = (0, 0)  # the span that may be cut if the prompt is too long
    answer: tuple[int, int] = (0, 0)  # the span in it that training must not cut: the completion repeats or asks for it


def references_of(data: Sequence[Example] | str) -> dict[str, tuple[str, ...]]:
    """The right texts by the examples' ids; none for a text."""
    return {} if isinstance(data, str) else {e.id: e.references or (e.completion.strip(),) for e in data}


def cache_folder() -> Path:
    """Where downloads are kept: ``$MINOPT_HOME``, else ``$XDG_CACHE_HOME/minopt``, else ``~/.cache/minopt``."""
    named, shared = os.environ.get("MINOPT_HOME"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(named or os.path.join(shared, "minopt")))


def read_data(
    source: str | Path, task: Task = TASKS["squad"], *, split: Literal["train", "dev"] = "train",
    show_progress: bool = True,
) -> list[Example] | str:  # fmt: skip
    """Reads examples, or a text for language modelling, from a file or from the published SQuAD.

    Args:
        source: a file, whose ending tells its format: ``.json`` SQuAD v1.1 or v2.0 (arXiv 1606.05250, 1806.03822);
            ``.jsonl`` or ``.ndjson`` an object a line with the texts ``prompt`` and ``completion`` and perhaps ``id``;
            ``.txt`` or ``.raw`` plain text. ``"squad"`` and ``"squad-v2"``, where no file is called that, are the
            published files, downloaded once into ``cache_folder() / "squad"``.
        task: how questions of SQuAD become examples. A prompt with ``{answer}`` leaves out questions that have
            none; with other prompts, the answer to those is ``UNANSWERABLE`` and their reference ``""``.
        split: which published file, and which option a message names: ``train_file`` or ``dev_file``.
        show_progress: draw a bar on stderr while downloading, if that is a terminal.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, is empty, or two examples have one id; with the place that is wrong.
        OSError: if a download fails; nothing is left of it then.
    """
    if split not in ("train", "dev"):
        raise ValueError(f'split: expected "train" or "dev", got {split!r}.')
    path = Path(source)
    if str(source) in _SQUAD_VERSIONS and not path.is_file():
        path = _download(f"{split}-{_SQUAD_VERSIONS[str(source)]}.json", split, show_progress)
    text = read_text(path, f"{split}_file")
    ending = path.suffix.lower()
    if ending in _TEXTS:
        return text
    examples = list(_read_lines(text, path) if ending in _LINES else _read_squad(text, task, path))
    if not examples:
        raise ValueError(f"{split}_file: expected examples, got none for the template ({path}). {_FORMATS}")
    if repeated := [repr(key) for key, count in Counter(e.id for e in examples).items() if count > 1]:
        raise ValueError(
            f"{split}_file: expected a different id for each example, got {some(repeated)} more than once ({path}). "
            "Rename or remove the repetitions."
        )
    return examples


def _download(name: str, split: str, show_progress: bool) -> Path:
    """A published file in the cache, where only what has the right digest gets that name."""
    path, url = cache_folder() / "squad" / name, SQUAD_URL + name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            shown = show_progress and on_terminal()
            torch.hub.download_url_to_file(url, str(new), hash_prefix=_SQUAD_SHA256[name], progress=shown)
    except (OSError, HTTPException, RuntimeError) as error:  # the last is a wrong digest
        raise OSError(
            f"{split}_file: {url} cannot be downloaded to {path.parent} ({first_line(error)}). "
            "Try again, or fetch the file by hand and give its path."
        ) from None
    return path


def read_text(path: Path, option: str) -> str:
    """The text of a file, its line ends unchanged, without a byte order mark; errors name the option."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{option}: expected {', '.join(_SQUAD_VERSIONS)} or a file ({', '.join(_ENDINGS)}), got "
            f"{'a folder' if path.is_dir() else 'nothing of that name'} ({path}). Check the path."
        )
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{option}: expected a name that ends in {', '.join(_ENDINGS)}, got {path}. {_FORMATS}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: expected UTF-8, got {error} ({path}). Convert it to UTF-8.") from None
    if not text.strip():
        raise ValueError(f"{option}: expected data, got an empty file ({path}). {_FORMATS}")
    return text


def _read_lines(text: str, path: Path) -> Iterator[Example]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]  # JSON may hold \u2028
    for count, (number, line) in enumerate(lines):
        at = f"{path}: line {number}: "
        record = parse(line, _LINE, at)
        completion = record["completion"]
        if not completion:
            raise ValueError(f"{at}completion: expected a text to train on, got an empty one. {_FORMATS}")
        yield Example(record["prompt"], completion, (completion.strip(),), record.get("id", str(count)))


def _read_squad(text: str, task: Task, path: Path) -> Iterator[Example]:
    for i, article in enumerate(parse(text, _SQUAD, f"{path}: ")["data"]):
        for j, paragraph in enumerate(article["paragraphs"]):
            for k, question in enumerate(paragraph["qas"]):
                at = f"{path}: data[{i}].paragraphs[{j}].qas[{k}].answers"
                yield from _squad_examples(question, paragraph["context"], task, at)


def _squad_examples(record: dict[str, Any], context: str, task: Task, at: str) -> Iterator[Example]:
    """The example that a question gives, or none if the template wants an answer and there is none."""
    answers = [] if record.get("is_impossible") else record.get("answers", [])
    if blank := [n for n, answer in enumerate(answers) if not answer["text"].strip()]:
        raise ValueError(f"{at}[{blank[0]}].text: expected an answer, got a blank text. {_FORMATS}")
    if not answers and not (record.get("is_impossible") or {"is_impossible", "answers"} <= record.keys()):
        raise ValueError(f"{at}: expected one or more, got none. A question without answers needs is_impossible: true.")
    right = tuple(dict.fromkeys(answer["text"].strip() for answer in answers))
    values = {"context": context, "question": record["question"].strip(), "answer": (*right, UNANSWERABLE)[0]}
    prompt, starts = fill(task.prompt, values)
    if not answers and "answer" in starts:
        return
    completion, (asked,) = fill(task.completion, values)
    cut, kept = (0, 0), (0, 0)
    if "context" in starts:
        begin = starts["context"]
        cut = (begin, begin + len(context))
        if answers and (place := _nearest(context, right[0], answers[0])) is not None:
            kept = (begin + place, begin + place + len(right[0]))
    references = (right or ("",)) if asked == "answer" else (values[asked],)
    yield Example(prompt, completion, references, record["id"], cut, kept)


def _nearest(context: str, text: str, answer: dict[str, Any]) -> int | None:
    """The place of an answer's stripped text in a context that is nearest to where it should stand."""
    start = answer["answer_start"] + len(answer["text"]) - len(answer["text"].lstrip())
    after = max(start, 0)
    places = (context.rfind(text, 0, after + len(text)), context.find(text, after))
    return min((p for p in places if p >= 0), key=lambda p: abs(p - start), default=None)


def parse(text: str, shape: Any, at: str, formats: str = _FORMATS) -> Any:
    """JSON of a shape; errors begin with ``at``, and say which formats there are."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{at}expected JSON, got an error: {first_line(error)}. {formats}") from None
    _check(value, shape, at, "", formats)
    return value


def _check(value: object, shape: Any, at: str, path: str, formats: str) -> None:
    """Refuses a value of JSON that has not the given shape, and names the path to what is wrong."""
    kind, where = shape if isinstance(shape, type) else type(shape), f"{at}{path.lstrip('.') or 'all of it'}"
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {_KINDS[kind]}, got {_KINDS[type(value)]}. {formats}")
    if isinstance(value, str):
        try:
            value.encode()  # tokenizers take no other
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: expected characters, got half of one at {error.start} of the text. "
                             "Write both halves of a surrogate pair.") from None  # fmt: skip
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, shape[0], at, f"{path}[{i}]", formats)
    elif isinstance(value, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value or name == key:
                _check(value.get(name, ...), inner, at, f"{path}.{name}", formats)

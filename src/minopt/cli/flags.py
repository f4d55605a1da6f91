"""Commands, whose flags are the fields of dataclasses: typed words as values, and pages of help.

Not argparse, to which each rule here would have to be taught: either spelling, other programs' names, values that begin
with a hyphen, a positional word by its name, the nearest right word. And its messages differ from Python to Python.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from inspect import get_annotations
from typing import Any, ClassVar, TypeVar

from minopt.settings import is_choice, option, problems

T = TypeVar("T")

# Names for one thing, here and in other programs. A field of the very name that was typed comes first.
_SYNONYMS = (
    ("model", "model_name_or_path", "model_dir"), ("destination", "output_path"), ("max_new_tokens", "tgt_length"),
    ("resume", "resume_from_checkpoint"), ("keep_last", "save_total_limit"),
    ("label_smoothing", "label_smoothing_factor"), ("evaluation_strategy", "eval_strategy"),
)  # fmt: skip

# Flags of other programs whose work is done here by a flag of another name.
_NEAREST = {"--max-length": "--max-new-tokens", "--min-length": "--min-new-tokens", "--src-length": "--truncate-prompt"}


@dataclass(frozen=True)
class Command:
    """A word after ``minopt``, the name of its class. Its fields are flags; its docstring is shown by ``--help``."""

    summary: ClassVar[str] = ""
    records: ClassVar[tuple[type, ...]] = ()  # dataclasses whose fields are flags too; of two of one name the first is
    titles: ClassVar[Mapping[str, str]] = {}  # of groups of flags, by the name of the first one in each
    defaults: ClassVar[Mapping[str, Any]] = {}  # where they are not the field's own
    without: ClassVar[tuple[str, ...]] = ()  # fields that are no flags
    alone: ClassVar[bool] = False  # whether under torchrun the first process runs it alone
    when_out_of_memory: ClassVar[str] = "--dtype bfloat16, or with --input a smaller --max-batch-tokens"

    def run(self, given: dict[str, Any]) -> int | None:
        """Runs it. ``given`` is what was typed, by the names of fields. Returns the exit code; ``None`` is 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Everywhere:
    help: bool = option(False, "show this page")
    debug: bool = option(False, "show the traceback of an error, as MINOPT_DEBUG=1 does")


def fields_of(command: type[Command]) -> dict[str, Field[Any]]:
    """By name, words without a flag first; of each record its own before those that it inherits."""
    found: dict[str, Field[Any]] = {}
    records: list[Any] = [_Everywhere, command, *command.records]
    for record in records:
        known = {f.name: f for f in fields(record) if f.name not in command.without}
        for name in (name for cls in record.__mro__ for name in get_annotations(cls) if name in known):
            found.setdefault(name, known[name])
    return dict(sorted(found.items(), key=lambda item: not _is_word(item[1])))


def _is_word(f: Field[Any]) -> bool:
    return f.metadata.get("is_word", False)


def flag_of(f: Field[Any]) -> str:
    """``--max-new-tokens`` of ``max_new_tokens``; the name of a word that has no flag."""
    name = "model" if f.name == "model_name_or_path" else f.name.replace("_", "-")
    return name if _is_word(f) else f"--{name}"


def given_to(record: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed of a record's fields."""
    return {f.name: given[f.name] for f in fields(record) if f.name in given}


def fill(record: type[T], given: Mapping[str, Any]) -> T:
    """A record of what was typed, and of defaults. Raises ``ValueError`` for values that make no sense."""
    found = record(**given_to(record, given))
    if wrong := problems(found):
        raise ValueError("; ".join(wrong) + ".")
    return found


def parse(command: type[Command], words: Sequence[str]) -> dict[str, Any]:
    """The words after a command, by the names of its fields. Raises ``ValueError`` for the first wrong word."""
    known, spellings = fields_of(command), _spellings(command)
    given, unflagged, queue = dict[str, Any](), list[str](), deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":
            unflagged += queue
            break
        if not re.match(r"--?[A-Za-z](\S*$|[\w-]*=)", word):
            unflagged.append(word)
            continue
        typed, equals, text = word.partition("=")
        if _name(typed) not in spellings:
            typed = typed.replace("_", "-")
            flags = [f"--{name.replace('_', '-')}" for name in spellings]
            raise ValueError(f"{typed}: no such flag{meant(_NEAREST.get(typed, typed), flags)}")
        f, is_off = spellings[_name(typed)]
        if is_off and equals:
            raise ValueError(f"{typed}: expected no value, got {text!r}")
        if f.type == "bool" and not equals:
            text = queue.popleft() if queue and queue[0].lower() in ("true", "false") and not is_off else "true"
        elif not equals:
            if not queue or (queue[0].startswith("--") and _name(queue[0]) in spellings):
                raise ValueError(f"{flag_of(f)}: expected a value, got none")
            text = queue.popleft()
        value = not is_off and _value(f, text)
        given[f.name] = (*given.get(f.name, ()), value) if f.type == "tuple[str, ...]" else value
    places = [f for f in known.values() if _is_word(f) and f.name not in given]
    if len(unflagged) > len(places):
        raise ValueError(
            f"{unflagged[len(places)]}: unexpected word. Put a text in quotes; if it begins with a hyphen, write -- "
            "before it"
        )
    given |= {f.name: word for f, word in zip(places, unflagged, strict=False)}
    needed = [f for f in known.values() if f.metadata.get("required") and not given.get(f.metadata.get("unless", ""))]
    if missing := [flag_of(f) for f in needed if f.name not in given]:
        raise ValueError(f"{', '.join(missing)}: expected a value, got none")
    return given


def _name(typed: str) -> str:
    return typed.partition("=")[0].lstrip("-").replace("-", "_")


def _spellings(command: type[Command]) -> dict[str, tuple[Field[Any], bool]]:
    """The field of each name that a flag may have, other programs' and ``no_...`` too; and whether it is ``no_...``."""
    known = fields_of(command)
    found = {name: (f, False) for name, f in known.items()}
    for names in _SYNONYMS:
        of = [known[name] for name in names if name in known]
        found |= {name: (of[0], False) for name in names if of and name not in known}
    return found | {f"no_{name}": (f, True) for name, f in known.items() if f.type == "bool"}


def meant(word: str, words: Iterable[str]) -> str:
    """A question for the nearest of several words; nothing if none is near."""
    words = list(words)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    near = near or [w for w in words if len(word) > 4 and word in w] or difflib.get_close_matches(word, words, n=1)
    return f". Did you mean {near[0]}?" if near else ""


def _size(text: str) -> int:
    """Bytes of "2GB", "1.5 GiB" or "500m". A number alone is refused: it may be meant as bytes or as gigabytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(?:([kmgt])(i?)b?|b|bytes)", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2] or " ")))


def utf8(word: str) -> str:
    """A word of the command as UTF-8, also where the locale says that it is something less."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        return word


def _text(word: str) -> str:
    if not word:
        raise ValueError
    return utf8(word)


def _choice(choices: Sequence[str], text: str) -> Any:
    word = text.lower() if "true" in choices else text
    if not is_choice(word, choices):
        raise ValueError
    return {"true": True, "false": False}.get(word, word)


# For each type of a field: what reads a word, what stands for it in the help, and what an error expects.
_Kind = tuple[Callable[[str], Any], str, str]
_IDS: _Kind = (lambda text: tuple(map(int, text.split(","))) if text else (), "IDS", "ids such as 5 or 5,6")
_KINDS: dict[str, _Kind] = {
    "int": (int, "N", "an integer"), "float": (float, "X", "a number"), "str": (str, "TEXT", "a text"),
    "file": (str, "FILE", "a file"), "folder": (str, "FOLDER", "a folder"),
    "size": (_size, "SIZE", "a size above 0 with its unit, such as 16GB or 500MB"),
    "tuple[str, ...]": (_text, "TEXT", "a text of at least one character"),
    "tuple[int, ...]": _IDS, "int | tuple[int, ...]": _IDS,
}  # fmt: skip


def _choices(f: Field[Any]) -> Sequence[str]:
    """The words that a field takes, if they are few."""
    if str(f.type).startswith("bool"):
        return ("true", "false", *re.findall(r"Literal\[.(\w+).\]", str(f.type)))
    return tuple(f.metadata["choices"])


def _kind(f: Field[Any]) -> _Kind:
    if choices := _choices(f):
        return partial(_choice, choices), "|".join(choices), " or ".join(choices)
    return _KINDS.get(f.metadata.get("kind", f.type.removesuffix(" | None")), (json.loads, "JSON", "JSON"))


def _value(f: Field[Any], text: str) -> Any:
    """A typed word as a value of a field."""
    read, _, wanted = _kind(f)
    try:
        return read(text)
    except (ValueError, RecursionError):
        nearest = meant(text, _choices(f))
        raise ValueError(f"{flag_of(f)}: expected {wanted}, got {text[:80]!r}{nearest}") from None


def help_page(command: type[Command]) -> str:
    """The help of a command, as wide as the terminal."""
    known, width = fields_of(command), shutil.get_terminal_size().columns
    words = [f.name if f.metadata.get("required") else f"[{f.name}]" for f in known.values() if _is_word(f)]
    lines = ["usage: " + " ".join(["minopt", command.__name__.lower(), *words, "[flags]"]), ""]
    lines += [*textwrap.wrap(" ".join((command.__doc__ or "").split()), width), ""]
    for name, f in known.items():
        if name in command.titles:
            lines += ["", f"{command.titles[name]}:"]
        default, text = command.defaults.get(name, f.default), f.metadata["help"]
        if default not in (None, "", ()) and default is not False and not text.endswith(")"):
            text += f" ({str(default).lower()})"
        value = "" if _is_word(f) or (f.type == "bool" and not default) else f" {_kind(f)[1]}"
        head = f"  {flag_of(f)}{value}"
        body = textwrap.wrap(re.sub(r"--\w+", lambda m: m[0].replace("_", "-"), text), max(20, width - 24))
        lines += [f"{head:24}{body.pop(0)}"] if len(head) < 23 else [head]
        lines += [f"{'':24}{line}" for line in body]
    lines += ["", "A flag that takes no value is off; --flag turns it on, --no-flag off."]
    return "\n".join([*lines, "Flags may have _ in place of -."])

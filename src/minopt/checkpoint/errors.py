"""The errors that say why a checkpoint cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_CHARACTERS = 2000


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, what was expected and what to do.

    It is one line that a terminal can show, whatever names a file holds.
    """

    def __init__(self, message: str) -> None:
        message = message if len(message) <= _MOST_CHARACTERS else f"{message[:_MOST_CHARACTERS]} ..."
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint of which a file is not there."""


class AmbiguousPathError(CheckpointError):
    """A path that leads to several checkpoints."""


def some(names: Sequence[object], most: int = 5) -> str:
    """The first few of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = (text if len(text) <= 120 else f"{text[:120]}..." for text in map(str, names[:most]))
    return ", ".join(shown) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the kind of error where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__

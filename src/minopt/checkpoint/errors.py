"""What the rooms of ``checkpoint`` say when a checkpoint cannot be used."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, what was expected and what to do."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint of which a file is not there."""


class AmbiguousPathError(CheckpointError):
    """A path that leads to several checkpoints."""


def some(names: Sequence[object], most: int = 5) -> str:
    """The first few of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the kind of error where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__

"""Progress on stderr: bars and lines, of the first process alone."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def on_terminal() -> bool:
    """Whether stderr is a terminal that has room for a bar."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False


def say_on_terminal(text: str) -> None:
    """A line of the first process that only somebody who waits wants to read."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None and sys.stderr.isatty():
        say(text)


def bar(total: float, unit: str, *, shown: bool = True, **options: Any) -> tqdm[Any]:
    """A bar of at most ten frames a second, on a terminal only.

    Args:
        total: the number of units.
        unit: the word for what is counted.
        shown: whether to draw it at all.
        **options: options of ``tqdm``.
    """
    from tqdm import tqdm  # not needed to show help

    disable = not (shown and os.environ.get("RANK", "0") == "0" and on_terminal())
    return tqdm(total=total, unit=unit, mininterval=0.1, disable=disable, **options)


def counted(number: int, noun: str, several: str | None = None) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def size_of(count: float) -> str:
    """Bytes in words: ``20.3 MB``."""
    units = iter(("kB", "MB", "GB", "TB"))
    unit = ""
    while abs(count) >= (999.95 if unit else 1000) and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.1f} {unit}" if unit else f"{count:.0f} bytes"


def say(text: str) -> None:
    """A line on stderr beside any bar, if somebody reads it: a run does not end with its reader."""
    from tqdm import tqdm

    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stderr)

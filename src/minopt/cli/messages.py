"""The messages of commands on stderr: lines that begin with minopt:, and for an error one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minopt.cli.flags import Command, fields_of, flag_of
from minopt.errors import is_connection_lost, is_out_of_memory, is_users
from minopt.progress import say

# The system's reasons that have an answer: what is said of a path, or alone.
_DENIED = "permission denied. Change it, or name another path"
_SYSTEMS = {
    errno.ENOENT: "there is no such file or folder. Check the path",
    errno.EISDIR: "expected a file, got a folder. Name a file in it",
    errno.ENOTDIR: "expected a folder, got a file on the way. Check the path",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "cannot be written on this disk. Name another path",
    errno.ENOSPC: "the disk is full. Free some space, or name another path",
    errno.EDQUOT: "the disk quota is used up. Free some space, or name another path",
    errno.ENAMETOOLONG: "the name is too long. Check the path",
}


def tell(text: str) -> None:
    """One line on stderr."""
    say(f"minopt: {text}")


def tell_error(text: str, error: Exception | None = None) -> None:
    """One line of why a command ends, from the process whose error it is."""
    if error is not None and is_connection_lost(error):
        time.sleep(5)  # for torchrun, which says who has died and ends the others; unless it is gone itself
    elif os.environ.get("RANK", "0") != str(getattr(error, "process", 0)):
        time.sleep(5)  # for torchrun, which ends the others with the first that ends: that one has to say why
        return
    tell(f"error: {text}")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of which torchrun makes the end of its own report
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def explained(error: Exception, command: type[Command], given: Mapping[str, Any]) -> str | None:
    """One line for an error that a user can mend; ``None`` for a bug of minopt's."""
    if is_out_of_memory(error):
        where = f"process {error.process}: " if hasattr(error, "process") else ""
        return f"{where}not enough memory. Try {command.when_out_of_memory}."
    if is_connection_lost(error):
        reason = str(error).splitlines()[0][:200]
        return f"process {os.environ.get('RANK', '0')} has lost another one, which has died or is gone ({reason})."
    if not is_users(error):
        return None
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        reason = _SYSTEMS.get(error.errno, error.strerror)
        if error.filename is None:
            return f"{reason}."
        known = fields_of(command).items()
        flag = next((f"{flag_of(f)}: " for name, f in known if str(given.get(name)) == str(error.filename)), "")
        return f"{flag}{error.filename}: {reason}."
    return in_flags(" ".join(str(error).split("\n")), command)


def in_flags(text: str, command: type[Command]) -> str:
    """A message of the library with flags in place of Python's arguments: ``top_k must`` as ``--top-k must``."""
    flags = {name: flag_of(f) for name, f in fields_of(command).items()}

    def flag(match: re.Match[str]) -> str:
        name = match[0].removeprefix("--")
        return flags.get(name, match[0].replace("_", "-") if match[0].startswith("--") else name)

    text = re.sub(r"\b(\w+)=True\b", lambda match: flags.get(match[1], match[0]), text.removeprefix("generation: "))
    several = r"(?:--)?\b[a-z0-9]+(?:_[a-z0-9]+)+\b"
    return re.sub(rf"(?<![\w./\\'\"=-])(?:{several}|[a-z]+(?=: | must | acts ))(?![/\\'\"]|\.\w)", flag, text)


@contextlib.contextmanager
def warnings_told(command: type[Command]) -> Iterator[None]:
    """Shows what the library logs, as lines that name flags."""
    handler = logging.Handler()
    handler.emit = lambda record: tell(f"warning: {in_flags(record.getMessage(), command)}")  # type: ignore[method-assign]
    logger = logging.getLogger("minopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)

"""The command line: each command is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minopt import __version__
from minopt.cli.checkpoints import Convert, Export, Inspect
from minopt.cli.evaluate import Evaluate
from minopt.cli.finetune import Finetune
from minopt.cli.flags import Command, fields_of, fill, flag_of, help_page, meant, parse
from minopt.cli.generate import Generate
from minopt.cli.plan import Plan
from minopt.cli.records import tell
from minopt.errors import is_connection_lost, is_out_of_memory, is_users

_CLASSES: tuple[type[Command], ...] = (Generate, Convert, Export, Inspect, Plan, Finetune, Evaluate)
COMMANDS = {command.__name__.lower(): command for command in _CLASSES}

_ABOUT = """usage: minopt command [flags]

OPT language models in plain PyTorch. minopt COMMAND --help shows the flags of a command.

commands:
""" + "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; ``None`` is ``sys.argv``'s.

    Returns:
        The exit code: 0; 1 where a check that was asked for has failed; 2 for what the user can mend (one line on
        stderr says what); 130 if interrupted.

    Raises:
        SystemExit: with 2 for wrong usage, with 0 for ``--help`` and ``--version``.
        Exception: whatever is a bug of minopt's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?", not a traceback
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("MINOPT_DEBUG", "0") not in ("", "0")
    try:
        return _run(*_understood(words), debug)
    except BrokenPipeError:  # the reader has had enough: `| head`
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # said above, if it needs saying: what is left to write goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _understood(words: list[str]) -> tuple[type[Command], dict[str, Any]]:
    """The command, and what was typed after it. Ends the program if that is all, or makes no sense."""
    if words[:1] == ["--debug"]:
        words = [*words[1:], "--debug"]
    first, *rest = words or [""]
    if first == "help":
        first, rest = rest[0] if rest else "--help", ["--help"]
    command, page = COMMANDS.get(first), None
    if first in ("", "-h", "--help", "--version"):
        page = f"minopt {__version__}" if first == "--version" else _ABOUT
    elif command is not None and {"-h", "--help"} & set(rest[: rest.index("--")] if "--" in rest else rest):
        page = help_page(command)
    if page is not None:
        print(page, file=sys.stdout if first else sys.stderr)
        raise SystemExit(0 if first else 2)
    try:
        if command is not None:
            return command, parse(command, rest)
        if first.startswith("-"):
            raise ValueError(f"{first}: expected a command before its flags: {', '.join(COMMANDS)}")
        raise ValueError(f"{first}: no such command{meant(first, COMMANDS)}")
    except ValueError as error:
        end = "" if str(error).endswith("?") else "."
        _tell_error(f"{error}{end} See minopt {f'{first} ' if command else ''}--help.")
        raise SystemExit(2) from None


def _run(command: type[Command], given: dict[str, Any], debug: bool) -> int:
    """Runs a command, and says in one line what a user can mend; lets what is a bug go on."""
    if command.alone and os.environ.get("RANK", "0") != "0":
        return 0
    handler, logger = logging.Handler(), logging.getLogger("minopt")
    handler.emit = lambda record: tell(f"warning: {_in_flags(record.getMessage(), command)}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        code = fill(command, given).run(given) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        line = _explained(error, command, given)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        _tell_error(line, error)
        return 2
    finally:
        logger.removeHandler(handler)


def _tell_error(text: str, error: Exception | None = None) -> None:
    """One line of why a command ends, from the process whose error it is."""
    is_lost = error is not None and is_connection_lost(error)
    is_others = not is_lost and os.environ.get("RANK", "0") != str(getattr(error, "process", 0))
    if is_lost or is_others:
        time.sleep(5)  # torchrun ends this process before, and says which one has died; unless it is gone itself
    if is_others:
        return
    tell(f"error: {text}")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of which torchrun makes the end of its own report
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _explained(error: Exception, command: type[Command], given: Mapping[str, Any]) -> str | None:
    """One line for an error that a user can mend; ``None`` for a bug of minopt's."""
    if is_out_of_memory(error):
        where = f"process {error.process}: " if hasattr(error, "process") else ""
        return f"{where}not enough memory. Try {command.when_out_of_memory}."
    if is_connection_lost(error):
        reason = str(error).splitlines()[0][:200]
        return f"process {os.environ.get('RANK', '0')} has lost another one, which has died or is gone ({reason})."
    if not is_users(error):
        return None
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return _in_flags(" ".join(str(error).split("\n")), command)
    flags = [flag_of(f) for name, f in fields_of(command).items() if str(given.get(name)) == str(error.filename)]
    named = [*flags[:1], str(error.filename)] if error.filename is not None else []
    return ": ".join([*named, _SYSTEMS.get(error.errno, error.strerror)]) + "."


def _in_flags(text: str, command: type[Command]) -> str:
    """A message of the library with flags in place of Python's arguments: ``top_k must`` as ``--top-k must``."""
    flags = {name: flag_of(f) for name, f in fields_of(command).items()}

    def flag(match: re.Match[str]) -> str:
        name = match[0].removeprefix("--")
        return flags.get(name, match[0].replace("_", "-") if match[0].startswith("--") else name)

    text = re.sub(r"\b(\w+)=True\b", lambda match: flags.get(match[1], match[0]), text.removeprefix("generation: "))
    several = r"(?:--)?\b[a-z0-9]+(?:_[a-z0-9]+)+\b"
    return re.sub(rf"(?<![\w./\\'\"=-])(?:{several}|[a-z]+(?=: | must | acts ))(?![/\\'\"]|\.\w)", flag, text)

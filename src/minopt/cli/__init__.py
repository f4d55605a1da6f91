"""The command line: each command is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from minopt import __version__
from minopt.cli.checkpoints import Convert, Export, Inspect
from minopt.cli.evaluate import Evaluate
from minopt.cli.finetune import Finetune
from minopt.cli.flags import Command, fill, help_page, meant, parse
from minopt.cli.generate import Generate
from minopt.cli.messages import explained, tell_error, warnings_told
from minopt.cli.plan import Plan

_CLASSES: tuple[type[Command], ...] = (Generate, Convert, Export, Inspect, Plan, Finetune, Evaluate)
COMMANDS = {command.__name__.lower(): command for command in _CLASSES}

_ABOUT = """usage: minopt command [flags]

OPT language models in plain PyTorch. minopt COMMAND --help shows the flags of a command."""


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
    try:
        return _run(
            *_understood(words), debug="--debug" in words or os.environ.get("MINOPT_DEBUG", "0") not in ("", "0")
        )
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
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    first, program = words[0] if words else "", "minopt"
    try:
        if first in COMMANDS:
            program = f"minopt {first}"
            if {"-h", "--help"} & set(words[: words.index("--")] if "--" in words else words):
                print(help_page(COMMANDS[first]))
                raise SystemExit(0)
            return COMMANDS[first], parse(COMMANDS[first], words[1:])
        if first in ("", "-h", "--help", "--version"):
            listed = "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())
            page = f"minopt {__version__}" if first == "--version" else f"{_ABOUT}\n\ncommands:\n{listed}"
            print(page, file=sys.stdout if first else sys.stderr)
            raise SystemExit(0 if first else 2)
        if first.startswith("-"):
            raise ValueError(f"{first}: expected a command before its flags: {', '.join(COMMANDS)}")
        raise ValueError(f"{first}: no such command{meant(first, COMMANDS)}")
    except ValueError as error:
        end = "" if str(error).endswith("?") else "."
        tell_error(f"{error}{end} See {program} --help.")
        raise SystemExit(2) from None


def _run(command: type[Command], given: dict[str, Any], *, debug: bool) -> int:
    """Runs a command, and says in one line what a user can mend; lets what is a bug go on."""
    if command.alone and os.environ.get("RANK", "0") != "0":
        return 0
    try:
        with warnings_told(command):
            code = fill(command, given).run(given) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        line = explained(error, command, given)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        tell_error(line, error)
        return 2

"""The command line: each verb is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minopt import __version__
from minopt.cli.checkpoints import add_convert, add_inspect
from minopt.cli.common import tell, tell_error
from minopt.cli.errors import explained
from minopt.cli.evaluate import add_evaluate
from minopt.cli.export import add_export
from minopt.cli.finetune import add_finetune
from minopt.cli.generate import add_generate
from minopt.cli.parser import Parser
from minopt.cli.plan import add_plan
from minopt.errors import is_connection_lost


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
    args = argparse.Namespace()
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        if "alone" in args and os.environ.get("RANK", "0") != "0":
            return 0
        with _warnings_told(args.parser):
            code = args.run(args) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has had enough: `| head`
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _told(error, args)
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # said above, if it needs saying: what is left to write goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a verb, and its ``parser``. Ends the program if they make no sense."""
    parser = build_parser()
    verbs: dict[str, Parser] = next(a.choices for a in parser._actions if isinstance(a.choices, dict))
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    if words[0] == "--debug":
        words = [*words[1:], "--debug"]
    if words[0] in verbs:
        verb = verbs[words[0]]
        return argparse.Namespace(**vars(verb.parse_args(verb.spelt(words[1:]))), parser=verb)
    if words[0] not in ("-h", "--help", "--version"):
        parser.refuse_command(words[0], verbs)
    return parser.parse_args(words[:1])


def build_parser() -> Parser:
    """The parser of all verbs; each sets ``run``, the function that takes the parsed arguments."""
    parser = Parser(prog="minopt", description="OPT language models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minopt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="command")
    add_generate(verbs)
    add_convert(verbs)
    add_export(verbs)
    add_inspect(verbs)
    add_plan(verbs)
    add_finetune(verbs)
    add_evaluate(verbs)
    return parser


def _told(error: Exception, args: argparse.Namespace) -> int:
    """Says in one line what a user can mend; lets what is a bug go on."""
    line = explained(error, args)
    if line is None:
        raise
    if "debug" in args or os.environ.get("MINOPT_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    lost, first = is_connection_lost(error), str(getattr(error, "process", 0))
    if lost:
        time.sleep(5)  # for torchrun, which says who has died and ends the others; unless it is gone itself
    tell_error(args.parser.in_flags(line), says=lost or os.environ.get("RANK", "0") == first)
    return 2


@contextmanager
def _warnings_told(parser: Parser) -> Iterator[None]:
    """What the library logs, as lines that name flags."""
    handler = logging.Handler()
    handler.emit = lambda record: tell(f"warning: {parser.in_flags(record.getMessage())}")  # type: ignore[method-assign]
    logger = logging.getLogger("minopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)

"""The command line: each verb is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Sequence

from minopt import __version__
from minopt.cli.checkpoints import add_convert, add_inspect
from minopt.cli.common import tell
from minopt.cli.evaluate import add_evaluate
from minopt.cli.export import add_export
from minopt.cli.finetune import add_finetune
from minopt.cli.generate import add_generate
from minopt.cli.plan import add_plan

# What gloo and NCCL say of it.
_CONNECTION_LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|socket", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; ``None`` is ``sys.argv``'s.

    Returns:
        The exit code: 0; 1 where a check that was asked for has failed; 2 for what the user can mend (one line on
        stderr says what); 130 if interrupted.

    Raises:
        SystemExit: with 2 for wrong usage, with 0 for ``--help`` and ``--version``.
    """
    args = build_parser().parse_args(_hyphenated(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?", not a traceback
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # the reader has had enough: `| head`. What is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            tell(f"error: {error}")
        else:
            time.sleep(5)  # for torchrun, which ends the others with the first that ends: that one has to say it
        return 2
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1" and _CONNECTION_LOST.search(str(error)):
            time.sleep(5)  # for torchrun, which says who has died and ends the others; unless it is gone itself
            reason = str(error).splitlines()[0][:200]
            tell(f"error: process {os.environ.get('RANK')} has lost another one, which has died or is gone ({reason}).")
            return 2
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        tell(f"error: not enough memory. Try {args.when_out_of_memory}.")
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``run``, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="minopt", description="OPT language models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minopt {__version__}")
    parser.set_defaults(when_out_of_memory="--dtype bfloat16, or with --input a smaller --max-batch-tokens")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="command")
    add_generate(verbs)
    add_convert(verbs)
    add_export(verbs)
    add_inspect(verbs)
    add_plan(verbs)
    add_finetune(verbs)
    add_evaluate(verbs)
    return parser


def _hyphenated(arguments: Sequence[str]) -> list[str]:
    """``--max_new_tokens=3`` as ``--max-new-tokens=3``: either spelling works, up to a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = (argument.partition("=") for argument in arguments[:end])
    spelt = [(f.replace("_", "-") if f.startswith("--") else f) + equals + value for f, equals, value in flags]
    return spelt + list(arguments[end:])

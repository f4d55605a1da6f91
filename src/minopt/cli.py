"""The command line: each verb is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from minopt import DEMO, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; ``None`` is ``sys.argv``'s.

    Returns:
        The exit code: 0; 2 for what the user can mend (one line on stderr says what); 130 if interrupted.

    Raises:
        SystemExit: with 2 for wrong usage, with 0 for ``--help`` and ``--version``.
    """
    args = build_parser().parse_args(_hyphenated(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?", not a traceback
    try:
        args.run(args)
    except BrokenPipeError:  # the reader has had enough: `| head`. What is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        _tell(f"error: {error}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _tell("error: not enough memory for this model. Try --dtype bfloat16.")
        return 2
    return 0


def _tell(text: str) -> None:
    """One line on stderr, if there is one: where it is closed, print would take stdout."""
    if sys.stderr is not None:
        print(f"minopt: {text}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``run``, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="minopt", description="OPT language models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minopt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_generate(verbs)
    return parser


def _hyphenated(arguments: Sequence[str]) -> list[str]:
    """``--max_new_tokens=3`` as ``--max-new-tokens=3``: either spelling works, up to a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = (argument.partition("=") for argument in arguments[:end])
    spelt = [(f.replace("_", "-") if f.startswith("--") else f) + equals + value for f, equals, value in flags]
    return spelt + list(arguments[end:])


def _add_generate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "generate", help="continue a text", description="Continues a text, written as it comes.", allow_abbrev=False
    )
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", help='the text to continue, in quotes; "" starts from nothing')
    _add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=30, metavar="N", help="the most tokens to add (30)")
    parser.add_argument("--min-new-tokens", type=int, metavar="N", help="do not end before that many (0)")
    parser.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the most probable")
    parser.add_argument("--temperature", type=float, metavar="X", help="divide logits by it before drawing (1.0)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from that many most probable tokens (50)")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="draw from the fewest tokens that together have probability X (1.0)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the draws")
    parser.add_argument("--echo", action="store_true", help="write the prompt first")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="a folder, or a name such as facebook/opt-125m (default: the small model that minopt carries)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="use the hub's cache, ask nobody")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16, float16 or float64 (auto: float32 on a CPU, elsewhere the file's own)",
    )


def _generate(args: argparse.Namespace) -> None:
    from minopt.generation.config import GenerationConfig
    from minopt.language_model import load

    names = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    GenerationConfig().replace(**options)  # complain before a model is loaded or fetched
    if args.model is None and args.revision is not None:
        raise ValueError("--revision needs --model: the small demo model has no revisions.")
    if args.model is None:
        _tell("no --model given, using the small demo model (see minopt generate --help)")
    lm = load(
        args.model or DEMO,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        local_files_only=args.local_files_only,
    )
    pieces = lm.stream(args.prompt, **options)
    if args.echo:
        print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()

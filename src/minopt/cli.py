"""The command line: each verb is one call to the library. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from minopt import DEMO, __version__

_MODEL = "a folder, any one file of a checkpoint, or a name such as facebook/opt-125m"


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
        _tell(f"error: {error}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _tell("error: not enough memory for this model. Try --dtype bfloat16.")
        return 2


def _tell(text: str) -> None:
    """One line on stderr, if there is one: where it is closed, print would take stdout."""
    if sys.stderr is not None:
        print(f"minopt: {text}", file=sys.stderr)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``run``, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="minopt", description="OPT language models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minopt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_generate(verbs)
    _add_convert(verbs)
    _add_inspect(verbs)
    _add_evaluate(verbs)
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


def _add_convert(verbs: Any) -> None:
    parser = verbs.add_parser(
        "convert", help="write a checkpoint anew, as another kind", allow_abbrev=False,
        description="Reads a checkpoint of any kind (Hugging Face or metaseq: one file, parts, shards) and writes a "
        "Hugging Face folder, or metaseq's files.",
    )  # fmt: skip
    parser.set_defaults(run=_convert)
    parser.add_argument("source", help=_MODEL)
    parser.add_argument("destination", help="a folder, made if missing")
    parser.add_argument("--format", choices=("hf", "metaseq"), default="hf", help="what to write (hf)")
    parser.add_argument("--parts", type=int, default=1, metavar="N", help="metaseq's model parallel parts (1)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: as stored)")
    parser.add_argument("--max-shard-size", type=_size, default="2GB", metavar="SIZE",
                        help="the most that a safetensors file holds (2GB)")  # fmt: skip
    _add_reading_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace a model that is there")


def _add_inspect(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect", help="say what a checkpoint is", allow_abbrev=False,
        description="Says what a checkpoint is and whether it is complete. Exits with 1 if it cannot be loaded, or "
        "--check finds something.",
    )  # fmt: skip
    parser.set_defaults(run=_inspect)
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--check", action="store_true", help="scan values: not finite, beyond 100, all zero")
    parser.add_argument("--hash", action="store_true", help="digests that do not depend on how the file was saved")
    parser.add_argument("--json", action="store_true", help="write JSON")
    _add_reading_arguments(parser, with_tokenizer=False)


def _add_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "evaluate", help="compare a model with published numbers", allow_abbrev=False,
        description="Compares a model with published numbers. Exits with 0 only if all hold.",
    )  # fmt: skip
    parser.set_defaults(run=_evaluate)
    parser.add_argument("--task", choices=("reference",), required=True,
                        help="reference: the values in metaseq's and transformers' own tests of opt-125m and "
                        "opt-350m")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="write JSON")
    _add_model_arguments(parser, with_dtype=False)


def _add_reading_arguments(parser: argparse.ArgumentParser, with_tokenizer: bool = True) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="use the hub's cache, ask nobody")
    parser.add_argument(
        "--model-config",
        metavar="NAME_OR_JSON",
        help="a preset such as opt-1.3b, or a config.json, instead of what the checkpoint says",
    )
    if with_tokenizer:
        parser.add_argument(
            "--tokenizer", metavar="FOLDER", help="of its files (default: beside the weights, or one up)"
        )


def _size(text: str) -> int:
    """Bytes of "2GB", "500MB" or "1000"."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.rstrip("KMGBkmgb ")
    unit = text[len(number) :].strip().upper()
    if not number.replace(".", "", 1).isdecimal() or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 500MB, got {text!r}")
    return int(float(number) * units[unit])


def _add_model_arguments(parser: argparse.ArgumentParser, with_dtype: bool = True) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help=f"{_MODEL} (default: the small model that minopt carries)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    if with_dtype:
        parser.add_argument(
            "--dtype",
            default="auto",
            help="auto, float32, bfloat16, float16 or float64 (auto: float32 on a CPU, elsewhere the file's own)",
        )
    _add_reading_arguments(parser)


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
        model_config=args.model_config,
        tokenizer=args.tokenizer,
    )
    pieces = lm.stream(args.prompt, **options)
    if args.echo:
        print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _convert(args: argparse.Namespace) -> None:
    from minopt.checkpoint.convert import convert

    convert(
        args.source,
        args.destination,
        format=args.format,
        parts=args.parts,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        tokenizer=args.tokenizer,
        force=args.force,
        show_progress=_on_terminal(),
    )
    _tell(f"wrote {args.destination}")


def _inspect(args: argparse.Namespace) -> int:
    from minopt.checkpoint.inspect import inspect_checkpoint

    report = inspect_checkpoint(
        args.model,
        check=args.check,
        digest=args.hash,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        show_progress=_on_terminal(),
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.to_text(tensors=args.tensors))
    return 0 if report.is_sound else 1


def _evaluate(args: argparse.Namespace) -> int:
    from minopt.evaluation.reference import as_records, compare_with_published, format_table
    from minopt.language_model import load

    if args.model is None:
        raise ValueError("--model: published numbers exist for opt-125m and opt-350m. Name a checkpoint of one.")
    lm = load(
        args.model,
        device=args.device,
        dtype="float32",
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        tokenizer=args.tokenizer,
    )
    comparisons = compare_with_published(lm.model, lm.tokenizer)
    print(json.dumps(as_records(comparisons), indent=2) if args.json else format_table(comparisons))
    return 0 if all(comparison.passed for comparison in comparisons) else 1

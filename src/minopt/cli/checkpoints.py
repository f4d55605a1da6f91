"""``minopt convert`` and ``minopt inspect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from minopt.cli.common import MODEL, add_force, add_reading_arguments, size, tell


def add_convert(verbs: Any) -> None:
    parser = verbs.add_parser(
        "convert", help="convert a checkpoint to another format",
        description="Converts a checkpoint of any kind (Hugging Face or metaseq; one file, parts or shards) to a "
        "Hugging Face folder or to metaseq's files.",
    )  # fmt: skip
    parser.set_defaults(run=_convert, alone=True)
    parser.add_argument("source", help=MODEL)
    parser.add_argument("destination", help="the folder to write; it is created")
    parser.add_argument(
        "--format",
        choices=("hf", "metaseq"),
        default="hf",
        help="hf: a Hugging Face folder; metaseq: reshard.pt or its parts (hf)",
    )
    parser.add_argument(
        "--parts",
        type=int,
        default=1,
        metavar="N",
        help="with --format metaseq: the number of model parallel parts (1)",
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or float64 (auto: as stored)")
    parser.add_argument("--quantize", choices=("int8",), help="with --format hf: round the layers' weights to 8 bits")
    parser.add_argument("--max-shard-size", dest="max_shard_bytes", type=size, default="2GB", metavar="SIZE",
                        help="with --format hf: the largest file (2GB)")  # fmt: skip
    add_reading_arguments(parser)
    add_force(parser, "a model that is already in the destination")


def add_inspect(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect", help="show what a checkpoint is and whether it is complete",
        description="Shows what a checkpoint is and whether it is complete. The exit code is 1 if it cannot be loaded, "
        "or if --check finds something.",
    )  # fmt: skip
    parser.set_defaults(run=_inspect, alone=True)
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--tensors", action="store_true", help="list the tensors (--json always does)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all values: report those that are not finite or beyond 100, and tensors of zeros",
    )
    parser.add_argument("--hash", action="store_true", help="digests of the tensors, the same in every format")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    add_reading_arguments(parser, with_tokenizer=False)


def _convert(args: argparse.Namespace) -> None:
    from minopt.checkpoint.convert import convert

    convert(
        args.source,
        args.destination,
        format=args.format,
        parts=args.parts,
        dtype=args.dtype,
        quantize=args.quantize,
        max_shard_bytes=args.max_shard_bytes,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        ignore=args.ignore,
        tokenizer=args.tokenizer,
        force=args.force,
        show_progress=True,
    )
    tell(f"wrote {args.destination}")


def _inspect(args: argparse.Namespace) -> int:
    from minopt.checkpoint.inspect import inspect_checkpoint

    report = inspect_checkpoint(
        args.model,
        check=args.check,
        digest=args.hash,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        ignore=args.ignore,
        show_progress=True,
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.to_text(tensors=args.tensors))
    return 0 if report.is_sound else 1

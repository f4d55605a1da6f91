"""``minopt export``."""

from __future__ import annotations

import argparse
from typing import Any

from minopt.cli.common import MODEL, add_reading_arguments, tell


def add_export(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export", help="compile a model into a program that runs without it",
        description="Compiles a model with AOTInductor, checks that the program decodes as the model does, and writes "
        "it with the tokenizer's files into a folder, which minopt generate --model opens. Takes about a minute and "
        "needs a C++ compiler. The program runs with this version of torch, on processors like this one.",
    )  # fmt: skip
    parser.set_defaults(run=_export)
    parser.add_argument("model", help=MODEL)
    parser.add_argument("destination", help="a folder that is not there yet")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: float32 on a CPU)")
    parser.add_argument("--quantize", choices=("int8",), help="weights and inputs of linear layers in 8 bits (none)")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="the most tokens of a row, new ones included (the model's positions)")  # fmt: skip
    parser.add_argument("--max-batch", type=int, metavar="N", help="the most rows that run together (any number)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is to run (cpu)")
    add_reading_arguments(parser)


def _export(args: argparse.Namespace) -> None:
    from minopt.export import export_model

    export_model(
        args.model,
        args.destination,
        dtype=args.dtype,
        quantize=args.quantize,
        max_length=args.max_length,
        max_batch=args.max_batch,
        device=args.device,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        ignore=args.ignore,
        tokenizer=args.tokenizer,
    )
    tell(f"wrote {args.destination}")

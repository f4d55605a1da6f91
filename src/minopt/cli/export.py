"""``minopt export``."""

from __future__ import annotations

import argparse
from typing import Any

from minopt.cli.common import MODEL, add_force, add_reading_arguments, tell


def add_export(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export", help="compile a model into a program that runs without model code",
        description="Compiles a model with AOTInductor, checks that the program decodes as the model does, and writes "
        "it with the tokenizer's files to a folder that minopt generate --model opens. This takes about a minute and "
        "needs a C++ compiler. The program runs with this version of torch, on processors with the same instructions.",
    )  # fmt: skip
    parser.set_defaults(run=_export, alone=True)
    parser.add_argument("model", help=MODEL)
    parser.add_argument("destination", help="the folder to write; it is created")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: float32 on a CPU)")
    parser.add_argument("--quantize", choices=("int8",), help="compute linear layers with weights and inputs of 8 bits")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="the most tokens of a text, prompt and new ones (the model's positions)")  # fmt: skip
    parser.add_argument("--max-batch", type=int, metavar="N", help="the most texts that run together (any number)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the program runs (cpu)")
    add_reading_arguments(parser)
    add_force(parser, "a program or model that is already in the destination")


def _export(args: argparse.Namespace) -> None:
    from minopt.inference.compile import export_model

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
        force=args.force,
    )
    tell(f"wrote {args.destination}")

"""What several commands share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from minopt.progress import say

MODEL = "a folder, any one file of a checkpoint, or a name such as facebook/opt-125m"


def tell(text: str) -> None:
    """One line on stderr."""
    say(f"minopt: {text}")


def tell_error(text: str, *, says: bool) -> None:
    """One line on stderr of why a command ends, from the one process that ``says`` it."""
    if not says:
        time.sleep(5)  # for torchrun, which ends the others with the first that ends: that one has to say why
        return
    tell(f"error: {text}")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of which torchrun makes the end of its own report
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def size(text: str) -> int:
    """Bytes of "2GB", "1.5 GiB" or "500m". A number alone is refused: it may be meant as bytes or as gigabytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(?:([kmgt])(i?)b?|b|bytes)", text.strip().lower())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size above 0 with its unit, such as 16GB or 500MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2] or " ")))


def add_force(parser: Any, what: str) -> None:
    parser.add_argument("--force", action="store_true", help=f"replace {what}")


def check_output(output: Path, force: bool, remedy: str = "replace it with --force") -> None:
    """Refuses an ``--output`` that cannot or must not be written, before a model is loaded.

    Raises:
        OSError: saying which.
    """
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise IsADirectoryError(f"--output: expected a file, got a folder ({output}). Name a file in it.")
    if output.is_file() and not force:  # /dev/null may be written
        raise FileExistsError(f"--output: {output} is there already. Name another file, or {remedy}.")


def add_reading_arguments(parser: argparse.ArgumentParser, with_tokenizer: bool = True) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument(
        "--local-files-only", action="store_true", help="use only files that are already on this machine: no network"
    )
    parser.add_argument(
        "--model-config",
        metavar="NAME_OR_JSON",
        help="the configuration instead of the checkpoint's own: a preset such as opt-1.3b, or a config.json",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors of such a name in the files, for example v_head.* (more than once: several)",
    )
    if with_tokenizer:
        parser.add_argument(
            "--tokenizer",
            metavar="FOLDER",
            help="folder of the tokenizer's files (default: that of the weights, or the one above it)",
        )


def add_model_arguments(
    parser: argparse.ArgumentParser, default: str = "default: the small model in the package"
) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help=f"{MODEL} ({default})",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16, float16 or float64 (auto: float32 on a CPU, elsewhere the file's own)",
    )
    parser.add_argument(
        "--quantize", choices=("int8",), help="round the weights to 8 bits: a quarter of float32's bytes"
    )
    add_reading_arguments(parser)

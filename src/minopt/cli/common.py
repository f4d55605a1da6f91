"""What several commands share."""

from __future__ import annotations

import argparse

from minopt.progress import say

MODEL = "a folder, any one file of a checkpoint, or a name such as facebook/opt-125m"


def tell(text: str) -> None:
    """One line on stderr."""
    say(f"minopt: {text}")


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def size(text: str) -> int:
    """Bytes of "2GB", "500MB" or "1000"."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.rstrip("KMGBkmgb ")
    unit = text[len(number) :].strip().upper()
    if not number.replace(".", "", 1).isdecimal() or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 500MB, got {text!r}")
    return int(float(number) * units[unit])


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


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

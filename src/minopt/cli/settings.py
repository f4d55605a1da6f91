"""Flags that are fields of ``TrainingConfig``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from minopt.cli.common import true_or_false
from minopt.training.config import TrainingConfig

_GROUPS = {
    "output_dir": "what to do", "train_file": "data", "num_train_epochs": "optimisation", "fp16": "how to compute",
    "evaluation_strategy": "evaluation", "logging_steps": "what to write",
}  # fmt: skip

_VALUES = {"model_name_or_path": "NAME_OR_PATH", "output_dir": "FOLDER", "train_file": "FILE", "dev_file": "FILE"}
_FLAGS = {"model_name_or_path": "--model"}  # what the other verbs call it


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds flags for fields of ``TrainingConfig``; those that are not given are not set."""
    group: Any = parser
    for f in fields(TrainingConfig):
        if f.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[f.name])
        if f.name not in names:
            continue
        assert isinstance(f.type, str)
        kind = f.type.removesuffix(" | None")
        options: dict[str, Any] = {"type": {"int": int, "float": float, "bool": true_or_false}.get(kind, str)}
        options["metavar"] = {"int": "N", "float": "X", "bool": "true|false"}.get(kind, _VALUES.get(f.name, "TEXT"))
        if kind == "bool":
            options |= {"nargs": "?", "const": True}
        if f.metadata["choices"]:
            options["metavar"] = "|".join(f.metadata["choices"])  # which TrainingConfig checks
        said = f.default in (None, "", False, MISSING) or f.metadata["help"].endswith(")")
        default = "" if said else f" ({str(f.default).lower()})"
        text = _hyphenated(f.metadata["help"]).replace("%", "%%") + default
        flag = _FLAGS.get(f.name, f"--{f.name.replace('_', '-')}")
        group.add_argument(flag, dest=f.name, help=text, default=argparse.SUPPRESS, **options)


def _hyphenated(text: str) -> str:
    return re.sub(r"--\w+", lambda match: match[0].replace("_", "-"), text)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``TrainingConfig`` that flags have set."""
    names = {f.name for f in fields(TrainingConfig)}
    return {name: value for name, value in vars(args).items() if name in names}

"""Flags that are fields of ``TrainingConfig``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from minopt.cli.common import true_or_false
from minopt.training.config import TrainingConfig

_GROUPS = {
    "output_dir": "what", "train_file": "data", "num_train_epochs": "optimisation", "fp16": "how it runs",
    "evaluation_strategy": "evaluation", "logging_steps": "what is written",
}  # fmt: skip

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
        options["metavar"] = {"int": "N", "float": "X", "bool": "true|false"}.get(kind, "TEXT")
        if kind == "bool":
            options |= {"nargs": "?", "const": True}
        if f.metadata["choices"]:
            options["metavar"] = "|".join(f.metadata["choices"])  # which TrainingConfig checks
        said = f.default in (None, "", False, MISSING) or f.metadata["help"].endswith(")")
        default = "" if said else f" ({str(f.default).lower()})"
        text = f.metadata["help"].replace("%", "%%") + default
        flag = _FLAGS.get(f.name, f"--{f.name.replace('_', '-')}")
        group.add_argument(flag, dest=f.name, help=text, default=argparse.SUPPRESS, **options)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``TrainingConfig`` that flags have set."""
    names = {f.name for f in fields(TrainingConfig)}
    return {name: value for name, value in vars(args).items() if name in names}

"""Views and adapters for other programs, a file each; their packages are imported only where a file here is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "as_hf":
        raise AttributeError(f"module 'minopt.interop' has no attribute {name!r}")
    return import_module("minopt.interop.hf").as_hf


def need(package: str, extra: str) -> Any:
    """Imports another program's package; ``ValueError`` with the line that installs it if it is missing."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise ValueError(
            f"{package}: expected to find it, it is not installed. pip install 'minopt[{extra}]'."
        ) from None

"""Counts the functions through which data goes on three walks: ``python tests/count_calls.py``.

The walks are: a prompt to its text (one greedy token; the model is loaded already); a metaseq shard to the parameters
of a model; a SQuAD question to its gradient (one step).

A function or method of minopt counts if data goes through it: a text, ids, a file's path or a tensor is among its
arguments, alone or in a list or a dataclass, and it returns something. It counts once, however often it is entered: a
layer counts as much as all layers. Checks, which return nothing or only whether a thing is so, do not count; nor do
properties, functions inside of functions and what Python generates, such as the ``__init__`` of a dataclass.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import minopt

PACKAGE = str(Path(minopt.__file__).parent)
LIMITS = {"prompt to text": 25, "shard to parameter": 14, "question to gradient": 18}


def is_data(value: object, depth: int = 3) -> bool:
    """Whether a value is data of the walk or holds some."""
    if isinstance(value, (str, Path, torch.Tensor)):
        return True
    if depth == 0 or isinstance(value, torch.nn.Module):
        return False
    if isinstance(value, dict):
        return any(is_data(item, depth - 1) for item in list(value.values())[:3])
    if isinstance(value, (list, tuple)):
        return bool(value) and (is_data(value[0], depth - 1) or all(type(item) is int for item in value))
    if dataclasses.is_dataclass(value):
        return any(isinstance(getattr(value, f.name), torch.Tensor) for f in dataclasses.fields(value))
    return False


def entered(walk: Callable[[], Any]) -> list[str]:
    """The functions of minopt through which data goes, in the order in which they return first."""
    found: dict[str, None] = {}
    given: dict[int, bool] = {}

    def look(frame: FrameType, event: str, result: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        if "<" in code.co_qualname or not code.co_flags & 0x2:  # inside of a function; the body of a class or module
            return
        if event == "call":
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x4)]
            given[id(frame)] = any(is_data(frame.f_locals.get(name)) for name in names)
        elif given.get(id(frame)) and result is not None and not isinstance(result, bool):
            found.setdefault(f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}")

    sys.setprofile(look)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return list(found)


def prompt_to_text() -> Callable[[], Any]:
    lm = minopt.load(minopt.DEMO, device="cpu")
    return lambda: lm.generate("The sea", max_new_tokens=1)


WALKS: dict[str, Callable[[], Callable[[], Any]]] = {"prompt to text": prompt_to_text}

if __name__ == "__main__":
    for name, prepare in WALKS.items():
        functions = entered(prepare())
        print(f"{name}: {len(functions)} functions of {len({f.split(':')[0] for f in functions})} files")
        print("\n".join("    " + f for f in functions))

"""Counts the functions through which data goes on three walks: ``python -m tests.count_calls``.

The walks are: a prompt to its text (one greedy token; the model is loaded already); the shards of a metaseq checkpoint
to the parameters of a model; a SQuAD question in a file to its gradient (one step).

A function or method of minopt counts if data goes through it: it is given the text, ids, an example, a path or a
tensor, alone or in a list or a dataclass, and it returns such data. It counts once, however often it is entered: one
layer counts as much as all layers. Not counted are checks, decisions, properties, functions inside of functions, and
what Python generates, such as the ``__init__`` of a dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

import minopt
from tests.checkpoint.metaseq_files import write_metaseq
from tests.conftest import build_reference

PACKAGE = str(Path(minopt.__file__).parent)
LIMITS = {"prompt to text": 25, "shard to parameter": 14, "question to gradient": 18}


class _Ended(BaseException):
    """A walk has come to its gradient."""


PROMPT, QUESTION = "The sea", "Who are you?"


def is_data(value: object, depth: int = 3) -> bool:
    """Whether a value is data of the walk or holds some."""
    if isinstance(value, (Path, torch.Tensor, minopt.Example)):
        return True
    if isinstance(value, str):
        return PROMPT in value or QUESTION in value
    if depth == 0 or isinstance(value, torch.nn.Module):
        return False
    if isinstance(value, dict):
        return any(is_data(item, depth - 1) for item in list(value.values())[:3])
    if isinstance(value, (list, tuple)):
        return bool(value) and (is_data(value[0], depth - 1) or all(type(item) is int for item in value))
    if dataclasses.is_dataclass(value):
        return any(is_data(getattr(value, f.name, None), depth - 1) for f in dataclasses.fields(value))
    return False


def entered(walk: Callable[[], Any]) -> list[str]:
    """The functions of minopt through which data goes, in the order in which they return first."""
    found: dict[str, None] = {}
    given: dict[int, bool] = {}
    properties = {
        getattr(item.fget, "__code__", None)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("minopt")
        for kind in vars(module).values()
        if isinstance(kind, type)
        for item in vars(kind).values()
        if isinstance(item, property) and hasattr(item.fget, "__code__")
    }

    def look(frame: FrameType, event: str, result: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE) or code in properties:
            return
        if "<" in code.co_qualname or not code.co_flags & 0x2:  # inside of a function; the body of a class or module
            return
        if event == "call":
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x4)]
            given[id(frame)] = any(is_data(frame.f_locals.get(name)) for name in names)
        elif given.get(id(frame)) and (ended or is_data(result)):
            found.setdefault(f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}")

    ended: list[bool] = []

    def end(*args: object, **options: object) -> None:
        ended.append(True)
        raise _Ended

    sys.setprofile(look)
    try:
        with mock.patch.object(torch.Tensor, "backward", end), contextlib.suppress(_Ended):
            walk()
    finally:
        sys.setprofile(None)
    return list(found)


def prompt_to_text(folder: Path) -> Callable[[], Any]:
    lm = minopt.load(minopt.DEMO, device="cpu")
    lm.generate("The land", max_new_tokens=1)  # what is made once
    return lambda: lm.generate(PROMPT, max_new_tokens=1)


def shard_to_parameter(folder: Path) -> Callable[[], Any]:
    write_metaseq(folder / "shards", build_reference("125m"), shards=2)
    return lambda: minopt.load_model(folder / "shards", device="cpu")


def question_to_gradient(folder: Path) -> Callable[[], Any]:
    question = {"question": QUESTION, "answers": [{"text": "I", "answer_start": 0}], "id": "1"}
    data = {"data": [{"title": "x", "paragraphs": [{"context": "I am.", "qas": [question]}]}]}
    (folder / "squad.json").write_text(json.dumps(data), encoding="utf-8")
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    config = minopt.TrainingConfig(output_dir=str(folder / "run"), max_steps=1)
    return lambda: minopt.train(lm.model, minopt.read_data(folder / "squad.json"), config, tokenizer=lm.tokenizer)


WALKS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "prompt to text": prompt_to_text,
    "shard to parameter": shard_to_parameter,
    "question to gradient": question_to_gradient,
}

if __name__ == "__main__":
    for name, prepare in WALKS.items():
        with tempfile.TemporaryDirectory() as place:
            functions = entered(prepare(Path(place)))
        files = {function.split(":")[0] for function in functions}
        print(f"{name}: {len(functions)} functions of {len(files)} files, at most {LIMITS[name]} are wanted")
        print("\n".join("    " + function for function in functions))

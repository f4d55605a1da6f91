"""The folder of a run: who may use it, which settings it was begun with, and what it has measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minopt.atomic import replacing, write_text
from minopt.checkpoint.errors import some
from minopt.config import read_json
from minopt.training.config import differences

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

SETTINGS = "run.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
MODEL = ".model.saving"  # where the model is written before it takes its place in the run's folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder, and holds it against other runs until the block ends or the process dies.

    Raises:
        OSError: if it cannot be made, or a run holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output_dir: expected a folder, got {folder}, a file. Name another.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OSError(
                    f"--output_dir: {folder} is in use by a run that is alive (process {file.read().strip()}). "
                    "Wait for it, or name another folder."
                ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_settings(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuses a folder that holds another run, or no run but something else.

    Args:
        folder: of the run to be.
        record: see ``check_same``.

    Raises:
        ValueError: naming the settings that differ.
        FileExistsError: if there are files that are no run's.
    """
    if (folder / SETTINGS).is_file():
        check_same(folder, read_json(folder / SETTINGS), record)
        return
    others = sorted(path.name for path in _of_a_run(folder))
    if others:
        raise FileExistsError(
            f"--output_dir: {folder} holds files that are no run's: {some(others)}. Name another folder."
        )


def check_unfinished(folder: Path) -> None:
    """Refuses to begin a run anew that is finished and has kept no checkpoint.

    Raises:
        FileExistsError: saying so.
    """
    record = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if "finished" in record:
        raise FileExistsError(
            f"--output_dir: {folder} holds a run that has finished after step {record['finished']} and kept no "
            "checkpoint to go on from. Name another folder, or use --resume never to put that run aside."
        )


def link_same(file: Path, other: Path) -> None:
    """Makes ``other``, which has the same content, a second name of a file; where the disk cannot, it stays a copy."""
    with contextlib.suppress(OSError), replacing(other) as new:
        os.link(file, new)


def check_same(where: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuses to take two runs for one.

    Args:
        where: of the other run or its checkpoint, for the message.
        theirs, mine: ``settings`` as ``TrainingConfig.to_dict`` gives them, and ``data``, a digest.

    Raises:
        ValueError: naming the settings that differ.
    """
    found = differences(mine["settings"], theirs.get("settings", {}))
    if not found and theirs.get("data") != mine["data"]:
        found = ["the training data or the tokenizer are others"]
    if found:
        raise ValueError(
            f"--output_dir: {where} holds a run with other settings: {'; '.join(found)}. Name another folder, or use "
            "--resume never to put that run aside."
        )


def set_aside(folder: Path) -> Path | None:
    """Moves all that a run has left into a folder of its own within, and says where; ``None`` if there is no run."""
    if not (folder / SETTINGS).is_file():
        return None
    number = 1
    while (folder / f"before-{number}").exists():
        number += 1
    aside = folder / f"before-{number}"
    aside.mkdir()
    for path in sorted(_of_a_run(folder), key=lambda path: path.name == SETTINGS):  # last: it can be done again
        path.rename(aside / path.name)
    return aside


def overwrite(folder: Path) -> None:
    """Removes what a run, or a model, has left in a folder, and nothing else."""
    for name in (CHECKPOINTS, BEST, "config.json", "model*.safetensors*", PREDICTIONS, METRICS, SETTINGS):
        for path in folder.glob(name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while writing has left."""
    for name in (SETTINGS, METRICS, PREDICTIONS, MODEL, BEST):
        for path in folder.glob(f".{name}.*.saving"):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / MODEL, ignore_errors=True)


def _of_a_run(folder: Path) -> list[Path]:
    """All but the lock, and runs that were put aside."""
    return [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("before-")]


def begin_metrics(folder: Path, step: int, evaluated: int) -> None:
    """Drops lines of ``metrics.jsonl`` that a run will write again.

    Args:
        folder: of the run.
        step: how many steps are done.
        evaluated: how many were at the last evaluation.
    """
    path = folder / METRICS
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _is_kept(line, step, evaluated)))


def _is_kept(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= (evaluated if "eval_loss" in record else step)
    except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
        return False


def add_metrics(folder: Path, record: Mapping[str, float]) -> None:
    """Adds a line to ``metrics.jsonl``; what is no finite number is null there, as JSON has it."""
    written = {name: value if math.isfinite(value) else None for name, value in record.items()}
    try:
        with (folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**written, "time": round(time.time(), 6)}) + "\n")
    except OSError as error:
        raise OSError(f"{folder / METRICS}: cannot be written ({error.strerror}). Is the disk full?") from None

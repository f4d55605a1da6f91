"""Checkpoints of a run: each complete or invisible, read by any number of processes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minopt.atomic import flush, write_text
from minopt.checkpoint.errors import first_line
from minopt.config import read_json
from minopt.distributed import World

_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.json"  # written last


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder, ``step-00000120`` and the like.

    Each holds the model and the optimizer as torch.distributed.checkpoint writes them, a file a process, and a
    ``state.json``. It is written under a hidden name and renamed when all of it is on the disk.
    """

    folder: Path
    world: World

    def latest(self) -> Path | None:
        """The checkpoint of the most steps."""
        steps = self._steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Writes a checkpoint, or the state alone of one that is there; every process has to call it.

        Args:
            step: how many steps are done.
            module: the model, wrapped or not.
            optimizer: its.
            state: what else there is, as JSON takes it.

        Raises:
            OSError: if it cannot be written; earlier ones are as they were.
        """
        path = self.path(step)
        new = path.with_name(f".{path.name}.saving")
        if self.world.gather(path.exists())[0]:
            self.world.first(lambda: write_text(path / _STATE, _as_text(state)))
            return
        try:
            self.world.first(lambda: _make_empty(new))
            self._write(new, module, optimizer)
            self.world.first(lambda: _publish(new, path, state))
        except OSError as error:
            self.world.first(lambda: shutil.rmtree(new, ignore_errors=True))
            raise OSError(
                f"{path}: cannot be written ({error}). Is the disk full? Earlier checkpoints are whole."
            ) from None

    def _write(self, folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        error: OSError | None = None
        try:
            with _quietly():
                save(_state(module, optimizer), checkpoint_id=folder, no_dist=self.world.size == 1)
        except (CheckpointException, OSError, RuntimeError) as e:
            error = OSError(_reason(e))
        self.world.agree(error)

    def load(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fills a model and its optimizer, in place; every process has to call it.

        Raises:
            ValueError: if the checkpoint is not of such a model, or damaged.
        """
        state = _state(module, optimizer)
        error: ValueError | None = None
        try:
            if not (path / ".metadata").is_file():  # the library would write pages about it
                raise ValueError("there is no .metadata in it")
            with _quietly():
                load(state, checkpoint_id=path, no_dist=self.world.size == 1)
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as e:
            error = ValueError(f"{path}: cannot be read into this model ({_reason(e)}). Use another checkpoint.")
        self.world.agree(error)
        set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def remove_old(self, keep_last: int, best_step: int | None) -> None:
        """Removes all but the last few and the best; a run that goes on needs one."""
        for step in self._steps()[: -max(1, keep_last)]:
            if step != best_step:
                _remove(self.path(step))

    def remove_later(self, path: Path) -> None:
        """Removes the checkpoints behind one, which a run that goes on from there writes again."""
        for step in self._steps():
            if self.path(step) > path:
                _remove(self.path(step))

    def remove_unfinished(self) -> None:
        """Removes what a crash has left."""
        for path in self.folder.glob(".step-*.*ing"):
            shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*") if (path / _STATE).is_file())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint after some steps is, or would be."""
        return self.folder / f"step-{step:08}"


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    if not (path / _STATE).is_file():
        raise ValueError(f"--resume: expected auto, never or the folder of a checkpoint, got {path}. Name another.")
    return read_json(path / _STATE)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not optimizer.state:  # the library fills it by a step that changes nothing, but counts
        get_state_dict(module, optimizer)
        for values in optimizer.state.values():
            values["step"].zero_()
    model, optim = get_state_dict(module, optimizer)
    return {"model": model, "optimizer": optim}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's remark that a single process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove(path: Path) -> None:
    # Renamed first: what a crash leaves half removed must not be taken for a checkpoint.
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.removing")), ignore_errors=True)


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _publish(new: Path, path: Path, state: dict[str, Any]) -> None:
    (new / _STATE).write_text(_as_text(state), encoding="utf-8")
    flush(new / _STATE)
    new.rename(path)
    flush(path.parent)


def _as_text(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=1) + "\n"


def _reason(error: BaseException) -> str:
    """The first cause on any process: the library's own message is pages long."""
    if isinstance(error, CheckpointException):
        for failure in error.failures.values():
            return first_line(failure[0])[:200]
    return first_line(error)[:200]

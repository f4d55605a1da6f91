"""The folder of a run: who uses it, its settings and metrics, its checkpoints; and the signals that stop a run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minopt.atomic import flush, replacing, write_text
from minopt.checkpoint.errors import first_line, some
from minopt.config import read_json
from minopt.distributed import World
from minopt.training.config import differences

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SETTINGS, METRICS, PREDICTIONS, CHECKPOINTS, BEST = (
    "run.json", "metrics.jsonl", "predictions.json", "checkpoints", "best"
)  # fmt: skip
MODEL = ".model.saving"  # where the model is written before it takes its place in the run's folder
# What a run leaves besides, by any method; other files in its folder are the user's.
_RESULTS = ("config.json", "adapter_config.json", "model*.safetensors*", "adapter_model.safetensors", "mezo.jsonl")
_STATE = "state.json"  # of a checkpoint; written last
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is in a checkpoint


class RunFolder:
    """The folder of a run, with checkpoints such as ``checkpoints/step-00000120``.

    All processes of the run use the same one: all call ``save`` and ``load``, and the first one alone all else.
    """

    def __init__(self, path: str | Path, world: World) -> None:
        self.path, self.world = Path(path).expanduser().resolve(), world
        self.checkpoints = self.path / CHECKPOINTS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and holds it against other runs until the block ends or the process dies."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"--output_dir: expected a folder, got {self.path}, a file. Name another.")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OSError(
                    f"--output_dir: {self.path} is in use by a run that is alive (process {file.read().strip()}). "
                    "Wait for it, or name another folder."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def claim(self, record: Mapping[str, Any], resume: str, *, overwrite: bool) -> Path | None:
        """Makes the folder ready for a run, and finds the checkpoint from which it goes on, if there is one.

        ``record`` has ``settings`` as ``TrainingConfig.to_dict`` gives them, and ``data``, a digest; ``resume`` and
        ``overwrite`` are as in the settings.

        Raises:
            ValueError: if the folder or the checkpoint is of a run with other settings.
            FileExistsError: if the folder holds files that are no run's, or a finished run without a checkpoint.
        """
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, after a process died
        self._remove(".*.saving", f"{BEST}/.*.saving", f"{CHECKPOINTS}/.*.*ing")  # of a process that was killed
        if overwrite and not restarted:
            self._remove(CHECKPOINTS, BEST, *_RESULTS, PREDICTIONS, METRICS, SETTINGS)
        elif resume == "never" and not restarted:
            self._set_aside()
        theirs = read_json(self.path / SETTINGS) if (self.path / SETTINGS).is_file() else None
        if theirs is not None:
            _check_same(self.path, theirs, record)
        elif not overwrite and (others := [path.name for path in self._content()]):
            raise FileExistsError(
                f"--output_dir: {self.path} holds files that are no run's: {some(others)}. Name another folder."
            )
        found = self._start(resume, restarted)
        if found is not None:
            _check_same(found, read_state(found), record)
        elif theirs is not None and "finished" in theirs:
            raise FileExistsError(
                f"--output_dir: {self.path} holds a run that has finished after step {theirs['finished']} and kept no "
                "checkpoint to go on from. Name another folder, or use --resume never to put that run aside."
            )
        return found

    def _start(self, resume: str, restarted: bool) -> Path | None:
        """The checkpoint to go on from: that of another run only until this one has its own."""
        own = self.latest()
        if resume in ("auto", "never") or (restarted and own is not None):
            return own
        path = Path(resume).expanduser()
        path = RunFolder(path, self.world).latest() or path
        read_state(path)
        if path.resolve().parent == self.checkpoints:  # the run writes the later ones again
            for step in self.steps():
                if self.checkpoint(step) > path.resolve():
                    _remove_whole(self.checkpoint(step))
            return path
        if own is not None:
            logger.warning("--resume %s: this run goes on from %s, its own.", path, own)
        return own or path

    def _content(self) -> list[Path]:
        """All but the lock and runs that were put aside; the settings last, so that moving can be repeated."""
        found = (path for path in self.path.iterdir() if path.name != ".lock" and not path.name.startswith("before-"))
        return sorted(found, key=lambda path: (path.name == SETTINGS, path.name))

    def _set_aside(self) -> None:
        """Moves all that a run has left into a folder of its own within."""
        if not (self.path / SETTINGS).is_file():
            return
        aside = next(p for n in count(1) if not (p := self.path / f"before-{n}").exists())
        aside.mkdir()
        for path in self._content():
            path.rename(aside / path.name)
        logger.warning("--resume never: the run that was in %s is now in %s.", self.path, aside)

    def _remove(self, *patterns: str) -> None:
        for path in (path for pattern in patterns for path in self.path.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes the settings or the predictions."""
        write_text(self.path / name, json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    def trim_metrics(self, step: int, evaluated: int) -> None:
        """Drops the lines that a run will write again: those after ``step``, or after the ``evaluated`` one."""

        def is_kept(line: str) -> bool:
            try:
                record = json.loads(line)
                return record["step"] <= (evaluated if "eval_loss" in record else step)
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                return False

        path = self.path / METRICS
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(filter(is_kept, lines)))

    def add_metrics(self, record: Mapping[str, float]) -> None:
        """Adds a line; what is no finite number is null there, as JSON has it."""
        written = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.add_line(METRICS, {**written, "time": round(time.time(), 6)})

    def add_line(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds a line to a file."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror}). Is the disk full?") from None

    def publish(self, *, is_best: bool) -> None:
        """Moves the model out of its ``MODEL`` folder; config.json comes last, and makes the run's a model's folder.

        If ``best`` holds the same model, its files become second names of these.
        """
        for path in sorted((self.path / MODEL).iterdir(), key=lambda path: path.name in _RESULTS[:2]):
            twin = self.path / BEST / path.name
            if is_best and twin.is_file():
                with contextlib.suppress(OSError), replacing(twin) as new:  # where the disk has no links, a copy stays
                    os.link(path, new)
            path.replace(self.path / path.name)
        (self.path / MODEL).rmdir()

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after some steps, which may not exist yet."""
        return self.checkpoints / f"step-{step:08}"

    def steps(self) -> list[int]:
        """After how many steps there are checkpoints."""
        found = (re.fullmatch(r"step-(\d{8})", path.parent.name) for path in self.checkpoints.glob(f"step-*/{_STATE}"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Path | None:
        """The checkpoint of the most steps."""
        return max(map(self.checkpoint, self.steps()), default=None)

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint, or the state alone of one that is there.

        It holds model and optimizer as torch.distributed.checkpoint writes them, a file a process, and what else there
        is as state.json. It is written under a hidden name and renamed when all of it is on the disk: after an
        ``OSError`` earlier checkpoints are as they were.
        """
        path, text = self.checkpoint(step), json.dumps(state, indent=1) + "\n"
        if self.world.first(path.exists):
            self.world.first(lambda: write_text(path / _STATE, text))
            return
        new = path.with_name(f".{path.name}.saving")

        def write() -> None:
            with _one_line(OSError, "{}"):
                save(_tensors(module, optimizer), checkpoint_id=new, no_dist=self.world.size == 1)

        def publish() -> None:
            (new / _STATE).write_text(text, encoding="utf-8")
            flush(new / _STATE)
            new.rename(path)
            flush(path.parent)

        try:
            self.world.first(lambda: new.mkdir(parents=True))
            self.world.each(write)
            self.world.first(publish)
        except OSError as error:
            self.world.first(lambda: shutil.rmtree(new, ignore_errors=True))
            raise OSError(
                f"{path}: cannot be written ({error}). Is the disk full? Earlier checkpoints are whole."
            ) from None

    def load(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Fills a model and its optimizer, in place; ``ValueError`` if the checkpoint is not of such a one."""
        tensors = _tensors(module, optimizer)

        def read() -> None:
            with _one_line(ValueError, f"{path}: cannot be read into this model ({{}}). Use another checkpoint."):
                if not (path / ".metadata").is_file():  # the library would write pages about it
                    raise ValueError("there is no .metadata in it")
                load(tensors, checkpoint_id=path, no_dist=self.world.size == 1)

        self.world.each(read)
        set_state_dict(
            module, optimizer or (), model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"],
            options=_TRAINED,
        )  # fmt: skip

    def remove_old(self, keep_last: int, best_step: int) -> None:
        """Removes all checkpoints but the last few and the best; a run that goes on needs one."""
        for step in self.steps()[: -max(1, keep_last)]:
            if step != best_step:
                _remove_whole(self.checkpoint(step))


def _check_same(where: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuses to take two runs for one. For both records see ``RunFolder.claim``."""
    found = differences(mine["settings"], theirs.get("settings", {}))
    if not found and theirs.get("data") != mine["data"]:
        found = ["the training data or the tokenizer are others"]
    if found:
        raise ValueError(
            f"--output_dir: {where} holds a run with other settings: {'; '.join(found)}. Name another folder, or use "
            "--resume never to put that run aside."
        )


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint. Raises ``ValueError`` if there is none."""
    if not (path / _STATE).is_file():
        raise ValueError(f"--resume: expected auto, never or the folder of a checkpoint, got {path}. Name another.")
    return read_json(path / _STATE)


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if optimizer is not None and not optimizer.state:  # the library fills it by a step that changes nothing, but counts
        get_state_dict(module, optimizer)
        for values in optimizer.state.values():
            values["step"].zero_()
    model, optim = get_state_dict(module, optimizer or (), options=_TRAINED)
    return {"model": model, "optimizer": optim}


@contextmanager
def _one_line(kind: type[Exception], message: str) -> Iterator[None]:
    """Makes one line of what torch.distributed.checkpoint says; its own messages are pages long."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is alone
            yield
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        causes = error.failures.values() if isinstance(error, CheckpointException) else ()  # of each process
        reason = first_line(next((cause for cause, _ in causes), error))
        raise kind(message.format(reason[:200])) from None


def _remove_whole(path: Path) -> None:
    # Renamed first: what a crash leaves half removed must not be taken for a checkpoint.
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.removing")), ignore_errors=True)


class Signals:
    """SIGTERM and SIGINT, noted instead of ending the process until the block ends. A second one acts as usual.

    Within 5 seconds it is no second one: where a terminal or a scheduler signals all processes, torchrun repeats it.
    """

    received = 0  # the number of the first one

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not in the main thread: there are no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > 5:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Checkpoints of a run: whole or invisible, whatever happens while they are written or removed."""

from __future__ import annotations

import errno
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minopt.training import checkpoint, trainer
from minopt.training.evaluation import EvaluationResult
from tests.training.test_resume import Patch, Runs, kill, rank, signal_at

LAST = 12
SETTINGS = {
    "dropout": 0,
    "max_steps": LAST,
    "save_steps": 3,
    "keep_last": 2,
}  # the save of step 9 removes the checkpoint of step 3


# What the processes do


def while_saving(step: int, act: Patch, of: int = 0) -> None:
    """Has a process do something when it begins to write a checkpoint."""
    original = checkpoint.Checkpoints.save

    def save(self: Any, at: int, *args: Any) -> Path:
        if at == step and rank() == of:
            act()
        return original(self, at, *args)

    checkpoint.Checkpoints.save = save  # type: ignore[method-assign]


def while_writing_a_model(name: str, act: Patch) -> None:
    """The same, when it begins to write a model."""
    original = trainer._Run._save_model

    def save_model(self: Any, folder: Path) -> None:
        if folder.name == name:
            act()
        original(self, folder)

    trainer._Run._save_model = save_model  # type: ignore[method-assign]


def fail_in(call: str, number: int, after: bool = False, error: int | None = None) -> None:
    """From now on, the n-th call of a function of ``os`` kills the process, or fails like all behind it."""
    original, calls = getattr(os, call), []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        due = len(calls) == number if error is None else len(calls) >= number
        if due and error is not None:
            raise OSError(error, os.strerror(error))
        if due and not after:
            kill()
        result = original(*args, **options)
        if due:
            kill()
        return result

    setattr(os, call, wrapped)


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def scores(*first: float) -> None:
    """The scores of the evaluations of a process; 1 when there are no more."""
    left = list(first)

    def evaluate(*args: Any, **options: Any) -> EvaluationResult:
        return EvaluationResult({"loss": 1.0}, left.pop(0) if left else 1.0, {})

    trainer.evaluate = evaluate


# How tests see it


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs, one of which, ``whole``, nothing has happened to."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    assert runs("whole", **SETTINGS).code == 0
    assert runs.steps("whole") == [9, LAST]
    return runs


@pytest.mark.parametrize(
    ("call", "number", "after", "found"),
    [
        ("fsync", 1, False, 6),  # tensors are
        ("rename", 1, True, 6),  # what torch says about them is
        ("fsync", 3, False, 6),  # state.json has no name yet
        ("rename", 2, False, 6),  # all is there, under a hidden name
        ("rename", 2, True, 9),
        ("rename", 3, True, 9),  # the old one is to be removed
        ("unlink", 2, True, 9),  # half of it is
    ],
)
def test_a_run_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    runs: Runs, call: str, number: int, after: bool, found: int
) -> None:
    name = f"{call}-{number}-{after}"
    assert runs(name, partial(while_saving, 9, partial(fail_in, call, number, after)), **SETTINGS).code == -9
    assert runs.steps(name)[-1] == found
    ended = runs(name, **SETTINGS)
    assert ended.code == 0, ended.said
    assert f"after step {found}\n" in ended.said[0]
    runs.assert_same(name, "whole")


@pytest.mark.parametrize(
    ("call", "number", "after"),
    [("fsync", 1, False), ("replace", 1, True), ("replace", 4, True), ("rmdir", 2, False)],
)  # fmt: skip
def test_a_run_killed_while_it_writes_its_model_writes_it_when_started_again(
    runs: Runs, call: str, number: int, after: bool
) -> None:
    name = f"model-{call}-{number}"
    patch = partial(while_writing_a_model, ".model.saving", partial(fail_in, call, number, after))
    assert runs(name, patch, **SETTINGS).code == -9
    ended = runs(name, **SETTINGS)
    assert ended.code == 0, ended.said
    runs.assert_same(name, "whole")
    kept = {path.name for path in (runs.folder / name).iterdir()}
    assert kept == {path.name for path in (runs.folder / "whole").iterdir()}


@pytest.mark.parametrize(
    ("name", "failing", "size", "of"),
    [
        ("tensors", no_large_files, 1, 0),
        ("tensors of the second", no_large_files, 2, 1),
        ("folder", partial(fail_in, "mkdir", 1, error=errno.ENOSPC), 2, 0),
        ("state", partial(fail_in, "fsync", 3, error=errno.ENOSPC), 1, 0),
        ("name", partial(fail_in, "rename", 2, error=errno.ENOSPC), 1, 0),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_checkpoint_and_the_one_before_is_whole(
    runs: Runs, name: str, failing: Patch, size: int, of: int
) -> None:
    name = f"full-{name}"
    ended = runs(name, partial(while_saving, 9, failing, of), size=size, **SETTINGS)
    assert ended.codes == [2] * size
    path = runs.folder / name / "checkpoints" / "step-00000009"
    assert ended.last_line.startswith(f"minopt: error: {path}: cannot be written (")
    assert ended.last_line.endswith("). Is the disk full? Earlier checkpoints are whole.")
    assert "Traceback" not in "".join(ended.said)
    assert "".join(ended.said).count("cannot be written") == 1  # one process alone says it
    assert runs.steps(name) == [3, 6]
    assert runs.hidden(name) == []
    if size == 1:
        assert runs(name, **SETTINGS).code == 0
        runs.assert_same(name, "whole")


def test_the_last_and_the_best_are_kept_over_a_resumption(runs: Runs) -> None:
    settings = SETTINGS | {"keep_last": 1, "dev_file": runs.data, "evaluation_strategy": "steps", "eval_steps": 3,
                           "lr_scheduler_type": "constant"}  # fmt: skip
    assert runs("best", partial(scores, 2.0, 5.0), partial(signal_at, 7, signal.SIGKILL), **settings).code == -9
    assert runs.steps("best") == [6]
    assert runs("best", partial(scores, 4.0), **settings).code == 0
    assert runs.steps("best") == [6, LAST]
    assert runs("to-6", **(settings | {"max_steps": 6, "evaluation_strategy": "no"})).code == 0
    best = load_file(runs.folder / "best" / "best" / "model.safetensors")
    expected = load_file(runs.folder / "to-6" / "model.safetensors")
    assert all(best[key].equal(expected[key]) for key in expected | best)


def test_a_better_one_takes_the_place_of_the_best(runs: Runs) -> None:
    settings = SETTINGS | {"keep_last": 1, "dev_file": runs.data, "evaluation_strategy": "steps", "eval_steps": 4}
    assert runs("better", partial(scores, 2.0, 5.0, 3.0), **settings).code == 0
    assert runs.steps("better") == [8, LAST]


def test_a_run_killed_while_it_writes_its_best_model_leaves_nothing_half_written(runs: Runs) -> None:
    settings = SETTINGS | {"dev_file": runs.data, "evaluation_strategy": "steps", "eval_steps": 9}
    assert runs("whole-best", partial(scores, 2.0), **settings).code == 0
    patch = partial(while_writing_a_model, "best", partial(fail_in, "fsync", 1))
    assert runs("killed-best", partial(scores, 2.0), patch, **settings).code == -9
    assert runs("killed-best", partial(scores, 2.0), **settings).code == 0
    runs.assert_same("killed-best", "whole-best")
    best = [(runs.folder / name / "best" / "model.safetensors").read_bytes() for name in ("killed-best", "whole-best")]
    assert best[0] == best[1]


@pytest.mark.parametrize("damage", ["missing", "short", "no metadata"])
def test_a_damaged_checkpoint_is_refused_by_its_name(runs: Runs, damage: str) -> None:
    name = damage.replace(" ", "-")
    assert runs(name, partial(signal_at, 3, signal.SIGTERM), **SETTINGS).code == 143
    path = runs.folder / name / "checkpoints" / "step-00000004"
    (tensors,) = path.glob("*.distcp")
    if damage == "missing":
        tensors.unlink()
    elif damage == "short":
        os.truncate(tensors, 100)
    else:
        (path / ".metadata").unlink()
    ended = runs(name, **SETTINGS)
    assert ended.code == 2
    assert ended.last_line.startswith(f"minopt: error: {path}: cannot be read into this model (")
    assert ended.last_line.endswith("). Use another checkpoint.")
    assert "Traceback" not in ended.said[0]

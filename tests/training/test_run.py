"""The folder of a run: other runs and files in it, and checkpoints that are whole or invisible whatever happens."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minopt.evaluation.answers import EvaluationResult
from minopt.training import method, trainer
from minopt.training.run import RunFolder
from tests.training.runs import STEPS, Patch, Runs, before_step, kill, rank, signal_at

SETTINGS = {"dropout": 0, "save_steps": 6}


# What the processes do


def before(owner: Any, name: str, act: Patch, *, path: str = "", step: int | None = None, of: int = 0) -> None:
    """Has a process do something when it calls a method, for a checkpoint after ``step`` or a folder ``path``."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if rank() == of and step in (None, *args[1:2]) and (not path or args[1].name == path):
            act()
        return original(*args, **options)

    setattr(owner, name, wrapped)


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
        return EvaluationResult({"loss": 1.0, "f1": left.pop(0) if left else 1.0}, {})

    method.evaluate = evaluate


def slow_steps() -> None:
    before_step(None, partial(time.sleep, 0.1))


saving = partial(before, RunFolder, "save")


# How tests see it


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs: ``whole``, and ``stopped``, the same after 5 steps."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    assert runs("whole", **SETTINGS).code == 0
    assert runs.steps("whole") == [12, STEPS]
    assert runs("stopped", partial(signal_at, 4, signal.SIGTERM), **SETTINGS).code == 143
    return runs


@pytest.fixture
def runs(module_runs: Runs) -> Runs:
    """The runs, and a new copy of ``stopped`` as ``mine``."""
    shutil.rmtree(module_runs.folder / "mine", ignore_errors=True)
    for path in module_runs.folder.glob("mine.*"):
        path.unlink()
    shutil.copytree(module_runs.folder / "stopped", module_runs.folder / "mine")
    return module_runs


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_ended_like_the_whole_run(runs: Runs, name: str = "mine") -> None:
    runs.assert_same_result(name, "whole")
    assert runs.hidden(name) == []


# Killed, full, damaged


@pytest.mark.parametrize(
    ("call", "number", "after", "found"),
    [
        ("fsync", 1, False, 6),  # tensors are
        ("rename", 1, True, 6),  # what torch says about them is
        ("fsync", 3, False, 6),  # state.json has no name yet
        ("rename", 2, False, 6),  # all is there, under a hidden name
        ("rename", 2, True, 12),
        ("rename", 3, True, 12),  # the old one is to be removed
        ("unlink", 2, True, 12),  # half of it is
    ],
)
def test_a_run_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    runs: Runs, call: str, number: int, after: bool, found: int
) -> None:
    settings = SETTINGS | {"keep_last": 1}
    patch = partial(saving, partial(fail_in, call, number, after), step=12)
    assert runs("mine", patch, **settings).code == -9
    assert runs.steps("mine")[-1] == found
    assert f"after step {found}\n" in runs("mine", **settings).said[0]
    assert_ended_like_the_whole_run(runs)
    assert runs.steps("mine") == [STEPS]


@pytest.mark.parametrize(
    ("owner", "name", "path", "call", "number", "after"),
    [
        (trainer.Run, "save", ".model.saving", "fsync", 1, False),
        (trainer.Run, "save", ".model.saving", "replace", 1, True),
        (trainer.Run, "_finish", "", "replace", 2, True),
        (trainer.Run, "_finish", "", "rmdir", 1, False),
        (RunFolder, "write", "", "fsync", 1, False),
        (RunFolder, "write", "", "replace", 1, False),
    ],
)  # fmt: skip
def test_a_run_killed_while_it_begins_or_writes_its_model_ends_when_started_again(
    runs: Runs, owner: Any, name: str, path: str, call: str, number: int, after: bool
) -> None:
    shutil.rmtree(runs.folder / "mine")
    patch = partial(before, owner, name, partial(fail_in, call, number, after), path=path)
    assert runs("mine", patch, **SETTINGS).code == -9
    assert runs("mine", **SETTINGS).code == 0
    assert_ended_like_the_whole_run(runs)
    mine, whole = ({path.name for path in (runs.folder / name).iterdir()} for name in ("mine", "whole"))
    assert mine == whole


@pytest.mark.parametrize(
    ("failing", "size", "of"),
    [
        (no_large_files, 1, 0),
        (no_large_files, 2, 1),
        (partial(fail_in, "mkdir", 1, error=errno.ENOSPC), 2, 0),
        (partial(fail_in, "rename", 2, error=errno.ENOSPC), 1, 0),
    ],
    ids=["tensors", "tensors of the second", "folder", "name"],
)
def test_a_full_disk_is_one_line_that_names_the_checkpoint_and_the_one_before_is_whole(
    runs: Runs, failing: Patch, size: int, of: int
) -> None:
    shutil.rmtree(runs.folder / "mine")
    ended = runs("mine", partial(saving, failing, step=12, of=of), size=size, **SETTINGS)
    assert ended.codes == [2] * size
    path = runs.folder / "mine" / "checkpoints" / "step-00000012"
    assert ended.last_line.startswith(f"minopt: error: {path}: cannot be written (")
    assert ended.last_line.endswith("). Is the disk full? Earlier checkpoints are whole.")
    assert "Traceback" not in "".join(ended.said)
    assert "".join(ended.said).count("cannot be written") == 1  # one process alone says it
    assert runs.steps("mine") == [6]
    assert runs.hidden("mine") == []


@pytest.mark.parametrize("damage", ["missing", "short", "no metadata"])
def test_a_damaged_checkpoint_is_refused_by_its_name(runs: Runs, damage: str) -> None:
    path = runs.folder / "mine" / "checkpoints" / "step-00000005"
    (tensors,) = path.glob("*.distcp")
    if damage == "missing":
        tensors.unlink()
    elif damage == "short":
        os.truncate(tensors, 100)
    else:
        (path / ".metadata").unlink()
    ended = runs("mine", **SETTINGS)
    assert ended.code == 2
    assert ended.last_line.startswith(f"minopt: error: {path}: cannot be read into this model (")
    assert ended.last_line.endswith("). Use another checkpoint.")
    assert "Traceback" not in ended.said[0]


def test_the_last_and_the_best_are_kept_over_a_resumption(runs: Runs) -> None:
    settings = {"dropout": 0, "save_steps": 3, "max_steps": 12, "keep_last": 1, "dev_file": runs.data,
                "evaluation_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}  # fmt: skip
    assert runs("best", partial(scores, 2.0, 5.0), partial(signal_at, 7, signal.SIGKILL), **settings).code == -9
    assert runs.steps("best") == [6]
    patch = partial(before, trainer.Run, "save", partial(fail_in, "fsync", 1), path="best")
    assert runs("best", partial(scores, 4.0, 6.0), patch, **settings).code == -9  # while it writes a better one
    assert runs("best", partial(scores, 4.0, 4.0), **settings).code == 0
    assert runs.steps("best") == [6, 12]
    assert runs.hidden("best") == []
    assert runs("to-6", **(settings | {"max_steps": 6, "evaluation_strategy": "no"})).code == 0
    best = load_file(runs.folder / "best" / "best" / "model.safetensors")
    expected = load_file(runs.folder / "to-6" / "model.safetensors")
    assert all(best[key].equal(expected[key]) for key in expected | best)


@pytest.mark.parametrize("torn", ['{"step": 6, "loss": 7.', "\0\0\0\0", '{"step": 6, "loss": 7.5}'])
def test_metrics_behind_the_checkpoint_are_dropped_whole_or_torn(runs: Runs, torn: str) -> None:
    with (runs.folder / "mine" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 6, "eval_loss": 1.0}\n' + torn)
    assert runs("mine", **SETTINGS).code == 0
    assert_ended_like_the_whole_run(runs)


# Other runs, settings and files


def test_resume_never_puts_what_was_there_aside_and_begins_anew(runs: Runs) -> None:
    mine = runs.folder / "mine"
    kept = content(mine)
    ended = runs("mine", partial(signal_at, 7, signal.SIGKILL), resume="never", **SETTINGS)
    assert ended.code == -9
    assert f"--resume never: the run that was in {mine} is now in {mine / 'before-1'}.\n" in ended.said[0]
    assert "going on" not in ended.said[0]
    assert content(mine / "before-1") == kept
    ended = runs("mine", **SETTINGS)  # goes on like any other
    assert "after step 6\n" in ended.said[0]
    assert_ended_like_the_whole_run(runs)
    weights = runs.weights("mine")
    assert runs("mine", resume="never", **(SETTINGS | {"seed": 1})).code == 0
    assert content(mine / "before-1") == kept
    assert (mine / "before-2" / "model.safetensors").read_bytes() == weights
    assert runs.weights("mine") != weights


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_killed_while_it_puts_another_aside_loses_nothing_of_it(runs: Runs, number: int) -> None:
    kept = content(runs.folder / "mine")
    patch = partial(before, RunFolder, "_set_aside", partial(fail_in, "rename", number, after=True))
    assert runs("mine", patch, resume="never", **SETTINGS).code == -9
    ended = runs("mine", resume="never", **SETTINGS)
    assert ended.code == 0, ended.said
    aside = {}
    for folder in sorted((runs.folder / "mine").glob("before-*")):
        aside |= content(folder)
    assert aside == kept
    assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize("below", ["", "checkpoints/step-00000005"])
def test_another_runs_checkpoint_is_gone_on_from_until_there_is_an_own_one(runs: Runs, below: str) -> None:
    shutil.rmtree(runs.folder / "mine")
    kept, other = content(runs.folder / "stopped"), runs.folder / "stopped" / below
    ended = runs("mine", partial(signal_at, 9, signal.SIGTERM), resume=other, **SETTINGS)
    assert f"going on from {runs.folder / 'stopped' / 'checkpoints' / 'step-00000005'}, " in ended.said[0]
    assert f"--resume {shlex.quote(str(other))}" in ended.last_line
    ended = runs("mine", resume=other, **SETTINGS)
    assert f"going on from {runs.folder / 'mine' / 'checkpoints' / 'step-00000010'}, " in ended.said[0]
    assert content(runs.folder / "stopped") == kept
    assert runs.weights("mine") == runs.weights("whole")
    assert runs.losses("mine") == runs.losses("whole")[5:]


def test_what_makes_another_run_is_refused_in_one_line_and_changes_nothing(runs: Runs) -> None:
    mine = runs.folder / "mine"
    kept, data = content(mine), runs.data.read_text()
    ended = runs("mine", **(SETTINGS | {"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "label_smoothing": 0.1}))
    assert (ended.code, ended.last_line) == (2,
        f"minopt: error: --output-dir: {mine} holds a run with other settings: --learning-rate is 0.003 there and "
        '1e-05 here; --lr-scheduler-type is "linear" there and "cosine" here; --label-smoothing is 0.0 there and 0.1 '
        "here. Name another folder, or use --resume never to put that run aside."
    )  # fmt: skip
    ended = runs("elsewhere", resume=mine, **(SETTINGS | {"seed": 7}))
    assert ended.code == 2
    assert "seed is 42 there and 7 here" in ended.last_line
    for path in ("nowhere", "model", "data.jsonl"):
        ended = runs("elsewhere", resume=runs.folder / path, **SETTINGS)
        assert (ended.code, ended.last_line) == (2, "minopt: error: --resume: expected auto, never or the folder of a "
                                                    f"checkpoint, got {runs.folder / path}. Name another.")  # fmt: skip
    assert content(runs.folder / "elsewhere") == {}
    try:
        runs.data.write_text(data.replace("1 and", "2 and", 1))
        ended = runs("mine", **SETTINGS)
    finally:
        runs.data.write_text(data)
    assert ended.code == 2
    assert "holds a run with other settings: the training data or the tokenizer are others. Name" in ended.last_line
    assert content(mine) == kept


def test_settings_that_change_nothing_of_the_weights_may_change(runs: Runs) -> None:
    other = {"recompute": "true", "save_steps": 4, "keep_last": 1, "per_device_train_batch_size": 4,
             "gradient_accumulation_steps": 1, "dev_file": runs.data, "evaluation_strategy": "epoch",
             "max_eval_samples": 2, "batching": "packed"}  # fmt: skip
    ended = runs("mine", **(SETTINGS | other))
    assert ended.code == 0, ended.said
    assert "4 examples a step: 1 process x 1 microbatch x 4" in ended.said[0]
    assert runs.losses("mine") == pytest.approx(runs.losses("whole"), rel=1e-5)
    assert json.loads((runs.folder / "mine" / "run.json").read_text())["settings"]["keep_last"] == 1


def test_a_folder_in_use_is_refused_and_the_run_in_it_is_not_disturbed(runs: Runs) -> None:
    (runs.folder / "mine" / ".lock").write_text(f"{os.getpid()}\n")  # of a dead process whose number is used again
    first = runs.start("mine", slow_steps, **SETTINGS)
    until = time.monotonic() + 120
    while len(runs.losses("mine")) < 7 and time.monotonic() < until:
        time.sleep(0.02)
    log = runs.folder / "mine.0.log"
    said = log.read_text()
    log.rename(runs.folder / "mine.first.log")
    for resume in ("auto", "never"):
        ended = runs("mine", resume=resume, **SETTINGS)
        assert (ended.code, ended.last_line) == (2,
            f"minopt: error: --output-dir: {runs.folder / 'mine'} is in use by a run that is alive (process "
            f"{first.pid}). Wait for it, or name another folder."
        )  # fmt: skip
    assert first.is_alive(), said
    first.join(120)
    assert first.exitcode == 0
    assert_ended_like_the_whole_run(runs)


def test_a_folder_of_other_files_or_a_file_is_refused_and_untouched(runs: Runs) -> None:
    (runs.folder / "notes").mkdir()
    (runs.folder / "notes" / "notes.txt").write_text("precious")
    (runs.folder / "file").write_text("precious")
    for name, resume in (("model", "auto"), ("notes", "auto"), ("notes", "never"), ("file", "auto")):
        path = runs.folder / name
        kept = path.read_bytes() if name == "file" else content(path)
        ended = runs(name, resume=resume, **SETTINGS)
        assert ended.code == 2, ended.said
        what = f"expected a folder, got {path}, a file. " if name == "file" else f"{path} holds files that are no run's"
        assert ended.last_line.startswith(f"minopt: error: --output-dir: {what}")
        assert kept == (path.read_bytes() if name == "file" else content(path))


@pytest.mark.parametrize("found", ["run", "other run", "model"])
def test_overwriting_begins_anew_and_keeps_what_is_no_runs(runs: Runs, found: str) -> None:
    mine = runs.folder / "mine"
    if found == "model":
        shutil.rmtree(mine)
        shutil.copytree(runs.model, mine)
    (mine / "model-00001-of-00002.safetensors").write_text("of another model")
    precious = [mine / name for name in ("notes.txt", "pairs.jsonl", "ds_config.json", "my_model.safetensors")]
    for path in precious:
        path.write_text("precious")
    changes = {"seed": 1} if found == "other run" else {}
    ended = runs("mine", overwrite_output_dir="true", **(SETTINGS | changes))
    assert ended.code == 0, ended.said
    assert "going on" not in ended.said[0]
    assert [path.read_text() for path in precious] == ["precious"] * 4
    assert not [*mine.glob("before-*"), *mine.glob("model-*")]
    for path in precious:
        path.unlink()
    if found == "other run":
        assert runs.weights("mine") != runs.weights("whole")
    else:
        assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_overwriting_run_that_is_interrupted_goes_on(runs: Runs, restarted: bool) -> None:
    """By the command that it says, or when torchrun starts it again."""
    ended = runs("mine", partial(signal_at, 7, signal.SIGTERM), overwrite_output_dir="true", **SETTINGS)
    assert ended.last_line.endswith(" --overwrite-output-dir false")
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"} if restarted else {}
    overwrite = "true" if restarted else "false"
    process = runs.start("mine", environment=environment, overwrite_output_dir=overwrite, **SETTINGS)
    process.join(60)
    assert "after step 8\n" in runs.log("mine").read_text()
    assert_ended_like_the_whole_run(runs)


def test_a_run_that_is_finished_changes_nothing_when_started_again(runs: Runs) -> None:
    settings = SETTINGS | {"do_train": "true", "do_eval": "true", "dev_file": runs.data, "max_eval_samples": 2}
    shutil.rmtree(runs.folder / "mine")
    assert runs("mine", **settings).code == 0
    kept, seen = content(runs.folder / "mine"), runs.seen("mine")
    ended = runs("mine", **settings)
    assert ended.code == 0
    assert f"minopt: {STEPS} steps, loss " in ended.last_line
    assert "nan" not in ended.last_line
    assert content(runs.folder / "mine") == kept
    assert runs.seen("mine") == seen

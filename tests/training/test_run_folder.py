"""The folder of a run: other runs, other settings and other files in it, and what is written there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minopt.training import run_folder, trainer
from tests.training.test_checkpoint import fail_in
from tests.training.test_resume import STEPS, Patch, Runs, before_step, signal_at

SETTINGS = {"dropout": 0, "save_steps": 6}


# What the processes do


def while_setting_aside(act: Patch) -> None:
    """Has a process do something when it begins to put a run aside."""
    original = run_folder.set_aside

    def set_aside(folder: Path) -> Path | None:
        act()
        return original(folder)

    trainer.set_aside = set_aside


def while_beginning(act: Patch) -> None:
    """The same, when it begins to write down its settings."""
    original = trainer._Run._write_beginning

    def write_beginning(self: Any) -> None:
        act()
        original(self)

    trainer._Run._write_beginning = write_beginning  # type: ignore[method-assign]


def slow_steps() -> None:
    before_step(None, partial(time.sleep, 0.1))


# How tests see it


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs: ``whole``, and ``stopped``, the same after 5 steps."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    assert runs("whole", **SETTINGS).code == 0
    assert runs("stopped", partial(signal_at, 4, signal.SIGTERM), **SETTINGS).code == 143
    return runs


@pytest.fixture
def runs(module_runs: Runs, request: pytest.FixtureRequest) -> Runs:
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
    assert runs.metrics(name) == runs.metrics("whole")
    assert runs.weights(name) == runs.weights("whole")
    assert runs.hidden(name) == []


def test_resume_never_puts_what_was_there_aside_and_begins_anew(runs: Runs) -> None:
    mine = runs.folder / "mine"
    before = content(mine)
    ended = runs("mine", resume="never", **SETTINGS)
    assert ended.code == 0, ended.said
    assert f"--resume never: the run that was in {mine} is now in {mine / 'before-1'}.\n" in ended.said[0]
    assert "going on" not in ended.said[0]
    assert content(mine / "before-1") == before
    assert_ended_like_the_whole_run(runs)
    weights = runs.weights("mine")
    assert runs("mine", resume="never", **(SETTINGS | {"seed": 1})).code == 0
    assert content(mine / "before-1") == before
    assert (mine / "before-2" / "model.safetensors").read_bytes() == weights
    assert runs.weights("mine") != weights


def test_a_run_that_is_begun_anew_goes_on_later_like_any_other(runs: Runs) -> None:
    assert runs("mine", partial(signal_at, 7, signal.SIGKILL), resume="never", **SETTINGS).code == -9
    ended = runs("mine", **SETTINGS)
    assert ended.code == 0, ended.said
    assert "after step 6\n" in ended.said[0]
    assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_killed_while_it_puts_another_aside_loses_nothing_of_it(runs: Runs, number: int) -> None:
    before = content(runs.folder / "mine")
    patch = partial(while_setting_aside, partial(fail_in, "rename", number, after=True))
    assert runs("mine", patch, resume="never", **SETTINGS).code == -9
    ended = runs("mine", resume="never", **SETTINGS)
    assert ended.code == 0, ended.said
    aside = {}
    for folder in sorted((runs.folder / "mine").glob("before-*")):
        aside |= content(folder)
    assert aside == before
    assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("replace", 1)])
def test_a_run_killed_while_it_begins_can_begin_again(runs: Runs, call: str, number: int) -> None:
    shutil.rmtree(runs.folder / "mine")
    assert runs("mine", partial(while_beginning, partial(fail_in, call, number)), **SETTINGS).code == -9
    ended = runs("mine", **SETTINGS)
    assert ended.code == 0, ended.said
    assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize("below", ["", "checkpoints/step-00000005"])
def test_another_runs_checkpoint_is_gone_on_from_until_there_is_an_own_one(runs: Runs, below: str) -> None:
    shutil.rmtree(runs.folder / "mine")
    before = content(runs.folder / "stopped")
    other = runs.folder / "stopped" / below
    ended = runs("mine", partial(signal_at, 9, signal.SIGTERM), resume=other, **SETTINGS)
    assert ended.code == 143, ended.said
    assert f"going on from {runs.folder / 'stopped' / 'checkpoints' / 'step-00000005'}, " in ended.said[0]
    assert f"--resume {shlex.quote(str(other))}" in ended.last_line
    ended = runs("mine", resume=other, **SETTINGS)
    assert ended.code == 0, ended.said
    assert f"going on from {runs.folder / 'mine' / 'checkpoints' / 'step-00000010'}, " in ended.said[0]
    assert content(runs.folder / "stopped") == before
    assert runs.weights("mine") == runs.weights("whole")
    assert runs.losses("mine") == runs.losses("whole")[5:]


@pytest.mark.parametrize("path", ["nowhere", "model", "data.jsonl"])
def test_a_path_that_is_no_checkpoint_is_named(runs: Runs, path: str) -> None:
    shutil.rmtree(runs.folder / "mine")
    ended = runs("mine", resume=runs.folder / path, **SETTINGS)
    assert ended.code == 2
    assert ended.last_line == (
        f"minopt: error: --resume: expected auto, never or the folder of a checkpoint, got {runs.folder / path}. "
        "Name another."
    )
    assert content(runs.folder / "mine") == {}


def test_settings_that_make_another_run_are_listed_and_the_run_is_left_as_it_is(runs: Runs) -> None:
    before = content(runs.folder / "mine")
    ended = runs("mine", **(SETTINGS | {"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "label_smoothing": 0.1}))
    assert ended.code == 2
    assert ended.last_line == (
        f"minopt: error: --output-dir: {runs.folder / 'mine'} holds a run with other settings: "
        "--learning-rate is 0.003 there and 1e-05 here; "
        '--lr-scheduler-type is "linear" there and "cosine" here; --label-smoothing is 0.0 there and 0.1 here. '
        "Name another folder, or use --resume never to put that run aside."
    )
    ended = runs("elsewhere", resume=runs.folder / "mine", **(SETTINGS | {"seed": 7}))
    assert ended.code == 2
    assert "seed is 42 there and 7 here" in ended.last_line
    assert content(runs.folder / "mine") == before


def test_settings_that_change_nothing_of_the_weights_may_change(runs: Runs) -> None:
    other = {"recompute": "true", "save_steps": 4, "keep_last": 1, "per_device_train_batch_size": 4,
             "gradient_accumulation_steps": 1, "dev_file": runs.data, "evaluation_strategy": "epoch",
             "max_eval_samples": 2, "batching": "packed"}  # fmt: skip
    ended = runs("mine", **(SETTINGS | other))
    assert ended.code == 0, ended.said
    assert "4 examples a step: 1 process x 1 microbatch x 4" in ended.said[0]
    assert runs.losses("mine") == pytest.approx(runs.losses("whole"), rel=1e-5)
    assert json.loads((runs.folder / "mine" / "run.json").read_text())["settings"]["keep_last"] == 1


def test_other_training_data_under_the_same_name_is_noticed(runs: Runs) -> None:
    kept, before = runs.data.read_text(), content(runs.folder / "mine")
    try:
        runs.data.write_text(kept.replace("1 and", "2 and", 1))
        ended = runs("mine", **SETTINGS)
    finally:
        runs.data.write_text(kept)
    assert ended.code == 2
    assert "holds a run with other settings: the training data or the tokenizer are others. Name" in ended.last_line
    assert content(runs.folder / "mine") == before


def test_a_folder_in_use_is_refused_and_the_run_in_it_is_not_disturbed(runs: Runs) -> None:
    first = runs.start("mine", slow_steps, **SETTINGS)
    until = time.monotonic() + 30
    while len(runs.losses("mine")) < 7 and time.monotonic() < until:
        time.sleep(0.02)
    log = runs.folder / "mine.0.log"
    said = log.read_text()
    log.rename(runs.folder / "mine.first.log")
    for resume in ("auto", "never"):
        ended = runs("mine", resume=resume, **SETTINGS)
        assert ended.code == 2
        assert ended.last_line == (
            f"minopt: error: --output-dir: {runs.folder / 'mine'} is in use by a run that is alive (process "
            f"{first.pid}). Wait for it, or name another folder."
        )
    assert first.is_alive(), said
    first.join(30)
    assert first.exitcode == 0
    assert_ended_like_the_whole_run(runs)


def test_the_lock_of_a_dead_process_is_no_obstacle_even_if_its_number_is_used_again(runs: Runs) -> None:
    (runs.folder / "mine" / ".lock").write_text(f"{os.getpid()}\n")
    assert runs("mine", **SETTINGS).code == 0
    assert_ended_like_the_whole_run(runs)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("found", ["model", "notes"])
def test_a_folder_of_other_files_is_refused_and_untouched(runs: Runs, found: str, resume: str) -> None:
    mine = runs.folder / "mine"
    shutil.rmtree(mine)
    if found == "model":
        shutil.copytree(runs.model, mine)
    else:
        mine.mkdir()
        (mine / "notes.txt").write_text("precious")
    before = content(mine)
    ended = runs("mine", resume=resume, **SETTINGS)
    assert ended.code == 2, ended.said
    assert ended.last_line.startswith(f"minopt: error: --output-dir: {mine} holds files that are no run's: ")
    assert ended.last_line.endswith(". Name another folder.")
    assert content(mine) == before


@pytest.mark.parametrize("found", ["run", "other run", "model", "notes"])
def test_overwriting_begins_anew_and_keeps_what_is_no_runs(runs: Runs, found: str) -> None:
    mine = runs.folder / "mine"
    if found in ("model", "notes"):
        shutil.rmtree(mine)
        mine.mkdir()
    if found == "model":
        shutil.copytree(runs.model, mine, dirs_exist_ok=True)
    (mine / "model-00001-of-00002.safetensors").write_text("of another model")
    (mine / "notes.txt").write_text("precious")
    changes = {"seed": 1} if found == "other run" else {}
    ended = runs("mine", overwrite_output_dir="true", **(SETTINGS | changes))
    assert ended.code == 0, ended.said
    assert "going on" not in ended.said[0]
    assert (mine / "notes.txt").read_text() == "precious"
    assert not [*mine.glob("before-*"), *mine.glob("model-*")]
    (mine / "notes.txt").unlink()
    if found == "other run":
        assert runs.weights("mine") != runs.weights("whole")
    else:
        assert_ended_like_the_whole_run(runs)


def test_an_overwriting_run_that_is_stopped_goes_on_by_the_command_that_it_says(runs: Runs) -> None:
    ended = runs("mine", partial(signal_at, 7, signal.SIGTERM), overwrite_output_dir="true", **SETTINGS)
    assert ended.code == 143, ended.said
    assert ended.last_line.endswith(" --overwrite-output-dir false")
    assert runs("mine", overwrite_output_dir="false", **SETTINGS).code == 0
    assert_ended_like_the_whole_run(runs)


def test_a_restart_by_torchrun_does_not_overwrite_what_its_run_has_done(runs: Runs) -> None:
    overwriting = SETTINGS | {"overwrite_output_dir": "true"}
    assert runs("mine", partial(signal_at, 7, signal.SIGKILL), **overwriting).code == -9
    process = runs.start("mine", environment={"TORCHELASTIC_RESTART_COUNT": "1"}, **overwriting)
    process.join(60)
    assert process.exitcode == 0, process.said
    assert "after step 6\n" in runs.log("mine").read_text()
    assert_ended_like_the_whole_run(runs)


def test_a_file_where_the_folder_should_be_is_named(runs: Runs) -> None:
    shutil.rmtree(runs.folder / "mine")
    (runs.folder / "file").write_text("precious")
    ended = runs("file", **SETTINGS)
    assert ended.code == 2
    assert ended.last_line.startswith("minopt: error: ")
    assert str(runs.folder / "file") in ended.last_line
    assert (runs.folder / "file").read_text() == "precious"


def test_a_run_that_is_finished_changes_nothing_when_started_again(runs: Runs) -> None:
    settings = SETTINGS | {"do_train": "true", "do_eval": "true", "dev_file": runs.data, "max_eval_samples": 2}
    shutil.rmtree(runs.folder / "mine")
    assert runs("mine", **settings).code == 0
    before, seen = content(runs.folder / "mine"), runs.seen("mine")
    ended = runs("mine", **settings)
    assert ended.code == 0
    assert f"minopt: {STEPS} steps, loss " in ended.last_line
    assert "nan" not in ended.last_line
    after = content(runs.folder / "mine")
    assert [name for name in before | after if before.get(name) != after.get(name)] == []
    assert runs.seen("mine") == seen


@pytest.mark.parametrize("torn", ['{"step": 6, "loss": 7.', "\0\0\0\0", '{"step": 6, "loss": 7.5}'])
def test_metrics_behind_the_checkpoint_are_dropped_whole_or_torn(runs: Runs, torn: str) -> None:
    with (runs.folder / "mine" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 6, "eval_loss": 1.0}\n' + torn)
    assert runs("mine", **SETTINGS).code == 0
    assert_ended_like_the_whole_run(runs)

"""Runs that are killed, stopped and resumed end as one that was never interrupted, bit for bit.

MINOPT_TEST_KILLS=10 kills the one run more often than the tests otherwise do.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import (
    EXAMPLES,
    STEPS,
    Runs,
    scale_too_high,
    signal_at,
    signal_in_evaluation,
)

Whole = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Whole:
    """A function that makes sure of an uninterrupted run with some settings, and names it."""
    made: dict[str, str] = {}

    def run(*patches: Any, size: int = 1, **settings: Any) -> str:
        key = repr((patches, size, settings))
        if key not in made:
            name = made[key] = f"whole-{len(made)}"
            ended = runs(name, *patches, size=size, **settings)
            assert ended.codes == [0] * size, ended.said
            assert len(runs.losses(name)) == len(runs.seen(name)) == STEPS
        return made[key]

    return run


def assert_each_example_once_an_epoch(seen: dict[int, list[int]], epochs: int = 3) -> None:
    steps = len(seen) // epochs
    assert sorted(seen) == list(range(steps * epochs))
    for epoch in range(epochs):
        examples = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in seen[step]]
        assert sorted(examples) == list(range(EXAMPLES))


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(runs: Runs, whole: Whole) -> None:
    generator = random.Random(5)
    kills = int(os.environ.get("MINOPT_TEST_KILLS", "3"))
    for step in sorted(generator.choices(range(STEPS), k=kills)):
        patch = partial(signal_at, step, signal.SIGKILL, after_seconds=generator.random() * 0.004)
        assert runs("killed", patch).code == -signal.SIGKILL
    ended = runs("killed")
    assert ended.code == 0
    assert "going on from " in ended.said[0]
    runs.assert_same("killed", whole())
    assert_each_example_once_an_epoch(runs.seen("killed"))


@pytest.mark.parametrize(
    ("size", "settings"), [(3, {"per_device_train_batch_size": 1}), (2, {"parallel": "fsdp", "batching": "grouped"})]
)
def test_many_processes_go_on_after_one_of_them_is_killed(
    runs: Runs, whole: Whole, size: int, settings: dict[str, Any]
) -> None:
    name = f"killed-{size}"
    ended = runs(name, partial(signal_at, 7, signal.SIGKILL, of=1), size=size, **settings)
    assert ended.codes[1] == -signal.SIGKILL
    assert 0 not in ended.codes
    assert runs(name, size=size, **settings).codes == [0] * size
    runs.assert_same(name, whole(size=size, **settings))


def test_torchrun_goes_on_by_itself_after_ranks_are_killed(runs: Runs, whole: Whole) -> None:
    settings = {"per_device_train_batch_size": 1, "bf16": "true", "dropout": 0.2, "resume": "never"}
    deaths = {"0": [[1, 4]], "1": [[0, 13]]}
    torchrun = runs.torchrun("elastic", "--max-restarts", "2", kill=deaths, **settings)
    said = torchrun.communicate(timeout=120)[1]
    assert torchrun.returncode == 0, said
    assert said.count("going on from ") == 2
    runs.assert_same("elastic", whole(size=2, **settings))
    assert_each_example_once_an_epoch(runs.seen("elastic"))


def test_a_restart_before_the_first_checkpoint_begins_where_resume_says(runs: Runs, whole: Whole) -> None:
    checkpoint = runs.folder / whole() / "checkpoints" / "step-00000015"
    process = runs.start("again", environment={"TORCHELASTIC_RESTART_COUNT": "1"}, resume=checkpoint)
    process.join(60)
    said = runs.log("again").read_text()
    assert process.exitcode == 0, said
    assert f"going on from {checkpoint}, after step 15" in said


def test_float16_goes_on_with_its_scale_and_its_skipped_steps(runs: Runs, whole: Whole) -> None:
    settings = {"fp16": "true", "save_steps": 4}
    name = whole(scale_too_high, **settings)
    assert 1 < runs.metrics(name)[-1]["skipped_steps"] < 17
    # Before any step has changed weights, a checkpoint keeps an optimizer without a step; then one with some.
    assert runs("fp16", scale_too_high, partial(signal_at, 0, signal.SIGTERM), **settings).code == 143
    assert runs("fp16", partial(signal_at, 8, signal.SIGKILL), **settings).code == -signal.SIGKILL
    assert runs("fp16", **settings).code == 0
    runs.assert_same("fp16", name)


# Stopped


@pytest.mark.parametrize(("number", "code", "resume"), [(signal.SIGTERM, 143, "auto"), (signal.SIGINT, 130, "never")])
def test_a_signal_ends_the_step_saves_and_prints_the_command_that_goes_on(
    runs: Runs, whole: Whole, number: int, code: int, resume: str
) -> None:
    name = f"stopped by {number}, {resume}"  # spaces: the command has to quote them
    ended = runs(name, partial(signal_at, 7, number), resume=resume)
    assert ended.code == code
    assert runs.steps(name) == [6, 8]
    assert len(runs.losses(name)) == 8
    assert "Traceback" not in ended.said[0]
    said = ended.said[0].splitlines()[-2:]
    assert said[0].startswith("minopt: stopped after step 8; ")
    assert said[0].endswith("To go on:")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    resumed = subprocess.run(
        said[1], shell=True, env=os.environ | runs.environment(name) | {"PATH": path}, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 8\n" in resumed.stderr
    runs.assert_same_result(name, whole())


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(runs: Runs, whole: Whole) -> None:
    ended = runs("one of two", partial(signal_at, 4, signal.SIGTERM, of=1), size=2)
    assert ended.codes == [143, 143]
    assert "stopped after step 5" in ended.said[0]
    assert "--nproc-per-node 2 -m minopt finetune" in ended.last_line
    assert "stopped" not in ended.said[1]
    before = sorted((runs.folder / "one of two").rglob("*"))
    # Three processes cannot share the 8 examples of a step.
    refused = runs("one of two", size=3)
    assert refused.codes == [2, 2, 2]
    assert refused.last_line == (
        "minopt: error: --per-device-train-batch-size: 2 times 3 processes does not divide the 8 examples of a step "
        "that the run was begun with. Their product must be one of 1, 2, 4, 8."
    )
    assert sorted((runs.folder / "one of two").rglob("*")) == before
    assert runs("one of two", size=2).codes == [0, 0]
    runs.assert_same_result("one of two", whole(size=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_loses_nothing(runs: Runs, whole: Whole, number: int) -> None:
    name = f"torchrun-{number}"
    torchrun = runs.torchrun(name, slow=True)
    until = time.monotonic() + 60
    while len(runs.seen(name)) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(torchrun.pid, number)  # as a terminal does
    else:
        torchrun.send_signal(number)
    said = torchrun.communicate(timeout=60)[1]
    assert torchrun.returncode != 0
    assert said.count("To go on:") == 1, said
    command = said.partition("To go on:\n")[2].splitlines()[0]
    assert 0 < len(runs.losses(name)) < STEPS
    saved = runs.steps(name)[-1]
    assert shlex.split(command) == ["torchrun", "--nproc-per-node", "2", "-m", "minopt", *runs.arguments(name)]
    ended = runs(name, size=2)
    assert ended.codes == [0, 0]
    assert f"after step {saved}\n" in ended.said[0]
    runs.assert_same_result(name, whole(size=2))
    assert runs.seen(name) == runs.seen(whole(size=2))


@pytest.mark.parametrize(("number", "code", "every"), [(signal.SIGTERM, 143, 7), (signal.SIGKILL, -9, 18)])
def test_an_evaluation_that_was_interrupted_is_done_by_the_resumed_run(
    runs: Runs, whole: Whole, number: int, code: int, every: int
) -> None:
    settings = {"dev_file": runs.data, "max_eval_samples": 4, "evaluation_strategy": "steps", "eval_steps": every,
                "save_steps": 7, "do_train": "true", "do_eval": "true"}  # fmt: skip
    name = f"evaluating-{every}"
    ended = runs(name, partial(signal_in_evaluation, number), **settings)
    assert ended.code == code, ended.said
    assert not any("eval_loss" in line for line in runs.metrics(name))
    assert runs(name, **settings).code == 0
    runs.assert_same(name, whole(**settings))


@pytest.mark.parametrize("stages", [[(2, "ddp"), (1, "ddp"), (2, "fsdp")], [(2, "fsdp"), (2, "ddp")]])
def test_a_run_goes_on_with_other_processes_or_shares_to_the_same_losses(
    runs: Runs, whole: Whole, stages: list[tuple[int, str]]
) -> None:
    name = "-".join(f"{parallel}{size}" for size, parallel in stages)
    for number, (size, parallel) in enumerate(stages, 1):
        patches = [partial(signal_at, 5 * number, signal.SIGTERM)] if number < len(stages) else []
        # 8 examples a step, as it was begun; the settings ask for another number on other processes
        ended = runs(name, *patches, size=size, parallel=parallel, dropout=0, per_device_train_batch_size=2)
        assert ended.codes == [143 if patches else 0] * size, ended.said
        assert "; 8 examples a step" in ended.said[0]
    expected = whole(dropout=0, per_device_train_batch_size=4)
    assert runs.losses(name) == pytest.approx(runs.losses(expected), rel=1e-5)
    assert {step: sorted(found) for step, found in runs.seen(name).items()} == runs.seen(expected)

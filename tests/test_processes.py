"""Processes of a run: they end well, and one that hangs is named by the others, which end."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minopt.watch import limit_seconds
from tests.training.runs import Runs, free_port, rank, signal_at

SECONDS = 5  # a process says twenty times in it that it runs


def at_first_call(module: str, name: str, of: int, act: Callable[[], None]) -> None:
    """Has a process do something when it calls a function for the first time."""
    where = importlib.import_module(module)
    original, calls = getattr(where, name), [act] if rank() == of else []

    def wrapped(*args: Any, **options: Any) -> Any:
        if calls:
            calls.pop()()
        return original(*args, **options)

    setattr(where, name, wrapped)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def last_line_of_the_other(runs: Runs, name: str, patch: Callable[[], None], of: int, arguments: list[str]) -> str:
    """Starts two processes, one of which stops; the other has to end by itself, with an error."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
             "MINOPT_TIMEOUT_SECONDS": str(SECONDS)}  # fmt: skip
    started = [
        runs.start(name, patch, rank=k, environment={**world, "RANK": str(k), "LOCAL_RANK": str(k)},
                   arguments=arguments)
        for k in range(2)
    ]  # fmt: skip
    started[1 - of].join(90)
    ended = started[1 - of].exitcode
    for process in started:
        process.kill()
        process.join()
    said = runs.log(name, 1 - of).read_text()
    assert ended == 2, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


def the_line(of: int) -> str:
    return (
        f"minopt: error: process {of} has not answered for {SECONDS} seconds: stopped, swapped out, or waiting for a "
        "disk. Checkpoints are whole: start the run again. MINOPT_TIMEOUT_SECONDS sets the time limit."
    )


@pytest.mark.parametrize(("of", "settings"), [(1, {"parallel": "ddp"}), (0, {"parallel": "fsdp"})])
def test_a_process_that_is_stopped_is_named_and_the_run_goes_on_from_its_checkpoint(
    runs: Runs, of: int, settings: dict[str, str]
) -> None:
    arguments = runs.arguments(f"stopped-{of}", **settings)
    patch = partial(signal_at, 7, signal.SIGSTOP, of=of)
    assert last_line_of_the_other(runs, f"stopped-{of}", patch, of, arguments) == the_line(of)
    assert runs.steps(f"stopped-{of}") == [3, 6]
    ended = runs(f"stopped-{of}", size=2, **settings)
    assert ended.codes == [0, 0], ended.said
    assert "after step 6\n" in ended.said[0]


@pytest.mark.parametrize(
    ("verb", "module", "function"),
    [
        ("evaluate", "minopt.evaluation.answers", "token_logprobs"),
        ("generate", "minopt.inference.tensor_parallel", "fingerprint"),  # while it loads
        ("generate", "minopt.generation.continuous", "cut_batches"),
    ],
)
def test_so_is_one_that_is_stopped_while_it_evaluates_loads_or_generates(
    runs: Runs, verb: str, module: str, function: str
) -> None:
    words = {
        "evaluate": f"--task squad --dev-file {runs.data} --src-length 48 --tgt-length 16",
        "generate": f"--input {runs.data}",
    }[verb]
    arguments = [verb, "--model", str(runs.model), "--device", "cpu", *words.split()]
    patch = partial(at_first_call, module, function, 1, stop)
    assert last_line_of_the_other(runs, function, patch, 1, arguments) == the_line(1)


def test_a_process_that_works_for_longer_than_the_limit_is_waited_for(runs: Runs, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINOPT_TIMEOUT_SECONDS", str(SECONDS))
    patch = partial(at_first_call, "minopt.training.method", "tokenise", 0, partial(time.sleep, 1.5 * SECONDS))
    ended = runs("patient", patch, size=2, max_steps=2)
    assert ended.codes == [0, 0], ended.said


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan", ""])
def test_a_limit_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINOPT_TIMEOUT_SECONDS", text)
    with pytest.raises(ValueError, match=r"^MINOPT_TIMEOUT_SECONDS: expected a number of seconds above 0, got "):
        limit_seconds()


SCRIPT = """
import os, sys
import minopt

name, data, folder, way = sys.argv[1:]
given = name if way == "by name" else minopt.load(name, optimize=False)
model, tokenizer = (given, None) if way == "by name" else (given.model, given.tokenizer)
config = minopt.TrainingConfig(output_dir=folder, max_steps=2, src_length=48, tgt_length=16, device="cpu")
result = minopt.train(model, minopt.read_data(data), config, tokenizer=tokenizer)
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(result.steps, [name for name in threads if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("way", ["by name", "loaded"])
def test_no_thread_of_the_group_outlives_training_in_a_script_of_ones_own(runs: Runs, way: str, tmp_path: Path) -> None:
    """A process that ends with one left may abort or hang."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(runs.model), str(runs.data), str(tmp_path / "run"), way]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    environment = os.environ | runs.environment("script") | world
    started = [
        subprocess.Popen(command, env=environment | {"RANK": str(k)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for k in range(2)
    ]  # fmt: skip
    for process in started:
        said = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert said[0] == "2 []\n"

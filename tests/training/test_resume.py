"""Runs that are killed, stopped and resumed end as one that was never interrupted; and what the tests of runs share.

MINOPT_TEST_KILLS=10 kills the one run more often than the tests otherwise do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from minopt import DEMO, OPT, OPTConfig, Tokenizer
from minopt.checkpoint.save import save_model
from minopt.cli import main
from minopt.training import evaluation, trainer

Patch = Callable[[], None]

EXAMPLES = 22  # five steps of 4 and a part of one make an epoch
STEPS = 18
CONFIG = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64,
          "max_position_embeddings": 128, "dropout": 0.1}  # fmt: skip
SEEN = "seen-{}.jsonl"
PROJECT = Path(__file__).resolve().parents[2]

# Processes are forked from a server that has imported everything, and has no threads: each costs no time to begin.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["minopt.cli", "minopt.text", "minopt.training.trainer", "fsspec", "pytest"])


# What the processes of a run do


def work(arguments: list[str], environment: dict[str, str], log: Path, patches: tuple[Patch, ...]) -> None:
    """A process: ``minopt`` with arguments, after some patches; what it says goes to a file."""
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    for patch in (record_what_is_seen, *patches):
        patch()
    sys.argv = ["minopt", *arguments]
    sys.exit(main())


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def before_step(step: int | None, act: Patch) -> None:
    """Has a process do something when it begins a step, counted from 0, or any."""
    original = trainer._Run._step

    def wrapped(run: Any, *args: Any) -> bool:
        if step in (None, run.step):
            act()
        return original(run, *args)

    trainer._Run._step = wrapped  # type: ignore[method-assign]


def record_what_is_seen() -> None:
    """Writes process, step and examples of each microbatch to a file."""
    path = os.environ["MINOPT_TEST_SEEN"].format(rank())
    collate, step_of = trainer.collate, trainer._Run._step
    now: list[int] = []

    def step(run: Any, *args: Any) -> bool:
        now[:] = [run.step]
        return step_of(run, *args)

    def recorded(tokens: Any, indices: Any, **options: Any) -> Any:
        if now:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([os.getpid(), now[0], list(indices)]) + "\n")
        return collate(tokens, indices, **options)

    trainer._Run._step, trainer.collate = step, recorded  # type: ignore[method-assign]


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def signal_at(step: int, number: int, of: int = 0, after_seconds: float = 0.0) -> None:
    """A signal to one of the processes in a step."""
    if rank() == of:
        before_step(step, Timer(after_seconds, kill, (number,)).start if after_seconds else partial(kill, number))


def signal_in_evaluation(number: int) -> None:
    """A signal to the process while it evaluates for the first time."""
    original, rest = evaluation.token_logprobs, [number]

    def wrapped(*args: Any, **options: Any) -> Any:
        if rest:
            kill(rest.pop())
        return original(*args, **options)

    evaluation.token_logprobs = wrapped


def scale_too_high() -> None:
    """A loss scale with which the first gradients are infinite."""
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**24)  # type: ignore[assignment, misc]


def elastic() -> None:
    """A process that torchrun has started, patched as environment variables say."""
    record_what_is_seen()
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for of, step in json.loads(os.environ.get("MINOPT_TEST_KILL", "{}")).get(restarts, []):
        signal_at(step, signal.SIGKILL, of)
    if "MINOPT_TEST_SLOW" in os.environ:
        before_step(None, partial(time.sleep, 0.05))
    sys.exit(main())


# How a test starts them


@dataclass(frozen=True)
class Ended:
    """How the processes of a run have ended, by rank."""

    codes: list[int]
    said: list[str]

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def last_line(self) -> str:
        """Of the process that tells an error, which may be any; else of the first."""
        told = [text for text in self.said if "minopt: error: " in text] or self.said
        return told[0].splitlines()[-1]


class Runs:
    """Runs of a small model on a few examples, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.data = folder, folder / "model", folder / "data.jsonl"
        torch.manual_seed(0)
        model = OPT(OPTConfig(**CONFIG))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        save_model(model, self.model, Tokenizer.load(DEMO))
        lines = [{"prompt": f"{i} and " * (i % 7 + 1), "completion": f" is {i * i % 10}" * (i % 3 + 1)}
                 for i in range(EXAMPLES)]  # fmt: skip
        self.data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(self, name: str, **settings: Any) -> list[str]:
        flags = {"model_name_or_path": self.model, "train_file": self.data, "output_dir": self.folder / name,
                 "src_length": 48, "tgt_length": 16, "per_device_train_batch_size": 2,
                 "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 3e-3, "weight_decay": 0.1,
                 "logging_steps": 1, "save_steps": 3, "device": "cpu"} | settings  # fmt: skip
        return ["finetune", *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]

    def environment(self, name: str) -> dict[str, str]:
        (self.folder / name).parent.mkdir(exist_ok=True)
        seen = str(self.folder / f"{name}.{SEEN}")
        return {"MINOPT_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", "MINOPT_TEST_SEEN": seen}

    def __call__(self, name: str, *patches: Patch, size: int = 1, **settings: Any) -> Ended:
        """A run in some processes, waited for."""
        return self.command(name, self.arguments(name, **settings), *patches, size=size)

    def start(self, name: str, *patches: Patch, rank: int = 0, environment: dict[str, str] | None = None,
              arguments: list[str] | None = None, **settings: Any) -> Any:  # fmt: skip
        """One process of a run; ``said`` tells what it has said."""
        process: Any = _FORKS.Process(target=work, args=(
            arguments or self.arguments(name, **settings), self.environment(name) | (environment or {}),
            self.log(name, rank), patches,
        ))  # fmt: skip
        process.start()
        return process

    def log(self, name: str, rank: int = 0) -> Path:
        return self.folder / f"{name}.{rank}.log"

    def command(self, name: str, arguments: list[str], *patches: Patch, size: int = 1) -> Ended:
        """As a run that is called, by its command."""
        started = []
        port = free_port()
        for number in range(size):
            self.log(name, number).unlink(missing_ok=True)
            world = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                     "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = world if size > 1 else {}
            started.append(self.start(name, *patches, rank=number, environment=environment, arguments=arguments))
        until = time.monotonic() + 60
        for process in started:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [number for number, process in enumerate(started) if process.is_alive()]
        for process in started:
            process.kill()
            process.join()
        said = [self.log(name, number).read_text() for number in range(size)]
        assert not hanging, f"processes {hanging} of {size} hang; the first one said: {said[0]}"
        return Ended([process.exitcode for process in started], said)

    def torchrun(self, name: str, *options: str, environment: dict[str, str], **settings: Any) -> Any:
        """torchrun with two processes, in a process group of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
                   *options, "-m", "tests.training.test_resume", *self.arguments(name, **settings)]  # fmt: skip
        return subprocess.Popen(
            command, cwd=PROJECT, env=os.environ | self.environment(name) | environment, text=True,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    # What a run has left

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "model.safetensors").read_bytes()

    def metrics(self, name: str) -> list[dict[str, float]]:
        """The lines of metrics.jsonl without what tells the time."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in self.metrics(name) if "loss" in line]

    def seen(self, name: str) -> dict[int, list[int]]:
        """The examples of each step, when it was done the last time."""
        steps: dict[int, list[int]] = {}
        for path in sorted(self.folder.glob(f"{name}.{SEEN.format('*')}")):
            last: dict[int, tuple[int, list[int]]] = {}
            for process, step, indices in map(json.loads, path.read_text().splitlines()):
                before = last.get(step)
                last[step] = (process, before[1] + indices if before and before[0] == process else indices)
            for step, (_, indices) in last.items():
                steps[step] = sorted(steps.get(step, []) + indices)
        return steps

    def steps(self, name: str) -> list[int]:
        """Those of which there is a checkpoint."""
        found = (self.folder / name / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def hidden(self, name: str) -> list[str]:
        """What a crash may have left."""
        return sorted(str(p.relative_to(self.folder / name)) for p in (self.folder / name).rglob(".*")
                      if p.name not in (".lock", ".metadata"))  # fmt: skip

    def assert_same_result(self, name: str, whole: str) -> None:
        """A run that was interrupted has come to the same weights and metrics as another."""
        assert self.metrics(name) == self.metrics(whole)
        assert self.weights(name) == self.weights(whole)

    def assert_same(self, name: str, whole: str) -> None:
        """It has seen the same examples too, and leaves the same checkpoints and nothing half-written."""
        self.assert_same_result(name, whole)
        assert self.seen(name) == self.seen(whole)
        assert self.steps(name) == self.steps(whole)
        assert self.hidden(name) == []


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def assert_each_example_once_an_epoch(seen: dict[int, list[int]], epochs: int = 3) -> None:
    steps = len(seen) // epochs
    assert sorted(seen) == list(range(steps * epochs))
    for epoch in range(epochs):
        examples = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in seen[step]]
        assert sorted(examples) == list(range(EXAMPLES))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Callable[..., str]:
    """A function that makes sure of an uninterrupted run with some settings, and names it."""
    made: dict[str, str] = {}

    def run(*patches: Patch, size: int = 1, **settings: Any) -> str:
        key = repr((patches, size, settings))
        if key not in made:
            name = made[key] = f"whole-{len(made)}"
            ended = runs(name, *patches, size=size, **settings)
            assert ended.codes == [0] * size, ended.said
            assert len(runs.losses(name)) == len(runs.seen(name)) == STEPS
        return made[key]

    return run


# Killed


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(
    runs: Runs, whole: Callable[..., str]
) -> None:
    generator = random.Random(5)
    kills = int(os.environ.get("MINOPT_TEST_KILLS", "4"))
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
def test_many_processes_go_on_bit_for_bit_after_one_of_them_is_killed(
    runs: Runs, whole: Callable[..., str], size: int, settings: dict[str, Any]
) -> None:
    name = f"killed-{size}"
    ended = runs(name, partial(signal_at, 7, signal.SIGKILL, of=1), size=size, **settings)
    assert ended.codes[1] == -signal.SIGKILL
    assert 0 not in ended.codes
    assert runs(name, size=size, **settings).codes == [0] * size
    runs.assert_same(name, whole(size=size, **settings))


def test_torchrun_goes_on_by_itself_after_ranks_are_killed(runs: Runs, whole: Callable[..., str]) -> None:
    settings = {"per_device_train_batch_size": 1, "bf16": "true", "dropout": 0.2, "resume": "never"}
    deaths = {"0": [[1, 4]], "1": [[0, 7]], "2": [[1, 13]]}
    torchrun = runs.torchrun(
        "elastic", "--max-restarts", "3", environment={"MINOPT_TEST_KILL": json.dumps(deaths)}, **settings
    )
    said = torchrun.communicate(timeout=120)[1]
    assert torchrun.returncode == 0, said
    assert said.count("going on from ") == 3
    runs.assert_same("elastic", whole(size=2, **settings))
    assert_each_example_once_an_epoch(runs.seen("elastic"))


def test_a_restart_before_the_first_checkpoint_begins_where_resume_says(runs: Runs, whole: Callable[..., str]) -> None:
    checkpoint = runs.folder / whole() / "checkpoints" / "step-00000015"
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    process = runs.start("again", environment=restarted, resume=checkpoint)
    process.join(60)
    said = runs.log("again").read_text()
    assert process.exitcode == 0, said
    assert f"going on from {checkpoint}, after step 15" in said


def test_float16_goes_on_with_its_scale_and_its_skipped_steps(runs: Runs, whole: Callable[..., str]) -> None:
    settings = {"fp16": "true", "save_steps": 4}
    name = whole(scale_too_high, **settings)
    skipped = runs.metrics(name)[-1]["skipped_steps"]
    assert 1 < skipped < 17
    assert runs("fp16", scale_too_high, partial(signal_at, 8, signal.SIGKILL), **settings).code == -signal.SIGKILL
    assert runs("fp16", **settings).code == 0
    runs.assert_same("fp16", name)


def test_a_checkpoint_before_any_step_has_changed_weights_changes_nothing_either(
    runs: Runs, whole: Callable[..., str]
) -> None:
    settings = {"fp16": "true", "save_steps": 18}
    name = whole(scale_too_high, **settings)
    assert runs.metrics(name)[0]["skipped_steps"] == 1
    assert runs("unmoved", scale_too_high, partial(signal_at, 0, signal.SIGTERM), **settings).code == 143
    assert runs("unmoved", **settings).code == 0
    runs.assert_same_result("unmoved", name)


# Stopped


@pytest.mark.parametrize(
    ("number", "code", "resume"),
    [(signal.SIGTERM, 143, "auto"), (signal.SIGINT, 130, "never")],
)
def test_a_signal_ends_the_step_saves_and_prints_the_command_that_goes_on(
    runs: Runs, whole: Callable[..., str], number: int, code: int, resume: str
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


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(runs: Runs, whole: Callable[..., str]) -> None:
    ended = runs("one of two", partial(signal_at, 4, signal.SIGTERM, of=1), size=2)
    assert ended.codes == [143, 143]
    assert "stopped after step 5" in ended.said[0]
    assert "--nproc-per-node 2 -m minopt finetune" in ended.last_line
    assert "stopped" not in ended.said[1]
    assert runs("one of two", size=2).codes == [0, 0]
    runs.assert_same("one of two", whole(size=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_loses_nothing(runs: Runs, whole: Callable[..., str], number: int) -> None:
    name = f"torchrun-{number}"
    torchrun = runs.torchrun(name, environment={"MINOPT_TEST_SLOW": "1"})
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
    assert runs.losses(name)
    assert len(runs.losses(name)) < STEPS
    saved = runs.steps(name)[-1]
    assert shlex.split(command) == ["torchrun", "--nproc-per-node", "2", "-m", "minopt", *runs.arguments(name)]
    ended = runs(name, size=2)
    assert ended.codes == [0, 0]
    assert f"after step {saved}\n" in ended.said[0]
    runs.assert_same_result(name, whole(size=2))
    assert runs.seen(name) == runs.seen(whole(size=2))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("every", [7, 18])
def test_an_evaluation_that_was_interrupted_is_done_by_the_resumed_run(
    runs: Runs, whole: Callable[..., str], number: int, code: int, every: int
) -> None:
    settings = {"dev_file": runs.data, "max_eval_samples": 4, "evaluation_strategy": "steps", "eval_steps": every,
                "save_steps": 7, "do_train": "true", "do_eval": "true"}  # fmt: skip
    name = f"evaluating-{number}-{every}"
    ended = runs(name, partial(signal_in_evaluation, number), **settings)
    assert ended.code == code, ended.said
    assert not any("eval_loss" in line for line in runs.metrics(name))
    assert runs(name, **settings).code == 0
    runs.assert_same(name, whole(**settings))


# Resumed otherwise


@pytest.mark.parametrize("stages", [[(2, "ddp"), (1, "ddp"), (2, "ddp")], [(2, "ddp"), (2, "fsdp"), (2, "ddp")]])
def test_a_run_goes_on_with_other_processes_or_shares_to_the_same_losses(
    runs: Runs, whole: Callable[..., str], stages: list[tuple[int, str]]
) -> None:
    name = "-".join(f"{parallel}{size}" for size, parallel in stages)
    for number, (size, parallel) in enumerate(stages, 1):
        patches = [partial(signal_at, 5 * number, signal.SIGTERM)] if number < len(stages) else []
        # 8 examples a step, as it was begun; the settings ask for another number on other processes
        batch = {"per_device_train_batch_size": 4 // stages[0][0]}
        ended = runs(name, *patches, size=size, parallel=parallel, dropout=0, **batch)
        assert ended.codes == [143 if patches else 0] * size, ended.said
        assert "; 8 examples a step" in ended.said[0]
    expected = runs.losses(whole(dropout=0, per_device_train_batch_size=4))
    assert runs.losses(name) == pytest.approx(expected, rel=1e-5)
    assert {step: sorted(found) for step, found in runs.seen(name).items()} == runs.seen(
        whole(dropout=0, per_device_train_batch_size=4)
    )


def test_a_number_of_processes_that_does_not_fit_is_refused_with_what_would(runs: Runs) -> None:
    assert runs("fits", partial(signal_at, 2, signal.SIGTERM), size=2).codes == [143, 143]
    before = sorted((runs.folder / "fits").rglob("*"))
    ended = runs("fits", size=3)
    assert ended.codes == [2, 2, 2]
    assert ended.last_line == (
        "minopt: error: --per-device-train-batch-size: 2 times 3 processes does not divide the 8 examples of a step "
        "that the run was begun with. Their product must be one of 1, 2, 4, 8."
    )
    assert sorted((runs.folder / "fits").rglob("*")) == before


if __name__ == "__main__":
    elastic()

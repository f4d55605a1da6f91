"""Runs of a small model in processes of their own, which tests patch, kill and stop."""

from __future__ import annotations

import json
import multiprocessing
import os
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

import torch

from minopt import DEMO, OPT, OPTConfig, Tokenizer
from minopt.checkpoint.save import save_model
from minopt.cli import main
from minopt.evaluation import answers
from minopt.training import trainer

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
    original = trainer.Run._step

    def wrapped(run: Any, *args: Any) -> bool:
        if step in (None, run.progress.step):
            act()
        return original(run, *args)

    trainer.Run._step = wrapped  # type: ignore[method-assign]


def record_what_is_seen() -> None:
    """Writes process, step and examples of each microbatch to a file."""
    path, backward = os.environ["MINOPT_TEST_SEEN"].format(rank()), trainer.Run.backward

    def recorded(run: Any, rows: Any, weight: float) -> Any:
        if rows:
            indices = [index for index, row in enumerate(run.tokens.rows) if any(row is r for r in rows)]
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([os.getpid(), run.progress.step, indices]) + "\n")
        return backward(run, rows, weight)

    trainer.Run.backward = recorded  # type: ignore[method-assign]


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def signal_at(step: int, number: int, of: int = 0, after_seconds: float = 0.0) -> None:
    """A signal to one of the processes in a step."""
    if rank() == of:
        before_step(step, Timer(after_seconds, kill, (number,)).start if after_seconds else partial(kill, number))


def signal_in_evaluation(number: int) -> None:
    """A signal to the process while it evaluates for the first time."""
    original, rest = answers.token_logprobs, [number]

    def wrapped(*args: Any, **options: Any) -> Any:
        if rest:
            kill(rest.pop())
        return original(*args, **options)

    answers.token_logprobs = wrapped


def scale_too_high() -> None:
    """A loss scale with which the first gradients are infinite."""
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**24)  # type: ignore[assignment, misc]


def elastic() -> None:
    """A process that torchrun has started, patched as environment variables say."""
    record_what_is_seen()
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for of, step in json.loads(os.environ["MINOPT_TEST_KILL"]).get(restarts, []):
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

    def start(self, name: str, *patches: Patch, rank: int = 0, environment: dict[str, str] | None = None,
              arguments: list[str] | None = None, **settings: Any) -> Any:  # fmt: skip
        """One process of a run, or of the command with the given arguments."""
        environment = self.environment(name) | (environment or {})
        arguments = arguments or self.arguments(name, **settings)
        process: Any = _FORKS.Process(target=work, args=(arguments, environment, self.log(name, rank), patches))
        process.start()
        return process

    def log(self, name: str, rank: int = 0) -> Path:
        """What a process has said."""
        return self.folder / f"{name}.{rank}.log"

    def __call__(self, name: str, *patches: Patch, size: int = 1, **settings: Any) -> Ended:
        """A run in some processes, waited for."""
        started, port = [], free_port()
        for number in range(size):
            self.log(name, number).unlink(missing_ok=True)
            world = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                     "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = world if size > 1 else {}
            started.append(self.start(name, *patches, rank=number, environment=environment, **settings))
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

    def torchrun(self, name: str, *options: str, kill: Any = None, slow: bool = False, **settings: Any) -> Any:
        """torchrun with two processes, in a process group of its own.

        Args:
            kill: by the number of a restart, pairs of a process and the step in which it is killed.
            slow: whether each step takes a while.
        """
        environment = {"MINOPT_TEST_KILL": json.dumps(kill or {})} | ({"MINOPT_TEST_SLOW": "1"} if slow else {})
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
                   *options, "-m", "tests.training.runs", *self.arguments(name, **settings)]  # fmt: skip
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


if __name__ == "__main__":
    elastic()

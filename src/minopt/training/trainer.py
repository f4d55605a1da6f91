"""The training loop: one for one process and for many, DDP and FSDP, with every precision."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from minopt import __version__
from minopt.atomic import write_text
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.config import read_json
from minopt.distributed import World, processes
from minopt.model import OPT
from minopt.progress import counted, say
from minopt.tokenizer import Tokenizer
from minopt.training.batches import Order, collate, seed_of
from minopt.training.checkpoint import Checkpoints, read_state
from minopt.training.config import TrainingConfig
from minopt.training.data import Example
from minopt.training.evaluation import EvaluationResult, evaluate
from minopt.training.loss import ModelWithLoss
from minopt.training.optim import build_optimizer, clip_gradients, learning_rate
from minopt.training.parallel import apply_fsdp, gathered, wrapped_layers
from minopt.training.prepare import check, prepare, warn
from minopt.training.report import Reporter
from minopt.training.run_folder import (
    BEST,
    CHECKPOINTS,
    MODEL,
    PREDICTIONS,
    SETTINGS,
    add_metrics,
    begin_metrics,
    check_same,
    check_settings,
    check_unfinished,
    link_same,
    locked,
    overwrite,
    remove_leftovers,
    set_aside,
)
from minopt.training.signals import StopSignal
from minopt.training.tokens import Tokens
from minopt.training.weights import fill, find, save

logger = logging.getLogger(__name__)

MOST_SKIPPED = 20  # steps in a row whose gradients are not finite


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: how many there were, those before a resumption included.
        skipped_steps: those of them that changed nothing, for their gradients were not finite.
        loss: mean over the tokens of the last steps that were written to metrics.jsonl; NaN without training.
        metrics: of the last evaluation; empty if there was none. See ``EvaluationResult``.
        predictions: of the last evaluation.
        output_dir: the folder that now holds the model.
    """

    steps: int
    skipped_steps: int
    loss: float
    metrics: dict[str, float]
    predictions: dict[str, str] = field(repr=False)
    output_dir: Path


class TrainingStopped(RuntimeError):
    """A signal has ended the run, after a step and with a checkpoint.

    Attributes:
        signal: its number.
        step: how many steps are done.
        checkpoint: from which the run goes on.
    """

    def __init__(self, signal: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} holds all of it.")
        self.signal, self.step, self.checkpoint = signal, step, checkpoint


def train(
    model: OPT | str | Path,
    train_data: Sequence[Example] | str,
    config: TrainingConfig,
    *,
    tokenizer: Tokenizer | None = None,
    eval_data: Sequence[Example] | str | None = None,
) -> TrainResult:
    """Fine-tunes a model, in as many processes as torchrun has started, and writes it to ``config.output_dir``.

    The gradient of a step is that of the mean over all tokens that are learned in it, whatever the number of processes
    and microbatches. Order and dropout follow from seed and step, so that nothing of them has to be kept.

    Args:
        model: on any device; it is moved, made float32, and trained in place. Under FSDP it stays sharded. Or the name
            of one, as ``load_model`` takes it: then under FSDP each process reads its share, and none has it whole.
        train_data: examples, or one text, of which all tokens are learned; ``read_data`` gives either.
        config: how.
        tokenizer: the model's; ``None``, with a name, takes the one beside its weights, or one folder up.
        eval_data: what to evaluate on.

    Returns:
        The result, the same in all processes; the model is saved, with its tokenizer.

    Raises:
        ValueError: if the settings do not fit the model, the data, the processes or the run in the folder; or if
            the gradients of 20 steps in a row are not finite; and, of a model by its name, as ``load_model`` does.
        OSError: if the folder is in use, or cannot be written; and as ``load_model`` does.
        TrainingStopped: if SIGTERM or SIGINT has ended it.
    """
    with processes(config.device) as world:
        return _train(model, train_data, config, tokenizer, eval_data, world)


def _train(
    model: OPT | str | Path, train_data: Sequence[Example] | str, config: TrainingConfig, tokenizer: Tokenizer | None,
    eval_data: Sequence[Example] | str | None, world: World,
) -> TrainResult:  # fmt: skip
    """``train`` in the processes of a run, which leave their group when all that this made is gone."""
    training = config.replace(do_train=True)  # whatever else it says, which is for the command line
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if not isinstance(model, OPT):
            checkpoint, tokenizer = find(model, tokenizer, world)
            model = OPT(checkpoint.config, device="meta")
        if tokenizer is None:
            raise ValueError("tokenizer: expected the model's, got None. Pass it, or a name instead of the model.")
        check(model, config, eval_data)
        if config.max_eval_samples is not None and eval_data is not None and not isinstance(eval_data, str):
            eval_data = eval_data[: config.max_eval_samples]
        tokens = prepare(train_data, model, tokenizer, config, world, training=True)
        eval_tokens = None
        if eval_data is not None:
            eval_tokens = prepare(eval_data, model, tokenizer, config, world, training=False)
        warn(training, world, eval_data, eval_tokens)
        folder = Path(config.output_dir).expanduser()
        world.first(lambda: stack.enter_context(locked(folder)))
        run = _Run(model, tokenizer, tokens, eval_data, eval_tokens, config, world, folder)
        stack.enter_context(run.wrapped(checkpoint))
        return run.train()


class _Run:
    """A run in one process."""

    def __init__(
        self, model: OPT, tokenizer: Tokenizer, tokens: Tokens, eval_data: Sequence[Example] | str | None,
        eval_tokens: Tokens | None, config: TrainingConfig, world: World, folder: Path,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.config, self.world = model, tokenizer, config, world
        self.tokens, self.eval_data, self.eval_tokens = tokens, eval_data, eval_tokens
        self.folder = folder.resolve()
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, world)
        self.record: dict[str, Any] = {"settings": config.to_dict(), "data": tokens.digest}
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        self.sharded = config.parallel == "fsdp" and world.size > 1
        self.stop = StopSignal()
        self.restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, after a process died
        self.evaluated: EvaluationResult | None = None
        # What a checkpoint keeps beside the weights; counts since metrics were last written.
        self.step = 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.best: tuple[int, float] | None = None
        self.evaluated_step = 0
        self.loss_sum, self.loss_tokens, self.grad_norm = 0.0, 0, 0.0
        self.loss = math.nan

    @contextlib.contextmanager
    def wrapped(self, checkpoint: Checkpoint | None) -> Iterator[None]:
        """Makes of the plain model one that is trained, and afterwards a plain one again (under FSDP, sharded).

        With a checkpoint it is on the meta device, and filled from that.
        """
        config, world, model = self.config, self.world, self.model
        model.float().train()
        for layer in model.layers:
            layer.__dict__["dropout"] = model.config.dropout if config.dropout is None else config.dropout
        with wrapped_layers(model, recompute=config.recompute, compile=config.compile):
            self.module: Any = ModelWithLoss(model)
            if self.sharded:
                apply_fsdp(self.module, model, self.dtype, world.device)
            if checkpoint is not None:
                fill(model, checkpoint, world)
            if not self.sharded:
                model.to(world.device)
                if world.size > 1:
                    self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.optimizer = build_optimizer(self.module, config)
            self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.fp16)
            try:
                yield
            finally:
                for layer in model.layers:
                    layer.__dict__["dropout"] = model.config.dropout
                model.eval()
                # DDP holds the processes' group, and gradients lie in its buckets.
                self.optimizer.zero_grad()
                del self.module, self.optimizer

    # The run

    def train(self) -> TrainResult:
        config, world = self.config, self.world
        self._begin()
        order = Order(
            tuple(self.tokens.lengths().tolist()), self.batch_size, config.seed, grouped=config.batching == "grouped"
        )
        total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * order.steps_per_epoch)
        self.reporter = Reporter(world.is_first, self.step, total)
        with self.stop.caught(), torch.random.fork_rng(devices=_cuda(world)):
            try:
                self._loop(order, total)
            finally:
                self.reporter.close()
        self._finish()
        result = self.evaluated
        return TrainResult(
            self.step, self.skipped, self.loss, dict(result.metrics) if result else {},
            dict(result.predictions) if result else {}, self.folder,
        )  # fmt: skip

    def _begin(self) -> None:
        """Takes the folder: finds the checkpoint to go on from, and reads it."""
        world, config = self.world, self.config
        world.sum(0.0)  # all have read their model: it may lie in the folder, and be overwritten
        world.first(self._claim)
        path = world.gather(world.first(self._checkpoint))[0]
        if path is None:
            world.first(lambda: check_unfinished(self.folder))
        state: dict[str, Any] = {}
        if path is not None:
            state = read_state(path)
            check_same(path, state, self.record)
        self.batch_size = state.get("global_batch_size") or (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        )
        self.accumulation = self._accumulation()
        self.record["global_batch_size"] = self.batch_size
        self._say_settings()
        if world.size > 1 and not self.sharded:
            self._settle_buckets()
        if path is not None:
            self.checkpoints.load(path, self.module, self.optimizer)
            self._restore(state)
            if path.resolve().parent != self.checkpoints.folder:  # of another run, which has its own best
                self.best, self.evaluated, self.evaluated_step = None, None, 0
        world.first(self._write_beginning)
        if path is not None and world.is_first:
            say(f"going on from {path}, after step {self.step}")

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        if self.config.overwrite_output_dir:
            if not self.restarted:
                overwrite(self.folder)
        elif self.config.resume == "never" and not self.restarted:
            aside = set_aside(self.folder)
            if aside is not None:
                logger.warning("--resume never: the run that was in %s is now in %s.", self.folder, aside)
        if not self.config.overwrite_output_dir or (self.folder / SETTINGS).is_file():
            check_settings(self.folder, self.record)
        self.checkpoints.remove_unfinished()

    def _checkpoint(self) -> Path | None:
        """What to go on from; another run's counts until this one has a checkpoint of its own."""
        own = self.checkpoints.latest()
        if self.config.resume in ("auto", "never") or (self.restarted and own is not None):
            return own
        path = Path(self.config.resume).expanduser()
        path = Checkpoints(path / CHECKPOINTS, self.world).latest() or path
        if path.resolve().parent == self.checkpoints.folder:
            read_state(path)
            self.checkpoints.remove_later(path.resolve())
            return path
        if own is not None:
            logger.warning("--resume %s: this run goes on from %s, its own.", path, own)
        return own or path

    def _accumulation(self) -> int:
        """Microbatches of a process in a step; the examples of a step stay as many as the run began with."""
        config, size = self.config, self.world.size
        at_once = config.per_device_train_batch_size * size
        if self.batch_size % at_once == 0:
            found = self.batch_size // at_once
            if found != config.gradient_accumulation_steps and self.world.is_first:
                logger.warning(
                    "--gradient_accumulation_steps is %d: the run keeps the %d examples a step that it began with.",
                    found, self.batch_size,
                )  # fmt: skip
            return found
        fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
        raise ValueError(
            f"--per_device_train_batch_size: {config.per_device_train_batch_size} times "
            f"{counted(size, 'process', 'processes')} does not divide the "
            f"{self.batch_size} examples of a step that the run was begun with. Their product must be one "
            f"of {', '.join(map(str, fits))}."
        )

    def _say_settings(self) -> None:
        if not self.world.is_first:
            return
        say(self.config.to_text())
        say(
            f"{counted(len(self.tokens), 'example')}, {counted(int(self.tokens.lengths().sum()), 'token')}, "
            f"{self.tokens.learned():,} of them learned; {counted(self.batch_size, 'example')} a step: "
            f"{counted(self.world.size, 'process', 'processes')} x "
            f"{counted(self.accumulation, 'microbatch', 'microbatches')} x "
            f"{self.batch_size // self.world.size // self.accumulation}",
        )

    def _write_settings(self, **more: int) -> None:
        text = json.dumps({**self.record, "minopt": __version__, "torch": torch.__version__, **more}, indent=1)
        write_text(self.folder / SETTINGS, text + "\n")

    def _write_beginning(self) -> None:
        self._write_settings()
        self.checkpoints.folder.mkdir(exist_ok=True)
        self.tokenizer.save(self.checkpoints.folder)  # a checkpoint opens as a model
        begin_metrics(self.folder, self.step, self.evaluated_step)

    def _settle_buckets(self) -> None:
        """Lets DDP arrange its buckets, which it does after a first backward pass.

        It would do so after the first step otherwise, and after the first one of a resumed run: sums over more than two
        processes would be in another order there than in a run that was not interrupted.
        """
        for _ in range(2):
            batch = collate(self.tokens, [], packed=True).to(self.world.device)
            with self._precision():
                loss, _ = self.module(batch.input_ids, batch.lengths, batch.at, batch.targets)
            loss.backward()
        self.optimizer.zero_grad()

    def _loop(self, order: Order, total: int) -> None:
        config = self.config
        self.last_written = time.perf_counter()
        self.tokens_seen = 0
        stopped = self.step > 0 and self._evaluate_if_due(order, total)  # what a kill has kept from being done
        while self.step < total and not stopped:
            stopped = self._step(order, total)
            self.step += 1
            last = self.step == total
            written = None
            if self.step % config.logging_steps == 0 or last:
                written = self._write_metrics(order, total)
            self.reporter.step(written, self.step)
            if self.step % config.save_steps == 0 or last:
                self._save()
            stopped = stopped or self._evaluate_if_due(order, total)
        if stopped:
            self._save()
            raise TrainingStopped(self.stop.number or signal.SIGTERM, self.step, self.checkpoints.path(self.step))

    def _evaluate_if_due(self, order: Order, total: int) -> bool:
        """Returns whether a signal has come meanwhile."""
        config = self.config
        due = {"no": False, "steps": self.step % config.eval_steps == 0,
               "epoch": self.step % order.steps_per_epoch == 0}[config.evaluation_strategy]  # fmt: skip
        if not due and not (self.step == total and config.do_eval):
            return False
        return self.evaluated_step < self.step and self._evaluate()

    def _step(self, order: Order, total: int) -> bool:
        """One optimizer step. Returns whether a signal has come to any process."""
        config, world = self.config, self.world
        torch.manual_seed(seed_of(config.seed, self.step, world.rank))
        rate = learning_rate(self.step, total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        learned = self.tokens.learned(order.examples(self.step))
        mine = order.microbatches(self.step, world.size * self.accumulation)[world.rank :: world.size]
        loss_sum = torch.zeros((), device=world.device)
        seen = 0
        for number, indices in enumerate(mine, 1):
            batch = collate(self.tokens, indices, packed=config.batching == "packed").to(world.device)
            seen += batch.tokens
            with self._synchronised(number == len(mine)):
                with self._precision():
                    loss, _ = self.module(
                        batch.input_ids, batch.lengths, batch.at, batch.targets, config.label_smoothing
                    )
                # DDP and FSDP average over the processes; what is wanted is the sum.
                self.scaler.scale(loss * (world.size / learned)).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.module.parameters(), config.max_grad_norm).item()
        finite = math.isfinite(norm)  # the same in all processes, as the norm is
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        total_loss, total_seen, stopped = world.sum(loss_sum.item(), seen, float(self.stop.number != 0))
        self._count(finite, total_loss, learned, norm)
        self.tokens_seen += int(total_seen)
        return stopped > 0

    def _count(self, finite: bool, loss_sum: float, learned: int, norm: float) -> None:
        self.grad_norm = norm
        if math.isfinite(loss_sum):
            self.loss_sum, self.loss_tokens = self.loss_sum + loss_sum, self.loss_tokens + learned
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"step {self.step + 1}: gradients of {MOST_SKIPPED} steps in a row were not finite, the last loss was "
                f"{loss_sum / learned}. Lower --learning_rate, or use --bf16 instead of --fp16."
            )

    # Its parts

    def _precision(self) -> Any:
        """Products in 16 bits; FSDP hands out parameters in 16 bits itself."""
        enabled = self.dtype is not None and not self.sharded
        return torch.autocast(self.world.device.type, dtype=self.dtype or torch.bfloat16, enabled=enabled)

    def _synchronised(self, last: bool) -> Any:
        """DDP sums gradients over the processes with the last microbatch alone; FSDP's would be whole until then."""
        if self.world.size > 1 and not self.sharded and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def _write_metrics(self, order: Order, total: int) -> dict[str, float]:
        now = time.perf_counter()
        self.loss = self.loss_sum / self.loss_tokens if self.loss_tokens else math.nan
        metrics = {
            "step": self.step,
            "epoch": round(self.step / order.steps_per_epoch, 6),
            "loss": self.loss,
            "learning_rate": learning_rate(self.step - 1, total, self.config),
            "grad_norm": self.grad_norm,
            "skipped_steps": self.skipped,
            "tokens_per_second": round(self.tokens_seen / (now - self.last_written), 1),
        }
        self.loss_sum, self.loss_tokens, self.tokens_seen, self.last_written = 0.0, 0, 0, now
        self.world.first(lambda: add_metrics(self.folder, metrics))
        return metrics

    def _state(self) -> dict[str, Any]:
        result = self.evaluated
        return {
            **self.record,
            "config": self.model.config.to_dict(),
            "step": self.step,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "best": self.best,
            "evaluated": [self.evaluated_step, *((dict(result.metrics), result.score) if result else (None, None))],
            "loss": [self.loss_sum, self.loss_tokens, self.loss],
            "scaler": self.scaler.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.evaluated_step, metrics, score = state["evaluated"]
        if metrics is not None:
            path = self.folder / PREDICTIONS
            self.evaluated = EvaluationResult(metrics, score, read_json(path, sys.maxsize) if path.is_file() else {})
        self.loss_sum, self.loss_tokens, self.loss = state["loss"]
        if self.config.fp16:
            self.scaler.load_state_dict(state["scaler"])

    def _save(self) -> None:
        begin = time.perf_counter()
        self.checkpoints.save(self.step, self.module, self.optimizer, self._state())
        best = self.best[0] if self.best else None
        self.world.first(lambda: self.checkpoints.remove_old(self.config.keep_last, best))
        self.last_written += time.perf_counter() - begin  # tokens a second are those of training

    def _evaluate(self) -> bool:
        """Evaluates, and keeps the best. Returns whether a signal has come meanwhile."""
        assert self.eval_data is not None
        assert self.eval_tokens is not None
        begin, last_written = time.perf_counter(), self.last_written
        model = gathered(self.model, self.world.device, self._evaluation_dtype())
        result = evaluate(
            model, self.tokenizer, self.eval_data, self.eval_tokens, self.config, self.world,
            stop=lambda: self.stop.number != 0,
        )  # fmt: skip
        if result is None:
            return True
        self.evaluated, self.evaluated_step = result, self.step
        shown = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        self.reporter.say(f"evaluation after step {self.step}: {shown}")
        self.world.first(lambda: self._write_evaluation(result))
        is_best = not math.isnan(result.score) and (self.best is None or result.score > self.best[1])
        if is_best:
            self.best = (self.step, result.score)
            self._save_model(self.folder / BEST)
        if is_best or self.checkpoints.path(self.step).exists():
            self._save()
        self.last_written = last_written + time.perf_counter() - begin
        return False

    def _write_evaluation(self, result: EvaluationResult) -> None:
        record = {"step": self.step} | {f"eval_{name}": value for name, value in result.metrics.items()}
        add_metrics(self.folder, record)
        if result.predictions:
            text = json.dumps(dict(result.predictions), ensure_ascii=False, indent=0)
            write_text(self.folder / PREDICTIONS, text + "\n")

    def _evaluation_dtype(self) -> torch.dtype:
        if self.dtype is None or (self.dtype == torch.float16 and self.world.device.type == "cpu"):
            return torch.float32
        return self.dtype

    def _save_model(self, folder: Path) -> None:
        save(self.model, folder, self.tokenizer, self.world)

    def _finish(self) -> None:
        """Writes the model beside what the folder holds of the run; config.json comes last, and makes it a model's."""
        new = self.folder / MODEL
        self._save_model(new)

        def publish() -> None:
            same = self.folder / BEST if self.best is not None and self.best[0] == self.step else None
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
                if same is not None and (same / path.name).is_file():
                    link_same(path, same / path.name)
                path.replace(self.folder / path.name)
            new.rmdir()
            if self.config.keep_last == 0:
                self._write_settings(finished=self.step)
                shutil.rmtree(self.checkpoints.folder)

        self.world.first(publish)


def _cuda(world: World) -> list[int]:
    return [world.device.index or 0] if world.device.type == "cuda" else []

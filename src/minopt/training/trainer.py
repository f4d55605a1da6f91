"""The training loop: one for one process and for many, DDP and FSDP, with every precision."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minopt import __version__
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.config import read_json
from minopt.distributed import World, processes
from minopt.evaluation.answers import evaluate
from minopt.evaluation.tasks import seed_of
from minopt.model import OPT
from minopt.progress import bar, counted, on_terminal, say
from minopt.tokenizer import Tokenizer
from minopt.training.batches import Order, collate
from minopt.training.checks import accumulation_of, check_fit, tokens_of, warn
from minopt.training.config import TrainingConfig
from minopt.training.data import Example, references_of
from minopt.training.fsdp import apply_fsdp, gathered
from minopt.training.loss import ModelWithLoss
from minopt.training.optim import build_optimizer, clip_gradients, learning_rate, training_layers
from minopt.training.run import BEST, MODEL, PREDICTIONS, SETTINGS, RunFolder, caught, read_state
from minopt.training.weights import fill, find, save

logger = logging.getLogger(__name__)

MOST_SKIPPED = 20  # steps in a row whose gradients are not finite


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        steps: the number of steps, those before a resumption included.
        skipped_steps: the number of steps that changed nothing because their gradients were not finite.
        loss: the mean over the tokens of the steps in the last line of metrics.jsonl; NaN without training.
        metrics: the last evaluation's; empty if there was none. See ``EvaluationResult``.
        predictions: the last evaluation's.
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
        signal: the signal's number.
        step: the number of steps that are done.
        checkpoint: the one from which the run goes on.
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

    The gradient of a step is that of the mean over all tokens that count in the loss, whatever the number of processes
    and microbatches. Order and dropout follow from seed and step, so that a checkpoint keeps no random state.

    Args:
        model: an ``OPT``; it is moved, made float32, and trained in place. Under FSDP it stays sharded. Or the name
            of one, as ``load_model`` takes it: then under FSDP each process reads its share, and none has it whole.
        train_data: examples, or one text, of which all tokens count; ``read_data`` gives either.
        config: the settings of the run.
        tokenizer: the model's; ``None``, with a name, takes the one beside its weights, or one folder up.
        eval_data: the data to evaluate on.

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
    """``train`` in the processes of a run. All that this makes is gone before they leave their group."""
    checkpoint = None
    if not isinstance(model, OPT):
        checkpoint, tokenizer = find(model, tokenizer, world)
        model = OPT(checkpoint.config, device="meta")
    if tokenizer is None:
        raise ValueError("tokenizer: expected the model's, got None. Pass it, or a name instead of the model.")
    check_fit(model, config, eval_data)
    if eval_data is not None and not isinstance(eval_data, str):
        eval_data = eval_data[: config.max_eval_samples]
    run = _Run(model, tokenizer, config, world, train_data, eval_data)
    with contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(run.folder.locked()))
        stack.enter_context(run.wrapped(checkpoint))
        return run.train()


@dataclass
class _Progress:
    """The progress of a run, which a checkpoint keeps beside the weights."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of that evaluation
    loss: float = math.nan  # as last written to metrics.jsonl
    loss_sum: float = 0.0  # since then
    loss_tokens: int = 0  # since then


class _Run:
    """A run in one process. ``wrapped`` sets the first three attributes, ``_begin`` two more, ``train`` the rest."""

    module: Any  # the model with its loss, within DDP where that is used
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batch_size: int  # examples of a step in all processes
    accumulation: int  # microbatches of a step in one process
    order: Order
    total_steps: int
    first_step: int  # above 0 in a run that goes on
    began_at: float  # seconds of time.perf_counter
    bar: tqdm[Any]
    timed_since: float  # when metrics were last written; saving and evaluating since then move it on

    def __init__(
        self, model: OPT, tokenizer: Tokenizer, config: TrainingConfig, world: World,
        train_data: Sequence[Example] | str, eval_data: Sequence[Example] | str | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.config, self.world = model, tokenizer, config, world
        self.rows = tokens_of(train_data, model, tokenizer, config, world, training=True)
        self.eval_rows = None if eval_data is None else tokens_of(eval_data, model, tokenizer, config, world)
        self.references = references_of(eval_data or "")
        warn(config.replace(do_train=True), world, eval_data, self.eval_rows)
        self.folder = RunFolder(config.output_dir, world)
        self.record: dict[str, Any] = {"settings": config.to_dict(), "data": self.rows.digest()}
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        self.is_sharded = config.parallel == "fsdp" and world.size > 1
        self.is_ddp = config.parallel == "ddp" and world.size > 1
        self.progress, self.predictions = _Progress(), dict[str, str]()
        self.signal, self.signalled_at = 0, 0.0  # set by caught
        self.tokens_seen, self.grad_norm = 0, 0.0  # since metrics were last written; of the last step

    @contextlib.contextmanager
    def wrapped(self, checkpoint: Checkpoint | None) -> Iterator[None]:
        """Makes of the plain model one that is trained, and afterwards a plain one again (under FSDP, sharded).

        With a checkpoint the model is on the meta device, and filled from that.
        """
        config, world, model = self.config, self.world, self.model
        model.float().train()
        with training_layers(model, dropout=config.dropout, recompute=config.recompute, compile=config.compile):
            self.module = ModelWithLoss(model)
            if self.is_sharded:
                apply_fsdp(self.module, model, self.dtype, world.device)
            if checkpoint is not None:
                fill(model, checkpoint, world)
            if not self.is_sharded:
                model.to(world.device)
            if self.is_ddp:
                self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.optimizer = build_optimizer(self.module, config)
            self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.fp16)
            try:
                yield
            finally:
                model.eval()
                # DDP holds the processes' group, and gradients lie in its buckets.
                self.optimizer.zero_grad()
                del self.module, self.optimizer

    def train(self) -> TrainResult:
        config, world = self.config, self.world
        self._begin()
        lengths = tuple(len(ids) for ids, _ in self.rows.rows)
        self.order = Order(lengths, self.batch_size, config.seed, grouped=config.batching == "grouped")
        epochs = math.ceil(config.num_train_epochs * self.order.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else epochs
        shown = world.is_first and on_terminal()
        devices = [world.device.index or 0] if world.device.type == "cuda" else []
        self.first_step, self.began_at = self.progress.step, time.perf_counter()
        with (
            bar(self.total_steps, "step", initial=self.first_step, shown=shown) as self.bar,
            caught(self),
            torch.random.fork_rng(devices=devices),
        ):
            self._loop()
        save(self.model, self.folder.path / MODEL, self.tokenizer, world)
        world.first(self._finish)
        done = self.progress
        return TrainResult(done.step, done.skipped, done.loss, done.metrics, self.predictions, self.folder.path)

    def _begin(self) -> None:
        """Takes the folder, and goes on from the checkpoint that is in it or was named."""
        world, config, folder = self.world, self.config, self.folder
        world.wait()  # until all have read their model: it may lie in the folder, and be overwritten
        path = world.first(lambda: folder.claim(self.record, config.resume, overwrite=config.overwrite_output_dir))
        state = {} if path is None else world.each(lambda: read_state(path))
        asked = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        self.batch_size = state.get("global_batch_size", asked)
        self.accumulation = accumulation_of(config, world, self.batch_size)
        self.record |= {"global_batch_size": self.batch_size, "minopt": __version__, "torch": torch.__version__}
        if self.is_ddp:
            self._settle_buckets()
        if path is not None:
            folder.load(path, self.module, self.optimizer)
            self.progress = _Progress(**state["progress"])
            self.scaler.load_state_dict(state["scaler"])
            if path.resolve().parent != folder.checkpoints:  # of another run, which has its own best
                self.progress = replace(self.progress, best_step=0, best_score=-math.inf, evaluated_step=0, metrics={})
            elif (folder.path / PREDICTIONS).is_file() and self.progress.metrics:
                self.predictions = read_json(folder.path / PREDICTIONS, sys.maxsize)

        def write() -> None:
            folder.write(SETTINGS, self.record)
            folder.checkpoints.mkdir(exist_ok=True)
            self.tokenizer.save(folder.checkpoints)  # a checkpoint opens as a model
            folder.trim_metrics(self.progress.step, self.progress.evaluated_step)

        world.first(write)
        self._say_settings()
        if path is not None and world.is_first:
            say(f"going on from {path}, after step {self.progress.step}")

    def _say_settings(self) -> None:
        if not self.world.is_first:
            return
        rows, size = self.rows.rows, self.world.size
        say(self.config.to_text())
        say(
            f"{counted(len(rows), 'example')}, {counted(sum(len(ids) for ids, _ in rows), 'token')}, "
            f"{self.rows.learned(range(len(rows))):,} in the loss; {counted(self.batch_size, 'example')} a step: "
            f"{counted(size, 'process', 'processes')} x {counted(self.accumulation, 'microbatch', 'microbatches')} x "
            f"{self.batch_size // size // self.accumulation}",
        )

    def _settle_buckets(self) -> None:
        """Lets DDP arrange its buckets now, which it does after a first backward pass.

        With more than two processes a resumed run would otherwise sum in another order than an uninterrupted one.
        """
        for _ in range(2):
            with self._precision():
                loss = self.module(collate([], self.world.device, packed=True))
            loss.backward()
        self.optimizer.zero_grad()

    def _loop(self) -> None:
        config, done = self.config, self.progress
        self.timed_since = time.perf_counter()
        stopped = done.step > 0 and self._evaluate_if_due()  # a run may be killed between a checkpoint and this
        while done.step < self.total_steps and not stopped:
            stopped = self._step()
            done.step += 1
            last = done.step == self.total_steps
            self._show(self._write_metrics() if done.step % config.logging_steps == 0 or last else None)
            if done.step % config.save_steps == 0 or last:
                self._save()
            stopped = stopped or self._evaluate_if_due()
        if stopped:
            self._save()
            raise TrainingStopped(self.signal or signal.SIGTERM, done.step, self.folder.checkpoint(done.step))

    def _step(self) -> bool:
        """One optimizer step. Returns whether a signal has come to any process."""
        config, world, step = self.config, self.world, self.progress.step
        torch.manual_seed(seed_of(config.seed, step, world.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total_steps, config)
        learned = self.rows.learned(self.order.examples(step))
        mine = self.order.microbatches(step, world.size * self.accumulation)[world.rank :: world.size]
        loss_sum = torch.zeros((), device=world.device)
        seen = 0
        for number, indices in enumerate(mine, 1):
            rows = [self.rows.rows[i] for i in indices]
            batch = collate(rows, world.device, packed=config.batching == "packed")
            seen += batch.tokens
            # DDP sums gradients over the processes with the last microbatch alone; FSDP's would be whole until then.
            waits = self.is_ddp and number < len(mine)
            with self.module.no_sync() if waits else contextlib.nullcontext():
                with self._precision():
                    loss = self.module(batch, config.label_smoothing)
                # DDP and FSDP average over the processes; what is wanted is the sum.
                self.scaler.scale(loss * (world.size / learned)).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = clip_gradients(self.module.parameters(), config.max_grad_norm).item()
        if math.isfinite(self.grad_norm):  # the same in all processes, as the norm is
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        total_loss, total_seen, stopped = world.sum(loss_sum.item(), seen, float(self.signal != 0))
        self.tokens_seen += int(total_seen)
        self._count(total_loss, learned)
        return stopped > 0

    def _count(self, loss_sum: float, learned: int) -> None:
        done = self.progress
        if math.isfinite(loss_sum):
            done.loss_sum, done.loss_tokens = done.loss_sum + loss_sum, done.loss_tokens + learned
        if math.isfinite(self.grad_norm):
            done.skipped_in_a_row = 0
            return
        done.skipped, done.skipped_in_a_row = done.skipped + 1, done.skipped_in_a_row + 1
        if done.skipped_in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"step {done.step + 1}: gradients of {MOST_SKIPPED} steps in a row were not finite, the last loss was "
                f"{loss_sum / learned}. Lower --learning_rate, or use --bf16 instead of --fp16."
            )

    def _precision(self) -> Any:
        """Products in 16 bits; FSDP gathers parameters in 16 bits itself."""
        enabled = self.dtype is not None and not self.is_sharded
        return torch.autocast(self.world.device.type, dtype=self.dtype or torch.bfloat16, enabled=enabled)

    def _write_metrics(self) -> dict[str, float]:
        now, done = time.perf_counter(), self.progress
        done.loss = done.loss_sum / done.loss_tokens if done.loss_tokens else math.nan
        metrics = {
            "step": done.step,
            "epoch": round(done.step / self.order.steps_per_epoch, 6),
            "loss": done.loss,
            "learning_rate": learning_rate(done.step - 1, self.total_steps, self.config),
            "grad_norm": self.grad_norm,
            "skipped_steps": done.skipped,
            "tokens_per_second": round(self.tokens_seen / (now - self.timed_since), 1),
        }
        done.loss_sum, done.loss_tokens, self.tokens_seen, self.timed_since = 0.0, 0, 0, now
        self.world.first(lambda: self.folder.add_metrics(metrics))
        return metrics

    def _show(self, metrics: Mapping[str, float] | None) -> None:
        """One more step is done: a bar on a terminal, plain lines elsewhere."""
        text = ""
        if metrics is not None:
            text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            text += f"{metrics['tokens_per_second']:,.0f} tokens/s"
            text += f"  {metrics['skipped_steps']:.0f} skipped" if metrics["skipped_steps"] else ""
        step = self.progress.step
        if not self.bar.disable:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif text and self.world.is_first:
            left = (time.perf_counter() - self.began_at) / (step - self.first_step) * (self.total_steps - step)
            say(f"step {step}/{self.total_steps}  {text}  {tqdm.format_interval(left)} left")

    @contextlib.contextmanager
    def _not_timed(self) -> Iterator[None]:
        """Time in here does not count in tokens a second, which are those of training."""
        begin, since = time.perf_counter(), self.timed_since
        yield
        self.timed_since = since + time.perf_counter() - begin

    def _save(self) -> None:
        done, config = self.progress, self.model.config.to_dict()  # with which a checkpoint opens as a model
        state = {**self.record, "config": config, "progress": asdict(done), "scaler": self.scaler.state_dict()}
        with self._not_timed():
            self.folder.save(done.step, self.module, self.optimizer, state)
            self.world.first(lambda: self.folder.remove_old(self.config.keep_last, done.best_step))

    def _evaluate_if_due(self) -> bool:
        """Evaluates, and keeps the best model. Returns whether a signal has come meanwhile."""
        config, step = self.config, self.progress.step
        due = {"no": False, "steps": step % config.eval_steps == 0,
               "epoch": step % self.order.steps_per_epoch == 0}[config.evaluation_strategy]  # fmt: skip
        if self.progress.evaluated_step == step or not (due or (config.do_eval and step == self.total_steps)):
            return False
        with self._not_timed():
            return self._evaluate()

    def _evaluate(self) -> bool:
        assert self.eval_rows is not None
        config, world, done, task = self.config, self.world, self.progress, self.config.resolved_task()
        dtype = self.dtype or torch.float32
        if dtype == torch.float16 and world.device.type == "cpu":
            dtype = torch.float32
        result = evaluate(
            gathered(self.model, world.device, dtype), self.tokenizer, self.eval_rows.rows, self.references,
            task.scores, config.generation, world, batch_size=config.per_device_eval_batch_size,
            stop=lambda: self.signal != 0,
        )  # fmt: skip
        if result is None:
            return True
        done.metrics, self.predictions, done.evaluated_step = dict(result.metrics), dict(result.predictions), done.step

        def write() -> None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in done.metrics.items())
            say(f"evaluation after step {done.step}: {shown}")
            self.folder.add_metrics(
                {"step": done.step} | {f"eval_{name}": value for name, value in done.metrics.items()}
            )
            if self.predictions:
                self.folder.write(PREDICTIONS, self.predictions)

        world.first(write)
        score = result.metrics[task.best] if self.references else -result.metrics["loss"]
        is_best = score > done.best_score
        if is_best:
            done.best_step, done.best_score = done.step, score
            save(self.model, self.folder.path / BEST, self.tokenizer, world)
        if is_best or self.folder.checkpoint(done.step).exists():
            self._save()
        return False

    def _finish(self) -> None:
        self.folder.publish(is_best=self.progress.best_step == self.progress.step)
        if self.config.keep_last == 0:
            self.folder.write(SETTINGS, {**self.record, "finished": self.progress.step})
            shutil.rmtree(self.folder.checkpoints)

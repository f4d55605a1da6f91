"""The training loop: one for one process and for many, DDP and FSDP, with every precision."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minopt import __version__
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.config import read_json
from minopt.devices import resolve_dtype
from minopt.distributed import World, processes
from minopt.evaluation.tasks import seed_of
from minopt.memory import kept_when_freed
from minopt.model import OPT
from minopt.progress import bar, counted, say
from minopt.tokenizer import Tokenizer
from minopt.training.batches import microbatches
from minopt.training.checks import accumulation_of, check_fit, check_precision
from minopt.training.config import TrainingConfig
from minopt.training.data import Example
from minopt.training.method import Method, method_of
from minopt.training.optim import float32_products, learning_rate, training_layers
from minopt.training.run import BEST, MODEL, PREDICTIONS, SETTINGS, RunFolder, Signals, read_state
from minopt.training.weights import apply_fsdp

MOST_SKIPPED = 20  # steps in a row whose gradients are not finite


@dataclass(frozen=True)
class TrainResult:
    """The result of a run, the same in all processes."""

    steps: int  # those before a resumption included
    skipped_steps: int  # that changed nothing because their gradients were not finite
    loss: float  # the mean over the tokens of the steps in the last line of metrics.jsonl; NaN without training
    metrics: dict[str, float]  # the last evaluation's, see EvaluationResult; empty if there was none
    predictions: dict[str, str] = field(repr=False)  # the last evaluation's
    output_dir: Path  # the folder that now holds the model


class TrainingStopped(RuntimeError):
    """A signal (its number) has ended the run after a step, with a checkpoint from which the run goes on."""

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

    Raises:
        ValueError: if the settings do not fit the model, the data, the processes or the run in the folder; or if
            the gradients of 20 steps in a row are not finite; and, of a model by its name, as ``load_model`` does.
        OSError: if the folder is in use, or cannot be written; and as ``load_model`` does.
        TrainingStopped: if SIGTERM or SIGINT has ended it.
    """
    with processes(config.device) as world, contextlib.ExitStack() as stack:
        method, checkpoint = method_of(config), None
        if not isinstance(model, OPT):
            checkpoint, tokenizer = method.find(model, tokenizer, world)
            model = OPT(checkpoint.config, device="meta")
        if tokenizer is None:
            raise ValueError("tokenizer: expected the model's, got None. Pass it, or a name instead of the model.")
        check_fit(model, config, eval_data)
        check_precision(config, world.device)
        if eval_data is not None and not isinstance(eval_data, str):
            eval_data = eval_data[: config.max_eval_samples]
        run: Run = type("Run", (Run, method), {})(model, tokenizer, config, world, train_data, eval_data)
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


class Run(Method):
    """A run in one process: the loop, which drives the parts of a method."""

    def __init__(
        self, model: OPT, tokenizer: Tokenizer, config: TrainingConfig, world: World, train_data: Any, eval_data: Any
    ) -> None:
        self.model, self.tokenizer, self.config, self.world = model, tokenizer, config, world
        self.eval_data = eval_data
        self.tokens, self.eval_tokens = world.each(lambda: (
            self.tokenise(train_data, training=True),
            None if eval_data is None else self.tokenise(eval_data, training=False),
        ))  # fmt: skip
        self.warn()
        self.folder = RunFolder(config.output_dir, world)
        self.record: dict[str, Any] = {"settings": config.to_dict(), "data": self.tokens.digest()}
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        self.is_sharded = config.parallel == "fsdp" and world.size > 1
        self.is_ddp = config.parallel == "ddp" and world.size > 1
        self.progress, self.predictions, self.signals = _Progress(), dict[str, str](), Signals()
        self.tokens_seen, self.seconds = 0, 0.0  # of this process, since metrics were last written
        self.grad_norm = 0.0  # of the last step

    @contextlib.contextmanager
    def wrapped(self, checkpoint: Checkpoint | None) -> Iterator[None]:
        """Makes of the plain model one that is trained, and afterwards a plain one again (under FSDP, sharded).

        With a checkpoint the model is on the meta device, and filled from that.
        """
        config, world, model = self.config, self.world, self.model
        model.to(resolve_dtype(config.base_dtype)).train()
        with training_layers(model, config), float32_products(config, world.device), kept_when_freed(world.device):
            self.module = self.build()
            if self.is_sharded:
                apply_fsdp(self.module, model, self.dtype, world.device)
            if checkpoint is not None:
                self.fill(checkpoint)
            if not self.is_sharded:
                model.to(world.device)
            if self.is_ddp:
                self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.optimizer = self.build_optimizer()
            self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.fp16)
            try:
                yield
            finally:
                self.close()
                # DDP holds the processes' group, and gradients lie in its buckets.
                self.module.zero_grad()
                del self.module, self.optimizer

    def train(self) -> TrainResult:
        config, world = self.config, self.world
        self._begin()
        lengths, count = self.tokens.lengths, world.size * self.accumulation
        self.steps_per_epoch = math.ceil(len(lengths) / self.batch_size)
        epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else epochs
        grouped, self.first_step = config.batching == "grouped", self.progress.step  # above 0 in a run that goes on
        self.microbatches = microbatches(
            lengths, self.batch_size, count, config.seed, grouped=grouped, first_step=self.first_step
        )
        self.began_at = time.perf_counter()
        devices = [world.device.index or 0] if world.device.type == "cuda" else []
        with (
            bar(self.total_steps, "step", initial=self.first_step) as self.bar,
            self.signals,
            torch.random.fork_rng(devices=devices),
        ):
            self._loop()
        self.save(self.folder.path / MODEL)
        world.first(self._finish)
        progress = self.progress
        return TrainResult(
            progress.step, progress.skipped, progress.loss, progress.metrics, self.predictions, self.folder.path
        )

    def _begin(self) -> None:
        """Takes the folder, and goes on from the checkpoint that is in it or was named."""
        world, config, folder = self.world, self.config, self.folder
        world.wait()  # until all have read their model: it may lie in the folder, and be overwritten
        path = world.first(lambda: folder.claim(self.record, config.resume, overwrite=config.overwrite_output_dir))
        state = {} if path is None else world.each(lambda: read_state(path))
        asked = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        self.batch_size: int = state.get("global_batch_size", asked)  # examples of a step in all processes
        self.accumulation = accumulation_of(config, world, self.batch_size)  # microbatches of a step in this one
        self.record |= {"global_batch_size": self.batch_size, "minopt": __version__, "torch": torch.__version__}
        if self.is_ddp:
            # DDP arranges its buckets after a first backward pass. With more than two processes a resumed run would
            # otherwise sum in another order than an uninterrupted one.
            for _ in range(2):
                self.backward([], 0.0)
            self.optimizer.zero_grad()
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
            lengths, size = self.tokens.lengths, self.world.size
            learned = self.tokens.learned(range(len(lengths)))
            say(config.to_text())
            say(
                f"{counted(len(lengths), 'example')}, {counted(sum(lengths), 'token')}, "
                f"{learned:,} in the loss; {counted(self.batch_size, 'example')} a step: "
                f"{counted(size, 'process', 'processes')} x {counted(self.accumulation, 'microbatch', 'microbatches')} "
                f"x {self.batch_size // size // self.accumulation}"
            )
            if path is not None:
                say(f"going on from {path}, after step {self.progress.step}")

        world.first(write)

    def _loop(self) -> None:
        config, progress = self.config, self.progress
        stopped = progress.step > 0 and self._evaluate_if_due()  # a run may be killed between a checkpoint and this
        while progress.step < self.total_steps and not stopped:
            began = time.perf_counter()
            stopped = self._step()
            self.seconds += time.perf_counter() - began
            progress.step += 1
            last = progress.step == self.total_steps
            if progress.step % config.logging_steps == 0 or last:
                self._log()
            self.bar.update()
            if progress.step % config.save_steps == 0 or last:
                self._save()
            stopped = stopped or self._evaluate_if_due()
        if stopped:
            self._save()
            raise TrainingStopped(
                self.signals.received or signal.SIGTERM, progress.step, self.folder.checkpoint(progress.step)
            )

    def _step(self) -> bool:
        """One optimizer step. Returns whether a signal has come to any process."""
        world, step = self.world, self.progress.step
        torch.manual_seed(seed_of(self.config.seed, step, world.rank))
        examples = next(self.microbatches)
        learned = sum(map(self.tokens.learned, examples))
        rows = [[self.tokens.rows[i] for i in indices] for indices in examples[world.rank :: world.size]]
        loss, self.grad_norm = self.move(rows, learned, step, self.total_steps)
        total_loss, stopped = world.sum(loss, float(self.signals.received != 0))
        self._count(total_loss, learned)
        return stopped > 0

    def _count(self, loss_sum: float, learned: int) -> None:
        progress = self.progress
        if math.isfinite(loss_sum):
            progress.loss_sum, progress.loss_tokens = progress.loss_sum + loss_sum, progress.loss_tokens + learned
        if math.isfinite(self.grad_norm):
            progress.skipped_in_a_row = 0
            return
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"step {progress.step + 1}: gradients of {MOST_SKIPPED} steps in a row were not finite, the last "
                f"loss was {loss_sum / learned}. Lower --learning_rate, or use --bf16 instead of --fp16."
            )

    def _log(self) -> None:
        """Writes metrics, and shows them beside the bar or, without a terminal, in a line."""
        progress, total = self.progress, self.total_steps
        progress.loss = progress.loss_sum / progress.loss_tokens if progress.loss_tokens else math.nan
        speed = self.world.sum(self.tokens_seen)[0] / self.seconds
        rate = learning_rate(progress.step - 1, total, self.config)
        metrics = {
            "step": progress.step,
            "epoch": round(progress.step / self.steps_per_epoch, 6),
            "loss": progress.loss,
            "learning_rate": rate,
            "grad_norm": self.grad_norm,
            "skipped_steps": progress.skipped,
            "tokens_per_second": round(speed, 1),
        }
        progress.loss_sum, progress.loss_tokens, self.tokens_seen, self.seconds = 0.0, 0, 0, 0.0
        self.world.first(lambda: self.folder.add_metrics(metrics))
        text = f"loss {progress.loss:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s"
        text += f"  {progress.skipped} skipped" if progress.skipped else ""
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and self.world.is_first:
            left = (time.perf_counter() - self.began_at) / (progress.step - self.first_step) * (total - progress.step)
            say(f"step {progress.step}/{total}  {text}  {tqdm.format_interval(left)} left")

    def _save(self) -> None:
        progress, config = self.progress, self.model.config.to_dict()  # with which a checkpoint opens as a model
        state = {**self.record, "config": config, "progress": asdict(progress), "scaler": self.scaler.state_dict()}
        self.folder.save(progress.step, self.module, self.optimizer, state)
        self.world.first(lambda: self.folder.remove_old(self.config.keep_last, progress.best_step))

    def _evaluate_if_due(self) -> bool:
        """Evaluates, and keeps the best model. Returns whether a signal has come meanwhile."""
        config, step = self.config, self.progress.step
        every = {"no": math.inf, "steps": config.eval_steps, "epoch": self.steps_per_epoch}[config.evaluation_strategy]
        due = step % every == 0 or (config.do_eval and step == self.total_steps)
        return due and self.progress.evaluated_step != step and self._evaluate()

    def _evaluate(self) -> bool:
        world, progress, result = self.world, self.progress, self.measure()
        if result is None:
            return True
        progress.metrics, self.predictions, progress.evaluated_step = (
            dict(result.metrics),
            dict(result.predictions),
            progress.step,
        )

        def write() -> None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
            say(f"evaluation after step {progress.step}: {shown}")
            self.folder.add_metrics(
                {"step": progress.step} | {f"eval_{name}": v for name, v in progress.metrics.items()}
            )
            if self.predictions:
                self.folder.write(PREDICTIONS, self.predictions)

        world.first(write)
        score = self.score(result.metrics)
        is_best = score > progress.best_score
        if is_best:
            progress.best_step, progress.best_score = progress.step, score
            self.save(self.folder.path / BEST)
        if is_best or self.folder.checkpoint(progress.step).exists():
            self._save()
        return False

    def _finish(self) -> None:
        self.folder.publish(is_best=self.progress.best_step == self.progress.step)
        if self.config.keep_last == 0:
            self.folder.write(SETTINGS, {**self.record, "finished": self.progress.step})
            shutil.rmtree(self.folder.checkpoints)

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
    """What a run came to.

    Attributes:
        steps: how many there were, those before a resumption included.
        skipped_steps: those of them that changed nothing because their gradients were not finite.
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

    The gradient of a step is that of the mean over all tokens that count in the loss, whatever the number of processes
    and microbatches. Order and dropout follow from seed and step, so that a checkpoint keeps no random state.

    Args:
        model: on any device; it is moved, made float32, and trained in place. Under FSDP it stays sharded. Or the name
            of one, as ``load_model`` takes it: then under FSDP each process reads its share, and none has it whole.
        train_data: examples, or one text, of which all tokens count; ``read_data`` gives either.
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
    """How far a run has come: what a checkpoint keeps beside the weights."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of that evaluation
    loss: float = math.nan  # as metrics were last written; since then:
    loss_sum: float = 0.0
    loss_tokens: int = 0


class _Run:
    """A run in one process."""

    def __init__(
        self, model: OPT, tokenizer: Tokenizer, config: TrainingConfig, world: World,
        train_data: Sequence[Example] | str, eval_data: Sequence[Example] | str | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.config, self.world = model, tokenizer, config, world
        self.rows = tokens_of(train_data, model, tokenizer, config, world, training=True)
        self.eval_rows, self.references = None, references_of(eval_data or "")
        if eval_data is not None:
            self.eval_rows = tokens_of(eval_data, model, tokenizer, config, world)
        warn(config.replace(do_train=True), world, eval_data, self.eval_rows)
        self.folder = RunFolder(config.output_dir, world)
        self.record: dict[str, Any] = {"settings": config.to_dict(), "data": self.rows.digest()}
        self.dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        self.is_sharded = config.parallel == "fsdp" and world.size > 1
        self.is_ddp = config.parallel == "ddp" and world.size > 1
        self.progress, self.predictions = _Progress(), dict[str, str]()
        self.tokens_seen, self.grad_norm, self.signal, self.signalled = 0, 0.0, 0, 0.0

    @contextlib.contextmanager
    def wrapped(self, checkpoint: Checkpoint | None) -> Iterator[None]:
        """Makes of the plain model one that is trained, and afterwards a plain one again (under FSDP, sharded).

        With a checkpoint the model is on the meta device, and filled from that.
        """
        config, world, model = self.config, self.world, self.model
        model.float().train()
        with training_layers(model, dropout=config.dropout, recompute=config.recompute, compile=config.compile):
            self.module: Any = ModelWithLoss(model)
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
        self.total = config.max_steps if config.max_steps > 0 else epochs
        shown = world.is_first and on_terminal()
        devices = [world.device.index or 0] if world.device.type == "cuda" else []
        self.first_step, self.began = self.progress.step, time.perf_counter()
        with (
            bar(self.total, "step", initial=self.first_step, shown=shown) as self.bar,
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
        world.sum(0.0)  # all have read their model: it may lie in the folder, and be overwritten
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
        """Lets DDP arrange its buckets, which it does after a first backward pass.

        Otherwise it would do so after the first step, also after that of a resumed run: sums over more than two
        processes would be in another order there than in a run that was not interrupted.
        """
        for _ in range(2):
            with self._precision():
                loss = self.module(collate([], self.world.device, packed=True))
            loss.backward()
        self.optimizer.zero_grad()

    def _loop(self) -> None:
        config, done = self.config, self.progress
        self.last_written = time.perf_counter()
        stopped = done.step > 0 and self._evaluate_if_due()  # what a kill has kept from being done
        while done.step < self.total and not stopped:
            stopped = self._step()
            done.step += 1
            last = done.step == self.total
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
            group["lr"] = learning_rate(step, self.total, config)
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
            "learning_rate": learning_rate(done.step - 1, self.total, self.config),
            "grad_norm": self.grad_norm,
            "skipped_steps": done.skipped,
            "tokens_per_second": round(self.tokens_seen / (now - self.last_written), 1),
        }
        done.loss_sum, done.loss_tokens, self.tokens_seen, self.last_written = 0.0, 0, 0, now
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
            left = (time.perf_counter() - self.began) / (step - self.first_step) * (self.total - step)
            say(f"step {step}/{self.total}  {text}  {tqdm.format_interval(left)} left")

    def _save(self) -> None:
        begin, done = time.perf_counter(), self.progress
        config = self.model.config.to_dict()  # a checkpoint opens as a model
        state = {**self.record, "config": config, "progress": asdict(done), "scaler": self.scaler.state_dict()}
        self.folder.save(done.step, self.module, self.optimizer, state)
        self.world.first(lambda: self.folder.remove_old(self.config.keep_last, done.best_step))
        self.last_written += time.perf_counter() - begin  # tokens a second are those of training

    def _evaluate_if_due(self) -> bool:
        """Evaluates, and keeps the best model. Returns whether a signal has come meanwhile."""
        config, step = self.config, self.progress.step
        due = {"no": False, "steps": step % config.eval_steps == 0,
               "epoch": step % self.order.steps_per_epoch == 0}[config.evaluation_strategy]  # fmt: skip
        if self.progress.evaluated_step == step or not (due or (config.do_eval and step == self.total)):
            return False
        begin, last_written = time.perf_counter(), self.last_written
        stopped = self._evaluate()
        self.last_written = last_written + time.perf_counter() - begin
        return stopped

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

"""What a run trains, on what, by which step, and what it leaves: the parts that a method can do in another way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.distributed import World
from minopt.evaluation.answers import EvaluationResult, evaluate
from minopt.evaluation.tasks import LABEL_TASKS
from minopt.inference.fast import FastOPT
from minopt.model import OPT
from minopt.tokenizer import Tokenizer
from minopt.training.batches import Tokens, collate, tokenise
from minopt.training.checks import warn
from minopt.training.config import TrainingConfig
from minopt.training.data import read_data, references_of
from minopt.training.loss import ModelWithLoss
from minopt.training.optim import build_optimizer, clip_gradients, learning_rate
from minopt.training.run import RunFolder, Signals
from minopt.training.weights import fill, find, gathered, save

# The modules of other methods, each with when settings ask for it. A module has a class `Method`, made from the one
# here. Where several fit, the first comes first. Each can be deleted: its file, its row, its flags and its tests.
METHODS: tuple[tuple[str, Callable[[TrainingConfig], bool]], ...] = (
    ("minopt.methods.mezo", lambda config: config.optimizer == "mezo"),
    ("minopt.interop.lora", lambda config: config.lora_rank > 0),
    ("minopt.methods.labels", lambda config: config.task in LABEL_TASKS),
)


class Method:
    """The plain method: all weights, by AdamW, on prompts with completions or on a text.

    ``Run`` in trainer.py drives it. Another method is a subclass that replaces some of these parts. All processes call
    them at the same time. The attributes are there before the part that is named with them is called. Names that a
    subclass adds must not be among those of ``Run``, which come first.
    """

    config: TrainingConfig
    world: World
    model: OPT  # without numbers (meta) until `fill`, where a run begins with a name
    tokenizer: Tokenizer
    eval_data: Any  # what `read` gave for dev_file; None without evaluation
    tokens: Tokens  # for `warn`: what `tokenise` gave of train_file
    eval_tokens: Tokens | None  # and of dev_file
    dtype: torch.dtype | None  # for `build`: of products; None is float32
    is_sharded: bool  # by FSDP
    is_ddp: bool
    module: Any  # for `fill`: what `build` gave; for `move` and later within DDP where that is used
    optimizer: Any  # what `build_optimizer` gave; for `move`, as all below
    scaler: torch.amp.GradScaler
    tokens_seen: int  # `move` adds what it reads
    signals: Signals
    folder: RunFolder

    @classmethod
    def evaluate(cls, name: str, data: Any, config: TrainingConfig, world: World) -> EvaluationResult | None:
        """Measures a model as it is, for --do_eval alone; ``None`` if it is to be measured as a language model."""
        return None

    @classmethod
    def read(cls, config: TrainingConfig, split: Literal["train", "dev"]) -> Any:
        """Reads ``train_file`` or ``dev_file``: the data of ``train``, a text or a sequence of what has an ``id``."""
        return read_data(getattr(config, f"{split}_file"), config.resolved_task(), split=split)

    # Opens the model to start from, as `find` of weights.py does: an OPT's weights, perhaps with others to ignore.
    find = staticmethod(find)

    def tokenise(self, data: Any, *, training: bool) -> Tokens:
        """Data as rows. A step's loss is divided by what is ``learned`` of its rows."""
        return tokenise(data, self.tokenizer, self.model.config, self.config, training=training)

    def warn(self) -> None:
        """Says what of the rows was cut, and which settings do nothing."""
        tokens, is_text = {"train_file": self.tokens, "dev_file": self.eval_tokens}, isinstance(self.eval_data, str)
        warn(self.config.replace(do_train=True), self.world, tokens, eval_is_text=is_text)

    def build(self) -> nn.Module:
        """The module to train: it has ``model``, and what it adds is on the device. Of a batch it sums the losses."""
        return ModelWithLoss(self.model)

    def fill(self, checkpoint: Checkpoint) -> None:
        """Gives the module its first weights, sharded or not. Without a checkpoint, ``model`` has its own: no call."""
        fill(self.model, checkpoint, self.world)

    def build_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, whose state is kept in checkpoints; a method that needs none has its own ``move``."""
        return build_optimizer(self.module, self.config)

    def collate(self, rows: Sequence[Any]) -> Any:
        """Rows as a batch for the module, with ``tokens``, their number. Of no rows, a batch whose loss is 0."""
        return collate(rows, self.world.device, packed=self.config.batching == "packed")

    def losses(self, batch: Any) -> Tensor:
        """The sum of a batch's losses, in the run's precision."""
        in_16_bits = self.dtype is not None and not self.is_sharded  # FSDP gathers parameters in 16 bits itself
        with torch.autocast(self.world.device.type, dtype=self.dtype or torch.bfloat16, enabled=in_16_bits):
            return self.module(batch, self.config.label_smoothing)

    def backward(self, rows: Sequence[Any], weight: float) -> Tensor:
        """Adds the gradients of a microbatch, times a weight. Returns the sum of its losses."""
        batch = self.collate(rows)
        self.tokens_seen += batch.tokens
        loss: Any = self.losses(batch)
        self.scaler.scale(loss * weight).backward()
        return loss.detach()

    def move(self, rows: Sequence[Sequence[Any]], learned: int, step: int, total_steps: int) -> tuple[float, float]:
        """Changes the weights by a step, counted from 0, on this process' rows of each microbatch.

        ``learned`` is that of all processes' rows. Returns the sum of this process' losses, and the norm of the
        gradient, the same in all processes; where that is not finite, nothing was changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, self.config)
        loss_sum = torch.zeros((), device=self.world.device)
        for number, microbatch in enumerate(rows, 1):
            # DDP sums gradients over the processes with the last microbatch alone. FSDP always shards them: unsharded
            # ones would have to fit on each GPU.
            waits = self.is_ddp and number < len(rows)
            with self.module.no_sync() if waits else contextlib.nullcontext():
                # DDP and FSDP average over the processes; what is wanted is the sum.
                loss_sum += self.backward(microbatch, self.world.size / learned)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.module.parameters(), self.config.max_grad_norm)
        loss, grad_norm = torch.stack([loss_sum, norm]).tolist()  # here alone the host waits for a GPU
        if math.isfinite(grad_norm):  # the same in all processes, as the norm is
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, grad_norm

    @property
    def evaluation_dtype(self) -> torch.dtype:
        is_slow = self.config.fp16 and self.world.device.type == "cpu"
        return torch.float32 if is_slow else self.dtype or torch.float32

    def whole(self) -> OPT:
        """The model as it is now, not sharded, in evaluation mode and in the dtype of evaluations."""
        return gathered(self.model.config, self.model.named_parameters(), self.world.device, self.evaluation_dtype)

    def measure(self) -> EvaluationResult | None:
        """Evaluates on ``eval_tokens``; ``None`` once a signal has come to any process."""
        assert self.eval_tokens is not None
        references = references_of(self.eval_data or "")
        # Packing takes a second, and a second copy of the layers. Steps that generate then take half of the time.
        pays = bool(references) and self.world.device.type == "cpu" and not self.is_sharded
        model = self.whole()
        model = FastOPT(model.config, model.state_dict().items()) if pays else model
        return evaluate(
            model, self.tokenizer, self.eval_tokens.rows, references,
            self.config.resolved_task().scores, self.config.generation, self.world,
            batch_size=self.config.per_device_eval_batch_size, stop=lambda: self.signals.received != 0,
        )  # fmt: skip

    def score(self, metrics: Mapping[str, float]) -> float:
        """By which evaluations are compared; the highest is the best."""
        return -metrics["loss"] if isinstance(self.eval_data, str) else metrics[self.config.resolved_task().best]

    def save(self, folder: Path) -> None:
        """Writes the result, into a new folder or over an earlier result. The file that makes it one comes last."""
        save(self.model, folder, self.tokenizer, self.world)

    def close(self) -> None:
        """Makes ``model`` a plain one again, after the run or its failure; under FSDP a sharded one."""
        self.model.eval()


def method_of(config: TrainingConfig) -> type[Method]:
    """The method that settings ask for; parts that several replace are combined by ``super()``."""
    chosen = [import_module(module).Method for module, fits in METHODS if fits(config)]
    return type("Method", (*chosen, Method), {}) if chosen else Method

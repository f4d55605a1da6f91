"""MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1): fine-tuning by forward passes alone, in place.

A step moves what trains by ``eps * z`` and then by ``-2 * eps * z``, and measures the loss each time. z is normal
noise, drawn anew from the step's seed whenever it is needed. The difference of the losses over ``2 * eps`` is the slope
along z. The step goes ``-learning_rate * slope * z`` from where it began. The memory is that of inference, and of the
noise for one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minopt.evaluation.tasks import seed_of
from minopt.model import OPT
from minopt.training import method
from minopt.training.optim import learning_rate
from minopt.training.weights import local

LOG = "mezo.jsonl"  # in a run's folder: its steps, from which `replay` makes the model again


@dataclass(frozen=True)
class Step:
    """All that a step needs, once its slope is known; a line of the log."""

    step: int
    seed: int
    eps: float
    learning_rate: float
    weight_decay: float
    slope: float = 0.0  # of the mean loss along the noise, called projected_grad in the paper

    def move(self, parameters: Iterable[Tensor], times: float, decay: float = 0.0, back: float = 0.0) -> None:
        """Adds the noise ``back`` times, takes ``decay`` of matrices away, and adds the noise ``times`` times."""
        generator = None
        for parameter in parameters:
            generator = generator or torch.Generator(parameter.device).manual_seed(self.seed)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            own, noise = local(parameter, noise)
            keep = 1.0 - decay if parameter.ndim >= 2 else 1.0
            own.mul_(keep).add_(noise, alpha=back * keep + times)

    def end(self, parameters: Iterable[Tensor]) -> None:
        """Moves the weights on from where the second loss was measured; back alone, if a loss was not finite."""
        rate = self.learning_rate if math.isfinite(self.slope) else 0.0
        self.move(parameters, -rate * self.slope if rate else 0.0, rate * self.weight_decay, back=self.eps)


class Method(method.Method):
    """Moves what trains. Each process measures its rows, and all draw the same noise."""

    def build(self) -> nn.Module:
        self.is_ddp = False  # which would hold gradients as large as the model
        return super().build()

    def build_optimizer(self) -> None:
        """None: a step follows from its number alone."""

    @torch.no_grad()
    def move(self, rows: Sequence[Sequence[Any]], learned: int, step: int, total_steps: int) -> tuple[float, float]:
        config, module = self.config, self.module.eval()  # without dropout, as published
        batches = [self.collate(microbatch) for microbatch in rows]
        self.tokens_seen += sum(batch.tokens for batch in batches)
        rate, seed = learning_rate(step, total_steps, config), seed_of(config.seed, step, -1)  # of no process
        moved, losses = Step(step, seed, config.mezo_eps, rate, config.weight_decay), []
        for times in (moved.eps, -2 * moved.eps):
            moved.move(self._parameters(), times)
            losses.append(sum(self.losses(batch).item() for batch in batches))
        above, below = self.world.sum(*losses)
        moved = replace(moved, slope=(above - below) / learned / (2 * moved.eps))
        moved.end(self._parameters())
        module.train()
        self.world.first(lambda: self.folder.add_line(LOG, asdict(moved)))
        return losses[0], abs(moved.slope)

    def _parameters(self) -> list[Tensor]:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):  # the root has its whole weights still, after a forward pass
                part.reshard()
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


@torch.no_grad()
def replay(model: OPT, log: str | Path) -> None:
    """Makes the model of a run again, to the last bit, without its data.

    Args:
        model: the one that the run began with, in the same dtype; it is changed in place. What the run froze is frozen.
        log: the run's ``mezo.jsonl``. Of a step that is in it more than once, as a resumed run does it again, the last
            line counts.
    """
    lines = [Step(**json.loads(line)) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _, step in sorted({line.step: line for line in lines}.items()):
        step.move(parameters, step.eps)
        step.move(parameters, -2 * step.eps)
        step.end(parameters)

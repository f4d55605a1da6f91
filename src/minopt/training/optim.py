"""The optimizer, the learning rate as a function of the step, and how layers run while they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from minopt.model import OPT
from minopt.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: neither biases nor norms gain from being small."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly from 0 over the warm-up. Then it falls from its highest to ``lr_decay_ratio`` of that, which it
    would reach one step after the last: as transformers' schedules do, whose floor is 0.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.lr_scheduler_type]
    floor = config.lr_decay_ratio
    return config.learning_rate * (floor + (1 - floor) * left)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a norm over all of them, on all processes; 0 leaves them.

    Returns the norm before that, the same on all processes; it is not finite if any gradient is not.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):  # of sharded gradients
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def float32_products(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Until the block ends, lets a GPU compute float32 products in TF32 if the settings say so."""
    before = torch.get_float32_matmul_precision()
    if config.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def training_layers(model: OPT, config: TrainingConfig) -> Iterator[None]:
    """Until the block ends, lets layers run as the settings say: with another dropout, recomputed, compiled.

    Compiled layers share one program, which texts of any lengths use.
    """
    layers: list[Any] = [*model.layers]
    for layer in layers:
        forward: Any = layer.forward
        if config.compile:
            forward = torch.compile(forward)
        if config.recompute:  # keeps only the inputs of a layer
            forward = partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
        layer.dropout = model.config.dropout if config.dropout is None else config.dropout
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class' own shows again
            layer.dropout = model.config.dropout

"""The optimizer, the schedule and the clipping are torch's and transformers'; decay is for matrices alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from minopt.model import OPT
from minopt.training.config import TrainingConfig
from minopt.training.optim import build_optimizer, clip_gradients, learning_rate
from tests.conftest import build_ours, build_reference

CONFIG = TrainingConfig(output_dir="x", learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.95,
                        adam_epsilon=1e-3)  # fmt: skip


def with_gradients(kind: str = "125m", dtype: torch.dtype = torch.float64) -> OPT:
    model = build_ours(build_reference(kind, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def test_every_parameter_that_learns_is_in_one_group_and_matrices_alone_decay(kind: str) -> None:
    model = with_gradients(kind)
    for parameter in (model.embed_positions.weight, *model.layers[0].fc1.parameters()):
        parameter.requires_grad_(False)
    groups = build_optimizer(model, CONFIG).param_groups
    learned = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(learned)
    decaying = {learned[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {name for name in learned.values() if name.endswith("weight") and "norm" not in name}
    assert {group["weight_decay"] for group in groups} == ({0.5} if kind == "galactica" else {0.0, 0.5})


def test_steps_are_those_of_adamw_as_published(kind: str) -> None:
    """Arxiv 1711.05101, algorithm 2, with the settings of the configuration."""
    model = with_gradients(kind)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    optimizer = build_optimizer(model, CONFIG)
    for step in range(1, 4):
        optimizer.step()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            first[name].mul_(0.8).add_(0.2 * gradient)
            second[name].mul_(0.95).add_(0.05 * gradient**2)
            scale = (second[name] / (1 - 0.95**step)).sqrt() + 1e-3
            decay = 0.5 * expected[name] if parameter.ndim == 2 else 0
            expected[name] = expected[name] - 0.1 * (first[name] / (1 - 0.8**step) / scale + decay)
            parameter.grad = gradient.roll(1)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-10, atol=1e-10), name


SCHEDULES: dict[str, Any] = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


def rates(total: int, **changes: Any) -> list[float]:
    return [learning_rate(step, total, CONFIG.replace(**changes)) for step in range(total)]


def theirs(name: str, total: int, warmup: int) -> list[float]:
    """What transformers' scheduler sets, step for step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=CONFIG.learning_rate)
    schedule, found = SCHEDULES[name](optimizer, warmup, total), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (3, 0.5), (157, 0.0), (157, 0.06), (157, 0.999)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_all_steps_are_those_of_transformers(name: str, total: int, ratio: float) -> None:
    warmup = math.ceil(ratio * total)  # as TrainingArguments.get_warmup_steps has it
    assert rates(total, lr_scheduler_type=name, warmup_ratio=ratio) == pytest.approx(theirs(name, total, warmup))
    for steps in (1, 7, 200):  # which come before a ratio
        found = rates(total, lr_scheduler_type=name, warmup_steps=steps, warmup_ratio=0.3)
        assert found == pytest.approx(theirs(name, total, steps))


@pytest.mark.parametrize("floor", [0.1, 0.9])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_floor_lifts_what_falls_and_not_what_rises(name: str, floor: float) -> None:
    total, warmup = 50, 10
    plain = rates(total, lr_scheduler_type=name, warmup_ratio=0.2)
    lifted = rates(total, lr_scheduler_type=name, warmup_ratio=0.2, lr_decay_ratio=floor)
    assert lifted[:warmup] == plain[:warmup]
    assert lifted[warmup:] == pytest.approx([0.1 * floor + (1 - floor) * rate for rate in plain[warmup:]])
    assert max(lifted) == lifted[warmup] == 0.1
    end = CONFIG.replace(lr_scheduler_type=name, warmup_ratio=0.2, lr_decay_ratio=floor)
    assert learning_rate(total, total, end) == pytest.approx(0.1 * floor)


def test_paddlenlps_rate_rises_over_the_first_6_percent_and_falls_to_a_tenth() -> None:
    config = TrainingConfig(output_dir="x", recipe="paddlenlp")
    expected = [3e-5 * (step / 6 if step < 6 else 1 - 0.9 * (step - 6) / 94) for step in range(101)]
    assert [learning_rate(step, 100, config) for step in range(101)] == pytest.approx(expected)


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clipping_is_that_of_torch(max_norm: float, dtype: torch.dtype) -> None:
    ours, reference = with_gradients(dtype=dtype), with_gradients(dtype=dtype)
    for model in (ours, reference):
        model.embed_positions.weight.grad = None
    norm = clip_gradients(ours.parameters(), max_norm)
    # A limit of 0 measures, and changes nothing.
    assert torch.equal(norm, nn.utils.clip_grad_norm_(reference.parameters(), max_norm or math.inf))
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_gradient_that_is_not_finite_shows_in_the_norm(bad: float, max_norm: float) -> None:
    for place in (0, -1):
        model = with_gradients(dtype=torch.float32)
        gradient = list(model.parameters())[place].grad
        assert gradient is not None
        gradient.view(-1)[-1] = bad
        assert not clip_gradients(model.parameters(), max_norm).isfinite()

"""Training in several processes: the same losses, gradients and scores as in one, and no more messages than needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import minopt
from minopt import OPT
from minopt.distributed import World
from minopt.training import trainer
from minopt.training.trainer import train
from tests.training.small import (
    break_gradients,
    distance,
    examples,
    lines,
    losses,
    model_of,
    settings,
    together,
    tokenizer,
    watched,
    whole,
)

IDS = torch.tensor([[2, 9, 30, 41, 7], [2, 8, 8, 50, 60]])


@dataclass(frozen=True)
class Case:
    """A run to make in some number of processes: an epoch's last step has a single example."""

    kind: str = "125m"
    count: int = 9
    changes: dict[str, Any] = field(default_factory=dict)
    broken_step: int = -1  # in which a gradient of the last process is not finite


def case(kind: str = "125m", count: int = 9, broken_step: int = -1, **changes: Any) -> Case:
    return Case(kind, count, {"max_steps": -1, "num_train_epochs": 2} | changes, broken_step)


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"per_device_train_batch_size": 2},
    "ddp, accumulated": ACCUMULATED,
    "fsdp": {"per_device_train_batch_size": 2, "parallel": "fsdp"},
    "fsdp, accumulated": {"parallel": "fsdp"} | ACCUMULATED,
    "fsdp, recomputed": {"parallel": "fsdp", "recompute": True} | ACCUMULATED,
}
ACCUMULATING = ["ddp, accumulated", "fsdp, accumulated"]
WAYS_OF_KINDS = [("125m", way) for way in WAYS] + [
    (kind, way) for kind in ("350m", "galactica") for way in ACCUMULATING
]
BROKEN: dict[str, dict[str, Any]] = {"float32": {}, "fp16": {"fp16": True}, "bf16": {"bf16": True}}
IN_TWO = {f"{kind}, {way}": case(kind, do_eval=True, **WAYS[way]) for kind, way in WAYS_OF_KINDS} | {
    f"broken, {way}, {precision}": case(count=12, max_steps=4, broken_step=1, weight_decay=0.1, **WAYS[way], **changes)
    for way in ("ddp", "fsdp")
    for precision, changes in BROKEN.items()
}
IN_THREE = {way: case(count=13, **WAYS[way]) for way in ("ddp", "fsdp")} | {
    f"alone, {way}": case(count=1, max_steps=1, **WAYS[f"{way}, accumulated"]) for way in ("ddp", "fsdp")
}


@dataclass
class Report:
    """What a process saw of a run."""

    gradients: list[Tensor]
    weights: list[list[Tensor]]
    scales: list[float]
    skipped: int
    metrics: dict[str, float]
    predictions: dict[str, str]
    logits: Tensor
    sums: int  # of gradients, over all processes
    state: dict[str, Tensor]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts sums of gradients over the processes: of DDP's buckets, and of the groups of FSDP."""
    count, scatter = [0], dist.reduce_scatter_single

    class Counted(DistributedDataParallel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.register_comm_hook(None, hook)

    def hook(state: Any, bucket: Any) -> Any:
        count[0] += 1
        return allreduce_hook(state, bucket)

    hook.__annotations__.clear()  # DDP refuses those that are texts

    def watch(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return scatter(*args, **options)

    replaced = mock.patch.object(trainer, "DistributedDataParallel", Counted)
    with replaced, mock.patch.object(dist, "reduce_scatter_single", watch):
        yield count


def run(case: Case, folder: Path, rank: int = 0) -> Report:
    """Trains, in this process or together with others."""
    model = model_of(case.kind)
    config = settings(folder, **case.changes)
    eval_data = examples(5, seed=1) if config.do_eval else None
    with ExitStack() as stack:
        count = stack.enter_context(counted()) if dist.is_initialized() else [0]
        seen = stack.enter_context(watched())
        if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            break_gradients(model, lambda: seen.step == case.broken_step)
        result = train(model, examples(case.count), config, tokenizer=tokenizer(), eval_data=eval_data)
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    plain = OPT(model.config)
    plain.load_state_dict(state)
    with torch.no_grad():
        logits = plain.eval()(IDS)
    return Report(seen.gradients[0], seen.weights, seen.scales, result.skipped_steps, result.metrics,
                  result.predictions, logits, count[0], state)  # fmt: skip


@dataclass(frozen=True)
class Together:
    """What came of runs in several processes: by rank and name, and the folder that holds theirs."""

    found: list[dict[str, Any]]
    folder: Path

    @classmethod
    def of(cls, size: int, folder: Path, cases: dict[str, Case]) -> Together:
        return cls(together(size, folder, partial(_work, folder, cases)), folder)


def _work(folder: Path, cases: dict[str, Case], world: World) -> dict[str, Any]:
    return {name: run(case, folder / name, world.rank) for name, case in cases.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together.of(2, tmp_path_factory.mktemp("two"), IN_TWO)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together.of(3, tmp_path_factory.mktemp("three"), IN_THREE)


def assert_same(found: Report, expected: Report) -> None:
    """That gradients of the first step, and what was learned with them, are the same."""
    assert distance(found.gradients, expected.gradients) < 1e-6
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.predictions == expected.predictions


@pytest.mark.parametrize(("kind", "way"), WAYS_OF_KINDS)
def test_two_processes_give_and_save_what_one_gives(kind: str, way: str, two: Together, tmp_path: Path) -> None:
    expected = run(case(kind, do_eval=True), tmp_path / "one")
    for report in two.found:
        assert_same(report[f"{kind}, {way}"], expected)
    folder, report = two.folder / f"{kind}, {way}", two.found[0][f"{kind}, {way}"]
    assert len(losses(folder)) == 6  # of which the third and the last have one example, and one process none
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    model = minopt.load_model(folder, device="cpu", dtype="float32")
    state = model.state_dict()
    assert state.keys() == report.state.keys()
    assert all(torch.equal(state[name], report.state[name]) for name in state)
    reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), report.logits)
        torch.testing.assert_close(reference(IDS).logits, report.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_three_processes_give_what_one_gives_and_one_that_has_no_example_adds_nothing(
    way: str, three: Together, tmp_path: Path
) -> None:
    expected = run(case(count=13, per_device_train_batch_size=6), tmp_path / "one")
    for report in three.found:
        assert_same(report[way], expected)
    assert losses(three.folder / way) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    alone = run(case(count=1, max_steps=1), tmp_path / "alone")
    for report in three.found:
        assert_same(report[f"alone, {way}"], alone)
    assert distance(alone.gradients, expected.gradients) > 1e-2  # the comparison can fail


@pytest.mark.parametrize("way", WAYS)
def test_ddp_sums_gradients_once_a_step_and_fsdp_keeps_none_whole(way: str, two: Together) -> None:
    """DDP has one bucket, and two backward passes before the first step; FSDP gives shares away at each microbatch."""
    groups = 3 + 1  # a layer each, and all the rest
    microbatches = WAYS[way].get("gradient_accumulation_steps", 1)
    expected = 6 * groups * microbatches if "fsdp" in way else 2 + 6
    assert [report[f"125m, {way}"].sums for report in two.found] == [expected] * 2


@pytest.mark.parametrize("precision", BROKEN)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_all(
    way: str, precision: str, two: Together
) -> None:
    name = f"broken, {way}, {precision}"
    reports = [found[name] for found in two.found]
    counts = [0] + [line["skipped_steps"] for line in lines(two.folder / name)]
    skipped = [after > before for before, after in pairwise(counts)]
    assert skipped[1]
    assert skipped.count(True) == 1 or (precision == "fp16" and skipped == [True, True, False, False])  # by overflow
    for report in reports:
        assert report.skipped == counts[-1]
        assert [all(map(torch.equal, a, b)) for a, b in pairwise(report.weights)] == skipped[1:]
        assert all(torch.isfinite(w).all() for w in report.weights[-1])
        if precision == "fp16":
            assert report.scales == [65536.0 / 2**count for count in counts[1:]]
    for step, of_each in enumerate(zip(*(report.weights for report in reports), strict=True)):
        assert all(map(torch.equal, *of_each)), step

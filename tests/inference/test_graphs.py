"""What surrounds CUDA graphs, with plain calls in their place; and, where there is a GPU, the graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import minopt
from minopt.inference import graphs
from minopt.inference.fast import FastOPT
from minopt.inference.graphs import GraphedOPT
from tests.conftest import build_ours, lively

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
OPTIONS: list[dict[str, Any]] = [
    {}, {"num_return_sequences": 2, "do_sample": True, "seed": 1}, {"num_beams": 3, "num_return_sequences": 2},
]  # fmt: skip

captured: list[int] = []
CAPTURE = graphs.capture


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where graphs run; on a CPU a graph is the call that it would have captured, after the warm-up."""

    def capture(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
        captured.append(step().shape[0])
        return step

    captured.clear()
    monkeypatch.setattr(graphs, "BUCKET", 16)
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "capture", capture)
    return str(request.param)


def build(kind: str, device: str) -> tuple[FastOPT, GraphedOPT]:
    model = build_ours(lively(kind, torch.float32)).to(device)
    return FastOPT(model.config, model.state_dict().items()), GraphedOPT(model.config, model.state_dict().items())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", [None, PADDED])
def test_tokens_are_those_without_graphs(device: str, kind: str, options: dict[str, Any], mask: Tensor | None) -> None:
    plain, graphed = build(kind, device)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5))
    expected = minopt.generate(plain, ids, mask, max_new_tokens=20, **options)
    for _ in range(2):  # the second time with the graphs of the first
        found = minopt.generate(graphed, ids, mask, max_new_tokens=20, **options)
        assert torch.equal(found.sequences, expected.sequences)


def test_the_graphs_of_a_cache_serve_the_next_text_and_none_that_is_still_held(device: str) -> None:
    _, graphed = build("125m", device)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5), device=graphed.device)
    for _ in range(3):
        minopt.generate(graphed, ids, max_new_tokens=5)
        gc.collect()
    held = graphed.new_cache(2, 12)
    assert len(captured) <= 1
    assert len(graphed._graphs[held].by_shape) == 1
    assert not any(t.any() for t in held.keys)
    assert graphed.new_cache(2, 12).keys[0] is not held.keys[0]
    del held
    assert not graphed._graphs[graphed.new_cache(1, 12)].by_shape
    assert graphed.new_cache(2, 40).capacity == 48
    assert graphed.new_cache(2, 60).capacity == 64


def test_a_step_attends_the_filled_slots_rounded_up(device: str) -> None:
    _, graphed = build("125m", device)
    cache = graphed.new_cache(1, 40)
    for at in range(40):
        graphed.read(torch.tensor([[5]], device=device), torch.tensor([[at]], device=device), None, None, cache)
    steps = graphed._graphs[cache].by_shape
    assert {shape: step.mask.shape[3] for shape, step in steps.items()} == {(1, 16): 16, (1, 32): 32, (1, 48): 48}
    assert cache.length == 40


def test_text_to_the_last_position(device: str, kind: str) -> None:
    plain, graphed = build(kind, device)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5))
    expected = minopt.generate(plain, ids, max_new_tokens=57).sequences
    assert torch.equal(minopt.generate(graphed, ids, max_new_tokens=57).sequences, expected)


def test_a_copy_leaves_the_graphs_behind(device: str) -> None:
    _, graphed = build("125m", device)
    ids = torch.tensor([[2, 5, 60, 7]], device=graphed.device)
    minopt.generate(graphed, ids, max_new_tokens=5)
    graphed.compile_step = True
    again = copy.deepcopy(graphed)
    assert graphed._last is not None
    assert again._last is None
    assert again.compile_step
    assert torch.equal(again(ids), graphed(ids))


def test_a_cache_that_is_expanded_or_used_beside_another_has_graphs_of_its_own(device: str, kind: str) -> None:
    plain, graphed = build(kind, device)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5), device=graphed.device)
    streams = [[minopt.generate(model, ids[:1], max_new_tokens=9) for model in (plain, graphed)] for _ in range(2)]
    held = graphed.new_cache(2, 16)
    streams.append([minopt.generate(m, ids, max_new_tokens=9, do_sample=True, seed=1, num_return_sequences=3)
                    for m in (plain, graphed)])  # fmt: skip
    del held
    for expected, found in streams:
        assert torch.equal(found.sequences, expected.sequences)


def test_steps_of_any_number_of_shapes_are_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch stops after 8 of them, or 256 of all models, and runs the others as they are."""
    model = build_ours(lively("125m", torch.float32, num_hidden_layers=1)).to(device)
    graphed = GraphedOPT(model.config, model.state_dict().items(), compile_step=True)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **_: compile_(run, backend="eager", dynamic=False))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(accumulated_recompile_limit=8):
        for rows in range(1, 10):
            ids = torch.full((rows, 1), 5, device=device)
            graphed.read(ids, ids, None, None, graphed.new_cache(rows, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9


def test_all_captures_use_one_stream_and_a_failed_one_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs share a pool's memory on one stream alone; and torch leaves the stream of a capture only if that ends."""
    device, used = torch.device("cuda:7"), list[Any]()
    current = [Mock(name="own")]

    @contextmanager
    def chosen(stream: Any) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.remove(stream)

    @contextmanager
    def capturing(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        used.append(stream)
        assert not torch.is_inference_mode_enabled()  # or no graph could be captured outside of it any more
        yield
        assert not torch.is_inference_mode_enabled()
        current.append(stream)  # as where the end of a capture fails
        current.pop()

    fakes = {"Stream": lambda device: Mock(), "current_stream": lambda device: current[-1], "stream": chosen,
             "device": nullcontext, "CUDAGraph": Mock, "graph": capturing}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    outcomes: Any = iter([torch.zeros(1)] * 4 + [torch.zeros(1)] * 3 + [RuntimeError("capture")] + [torch.zeros(1)] * 4)

    def step() -> Tensor:
        assert torch.is_inference_mode_enabled()
        found = next(outcomes)
        if isinstance(found, RuntimeError):
            raise found
        return found

    with torch.inference_mode():
        CAPTURE(step, device, None)
        with pytest.raises(RuntimeError, match="capture"):
            CAPTURE(step, device, None)
        assert current[1:] == []
        CAPTURE(step, device, None)
    assert len(used) == 3
    assert len(set(used)) == 1


def test_a_failed_capture_leaves_nothing_to_the_next_text(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pool can be captured into no more."""
    plain, graphed = build("125m", device)
    ids, capture = torch.tensor([[2, 5, 60, 7]]), graphs.capture
    monkeypatch.setattr(graphs, "capture", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        minopt.generate(graphed, ids, max_new_tokens=9)
    assert graphed._last is None
    monkeypatch.setattr(graphs, "capture", capture)
    expected = minopt.generate(plain, ids, max_new_tokens=9).sequences
    assert torch.equal(minopt.generate(graphed, ids, max_new_tokens=9).sequences, expected)

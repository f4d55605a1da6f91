"""A program and its model are timed in turn, on work that fits the program, and what is slower is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minopt.inference import timing
from minopt.model import OPT
from tests.conftest import build_ours, build_reference


class Clocked:
    """A decoder whose calls take time by a clock of its own; some are disturbed by others' work."""

    def __init__(self, name: str, log: list[Any], model: OPT, length: int, max_batch: int | None, speed: float) -> None:
        self.name, self.log, self.model, self.speed, self.max_batch = name, log, model, speed, max_batch
        self.config, self.device = replace(model.config, max_position_embeddings=length), model.device
        self.new_cache = model.new_cache

    def read(self, inputs: torch.Tensor, positions: torch.Tensor, mask: Any, wanted: Any, cache: Any) -> torch.Tensor:
        assert int(positions.max()) < self.config.max_position_embeddings
        past = cache.length
        logits = self.model.read(inputs, positions, mask, wanted, cache)
        noise = 50.0 if len(self.log) % 7 == 0 else 0.0
        self.log.append((self.name, *inputs.shape, past, len(logits), mask, inputs.numel() / self.speed + noise))
        return logits


@pytest.mark.parametrize(
    ("length", "max_batch", "names", "cached", "prompt"),
    [
        (2048, None, ["1 row", "8 rows", "5 beams", "a prompt of 512 tokens"], 64, 512),
        (20, 3, ["1 row", "3 rows", "5 beams", "a prompt of 20 tokens"], 19, 20),
        (20, 1, ["1 row", "5 beams", "a prompt of 20 tokens"], 19, 20),
    ],
)
def test_both_are_timed_in_turn_on_the_same_work_as_far_as_the_limits_allow(
    length: int, max_batch: int | None, names: list[str], cached: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    model = build_ours(build_reference("125m", num_hidden_layers=1, max_position_embeddings=2048))
    both = [Clocked(name, log, model, length, max_batch, 1 + (name == "program")) for name in ("program", "model")]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(call[-1] for call in log))
    found = timing.beside(*both)  # type: ignore[arg-type]
    tokens = {"1 row": 1, f"{max_batch or 8} rows": max_batch or 8, "5 beams": 5, names[-1]: prompt}
    assert [*found] == names
    for name, both_times in found.items():  # without the noise
        assert both_times == {"program": pytest.approx(500 * tokens[name]), "model": pytest.approx(1000 * tokens[name])}
    steps = [call for call in log if call[3] == cached]
    rows = max_batch or 8
    assert {call[1:5] for call in steps} == {(1, 1, cached, 1), (1, 5, cached, 5), (rows, 1, cached, rows)}
    beams = next(call[5] for call in steps if call[2] == 5)
    assert beams.shape == (1, 1, 5, cached + 5)
    assert beams[0, 0, :, :cached].all()
    assert torch.equal(beams[0, 0, :, cached:], torch.eye(5).bool())
    assert {call[0] for call in steps} == {"program", "model"}
    assert (1, prompt, 0, 1) in {call[1:5] for call in log}


def test_what_is_slower_by_more_than_noise_is_told_with_both_times() -> None:
    times = {"1 row": {"program": 1.04, "model": 1.0}, "8 rows": {"program": 12.66, "model": 5.3},
             "5 beams": {"program": 0.2, "model": 1.0}}  # fmt: skip
    assert timing.slower(times) == "8 rows in 12.7 ms, the model in 5.3 ms"
    assert timing.worst(times) == pytest.approx(12.66 / 5.3)
    assert timing.slower({}) == ""
    assert timing.worst({}) == 0

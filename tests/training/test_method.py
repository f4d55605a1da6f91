"""The trainer drives another method by the parts of `Method`, and knows none by name."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from minopt import OPT
from minopt.evaluation.answers import EvaluationResult
from minopt.training import method
from minopt.training.batches import Tokens
from minopt.training.method import Method
from minopt.training.trainer import train
from tests.training.small import lines, model_of, settings, tokenizer


class Labelled(NamedTuple):
    id: str
    text: str
    label: int


class Scored(nn.Module):
    """A head on the last token, and the sum of its losses."""

    def __init__(self, model: OPT) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(32, 2)

    def scores(self, ids: Tensor) -> Tensor:
        return self.head(self.model.hidden_states(ids)[:, -1])

    def forward(self, batch: Any, label_smoothing: float) -> Tensor:
        return sum((nn.functional.cross_entropy(self.scores(ids[None]), label[None]) for ids, label in batch.rows),
                   torch.zeros(()))  # fmt: skip


class Rows(Tokens):
    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.rows]

    def learned(self, indices: Sequence[int]) -> int:
        return len(indices)

    def digest(self) -> str:
        return str(len(self.rows))


class Classified(Method):
    def tokenise(self, data: Any, *, training: bool) -> Tokens:
        rows: Any = [(torch.tensor(self.tokenizer.encode(x.text)), torch.tensor(x.label)) for x in data]
        return Rows(rows)

    def warn(self) -> None:
        pass

    def build(self) -> nn.Module:
        return Scored(self.model)

    def collate(self, rows: Sequence[Any]) -> Any:
        return types.SimpleNamespace(rows=rows, tokens=sum(len(ids) for ids, _ in rows))

    def measure(self) -> EvaluationResult | None:
        assert self.eval_tokens is not None
        with torch.no_grad():
            right = [
                self.module.scores(ids[None]).argmax().item() == label.item() for ids, label in self.eval_tokens.rows
            ]
        return EvaluationResult({"loss": 0.0, "accuracy": sum(right) / len(right)}, {})

    def score(self, metrics: Any) -> float:
        return metrics["accuracy"]

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "head.json").write_text(json.dumps(self.module.head.weight.tolist()))


class Halved(Method):
    """Another step: that of the others, and then half of the weights."""

    def move(self, *args: Any) -> tuple[float, float]:
        found = super().move(*args)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(0.5)
        return found


def use(monkeypatch: pytest.MonkeyPatch, **kinds: type[Method]) -> None:
    for name, kind in kinds.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Method=kind))
    rows = tuple((name, lambda config, name=name: name in config.output_dir) for name in kinds)
    monkeypatch.setattr(method, "METHODS", rows)


def data(count: int) -> list[Labelled]:
    return [Labelled(str(i), "ab"[i % 2] * 5 + "c", i % 2) for i in range(count)]


def test_a_head_of_its_own_learns_is_measured_saved_and_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, classified=Classified, halved=Halved)
    options: Any = {"tokenizer": tokenizer(), "eval_data": data(6)}

    def run(name: str, **changes: Any) -> Any:
        torch.manual_seed(1)  # of the head
        config = settings(tmp_path / name, learning_rate=1e-2, do_eval=True, weight_decay=0.1, **changes)
        return train(model_of(), data(16), config, **options)

    result = run("classified", max_steps=8)
    assert result.metrics == {"loss": 0.0, "accuracy": 1.0}
    found = [line["loss"] for line in lines(tmp_path / "classified") if "loss" in line]
    assert found[-1] < 0.5 * found[0]
    kept = (tmp_path / "classified" / "head.json").read_bytes()
    assert (tmp_path / "classified" / "best" / "head.json").read_bytes() == kept
    with monkeypatch.context() as patch:
        patch.setattr(Classified, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("again-classified", max_steps=8, evaluation_strategy="steps", eval_steps=5, save_steps=5)
    run("again-classified", max_steps=8, evaluation_strategy="steps", eval_steps=5, save_steps=5)
    assert (tmp_path / "again-classified" / "head.json").read_bytes() == kept
    run("classified-halved", max_steps=8)  # both
    assert (tmp_path / "classified-halved" / "head.json").read_bytes() != kept


def test_no_method_is_imported_before_settings_ask_for_it(tmp_path: Path) -> None:
    asked = {module for module, fits in method.METHODS if fits(settings(tmp_path))}
    assert asked == set()
    assert method.method_of(settings(tmp_path)) is Method

"""MeZO: against the published algorithm written plainly, resumed, replayed, in processes, and in memory."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

import minopt
from minopt.distributed import World
from minopt.evaluation.tasks import seed_of
from minopt.methods import mezo as module
from minopt.methods.mezo import replay
from minopt.training import method
from minopt.training.batches import microbatches
from minopt.training.config import TrainingConfig
from minopt.training.optim import learning_rate
from minopt.training.trainer import train
from tests.training.small import (
    distance,
    examples,
    losses,
    model_of,
    reference_of,
    rows_of,
    settings,
    together,
    tokenizer,
)

RATE, DECAY, EPS = 2e-4, 0.1, 1e-3


def mezo(folder: Path, **changes: Any) -> TrainingConfig:
    given = {"optimizer": "mezo", "learning_rate": RATE, "weight_decay": DECAY, "max_steps": 5, "dropout": 0.3}
    return settings(folder, **(given | changes))


def loss_of(reference: Any, batch: list[tuple[list[int], int]]) -> float:
    total = 0.0
    for ids, start in batch:
        logits = reference(torch.tensor([ids])).logits[0, start - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item()
    return total / sum(len(ids) - start for ids, start in batch)


@torch.no_grad()
def published(model: nn.Module, data: Any, config: TrainingConfig, eps: float = EPS) -> list[float]:
    """Algorithm 1 of the paper: perturb, measure, perturb back, measure, restore, update, one seed a step.

    Names of parameters are in minopt's order, in which the noise is drawn.
    """
    rows, found = rows_of(data), []
    named = dict(model.named_parameters())
    order = [named[f"model.decoder.{name}"] for name, _ in model_of(model.kind).named_parameters()]  # type: ignore

    def perturb(scale: float, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in order:
            z = torch.normal(mean=0, std=1, size=parameter.shape)
            parameter.add_(scale * z * eps)

    steps = islice(microbatches([len(ids) for ids, _ in rows], 4, 1, config.seed, grouped=False), config.max_steps)
    for step, (indices,) in enumerate(steps):
        batch, seed = [rows[i] for i in indices], seed_of(config.seed, step, -1)
        perturb(1, seed)
        loss1 = loss_of(model, batch)
        perturb(-2, seed)
        loss2 = loss_of(model, batch)
        perturb(1, seed)
        projected, rate = (loss1 - loss2) / (2 * eps), config.learning_rate * (1 - step / config.max_steps)
        torch.manual_seed(seed)
        for parameter in order:
            z = torch.normal(mean=0, std=1, size=parameter.shape)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            parameter.sub_(rate * (projected * z + decay * parameter))
        found.append(loss1)
    return found


def test_losses_and_weights_are_those_of_the_published_algorithm(kind: str, tmp_path: Path) -> None:
    config, data, model, theirs = mezo(tmp_path / "run"), examples(23), model_of(kind), reference_of(kind)
    before = [p.clone() for p in model.parameters()]
    train(model, data, config, tokenizer=tokenizer())
    theirs.kind = kind
    wanted = published(theirs, data, config)
    assert losses(tmp_path / "run") == pytest.approx(wanted, rel=1e-5)
    moved = dict(theirs.named_parameters())
    ours = [p - b for p, b in zip(model.parameters(), before, strict=True)]
    expected = [moved[f"model.decoder.{n}"] - b for (n, _), b in zip(model.named_parameters(), before, strict=True)]
    assert distance(ours, expected) < 1e-4
    assert not any(p.grad is not None for p in model.parameters())


def test_a_resumed_run_ends_with_the_same_bits_and_its_log_replays_it(tmp_path: Path) -> None:
    minopt.save_model(model_of(), tmp_path / "model", tokenizer())
    for name in ("whole", "cut", "cut"):
        config = mezo(tmp_path / name, save_steps=2, do_eval=True)
        with pytest.MonkeyPatch.context() as patch:
            if name == "cut" and not (tmp_path / "cut").exists():
                patch.setattr(module, "learning_rate", lambda step, *rest: learning_rate(step, *rest) + 0 / (3 - step))
                with pytest.raises(ZeroDivisionError):
                    train(tmp_path / "model", examples(12), config, tokenizer=tokenizer(), eval_data=examples(3))
            else:
                train(tmp_path / "model", examples(12), config, tokenizer=tokenizer(), eval_data=examples(3))
    kept = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert kept[0] == kept[1]
    log = [json.loads(line) for line in (tmp_path / "cut" / "mezo.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 2, 3, 4]
    assert log[2] == log[3]
    model = minopt.load_model(tmp_path / "model")
    replay(model, tmp_path / "cut" / "mezo.jsonl")
    wanted = minopt.load_model(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    held = FileSystemReader(tmp_path / "whole" / "checkpoints" / "step-00000005").read_metadata().state_dict_metadata
    assert all(key.startswith("model.") for key in held)
    assert minopt.load_model(tmp_path / "whole" / "checkpoints" / "step-00000005").dtype == torch.float32


def in_processes(world: World, folder: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        config = mezo(folder / f"{parallel}-{world.size}", max_steps=3, parallel=parallel,
                      per_device_train_batch_size=4 // world.size)  # fmt: skip
        train(folder / "model", examples(12), config, tokenizer=tokenizer())


def test_two_processes_measure_their_shares_and_move_alike(tmp_path: Path) -> None:
    minopt.save_model(model_of("350m"), tmp_path / "model", tokenizer())
    in_processes(World(0, 1, torch.device("cpu")), tmp_path)
    together(2, tmp_path, partial(in_processes, folder=tmp_path))
    before = load_file(tmp_path / "model" / "model.safetensors")
    for parallel in ("ddp", "fsdp"):
        one, two = (load_file(tmp_path / f"{parallel}-{size}" / "model.safetensors") for size in (1, 2))
        assert losses(tmp_path / f"{parallel}-2") == pytest.approx(losses(tmp_path / f"{parallel}-1"), rel=1e-5)
        assert distance([two[k] - before[k] for k in one], [one[k] - before[k] for k in one]) < 1e-2


def test_adapters_move_alone_with_lora(tmp_path: Path) -> None:
    model = model_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = mezo(tmp_path / "run", lora_rank=2, lora_target_modules="fc1", base_dtype="bfloat16", learning_rate=1e-2)
    train(model, examples(12), config, tokenizer=tokenizer())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name].to(p.dtype))}
    assert changed == {f"layers.{i}.fc1.weight" for i in range(3)}
    assert len(load_file(tmp_path / "run" / "adapter_model.safetensors")) == 6


@pytest.mark.parametrize("changes", [{"bf16": True}, {"base_dtype": "bfloat16"}, {"base_dtype": "float16"}], ids=str)
def test_sixteen_bits_learn_too_and_losses_that_are_not_finite_move_nothing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of()
    train(model, examples(12), mezo(tmp_path / "run", max_steps=3, **changes), tokenizer=tokenizer())
    plain = mezo(tmp_path / "plain", max_steps=3)
    train(model_of(), examples(12), plain, tokenizer=tokenizer())
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=0.03)
    before = [p.clone() for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method.Method, "losses", lambda self, batch: torch.tensor(float("nan")))
        result = train(model, examples(12), mezo(tmp_path / "nan", max_steps=3, **changes), tokenizer=tokenizer())
    assert result.skipped_steps == 3
    assert distance([*model.parameters()], before) < 1e-2

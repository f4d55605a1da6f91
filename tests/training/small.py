"""What the tests of training share: a tokenizer of characters, small models and data, and a look into runs."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import string
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minopt import OPT, Tokenizer
from minopt.distributed import World
from minopt.training import method, trainer
from minopt.training.config import TrainingConfig
from minopt.training.data import Example
from tests.conftest import build_ours, build_reference

VOCAB, EOS = 104, 2  # a token a character of ASCII, four special ones, and four rows without a token


@functools.cache
def tokenizer() -> Tokenizer:
    """One with a token for each character, made from files as OPT's are."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", "Ċ", *(chr(i) for i in range(33, 127))]
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return Tokenizer.load(folder)


def text_of(draw: random.Random, least: int, most: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase[:8] + " ", k=draw.randint(least, most))).strip() or "a"


def examples(count: int, seed: int = 0) -> list[Example]:
    """Pairs of many lengths."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt, completion = text_of(draw, 2, 28), text_of(draw, 1, 12)
        made.append(Example(prompt, " " + completion, (completion,), f"q{i}"))
    return made


def reference_of(kind: str = "125m", **changes: Any) -> Any:
    """transformers' small model for that tokenizer."""
    return build_reference(kind, **({"vocab_size": VOCAB, "eos_token_id": EOS} | changes))


def model_of(kind: str = "125m", **changes: Any) -> OPT:
    return build_ours(reference_of(kind, **changes))


def settings(folder: Path, **changes: Any) -> TrainingConfig:
    """A short run in float32 without dropout, each step of which is written."""
    values: dict[str, Any] = {
        "output_dir": folder, "src_length": 32, "tgt_length": 16, "per_device_train_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-3, "dropout": 0.0, "logging_steps": 1, "device": "cpu",
    }  # fmt: skip
    return TrainingConfig(**(values | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, of all its parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass
class Seen:
    """What happens in a run, a value a step: gradients before clipping, weights and the scale of losses after it."""

    step: int = -1
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Looks on, and changes nothing."""
    seen, clip, take_step = Seen(), method.clip_gradients, trainer.Run._step

    def watch_clip(parameters: Any, max_norm: float) -> Tensor:
        parameters = list(parameters)
        seen.gradients.append([whole(p.grad) for p in parameters])
        return clip(parameters, max_norm)

    def watch_step(run: Any, *args: Any) -> bool:
        seen.step = run.progress.step
        stopped = take_step(run, *args)
        seen.weights.append([whole(p) for p in run.module.parameters()])
        seen.scales.append(run.scaler.get_scale())
        return stopped

    clipping = mock.patch.object(method, "clip_gradients", watch_clip)
    with clipping, mock.patch.object(trainer.Run, "_step", watch_step):
        yield seen


def break_gradients(model: OPT, when: Callable[[], bool]) -> None:
    """Makes a NaN of the gradient of one position's vector, the first, and of nothing else."""

    def spoil(gradient: Tensor) -> Tensor:
        if not when():
            return gradient
        gradient = gradient.clone()
        gradient.flatten(0, -2)[0] = float("nan")
        return gradient

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    model.embed_positions.register_forward_hook(watch)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """How far apart two sets of gradients are, as a part of the norm of all."""
    apart = torch.stack([(f - e).norm() for f, e in zip(found, expected, strict=True)]).norm()
    return (apart / torch.stack([e.norm() for e in expected]).norm()).item()


def rows_of(data: list[Example]) -> list[tuple[list[int], int]]:
    """The ids of examples, and where their completions begin."""
    rows = []
    for example in data:
        prompt = tokenizer().encode(example.prompt)
        rows.append((prompt + tokenizer().encode(example.completion, add_bos=False) + [EOS], len(prompt)))
    return rows


def is_as_built(model: OPT) -> bool:
    """Whether a model is in evaluation mode, unpatched, and works."""
    assert torch.isfinite(model(torch.tensor([[2, 5, 6]]))).all()
    unpatched = all("forward" not in vars(layer) and layer._compiled_call_impl is None for layer in model.layers)
    restored = all(layer.dropout == model.config.dropout for layer in model.layers)
    return unpatched and restored and not any(module.training for module in model.modules())


def together(size: int, folder: Path, work: Callable[[World], Any]) -> list[Any]:
    """What a function finds in processes that together are a group, by their rank."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers", "pytest"])  # what takes seconds is imported once
    started = [context.Process(target=_process, args=(rank, size, folder, work)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    found = [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
    assert not any(isinstance(report, str) for report in found), found
    return found


def _process(rank: int, size: int, folder: Path, work: Callable[[World], Any]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MINOPT_HOME": folder / f"home-{size}"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        found = work(World(rank, size, torch.device("cpu")))
    except BaseException:  # of which the test has to tell
        found = traceback.format_exc()
    torch.save(found, folder / f"{size}-{rank}.pt")
    os._exit(0)  # the others may hang by now, and destroying the group would wait for them

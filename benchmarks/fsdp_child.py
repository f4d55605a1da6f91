"""One process of a fine-tuning under FSDP, for `bench_parallel.py`: what it holds while it loads, trains and saves.

torchrun --nproc-per-node 2 benchmarks/fsdp_child.py FOLDER OUTPUT_DIR STEPS WITH_OPTIMIZER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from inference_child import Watch, resident_mb

import minopt
from minopt.distributed import processes
from minopt.training import trainer  # before memory is looked at

PHASES: tuple[tuple[Any, str, str], ...] = (
    (trainer, "fill", "load"), (trainer._Run, "_loop", "training"), (trainer, "save", "save"),
)  # fmt: skip


def main() -> None:
    folder, output_dir, steps, with_optimizer = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
    data = [minopt.Example(f"{i} and {i} and {i} and {i} are", f" {i} times four.") for i in range(8 * steps)]
    config = minopt.TrainingConfig(
        output_dir=output_dir, max_steps=steps, per_device_train_batch_size=4, src_length=64, tgt_length=32, bf16=True,
        recompute=True, parallel="fsdp", logging_steps=1,
    )  # fmt: skip
    found: dict[str, Any] = {}
    with processes(None) as world, ExitStack() as stack:
        for owner, name, phase in PHASES:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), phase, found)))
        # Checkpoints of a run, three times the model on disk, are not what is measured.
        stack.enter_context(mock.patch.object(trainer.Checkpoints, "save"))
        if not with_optimizer:  # where its moments do not fit on one machine
            stack.enter_context(mock.patch.object(torch.optim.AdamW, "step"))
        found["rank"], found["before_mb"] = world.rank, [round(mb) for mb in resident_mb()]
        minopt.train(folder, data, config, tokenizer=minopt.Tokenizer.load(minopt.DEMO))
        everyone = world.gather(found)
    if world.is_first:
        print(json.dumps(everyone))


def watched(run: Callable[..., Any], phase: str, found: dict[str, Any]) -> Callable[..., Any]:
    """The same function; its time and its memory are noted."""

    def noted(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        with Watch() as watch:
            result = run(*args, **options)
        found[f"{phase}_seconds"] = round(time.perf_counter() - begin, 1)
        found[f"{phase}_peak_mb"] = [round(mb) for mb in watch.peak]
        if phase == "load":
            found["parameters"] = sum(p.to_local().numel() for p in args[0].parameters())
        if phase == "training" and torch.cuda.is_available():
            found["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        return result

    return noted


if __name__ == "__main__":
    main()

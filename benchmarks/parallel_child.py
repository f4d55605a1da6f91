"""One process of a model that is divided, for `bench_parallel.py`: loads its share, decodes, and tells what it took.

torchrun --nproc-per-node 2 benchmarks/parallel_child.py FOLDER DTYPE TOKENS ROUNDS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from inference_child import Watch, resident_mb
from torch.distributed.device_mesh import init_device_mesh

import minopt
import minopt.tensor_parallel  # before memory is looked at


def main() -> None:
    folder, dtype, tokens, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=20))
    size, rank = dist.get_world_size(), dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (size,))
    before = resident_mb()
    begin = time.perf_counter()
    with Watch() as loading:
        lm = minopt.load(folder, mesh=mesh, dtype=dtype)
    load_seconds = time.perf_counter() - begin
    ids = torch.randint(10, 50000, (1, 9), generator=torch.Generator().manual_seed(1))
    waited = [0.0]

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = collective(*args, **options)
            waited[0] += time.perf_counter() - start
            return result

        return run

    steps, shares = [], []
    with (
        Watch() as generating,
        mock.patch.multiple(dist, all_reduce=timed(dist.all_reduce), all_gather=timed(dist.all_gather)),
    ):
        for _ in range(rounds + 1):  # the first one warms up
            waited[0], start = 0.0, time.perf_counter()
            sequences = minopt.generate(lm.decoder, ids, max_new_tokens=tokens, eos_token_id=()).sequences
            if device == "cuda":
                torch.cuda.synchronize()
            whole = time.perf_counter() - start
            steps.append(whole / tokens)
            shares.append(waited[0] / whole)
    found = {
        "rank": rank,
        "before_mb": [round(mb) for mb in before],
        "load_peak_mb": [round(mb) for mb in loading.peak],
        "generation_peak_mb": [round(mb) for mb in generating.peak],
        "load_seconds": round(load_seconds, 1),
        "ms_per_token": round(median(steps[1:]) * 1e3, 2),
        "in_collectives": round(median(shares[1:]), 3),
        "tokens": sequences[0, 9:].tolist(),
    }
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, found)
    if rank == 0:
        print(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

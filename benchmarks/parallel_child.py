"""One process of a model that is divided, for `bench_parallel.py`: loads its share, decodes, and tells what it took.

torchrun --nproc-per-node 2 benchmarks/parallel_child.py FOLDER DTYPE TOKENS ROUNDS minopt|plain|dtensor
"""

from __future__ import annotations

import json
import os
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import minopt
import minopt.inference.tensor_parallel  # before memory is looked at
from minopt.checkpoint.names import shard_dim
from minopt.checkpoint.tensors import Share


def divided(folder: Path, dtype: str, mesh: DeviceMesh) -> Any:
    """minopt's."""
    return minopt.load(folder, mesh=mesh, dtype=dtype).decoder


def dtensor(folder: Path, dtype: str, mesh: DeviceMesh) -> Any:
    """The plain model, its layers divided by torch's own parallel styles; each process has some of the heads."""
    model = minopt.load_model(folder, dtype=dtype, device=mesh.device_type)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.out_proj", "fc2")}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    return _with_own_heads(model, mesh)


def plain(folder: Path, dtype: str, mesh: DeviceMesh) -> Any:
    """The same division by hand: local weights, and a sum behind out_proj and fc2."""
    model = minopt.load_model(folder, dtype=dtype, device=mesh.device_type)
    group, share = mesh.get_group(), Share(mesh.get_local_rank(), mesh.size())

    def summed(module: torch.nn.Module, _: Any, y: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(y, group=group)
        return y if module.bias_of_all is None else y + module.bias_of_all  # type: ignore[operator]

    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                dim = shard_dim(f"layers.0.{name}.weight")
                own = slice(*share.of(module.weight.shape[dim or 0]))
                weight = module.weight[own] if dim == 0 else module.weight[:, own]
                module.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
                if dim == 0:
                    module.bias = torch.nn.Parameter(module.bias[own].contiguous(), requires_grad=False)
                else:
                    module.bias_of_all, module.bias = module.bias, None  # type: ignore[assignment]
                    module.register_forward_hook(summed)
    return _with_own_heads(model, mesh)


def _with_own_heads(model: minopt.OPT, mesh: DeviceMesh) -> minopt.OPT:
    heads = model.config.num_attention_heads // mesh.size()
    model.new_cache = lambda batch, capacity: minopt.KVCache(  # type: ignore[method-assign]
        model.config, batch, capacity, dtype=model.dtype, device=model.device, heads=heads
    )
    return model


FORMS = {"minopt": divided, "plain": plain, "dtensor": dtensor}


def main() -> None:
    folder, dtype, tokens, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=20), **alone)
    size, rank = dist.get_world_size(), dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (size,))
    before = resident_mb()
    begin = time.perf_counter()
    with Watch() as loading:
        decoder: Any = FORMS[sys.argv[5]](folder, dtype, mesh)
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
        torch.no_grad(),
        mock.patch.multiple(dist, all_reduce=timed(dist.all_reduce), all_gather=timed(dist.all_gather)),
    ):
        for _ in range(rounds + 1):  # the first one warms up
            waited[0], start = 0.0, time.perf_counter()
            sequences = minopt.generate(decoder, ids, max_new_tokens=tokens, eos_token_id=()).sequences
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
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


if __name__ == "__main__":
    main()

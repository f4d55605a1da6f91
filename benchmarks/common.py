"""What the benchmarks share: the machine, its limits, paired samples, and how results are kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minopt import OPT, OPTConfig
from minopt.checkpoint.names import to_hf

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    return found


def synchronize(device: str) -> None:
    """Waits until the device has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 90th percentile and least of samples, in milliseconds."""
    ordered = sorted(samples)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 3),
        "p90_ms": round(p90 * 1e3, 3),
        "min_ms": round(ordered[0] * 1e3, 3),
    }


def read_bytes_per_second(device: str, numbers: int = 200_000_000) -> float:
    """The speed of memory: summing 800 MB of float32, best of 10."""
    data = torch.ones(numbers, device=device)
    return data.nbytes / min(seconds(data.sum, device) for _ in range(10))


def matmul_flops_per_second(dtype: torch.dtype, device: str) -> float:
    """The rate of a large square product, best of 5."""
    size = 4096 if device == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def write_model(
    folder: Path, preset: str = "opt-125m", dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Path:
    """A preset's shape, or its first layers, with random weights, in files of 2 GB; one of them is in memory."""
    config = OPTConfig.preset(preset)
    folder = folder / f"{preset}-{layers or 'whole'}-{str(dtype).removeprefix('torch.')}"
    config = replace(config, num_hidden_layers=layers or config.num_hidden_layers)
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    generator, held, weight_map = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), dict[str, str]()
    names = OPT(config, device="meta").state_dict()
    for index, (name, meta) in enumerate(names.items(), 1):
        noise = torch.empty(meta.shape).normal_(std=0.02, generator=generator)
        held[to_hf(name)] = (1 + noise if "layer_norm.weight" in name else noise).to(dtype)
        if sum(tensor.nbytes for tensor in held.values()) > 2e9 or index == len(names):
            file = f"model-{index:05d}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def torchrun(count: int, script: str | Path, *arguments: object, **options: Any) -> list[dict[str, Any]]:
    """What the processes of a script print in the end: a line of JSON. Cores are shared evenly."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    command = [sys.executable, *(start if count > 1 else []), *map(str, (script, *arguments))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, **options)
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to know of where the figures come from."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else None,
        "device": torch.cuda.get_device_name() if device != "cpu" else _processor(),
        "threads": torch.get_num_threads(),
    }


def commit(tree: Path = Path()) -> str:
    """The one that is checked out, ``-dirty`` where files other than results differ from it."""
    commit = subprocess.run(["git", "describe", "--always"], cwd=tree, capture_output=True, text=True, check=False)
    others = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run(others, cwd=tree, check=False).returncode
    return commit.stdout.strip() + ("-dirty" if changed else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    features = "amx_bf16" if cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text() else "no amx"
    return f"{match.group(1) if match else platform.processor()} ({features})"


def keep(topic: str, hardware: str, result: dict[str, Any]) -> None:
    """Writes ``results/<topic>_<hardware>_<yyyymmdd>.json`` and prints it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    path = kept(topic, hardware)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {path}")
    print(json.dumps(result))


def kept(topic: str, hardware: str) -> Path:
    """Where today's result of a topic is."""
    return RESULTS / f"{topic}_{hardware}_{date.today():%Y%m%d}.json"

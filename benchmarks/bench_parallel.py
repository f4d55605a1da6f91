"""A model divided among processes: what it costs in time and in memory (`docs/parallel.md`).

    python benchmarks/bench_parallel.py --folder MODELS [--hardware NAME] [--processes 1 2] [--cases speed memory]

``speed``: milliseconds a token of opt-125m's (float32) and opt-1.3b's size (bfloat16), and the share of it that is
spent in messages between the processes. Cores are shared evenly. ``memory``: a checkpoint of opt-6.7b's size in 16
bits, 13.3 GB, in two processes: the largest sum of anonymous and file pages of each. Random weights, written to MODELS
once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import save_file

from minopt import OPT, OPTConfig
from minopt.checkpoint.names import to_hf

SHARD_BYTES = 2_000_000_000
CHILD = Path(__file__).with_name("parallel_child.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models go: 17 GB with memory")
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=("speed", "memory"), default=["speed", "memory"])
    args = parser.parse_args()

    kept = common.kept("parallel", args.hardware)
    lines = json.loads(kept.read_text())["cases"] if kept.exists() else []
    lines = [line for line in lines if line["case"] not in args.cases]
    if "speed" in args.cases:
        for preset, dtype in (("opt-125m", "float32"), ("opt-1.3b", "bfloat16")):
            folder = write_model(args.folder, preset)
            for count in args.processes:
                lines.append({"case": "speed", "model": preset, "dtype": dtype, "processes": count,
                              "ranks": run(folder, dtype, count, tokens=24, rounds=5)})  # fmt: skip
                print(lines[-1], flush=True)
    if "memory" in args.cases:
        folder = write_model(args.folder, "opt-6.7b")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        lines.append({"case": "memory", "model": "opt-6.7b", "dtype": "bfloat16", "processes": 2, "bytes": size,
                      "ranks": run(folder, "bfloat16", 2, tokens=8, rounds=1)})  # fmt: skip
        print(lines[-1], flush=True)
    common.keep("parallel", args.hardware, {"topic": "parallel", **common.machine("cpu"), "cases": lines})


def write_model(folder: Path, preset: str) -> Path:
    """A preset's shape with random float16 weights, written file by file: never more than one of them in memory."""
    folder, config = folder / f"{preset}-parallel", OPTConfig.preset(preset)
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names, held, weight_map = list(OPT(config, device="meta").state_dict().items()), {}, {}
    number = 0
    for index, (name, meta) in enumerate(names):
        noise = torch.empty(meta.shape).normal_(std=0.02, generator=generator)
        is_norm = "layer_norm.weight" in name
        held[to_hf(name)] = (1 + noise if is_norm else noise).half()
        if sum(tensor.nbytes for tensor in held.values()) > SHARD_BYTES or index == len(names) - 1:
            number += 1
            save_file(held, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, f"model-{number:05d}.safetensors")
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def run(folder: Path, dtype: str, count: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """What each process tells."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    command += [str(CHILD), str(folder), dtype, str(tokens), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

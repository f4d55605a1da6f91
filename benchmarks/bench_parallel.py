"""A model divided among processes: what it costs (`docs/parallel.md`). What it takes of memory is in `check_plan.py`.

    python benchmarks/bench_parallel.py --folder MODELS [--hardware NAME] [--processes 1 2] [--cases speed fsdp]

``speed``: milliseconds a token of opt-125m's (float32) and opt-1.3b's size (bfloat16), and the share of it that is
spent in messages between the processes. Cores are shared evenly. Beside minopt's: the plain model divided by hand in
the same way (``plain``), and by torch's DTensor (``dtensor``), both with the whole token table in each process.
``fsdp``: the largest sum of anonymous and file pages of each process that fine-tunes opt-1.3b's width, 12 layers and
all 24, in two processes, beside what their shares take; AdamW's steps are left out where weights, gradients and
moments, 16 bytes a parameter, do not fit on the machine. Random weights, written to MODELS once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from safetensors.torch import save_file

from minopt import OPT, OPTConfig, load_model
from minopt.checkpoint.names import to_hf

SHARD_BYTES = 2_000_000_000
CHILD = Path(__file__).with_name("parallel_child.py")
FSDP_CHILD = CHILD.with_name("fsdp_child.py")
CASES = ("speed", "fsdp")
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models go: 4 GB, with fsdp 10")
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()

    kept = common.kept("parallel", args.hardware)
    lines = json.loads(kept.read_text())["cases"] if kept.exists() else []
    lines = [line for line in lines if line["case"] not in args.cases]
    if "speed" in args.cases:
        for preset, dtype in (("opt-125m", "float32"), ("opt-1.3b", "bfloat16")):
            folder = write_model(args.folder, preset)
            for count in args.processes:
                for form in ("minopt", "plain", "dtensor"):
                    lines.append({"case": "speed", "model": preset, "dtype": dtype, "processes": count, "form": form,
                                  "ranks": run(count, CHILD, folder, dtype, 24, 5, form)})  # fmt: skip
                    print(lines[-1], flush=True)
    if "fsdp" in args.cases:
        for layers in (12, None):
            lines.append(fine_tune(write_model(args.folder, "opt-1.3b", layers), args.folder / "run"))
            print(lines[-1], flush=True)
    common.keep("parallel", args.hardware, {"topic": "parallel", **common.machine("cpu"), "cases": lines})


def fine_tune(folder: Path, run_folder: Path) -> dict[str, Any]:
    """What two processes take, and whether the folder that they leave is what it should be."""
    source = load_model(folder, device="cpu", dtype="float16")  # mapped
    bytes_ = 4 * sum(p.numel() for p in source.parameters())
    fits = 4 * bytes_ + 4e9 < available_bytes()
    shutil.rmtree(run_folder, ignore_errors=True)
    ranks = run(2, FSDP_CHILD, folder, run_folder, STEPS, fits)
    for rank in ranks:
        rank["share_mb"] = round(rank["parameters"] * 4 / 1e6)
        rank["share_with_optimizer_mb"] = 4 * rank["share_mb"]
    saved = load_model(run_folder, device="cpu", dtype="float32")
    opened = transformers.OPTForCausalLM.from_pretrained(run_folder, dtype=torch.float32).model.decoder
    theirs = dict(opened.named_parameters())
    change = max((p - before.float()).abs().max().item()
                 for p, before in zip(saved.parameters(), source.parameters(), strict=True))  # fmt: skip
    result = {
        "case": "fsdp", "model": "opt-1.3b", "layers": source.config.num_hidden_layers, "processes": 2,
        "weights_mb": round(bytes_ / 1e6), "steps": STEPS, "optimizer": fits, "ranks": ranks,
        "files": len(list(run_folder.glob("*.safetensors"))), "largest_change": change,
        "transformers_opens_the_same": all(torch.equal(theirs[name], p) for name, p in saved.named_parameters()),
    }  # fmt: skip
    shutil.rmtree(run_folder)
    return result


def available_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def write_model(folder: Path, preset: str, layers: int | None = None) -> Path:
    """A preset's shape, or its first layers, with random float16 weights; written file by file, one in memory."""
    folder, config = folder / f"{preset}-parallel", OPTConfig.preset(preset)
    if layers is not None:
        folder, config = folder.with_name(f"{preset}-{layers}"), dataclasses.replace(config, num_hidden_layers=layers)
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


def run(count: int, script: Path, *arguments: object) -> list[dict[str, Any]]:
    """What each process tells."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    command += [str(script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

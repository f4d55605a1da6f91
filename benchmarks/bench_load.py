"""Time and peak memory of loading an opt-125m-size checkpoint, minopt and transformers in turn; time of imports.

    python benchmarks/bench_load.py [--hardware NAME] [--samples 7]

Each sample is a process of its own that loads once. Memory is resident (anonymous + file pages), read every
2 ms, less what the process held before the load. Times are with the file in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from inference_child import Watch, resident_mb

IMPORTS = (
    "import minopt",
    "import minopt; minopt.OPT",
    "import minopt; minopt.load",
    "import transformers; transformers.OPTForCausalLM",
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_once(*args.child)))
        return
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = write_models(Path(temporary))
        for name, folder, dtype in (
            ("safetensors float32", folders["safetensors"], "float32"),
            ("safetensors float32", folders["safetensors"], "bfloat16"),
            (".bin float16", folders["bin"], "float16"),
            (".bin float16", folders["bin"], "float32"),
        ):
            case = compare(name, folder, dtype, args.samples)
            cases.append(case)
            print(json.dumps(case), flush=True)
    common.keep(
        "load", args.hardware, {"topic": "load", **common.machine("cpu"), "samples": args.samples, "cases": cases}
    )
    imports = {"milliseconds_over_import_torch": {name: import_ms(name, args.samples) for name in IMPORTS}}
    common.keep("import", args.hardware, {"topic": "import", **common.machine("cpu"), **imports})


def import_ms(statement: str, samples: int) -> float:
    """What imports cost once torch is imported, the median of as many processes."""
    code = f"import time, torch; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    command = [sys.executable, "-c", code]
    times = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(samples)]
    return round(statistics.median(times) * 1e3, 1)


def write_models(folder: Path) -> dict[str, Path]:
    """One random model of opt-125m's shape, as float32 safetensors and as a float16 .bin (as the hub has it)."""
    import transformers

    model = transformers.OPTForCausalLM(transformers.OPTConfig())
    model.save_pretrained(folder / "safetensors")
    model.half().config.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    return {"safetensors": folder / "safetensors", "bin": folder / "bin"}


def compare(name: str, folder: Path, dtype: str, count: int) -> dict[str, Any]:
    """Alternating processes of both libraries."""
    samples: dict[str, list[dict[str, float]]] = {"minopt": [], "transformers": []}
    for _ in range(count):
        for library, values in samples.items():
            command = [sys.executable, __file__, "--child", library, str(folder), dtype]
            child = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            values.append(json.loads(child.stdout.splitlines()[-1]))
    stored = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    case: dict[str, Any] = {"file": name, "file_mb": round(stored / 1e6, 1), "dtype": dtype}
    for library, values in samples.items():
        case[library] = {key: round(statistics.median(v[key] for v in values), 3) for key in values[0]}
    larger = max(case["file_mb"], case["minopt"]["weights_mb"])
    case["peak_by_larger_of_file_and_weights"] = round(case["minopt"]["peak_mb"] / larger, 3)
    medians = {name: statistics.median(v["load_seconds"] for v in values) for name, values in samples.items()}
    case["seconds_ratio"] = round(medians["transformers"] / medians["minopt"], 2)
    return case


def load_once(library: str, folder: str, dtype: str) -> dict[str, float]:
    """Loads, then runs three tokens, so that memory-mapped weights count."""
    if library == "minopt":
        from minopt import load_model
    else:
        from transformers import OPTForCausalLM
    before = resident_mb()
    with Watch() as watch:
        begin = time.perf_counter()
        model: Any
        if library == "minopt":
            model = load_model(folder, device="cpu", dtype=dtype)
        else:
            model = OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        load_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        with torch.inference_mode():
            model(torch.tensor([[2, 100, 101]]))
        first = time.perf_counter() - begin
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    values = {"load_seconds": load_seconds, "first_call_seconds": first, "peak_mb": sum(watch.peak) - sum(before)}
    return values | {"before_mb": sum(before), "weights_mb": weights}


if __name__ == "__main__":
    main()

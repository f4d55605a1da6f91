"""Two versions of minopt against each other, by their public interface: is a change slower, or larger?

    python benchmarks/compare.py OLD NEW [--hardware NAME] [--rounds 8]     # two checkouts

Each sample is a process of its own, and the order of the two turns from round to round. A ratio is the old version's
time (or peak memory) divided by the new one's, the median over rounds: below 1 the new one is slower or larger.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch

# Rows, prompt, new tokens.
GENERATIONS = {"decode 1": (1, 9, 33), "decode 8": (8, 128, 17), "prefill 512": (1, 512, 1)}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
}  # fmt: skip


def generation(folder: str, precision: str) -> dict[str, float]:
    """Milliseconds a step of each kind of generation, the least of several."""
    import minopt

    decoder = minopt.load(folder, device="cpu", **PRECISIONS[precision]).decoder
    found = {}
    for name, (rows, prompt, new) in GENERATIONS.items():
        ids = torch.randint(10, 50000, (rows, prompt), generator=torch.Generator().manual_seed(1))

        def run(count: int, ids: torch.Tensor = ids) -> float:
            begin = time.perf_counter()
            minopt.generate(decoder, ids, max_new_tokens=count, eos_token_id=())
            return time.perf_counter() - begin

        run(2)
        if new == 1:
            found[name] = 1e3 * min(run(1) for _ in range(5))
        else:
            pairs = [(run(new), run(1)) for _ in range(5)]
            found[name] = 1e3 * min(whole - first for whole, first in pairs) / (new - 1)
    return found


def loading(folder: str, dtype: str) -> dict[str, float]:
    """Milliseconds of a load, and the peak memory of the process until after a first call."""
    from minopt import load_model

    begin = time.perf_counter()
    model = load_model(folder, device="cpu", dtype=dtype)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    with torch.inference_mode():
        model(torch.tensor([[2, 100, 101]]))
    return {"load": milliseconds, "load, peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def fine_tuning(folder: str, dtype: str) -> dict[str, float]:
    """Milliseconds a step of 8 examples of some 128 tokens, and the peak memory of the process."""
    import minopt

    words = ["the", "ship", "sailed", "at", "dawn", "and", "nobody", "saw", "where", "it", "went"]
    data = [
        minopt.Example(" ".join(words[(i + j) % len(words)] for j in range(90)), " it went home.", id=str(i))
        for i in range(40)
    ]
    model = minopt.load_model(folder, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as run:
        config = minopt.TrainingConfig(
            output_dir=run + "/run", max_steps=5, per_device_train_batch_size=8, logging_steps=1, device="cpu",
            bf16=dtype == "bfloat16", save_steps=1000, keep_last=0,
        )  # fmt: skip
        minopt.train(model, data, config, tokenizer=minopt.Tokenizer.load(minopt.DEMO))
        lines = [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if "loss" in line]
    steps = [end - begin for begin, end in pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"fine-tuning step": 1e3 * statistics.median(steps[1:]), "fine-tuning, peak MB": peak}


CASES = [
    *((generation, precision) for precision in PRECISIONS),
    *((loading, dtype) for dtype in ("float32", "bfloat16")),
    *((fine_tuning, dtype) for dtype in ("float32", "bfloat16")),
]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("trees", nargs=2, type=Path, metavar="CHECKOUT", help="the old version, then the new one")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    trees = dict(zip(("old", "new"), args.trees, strict=True))
    commits = {name: common.commit(tree) for name, tree in trees.items()}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = common.write_model(Path(temporary))
        for measure, option in CASES:
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for number in range(args.rounds):
                for name in list(trees)[:: -1 if number % 2 else 1]:
                    samples[name].append(sample(trees[name], measure.__name__, folder, option))
            for key in samples["old"][0]:
                old, new = ([found[key] for found in samples[name]] for name in trees)
                ratio = statistics.median(a / b for a, b in zip(old, new, strict=True))
                row = {"what": f"{key}, {option}", "old": round(statistics.median(old), 2),
                       "new": round(statistics.median(new), 2), "ratio": round(ratio, 3)}  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    common.keep(
        "compare", args.hardware, {"topic": "compare", **common.machine("cpu"), "commits": commits, "rows": rows}
    )


def sample(tree: Path, measure: str, folder: Path, option: str) -> dict[str, float]:
    """One measurement in a process that imports the minopt of a checkout."""
    code = f"import compare, json; print(json.dumps(compare.{measure}({str(folder)!r}, {option!r})))"
    paths = os.pathsep.join(map(str, (tree.resolve() / "src", Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

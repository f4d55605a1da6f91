"""Requests of lm-evaluation-harness to its models ``hf`` and ``minopt`` in turn, on an opt-125m with random weights.

    OMP_NUM_THREADS=1 python benchmarks/bench_lm_eval.py --data ../shared/data [--samples 5] [--requests 48]

``--data`` has opt-tokenizer/ and books/, whose words make requests as long as those of tasks. Times are those of the
processor, not of the clock: others may use the machine too.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from minopt import Tokenizer
from minopt.interop.lm_eval import MinoptLM

# Words of a context, words of a continuation, continuations of a context.
TASKS = {"piqa": ((6, 14), (12, 30), 2), "lambada": ((60, 80), (1, 1), 1), "arc": ((15, 25), (3, 8), 4),
         "hellaswag": ((40, 70), (15, 30), 4)}  # fmt: skip
BATCHES = (1, 8)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    args = parser.parse_args()
    words, draw, cases = (args.data / "books" / "emma.txt").read_text().split(), random.Random(0), []

    def text(least: int, most: int) -> str:
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(least, most)])

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(common.write_model(Path(temporary)))
        Tokenizer.load(args.data / "opt-tokenizer").save(folder)
        loading: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
        models = {f"hf, batch_size {n}": HFLM(folder, batch_size=n, **loading) for n in BATCHES}
        models["minopt"] = MinoptLM(folder, **loading)
        for task, (context, continuation, choices) in TASKS.items():
            contexts = [c for _ in range(args.requests // choices) for c in [text(*context)] * choices]
            pairs = [(c, f" {text(*continuation)}") for c in contexts]
            cases.append(compare(models, task, pairs, args.samples))
            print(cases[-1], flush=True)
    common.keep("lm_eval", args.hardware, {"topic": "lm_eval", **common.machine("cpu"), "cases": cases})


def compare(models: dict[str, Any], task: str, pairs: list[tuple[str, str]], samples: int) -> dict[str, Any]:
    """Seconds of the processor, medians after a first round that does not count."""
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    times: dict[str, list[float]] = {name: [] for name in models}
    found: dict[str, list[tuple[float, bool]]] = {}
    for _ in range(samples + 1):
        for name, model in models.items():
            begin = time.process_time()
            found[name] = model.loglikelihood(requests, disable_tqdm=True)
            times[name].append(time.process_time() - begin)
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}
    ours, peers = found.pop("minopt"), min(value for name, value in medians.items() if name != "minopt")
    errors = [abs(a[0] - b[0]) for theirs in found.values() for a, b in zip(theirs, ours, strict=True)]
    return {
        "task": task,
        "requests": len(pairs),
        "cpu_seconds": medians,
        "times_as_fast_as_hf": round(peers / medians["minopt"], 2),
        "largest_difference_of_loglikelihoods": max(errors),
    }


if __name__ == "__main__":
    main()

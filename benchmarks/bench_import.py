"""What ``import minopt`` costs over ``import torch``, and what the first use of ``load`` adds.

python benchmarks/bench_import.py [--hardware NAME] [--samples 11]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import common

PROGRAM = """
import time, torch
begin = time.perf_counter()
{statement}
print(time.perf_counter() - begin)
"""

STATEMENTS = {
    "import minopt": "import minopt",
    "import minopt; minopt.OPT": "import minopt; minopt.OPT",
    "import minopt; minopt.load": "import minopt; minopt.load",
    "import transformers; transformers.OPTForCausalLM": "import transformers; transformers.OPTForCausalLM",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    parser.add_argument("--samples", type=int, default=11)
    args = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(args.samples):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
            samples[name].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    result = {
        "topic": "import",
        **common.machine("cpu"),
        "samples": args.samples,
        "milliseconds_over_import_torch": {n: round(statistics.median(v) * 1e3, 1) for n, v in samples.items()},
    }
    common.keep("import", args.hardware, result)


if __name__ == "__main__":
    main()

"""Shows whether minopt does on a GPU what it promises. One command, at most 20 minutes on one GPU.

    python benchmarks/gpu_acceptance.py [--hardware NAME] [--only CHECK ...]
    python benchmarks/gpu_acceptance.py --rehearse

It needs torch 2.11 to 2.13, no network, and no files but minopt's own: weights are drawn on the GPU. Each check is a
process of its own (a function of gpu_checks.py) with a time limit: one that crashes, hangs or runs out of memory does
not stop the others, and what it has reported until then counts. The result is written after each check. The exit code
is 1 if a check failed.

``--rehearse`` runs all checks on the CPU with tiny models, and keeps no result. Bounds of speed and memory do not apply
there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

CHILD = Path(__file__).with_name("gpu_checks.py")
SECONDS = 20 * 60  # for all checks together
MARK = '{"figure"'  # how a line begins that a check reports


@dataclass(frozen=True)
class Bound:
    """What a figure may be at most or at least; ``rehearsed`` if that holds on a CPU too."""

    most: float | None = None
    least: float | None = None
    rehearsed: bool = False

    def holds(self, value: float | None) -> bool:
        least = -math.inf if self.least is None else self.least
        return value is not None and least <= value <= (math.inf if self.most is None else self.most)

    def __str__(self) -> str:
        return f"<= {self.most:g}" if self.most is not None else f">= {self.least:g}"


NONE_DIFFERS = Bound(most=0, rehearsed=True)

# The seconds of each check, and the bounds of its figures. A figure without a bound is only shown.
CHECKS: dict[str, tuple[int, dict[str, Bound]]] = {
    "machine": (60, {}),
    "parity": (300, {
        "difference of logits": Bound(most=1e-5, rehearsed=True),  # of the largest logit
        "tokens that differ": NONE_DIFFERS,
        "difference of logits without one bias": Bound(least=1e-3, rehearsed=True),
        "difference of log-probabilities": Bound(most=1e-4, rehearsed=True),
        "distance of drawn tokens from the probabilities": Bound(most=0.1, rehearsed=True),  # half the sum over tokens
    }),
    "rounding": (60, {
        "error in float16": Bound(most=0.01, rehearsed=True),  # of the largest logit
        "error in bfloat16": Bound(most=0.08, rehearsed=True),
        "error, to transformers'": Bound(most=1.5, rehearsed=True),
    }),
    "graphs": (120, {
        "captures for 20 texts": Bound(most=2, rehearsed=True),  # one a batch size
        "growth of reserved memory after two texts": Bound(most=0.1),
        "compiled steps of 10 batch sizes": Bound(least=10, rehearsed=True),  # torch stops at 8 shapes by default
    }),
    "lengths": (60, {
        "first call of a prompt's length beyond the second, median ms": Bound(most=20),
        "first step of packed lengths beyond the second, median ms": Bound(most=20),
    }),
    "waits": (120, {
        "waits of a token": Bound(most=1 / 8),  # the host looks every 8 steps
        "waits of a token, beams": Bound(most=1),
        "waits of a token, drafts": Bound(most=2),
        "waits of a token, streamed": Bound(most=1),
        "waits of forward and backward": Bound(most=0),
        "waits of a training step": Bound(most=1),
    }),
    "training": (120, {
        "difference of losses in float32": Bound(most=1e-4, rehearsed=True),
        "difference of losses in 16 bits": Bound(most=0.02, rehearsed=True),
        "difference of a resumed run's weights": Bound(most=1e-4, rehearsed=True),  # of the largest weight
    }),
    "offload": (120, {
        "tokens that differ": NONE_DIFFERS,
        "host memory to the plan": Bound(most=1.15),
    }),
    "plan": (90, {
        "reserved to the plan": Bound(most=1),
        "CUDA's own memory to the plan": Bound(most=1),
    }),
    "export": (180, {
        "tokens that differ": NONE_DIFFERS,
        "first call of a prompt's length beyond the second, median ms": Bound(most=20),
    }),
    "torchrun": (180, {
        "texts that differ": NONE_DIFFERS,
        "difference of losses": Bound(most=1e-3, rehearsed=True),
    }),
    "second-gpu": (60, {"tokens that differ": NONE_DIFFERS}),
    "training-speed": (180, {
        "packed to padded": Bound(least=1),
        "MFU of opt-1.3b": Bound(least=0.45),
    }),
    "speed-125m": (120, {
        "to transformers with a static cache": Bound(least=1),
        "compiled to load()": Bound(least=1),
    }),
    "speed-1.3b": (180, {
        "share of bandwidth, batch 1": Bound(least=0.65),
        "to transformers with a static cache": Bound(least=1),
        "int8 to 16 bits, batch 1": Bound(least=1.2),
        "compiled to load()": Bound(least=1),
    }),
    "speed-6.7b": (300, {
        "share of bandwidth, batch 1": Bound(least=0.75),
        "prefill, share of the matrix peak": Bound(least=0.5),
        "to transformers with a static cache": Bound(least=1),
        "int8 to 16 bits, batch 1": Bound(least=1.2),
        "compiled to load()": Bound(least=1),
    }),
}  # fmt: skip

Row = dict[str, Any]  # check, figure, case, value, bound, state (passed, failed, measured, skipped) and reason


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with tiny models")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS], metavar="CHECK", help="of all checks")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("needs a GPU, and torch sees none; --rehearse runs on the CPU")
    path, rows, end = common.kept("gpu-acceptance", args.hardware), list[Row](), time.monotonic() + SECONDS
    if not args.rehearse and path.exists():  # checks that ran today, and are not asked for again
        rows = [row for row in json.loads(path.read_text())["rows"] if row["check"] not in args.only]
    result: Row = {"topic": "gpu-acceptance", **common.machine("cpu"), "rows": rows}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        run = partial(check, folder=Path(folder), rehearse=args.rehearse, end=end)
        for found in (pool.map if args.rehearse else map)(run, args.only):
            rows += [row | {"commit": result["commit"]} for row in found]
            print("\n".join(as_lines(found)), flush=True)
            result |= {row["figure"]: row["value"] for row in found if row["check"] == "machine" and row["figure"]}
            if not args.rehearse:
                common.RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
    failed = sorted({row["check"] for row in rows if row["state"] == "failed" and row["check"] in args.only})
    print(f"failed: {', '.join(failed) or 'none'}")
    if args.rehearse:
        print(json.dumps(result))
    else:
        common.keep("gpu-acceptance", args.hardware, result)
    sys.exit(bool(failed))


def check(name: str, folder: Path, rehearse: bool, end: float) -> list[Row]:
    """Runs a check and judges its figures."""
    seconds, bounds = CHECKS[name]
    command = [sys.executable, str(CHILD), name, str(folder / name), *(["--rehearse"] if rehearse else [])]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "HF_HUB_OFFLINE": "1"}
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    reported, problem = run_child(command, min(seconds, end - time.monotonic()), environment)
    shutil.rmtree(folder / name, ignore_errors=True)
    return [{"check": name, **row} for row in judged(reported, bounds, problem, rehearse)]


def run_child(command: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[list[Row], str | None]:
    """The figures that a process reports until it ends, and what went wrong with it."""
    if seconds <= 0:
        return [], "no time was left"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=dict(environment), start_new_session=True)
        try:
            child.wait(seconds)
            problem = f"ended with {child.returncode}" if child.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"was ended after {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and all that it has started
            child.wait()
        out.seek(0)
        errors.seek(0)
        lines, said = out.read().splitlines(), errors.read().strip().splitlines()
    if problem:
        print("\n".join(said[-30:]), file=sys.stderr)
        problem += f": {said[-1][:300]}" if said else ""
    return [json.loads(line) for line in lines if line.startswith(MARK)], problem


def judged(reported: Iterable[Row], bounds: Mapping[str, Bound], problem: str | None, rehearse: bool) -> Iterator[Row]:
    """Rows of a check's figures, and one for each that it should have reported."""
    missing = dict(bounds)
    for row in reported:
        bound = missing.pop(row["figure"], None) or bounds.get(row["figure"])
        if row["reason"] and row["value"] is None:
            state = "skipped"
            missing = missing if row["figure"] else {}
        elif bound is None or (rehearse and not bound.rehearsed):
            state = "measured"
        else:
            state = "passed" if bound.holds(row["value"]) else "failed"
        yield row | {"bound": None if bound is None else str(bound), "state": state}
    blank: Row = {"figure": "", "case": "", "value": None, "bound": None, "state": "failed"}
    if problem:
        yield blank | {"reason": problem}
    for figure, bound in missing.items():
        yield blank | {"figure": figure, "bound": str(bound), "reason": "was not reported"}


def as_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Rows as a table for people: of the cases of a figure that passed, the worst one."""
    groups = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        groups[row["figure"], row["state"]].append(row)
    for (figure, state), cases in groups.items():
        kept, of = cases, ""
        if state == "passed" and len(cases) > 1:
            worst = min if cases[0]["bound"].startswith(">") else max
            kept, of = [worst(cases, key=lambda row: row["value"])], f" (worst of {len(cases)})"
        for row in kept:
            what = ", ".join(filter(None, (figure, row["case"]))) + of
            value = row["value"] or ("" if row["value"] is None else 0)
            line = f"{row['check']:14}  {what:76}  {value:>10}  {row['bound'] or '':>9}  {state:8}  {row['reason']}"
            yield line.rstrip()


if __name__ == "__main__":
    main()

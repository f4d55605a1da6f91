"""Opens tens of thousands of damaged checkpoints: each must give the model's tensors or one clear line, soon and lean.

    python benchmarks/fuzz_checkpoints.py [--hardware NAME] [--inputs 20000] [--seed 0] [--only N]

Valid checkpoints of every kind that minopt opens are damaged (see ``fuzz_mutations.py``) and opened on the CPU. An
input passes if it ends in

- a model with the names, shapes and dtypes of the undamaged one, which computes (numbers may differ: no format has a
  checksum that is read), or
- a ``CheckpointError`` of one printable line that names a file or folder of the checkpoint.

Anything else is a finding: another exception, a crash, a warning or other output, more than 5 seconds of the
processor, more than 500 MB beyond what the process held. Inputs follow from seed and number; ``--only N`` repeats one,
says what was done to it and leaves it to be looked at. The exit status is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from fuzz_engine import (
    LIMITS,
    PACKAGE,
    Kind,
    Limits,
    Opener,
    Outcome,
    build_kinds,
    check_valid,
    damage,
    open_model,
    run_one,
    verdict,
)

# --- many inputs ---


@dataclass
class _Worker:
    """A process that takes every ``step``-th number, and reports each."""

    process: Any
    pipe: Connection
    numbers: range
    terminal: Path
    since: float = field(default_factory=time.monotonic)


def run_many(
    kinds: Sequence[Kind], seed: int, inputs: int, scratch: Path, workers: int,
    opener: Opener = open_model, limits: Limits = LIMITS,
) -> Iterator[Outcome]:  # fmt: skip
    """The outcomes of inputs 0 to ``inputs``, as they come, from worker processes: one that dies is a finding."""
    context = multiprocessing.get_context("fork")  # which has imported and built everything already

    def start(numbers: range) -> _Worker:
        ours, theirs = context.Pipe(duplex=False)
        folder = scratch / f"worker {numbers.start % workers}"
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (theirs, kinds, seed, numbers, folder, opener, limits)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, numbers, folder / "terminal")

    running = [start(range(i, inputs, workers)) for i in range(min(workers, inputs))]
    try:
        while running:
            wait([worker.pipe for worker in running], timeout=1.0)
            for worker in list(running):
                ended = None
                try:
                    while worker.numbers and worker.pipe.poll():
                        yield worker.pipe.recv()
                        worker.numbers, worker.since = worker.numbers[1:], time.monotonic()
                except EOFError:
                    worker.process.join()
                    ended = f"died ({_signal(worker.process.exitcode)})"
                if time.monotonic() - worker.since > limits.patience_seconds:
                    ended = f"hung ({limits.patience_seconds:.0f} s)"
                if worker.numbers and ended is None:
                    continue
                running.remove(worker)
                _stop(worker)
                if ended is not None and worker.numbers:
                    number = worker.numbers[0]
                    damaged = damage(kinds, seed, number)
                    said = worker.terminal.read_text(errors="replace")
                    yield Outcome(
                        number, damaged.kind.name, "finding", f"{ended}, at {_deepest(said)}", said[:600],
                        damaged.done[:600], limits.patience_seconds if ended.startswith("hung") else 0.0,
                    )  # fmt: skip
                    if worker.numbers[1:]:
                        running.append(start(worker.numbers[1:]))
    finally:
        for worker in running:
            _stop(worker)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _deepest(trace: str) -> str:
    """The innermost line of minopt in what faulthandler wrote, the last call first."""
    package = PACKAGE.encode("ascii", "backslashreplace").decode()  # as faulthandler writes it
    match = re.search(rf'File "{re.escape(package)}(?:\w+/)*(\w+\.py)", line (\d+) in (\w+)', trace)
    return f"{match[1]}:{match[2]} {match[3]}" if match else "no line of minopt"


def _signal(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"


def _work(
    pipe: Connection, kinds: Sequence[Kind], seed: int, numbers: range, folder: Path, opener: Opener, limits: Limits
) -> None:
    """What a worker does; what anything writes to the terminal goes to a file, as does where it hangs or dies."""
    torch.set_num_threads(1)
    with (folder / "terminal").open("w+b") as terminal:
        faulthandler.enable(terminal)
        for descriptor in (1, 2):
            os.dup2(terminal.fileno(), descriptor)

        def said() -> str:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            terminal.seek(0)
            text = terminal.read().decode(errors="replace")
            terminal.seek(0)
            terminal.truncate()
            return text

        for number in numbers:
            faulthandler.dump_traceback_later(0.9 * limits.patience_seconds, file=terminal)
            outcome = run_one(kinds, seed, number, folder / "checkpoint", opener, limits, said)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(outcome)


# --- report ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, metavar="N", help="open one input, and leave it to be looked at")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        kinds = build_kinds(Path(temporary) / "valid")
        check_valid(kinds)
        if args.only is not None:
            return repeat(kinds, args.seed, args.only)
        machine = common.machine("cpu")  # before the run, while the commit is the one that is run
        began, outcomes = time.perf_counter(), []
        for outcome in run_many(kinds, args.seed, args.inputs, Path(temporary) / "scratch", args.workers):
            outcomes.append(outcome)
            if len(outcomes) % 1000 == 0:
                print(progress(outcomes, args.inputs, time.perf_counter() - began), flush=True)
    result = {"topic": "fuzz", **machine, "seed": args.seed, "inputs": args.inputs, "limits": asdict(LIMITS)}
    result |= summary(kinds, outcomes)
    print(table(result))
    common.keep("fuzz", args.hardware, result)
    return 1 if result["findings"] else 0


def repeat(kinds: Sequence[Kind], seed: int, number: int) -> int:
    """Opens one input and shows all there is to see."""
    folder = Path(tempfile.mkdtemp()) / "checkpoint"
    damaged = damage(kinds, seed, number)
    path = damaged.write(folder)
    print(f"kind: {damaged.kind.name}\ndone: {damaged.done}\nleft in: {path}", flush=True)
    faulthandler.dump_traceback_later(LIMITS.patience_seconds, exit=True)  # says where it hangs, if it does
    outcome = verdict(open_model, path, folder, damaged.models, LIMITS)
    print(json.dumps(asdict(outcome), indent=1), flush=True)
    try:
        open_model(path)
    except BaseException:
        traceback.print_exc()
    return 1 if outcome.result == "finding" else 0


def progress(outcomes: Sequence[Outcome], inputs: int, seconds: float) -> str:
    """How far a run is, in a line."""
    counts = Counter(outcome.result for outcome in outcomes)
    return (f"{len(outcomes):,} of {inputs:,}: {counts['loaded']:,} loaded, {counts['refused']:,} refused, "
            f"{counts['finding']:,} findings, {len(outcomes) / seconds:.0f} a second")  # fmt: skip


def summary(kinds: Sequence[Kind], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Outcomes by kind, and findings by group, each with the first input that shows it."""
    by_kind = {}
    for kind in kinds:
        own = [outcome for outcome in outcomes if outcome.kind == kind.name]
        counts = Counter(outcome.result for outcome in own)
        by_kind[kind.name] = {
            "inputs": len(own), "loaded": counts["loaded"], "refused": counts["refused"], "findings": counts["finding"],
            "slowest_seconds": round(max((outcome.seconds for outcome in own), default=0.0), 3),
            "largest_growth_mb": round(max((outcome.growth_bytes for outcome in own), default=0) / 1e6, 1),
        }  # fmt: skip
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.number):
        if outcome.result == "finding":
            groups.setdefault(outcome.group, []).append(outcome)
    findings = [
        {"group": group, "count": len(found), "numbers": [outcome.number for outcome in found[:5]],
         "kind": found[0].kind, "done": found[0].done, "detail": found[0].detail}
        for group, found in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]  # fmt: skip
    return {"by_kind": by_kind, "findings": findings}


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    columns = ("inputs", "loaded", "refused", "findings", "slowest_seconds", "largest_growth_mb")
    rows = [("kind", *(column.replace("_", " ") for column in columns))]
    rows += [(kind, *(f"{row[c]:,}" for c in columns)) for kind, row in result["by_kind"].items()]
    total = {c: (max if c in columns[4:] else sum)(row[c] for row in result["by_kind"].values()) for c in columns}
    rows.append(("all", *(f"{total[c]:,}" for c in columns)))
    lines = ["  ".join([f"{row[0]:36}", *(f"{cell:>17}" if i > 3 else f"{cell:>8}" for i, cell in enumerate(row[1:]))])
             for row in rows]  # fmt: skip
    for finding in result["findings"]:
        lines.append(f"{finding['count']:6,}  {finding['group']}")
        lines.append(f"        inputs {finding['numbers']}; {finding['kind']}; {finding['done'][:200]}")
        lines.append(f"        {finding['detail'][:300]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

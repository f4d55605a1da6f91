"""What `minopt plan` says against what processes hold; models larger than a process' memory (`docs/parallel.md`).

    python benchmarks/check_plan.py --folder MODELS [--hardware NAME] [--only opt-125m opt-1.3b ...]

Each configuration runs in processes of its own: a model of random float16 weights is loaded and continues random
prompts. The memory is the largest sum of anonymous and file pages of a process, read every 2 ms. Those with a limit run
in a cgroup of that size (as root), page cache included. Of processes that divide a model the largest counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch

from minopt import OPTConfig
from minopt.inference.plan import plan_generation

NEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """A configuration; ``limit`` is that of a cgroup, in bytes."""

    model: str
    dtype: str
    batch: int
    length: int
    processes: int = 1
    quantize: str | None = None
    offload: str | None = None
    limit: int | None = None


CASES = (
    Case("opt-125m", "float32", 1, 2048),
    Case("opt-125m", "bfloat16", 8, 512),
    Case("opt-125m", "float32", 1, 2048, quantize="int8"),
    Case("opt-350m", "bfloat16", 4, 1024),
    Case("opt-350m", "float32", 2, 256),
    Case("opt-1.3b", "float32", 1, 512),
    Case("opt-1.3b", "bfloat16", 1, 2048),
    Case("opt-1.3b", "float32", 4, 512, quantize="int8"),
    Case("opt-1.3b", "bfloat16", 8, 512, offload="disk"),
    Case("opt-1.3b", "bfloat16", 1, 2048, processes=2),
    Case("opt-1.3b", "bfloat16", 2, 512, processes=4),
    Case("opt-2.7b", "bfloat16", 2, 1024),
    Case("opt-6.7b", "bfloat16", 1, 512, processes=2),
    Case("opt-6.7b", "bfloat16", 1, 64, offload="disk", limit=4_000_000_000),
    Case("opt-6.7b", "bfloat16", 48, 64, offload="disk", limit=4_000_000_000),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where the models go: 17 GB")
    parser.add_argument("--only", nargs="+", choices=sorted({case.model for case in CASES}), help="models to check")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.folder, Case(**json.loads(args.child)))
        return
    lines = []
    for case in CASES:
        if args.only and case.model not in args.only:
            continue
        folder, disk = common.write_model(args.folder, case.model, torch.float16), None
        if case.limit is not None:  # or it would find the files in the page cache of others, which has no limit
            disk = {"disk_gb_per_second": round(read_from_disk(folder) / 1e9, 2)}
            forget(folder)
        arguments = (__file__, "--folder", folder, "--child", json.dumps(asdict(case)))
        with limited(case.limit) as enter:
            found = common.torchrun(case.processes, *arguments, preexec_fn=enter)
        plan = plan_generation(
            OPTConfig.preset(case.model), dtype=getattr(torch, case.dtype), devices=case.processes,
            offload=case.offload, quantize=case.quantize, batch=case.batch, length=case.length,
        )  # fmt: skip
        largest = max(found, key=lambda rank: rank["peak_mb"])
        lines.append({**asdict(case), **largest, **(disk or {}),
                      "planned_mb": round(plan.total / 1e6), "plan": asdict(plan),
                      "error": round(plan.total / 1e6 / largest["peak_mb"] - 1, 4)})  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    common.keep("plan", args.hardware, {"topic": "plan", **common.machine("cpu"), "cases": lines})


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk(folder: Path) -> float:
    """Bytes a second of reading a folder's files one after the other."""
    forget(folder)
    space, count, begin = bytearray(2**24), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while more := file.readinto(space):
                count += more
    return count / (time.perf_counter() - begin)


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[Any]:
    """A function that puts the process that calls it into a cgroup of a size; page cache counts, and gives way."""
    if limit is None:
        yield None
        return
    root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not root.is_dir():
        root, name = Path("/sys/fs/cgroup"), "memory.max"
    group = root / f"minopt-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        time.sleep(1)
        group.rmdir()


def child(folder: Path, case: Case) -> None:
    """Loads, generates, and prints what it took."""
    import torch.distributed as dist
    from inference_child import Watch, resident_mb
    from torch.distributed.device_mesh import init_device_mesh

    import minopt

    mesh, rank = None, 0
    if case.processes > 1:
        dist.init_process_group("gloo")
        mesh, rank = init_device_mesh("cpu", (case.processes,)), dist.get_rank()
    options: dict[str, Any] = {"dtype": case.dtype, "quantize": case.quantize, "offload": case.offload, "mesh": mesh}

    # Code and buffers that any model brings in.
    small = minopt.load(minopt.DEMO, device="cpu", **options)
    small.generate(["The ship"] * 2, max_new_tokens=4)
    del small
    before = resident_mb()
    begin = time.perf_counter()
    with Watch() as loading:
        lm = minopt.load(folder, device="cpu", **options)
    loaded = time.perf_counter()
    ids = torch.randint(10, 50000, (case.batch, case.length - NEW_TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[case.batch // 2 :, : 3 if case.batch > 1 else 0] = 0
    steps: list[float] = []

    def on_step(*_: Any) -> bool:
        steps.append(time.perf_counter())
        return False

    with Watch() as generating:
        output = minopt.generate(
            lm.decoder, ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=(), stopping_criteria=[on_step]
        )
    found = {
        "rank": rank,
        "before_mb": [round(mb) for mb in before],
        "loading_mb": [round(mb) for mb in loading.peak],
        "generating_mb": [round(mb) for mb in generating.peak],
        "peak_mb": round(max(sum(loading.peak), sum(generating.peak))),
        "load_seconds": round(loaded - begin, 1),
        "prompt_seconds": round(steps[0] - loaded, 2),
        "step_seconds": round((steps[-1] - steps[0]) / (len(steps) - 1), 3),
        "tokens": output.sequences[0, -NEW_TOKENS:].tolist(),
    }
    everyone: list[Any] = [found]
    if mesh is not None:
        everyone = [None] * case.processes
        dist.all_gather_object(everyone, found)
    if rank == 0:
        print(json.dumps(everyone))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads


if __name__ == "__main__":
    main()

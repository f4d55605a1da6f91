"""The time of a model that is divided among processes (`docs/parallel.md`); `check_plan.py` measures its memory.

    python benchmarks/bench_parallel.py --folder MODELS [--hardware NAME] [--processes 1 2]

Milliseconds a token of opt-125m's (float32) and opt-1.3b's size (bfloat16), and the share of it that is spent in
messages between the processes. The cores are shared evenly. Compared with the plain model divided by hand in the same
way (``plain``) and by torch's DTensor (``dtensor``), both with the whole token table in each process. Random weights,
written to MODELS once.
"""

from __future__ import annotations

from pathlib import Path

import common
import torch

CHILD = Path(__file__).with_name("parallel_child.py")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the models go: 4 GB")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    lines = []
    for preset, dtype in (("opt-125m", "float32"), ("opt-1.3b", "bfloat16")):
        folder = common.write_model(args.folder, preset, torch.float16)
        for count in args.processes:
            for form in ("minopt", "plain", "dtensor"):
                ranks = common.torchrun(count, CHILD, folder, dtype, 24, 5, form)
                line = {"model": preset, "dtype": dtype, "processes": count, "form": form, "ranks": ranks}
                lines.append({"case": "speed", **line})
                print(lines[-1], flush=True)
    common.keep("parallel", args.hardware, {"topic": "parallel", **common.machine("cpu"), "cases": lines})


if __name__ == "__main__":
    main()

"""``minopt plan``."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minopt.cli.common import MODEL, gigabytes, size
from minopt.config import PRESETS

if TYPE_CHECKING:
    from minopt.plan import Plan


def add_plan(verbs: Any) -> None:
    parser = verbs.add_parser(
        "plan", help="say what a model takes of a device's memory", allow_abbrev=False,
        description="Says what a device would hold while a model generates: whole, divided among several, or with its "
        "layers offloaded; what of it fits, and by which flags. No weights are needed. Exits with 1 if nothing fits.",
    )  # fmt: skip
    parser.set_defaults(run=_plan)
    parser.add_argument("model", help=f"{MODEL}, or a size such as opt-175b")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many there are (1)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of each, such as 16GB (what is free here)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what they are (a GPU if there is one)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows that run together, or beams (1)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each, with the new ones (the model's most)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: as minopt generate)")
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits")
    parser.add_argument("--json", action="store_true", help="write JSON")


def _plan(args: argparse.Namespace) -> int:
    import torch

    from minopt import int8
    from minopt.checkpoint.load import resolve_dtype
    from minopt.memory import available_memory
    from minopt.plan import find_config, plan_generation, rows_that_fit

    for name in ("devices", "batch", "length"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {given}.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, stored = find_config(args.model)
    longest = config.max_position_embeddings
    length = args.length or longest
    if length > longest:
        raise ValueError(f"--length: expected at most {longest} tokens, the model's positions, got {length}.")
    dtype = resolve_dtype(args.dtype) or (torch.float32 if device == "cpu" else stored)
    memory = args.memory or available_memory(torch.device(device))
    if memory is None:
        raise ValueError("--memory: what is free cannot be read on this machine. Say how much there is.")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "length": length}
    counts = [n for n in range(1, args.devices + 1) if config.num_attention_heads % n == 0]
    quantize = args.quantize or ("int8" if int8.CONFIG_KEY in config.extra else None)
    ways: list[dict[str, Any]] = [{"devices": n, "quantize": quantize} for n in counts]
    if args.quantize is None:
        ways += [{"offload": to} for to in ("cpu", "disk")[device == "cpu" :]]
    plans = [plan_generation(config, batch=args.batch, **way, **options) for way in ways]
    rows = [rows_that_fit(config, memory, **way, **options) for way in ways]
    fitting = [plan for plan in plans if plan.total <= memory]
    name = str(dtype).removeprefix("torch.")
    command = _command(args, fitting[0], name) if fitting else None
    if args.json:
        lines = [asdict(p) | {"total": p.total, "rows": most} for p, most in zip(plans, rows, strict=True)]
        print(json.dumps({"memory": memory, "plans": lines, "command": command}, indent=2))
        return 0 if fitting else 1
    kind = "a GPU" if device == "cuda" else "a CPU"
    print(f"{args.model} as {name}, {args.batch} x {length:,} tokens (prompt and new ones), on {kind} with "
          f"{gigabytes(memory)}\n")  # fmt: skip
    print(f"{'':28}{'weights':>10}{'cache':>10}{'activations':>13}{'runtime':>10}{'together':>10}{'rows that fit':>15}")
    for plan, most in zip(plans, rows, strict=True):
        parts = (plan.weights, plan.cache, plan.activations, plan.runtime, plan.total)
        widths = (10, 10, 13, 10, 10)
        print(f"{_label(plan):28}" + "".join(f"{gigabytes(n):>{w}}" for n, w in zip(parts, widths, strict=True))
              + f"{most:>15,}")  # fmt: skip
    print()
    if fitting and fitting[0].host:
        print(f"Beside it, {gigabytes(fitting[0].host)} of the machine's own memory.")
    print(f"Use: {command}" if command else _advice(args, plans))
    return 0 if fitting else 1


def _label(plan: Plan) -> str:
    if plan.offload is not None:
        return f"--offload {plan.offload}"
    return "one device" if plan.devices == 1 else f"each of {plan.devices} devices"


def _command(args: argparse.Namespace, plan: Plan, dtype: str) -> str:
    start = ["minopt"] if plan.devices == 1 else ["torchrun", "--nproc-per-node", str(plan.devices), "-m", "minopt"]
    named = f"facebook/{args.model}" if args.model in PRESETS and args.model != "opt-175b" else args.model
    command = [*start, "generate", "--model", named, "--dtype", dtype]
    if args.quantize is not None:
        command += ["--quantize", args.quantize]
    if plan.offload is not None:
        command += ["--offload", plan.offload]
    return shlex.join(command)


def _advice(args: argparse.Namespace, plans: list[Plan]) -> str:
    least = min(plans, key=lambda plan: plan.total)
    changes = [
        "--batch 1" if args.batch > 1 else "",
        "a smaller --length",
        "--dtype bfloat16" if args.dtype in ("auto", "float32") else "",
        "more --devices",
    ]
    return f"Nothing fits: the least is {gigabytes(least.total)} ({_label(least)}). Try " + ", or ".join(
        filter(None, changes)
    )

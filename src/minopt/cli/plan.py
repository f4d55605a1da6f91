"""``minopt plan``."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minopt.cli.common import MODEL, size
from minopt.progress import size_of

if TYPE_CHECKING:
    from minopt.inference.plan import Plan


def add_plan(verbs: Any) -> None:
    parser = verbs.add_parser(
        "plan", help="show how much memory a model needs",
        description="Shows how much memory a model needs to generate: whole, divided among devices, or with its layers "
        "offloaded; which of these fit, and the command. No weights are needed. The exit code is 1 if nothing fits.",
    )  # fmt: skip
    parser.set_defaults(run=_plan, alone=True)
    parser.add_argument("model", help=f"{MODEL}, or a size such as opt-175b")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many devices there are (1)")
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="memory of each device, such as 16GB (what is free on this machine)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="kind of the devices (cuda if there is a GPU)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="texts that run together, or beams (1)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens of each text, prompt and new ones (the model's positions)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16 or float64 (auto: float32 on a CPU, else the checkpoint's own)",
    )
    parser.add_argument("--quantize", choices=("int8",), help="plan for weights of 8 bits")
    parser.add_argument("--json", action="store_true", help="write the plan as JSON")


def _plan(args: argparse.Namespace) -> int:
    import torch

    from minopt import int8
    from minopt.devices import resolve_dtype
    from minopt.inference.plan import device_counts, find_config, plan_generation, rows_that_fit
    from minopt.memory import available_memory

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
    memory = args.memory
    if memory is None and (device == "cpu" or torch.cuda.is_available()):
        memory = available_memory(torch.device(device))
    if memory is None:
        raise ValueError("--memory: what is free cannot be read on this machine. Say how much there is.")
    shared = args.memory is None and device == "cpu"  # by all processes on it
    options: dict[str, Any] = {"dtype": dtype, "device": device, "length": length}
    possible = device_counts(config)
    counts = [n for n in possible if n <= args.devices]
    quantize = args.quantize or ("int8" if int8.CONFIG_KEY in config.extra else None)
    ways: list[dict[str, Any]] = [{"devices": n, "quantize": quantize} for n in counts]
    if args.quantize is None:
        ways += [{"offload": to} for to in ("cpu", "disk")[device == "cpu" :]]
    plans = [plan_generation(config, batch=args.batch, **way, **options) for way in ways]
    each = [memory // way.get("devices", 1) if shared else memory for way in ways]
    rows = [rows_that_fit(config, free, **way, **options) for way, free in zip(ways, each, strict=True)]
    fitting = [number for number, plan in enumerate(plans) if plan.total <= each[number]]
    name = str(dtype).removeprefix("torch.")
    best = plans[fitting[0]] if fitting else None
    command = None if best is None else _command(args, best, name, rows[fitting[0]] * length)
    if args.json:
        lines = [asdict(p) | {"total": p.total, "rows": most} for p, most in zip(plans, rows, strict=True)]
        print(json.dumps({"memory": memory, "plans": lines, "command": command}, indent=2))
        return 0 if fitting else 1
    kind = "a GPU" if device == "cuda" else "a CPU"
    print(f"{args.model} as {name}, {args.batch} x {length:,} tokens (prompt and new ones), on {kind} with "
          f"{size_of(memory)}\n")  # fmt: skip
    print(f"{'':28}{'weights':>11}{'cache':>11}{'activations':>13}{'runtime':>10}{'together':>12}{'rows that fit':>15}")
    for plan, most in zip(plans, rows, strict=True):
        parts = (plan.weights, plan.cache, plan.activations, plan.runtime, plan.total)
        widths = (11, 11, 13, 10, 12)
        print(f"{_label(plan):28}" + "".join(f"{size_of(n):>{w}}" for n, w in zip(parts, widths, strict=True))
              + f"{most:>15,}")  # fmt: skip
    print()
    if best is not None and best.host:
        print(f"Beside it, {size_of(best.host)} of the machine's own memory.")
    if args.devices not in possible:
        print(f"The model has {config.num_attention_heads} heads and can be divided among {_listed(possible)} devices, "
              f"not among {args.devices}.")  # fmt: skip
    if best is not None and best.offload is None and best.devices < args.devices:
        print(f"{best.devices} of the {args.devices} devices {'are' if best.devices > 1 else 'is'} enough for "
              f"{args.batch} x {length:,} tokens.")  # fmt: skip
    if command is not None:
        print(f"Use: {command}")
        return 0
    more = None
    if not shared:
        totals = ((n, plan_generation(config, batch=args.batch, devices=n, quantize=quantize, **options).total)
                  for n in possible if n > args.devices)  # fmt: skip
        more = next((n for n, total in totals if total <= memory), None)
    print(_advice(args, plans, dtype.itemsize, more))
    return 1


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:-1])) + f" or {counts[-1]}" if len(counts) > 1 else str(counts[0])


def _label(plan: Plan) -> str:
    if plan.offload is not None:
        return f"--offload {plan.offload}"
    return "one device" if plan.devices == 1 else f"each of {plan.devices} devices"


def _command(args: argparse.Namespace, plan: Plan, dtype: str, most_tokens: int) -> str:
    from minopt.generation.batches import MAX_BATCH_TOKENS
    from minopt.inference.plan import published

    start = ["minopt"] if plan.devices == 1 else ["torchrun", "--nproc-per-node", str(plan.devices), "-m", "minopt"]
    named = args.model
    if not Path(named).exists() and (name := published(named)) is not None and name.startswith("opt-"):
        named = f"facebook/{name}"
    command = [*start, "generate", "--model", named, "--dtype", dtype]
    if args.quantize is not None:
        command += ["--quantize", args.quantize]
    if plan.offload is not None:
        command += ["--offload", plan.offload]
    if plan.offload is not None or most_tokens < MAX_BATCH_TOKENS:  # where many prompts are to run together
        command += ["--max-batch-tokens", str(most_tokens)]
    return shlex.join(command)


def _advice(args: argparse.Namespace, plans: list[Plan], itemsize: int, more: int | None) -> str:
    least = min(plans, key=lambda plan: plan.total)
    changes = [
        "--batch 1" if args.batch > 1 else "",
        "a smaller --length" if args.length != 1 else "",
        "--dtype bfloat16" if itemsize > 2 else "",
        f"--devices {more}" if more is not None else "",
    ]
    advice = ", or ".join(filter(None, changes))
    return f"Nothing fits: the least is {size_of(least.total)} ({_label(least)}). Try {advice or 'a smaller model'}."

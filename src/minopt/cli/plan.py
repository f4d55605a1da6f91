"""``minopt plan``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minopt.cli.flags import Command
from minopt.cli.records import MODEL
from minopt.progress import size_of
from minopt.settings import option

if TYPE_CHECKING:
    from minopt.config import OPTConfig
    from minopt.inference.plan import Plan as Way
    from minopt.load_options import LoadOptions


@dataclass(frozen=True)
class Plan(Command):
    """Shows how much memory a model needs to generate: whole, divided among devices, or with its layers offloaded;
    which of these fit, and the command. No weights are needed. The exit code is 1 if nothing fits.
    """

    summary = "show how much memory a model needs"
    alone = True

    model: str = option("", f"{MODEL}, or a size such as opt-175b", is_word=True, required=True, unless="kernels")
    devices: int = option(1, "how many devices there are", least=1)
    memory: int | None = option(None, "memory of each device, such as 16GB (what is free)", kind="size")
    device: str | None = option(None, "kind of the devices (cuda if there is a GPU)", choices=("cpu", "cuda"))
    batch: int = option(1, "texts that run together, or beams", least=1)
    length: int | None = option(None, "tokens of each text, prompt and new ones (the model's positions)", least=1)
    dtype: str = option("auto", "float32, bfloat16, float16 or float64 (auto: float32 on a CPU, else the file's own)")
    quantize: str | None = option(None, "plan for weights of 8 or 4 bits", choices=("int8", "int4"))
    kernels: bool = option(False, "show which product each dtype of weights takes on this machine's CPU, and why")
    json: bool = option(False, "write the plan, or the products, as JSON")

    def run(self, given: dict[str, Any]) -> int:
        if self.kernels and self.model:
            raise ValueError(
                f"--kernels: shows the products of every dtype, whatever the model, got {self.model}. Leave out one."
            )
        return self._show_kernels() if self.kernels else self._show_ways()

    def _show_ways(self) -> int:
        import torch

        from minopt import int4, int8
        from minopt.devices import auto_dtype, resolve_dtype
        from minopt.inference.plan import device_counts, find_config, plan_generation, rows_that_fit
        from minopt.load_options import LoadOptions
        from minopt.memory import available_memory

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        config, stored = find_config(self.model)
        longest = config.max_position_embeddings
        length = self.length or longest
        if length > longest:
            raise ValueError(f"--length: expected at most {longest} tokens, the model's positions, got {length}.")
        memory = self.memory
        if memory is None and (device == "cpu" or torch.cuda.is_available()):
            memory = available_memory(torch.device(device))
        if memory is None:
            raise ValueError("--memory: what is free cannot be read on this machine. Say how much there is.")
        is_shared = self.memory is None and device == "cpu"  # by all processes on it
        dtype = resolve_dtype(self.dtype) or auto_dtype(stored, torch.device(device))
        is_int4 = int4.group_of(config.extra.get(int8.CONFIG_KEY)) is not None
        common: dict[str, Any] = {"dtype": dtype, "device": device, "length": length}
        counts = device_counts(config)
        ways = self._ways(config, LoadOptions(torch.device(device), dtype, self.quantize), counts)
        every = [(way, plan_generation(config, batch=self.batch, **way, **common)) for way in ways]
        free = {plan.devices: memory // plan.devices if is_shared else memory for _, plan in every}
        here = [(way, plan) for way, plan in every if plan.devices <= self.devices]
        plans = [plan for _, plan in here]
        rows = [rows_that_fit(config, free[plan.devices], **way, **common) for way, plan in here]
        best = next((i for i, plan in enumerate(plans) if plan.total <= free[plan.devices]), None)
        name = str(dtype).removeprefix("torch.")
        command = None if best is None else self._command(plans[best], name, rows[best] * length)
        if self.json:
            lines = [asdict(p) | {"total": p.total, "rows": most} for p, most in zip(plans, rows, strict=True)]
            print(json.dumps({"memory": memory, "plans": lines, "command": command}, indent=2))
            return 0 if command else 1
        texts = f"{self.batch} x {length:,} tokens"
        kind = "a GPU" if device == "cuda" else "a CPU"
        print(f"{self.model} as {name}, {texts} (prompt and new ones), on {kind} with {size_of(memory)}\n")
        _print_table(plans, rows)
        if is_int4 and ways[0]["quantize"] is None:
            print(f"The files hold int4 weights, with which the model computes as {name}.")
        if self.devices not in counts:
            print(f"The model has {config.num_attention_heads} heads and can be divided among "
                  f"{', '.join(map(str, counts))} devices, not among {self.devices}.")  # fmt: skip
        if best is None:
            more = [plan.devices for _, plan in every if plan.devices > self.devices and plan.total <= memory]
            print(self._advice(plans, dtype.itemsize, None if is_shared else next(iter(more), None)))
            return 1
        if plans[best].host:
            print(f"Beside it, {size_of(plans[best].host)} of the machine's own memory.")
        if plans[best].offload is None and (count := plans[best].devices) < self.devices:
            print(f"{count} of the {self.devices} devices {'are' if count > 1 else 'is'} enough for {texts}.")
        print(f"Use: {command}")
        return 0

    def _ways(self, config: OPTConfig, options: LoadOptions, counts: list[int]) -> list[dict[str, Any]]:
        """The forms of a model, as options of ``plan_generation``: whole, divided, offloaded."""
        quantize, group = self._quantized(config, options)
        ways: list[dict[str, Any]] = [{"devices": n, "quantize": quantize} for n in counts]
        if quantize == "int4":  # for one device alone: divided, the weights of files become floats
            rest = [way | {"quantize": None} for way in ways[1:] if self.quantize is None]
            ways = [ways[0] | {"group": group}, *rest]
        if self.quantize is None:
            ways += [{"offload": to} for to in ("cpu", "disk")[options.device.type == "cpu" :]]
        return ways

    def _quantized(self, config: OPTConfig, options: LoadOptions) -> tuple[str | None, int]:
        """What a model's weights are quantized to: as asked for, else as its files are if ``load`` keeps that.

        The number is for int4: inputs with one scale.
        """
        from minopt import int4, int8
        from minopt.inference.linear4 import no_product, stays

        stored, wanted = config.extra.get(int8.CONFIG_KEY), options.quantize
        group = int4.group_of(stored)
        if wanted == "int8" or (wanted is None and (stored is None or group is None)):
            return wanted if stored is None else "int8", 0
        if group is None:
            group = int4.group_size(config)
        if stays(config, group, options):
            return "int4", group
        if wanted is not None:
            raise no_product(config, group)
        return None, 0

    def _show_kernels(self) -> int:
        from minopt.inference.linear import kernels

        if self.device == "cuda":
            raise ValueError("--kernels: expected a CPU, got --device cuda. On a GPU, torch chooses at each call.")
        found = kernels()
        if self.json:
            print(json.dumps([{"dtype": dtype, "product": product, "reason": why} for dtype, product, why in found]))
            return 0
        for dtype, product, why in found:
            print(f"{dtype:10}{product:16}{why}")
        return 0

    def _command(self, plan: Way, dtype: str, most_tokens: int) -> str:
        from minopt.generation.batches import MAX_BATCH_TOKENS
        from minopt.inference.plan import published

        size = None if Path(self.model).exists() else published(self.model)
        model = f"facebook/{size}" if size is not None and size.startswith("opt-") else self.model
        command = [] if plan.devices == 1 else ["torchrun", "--nproc-per-node", str(plan.devices), "-m"]
        command += ["minopt", "generate", "--model", model, "--dtype", dtype]
        command += [] if self.quantize is None else ["--quantize", self.quantize]
        command += [] if plan.offload is None else ["--offload", plan.offload]
        if plan.offload is not None or most_tokens < MAX_BATCH_TOKENS:  # where many prompts are to run together
            command += ["--max-batch-tokens", str(most_tokens)]
        return shlex.join(command)

    def _advice(self, plans: list[Way], itemsize: int, more: int | None) -> str:
        least = min(plans, key=lambda plan: plan.total)
        changes = ["--batch 1"] * (self.batch > 1) + ["a smaller --length"] * (self.length != 1)
        changes += ["--dtype bfloat16"] * (itemsize > 2) + [f"--devices {more}"] * (more is not None)
        advice = ", or ".join(changes) or "a smaller model"
        return f"Nothing fits: the least is {size_of(least.total)} ({_label(least)}). Try {advice}."


def _print_table(plans: list[Way], rows: list[int]) -> None:
    print(f"{'':28}{'weights':>11}{'cache':>11}{'activations':>13}{'runtime':>10}{'together':>12}{'rows that fit':>15}")
    for plan, most in zip(plans, rows, strict=True):
        sizes = (plan.weights + plan.copies, plan.cache, plan.activations, plan.runtime, plan.total)
        columns = "".join(f"{size_of(size):>{width}}" for size, width in zip(sizes, (11, 11, 13, 10, 12), strict=True))
        print(f"{_label(plan):28}{columns}{most:>15,}")
    print()


def _label(plan: Way) -> str:
    if plan.offload is not None:
        return f"--offload {plan.offload}"
    return "one device" if plan.devices == 1 else f"each of {plan.devices} devices"

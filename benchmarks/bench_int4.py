"""int4 weights on a CPU, beside int8 and bfloat16: steps of one row and of several, a prompt, memory.

    python benchmarks/bench_int4.py [--hardware NAME] [--preset opt-1.3b] [--rounds 15]

Random weights of a published shape, activations in bfloat16. The three models are in one process, and each round takes
them in turn. Memory is what the process holds more once a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import common
import torch
from torch import Tensor

from minopt import OPTConfig, int8
from minopt.checkpoint.names import parameter_shapes
from minopt.inference.fast import FastOPT

ROWS, PAST, PROMPT, GROUP = (1, 2, 4, 5, 8, 16, 32), 64, 512, 128
STD = 0.02  # of OPT's initial weights


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="opt-1.3b")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    config, models, memory = OPTConfig.preset(args.preset), dict[str, FastOPT](), dict[str, int]()
    result: dict[str, Any] = {"topic": "int4", **common.machine("cpu"), "preset": args.preset, "memory_MB": memory}
    for form in ("bfloat16", "int8", "int4"):
        before = anonymous()
        models[form] = FastOPT(config, weights(config, form))
        numbers.cache_clear()
        memory[form] = (anonymous() - before) // 1_000_000
    with torch.inference_mode():
        for name, rows, tokens, rounds in [
            *((f"step, {rows} rows" if rows > 1 else "step, 1 row", rows, 1, args.rounds) for rows in ROWS),
            (f"prompt of {PROMPT}", 1, PROMPT, max(3, args.rounds // 3)),
        ]:
            result[name] = measure(models, rows, tokens, rounds)
            print(name, result[name], flush=True)
    common.keep("int4", args.hardware, result)


def measure(models: dict[str, FastOPT], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """The time in which each model reads some tokens, behind ``PAST`` others if it is one of each row."""
    past, samples = PAST if tokens == 1 else 0, {form: list[float]() for form in models}
    ids, positions = torch.full((rows, tokens), 7), torch.arange(past, past + tokens).expand(rows, -1)
    caches = {form: model.new_cache(rows, past + tokens) for form, model in models.items()}
    for number in range(rounds + 1):
        for form, model in models.items():
            caches[form].length = past
            last = torch.arange(tokens - 1, rows * tokens, tokens)
            time = common.seconds(lambda m=model, f=form, w=last: m.read(ids, positions, None, w, caches[f]))
            samples[form] += [time] * (number > 0)  # the first warms up
    found: dict[str, Any] = {form: common.summary(times) for form, times in samples.items()}
    own = found["int4"]["median_ms"]
    return found | {f"to_{form}": round(own / found[form]["median_ms"], 3) for form in ("int8", "bfloat16")}


def weights(config: OPTConfig, form: str) -> Iterator[tuple[str, Tensor]]:
    for name, shape in parameter_shapes(config).items():
        if form == "bfloat16" or not int8.is_quantized(name):
            yield name, numbers(shape, torch.bfloat16).mul(STD)
            continue
        rows, columns = shape
        dtype, width, groups, largest = {
            "int8": (torch.int8, columns, 1, 127),
            "int4": (torch.int32, columns // 8, columns // GROUP, 7.5),
        }[form]
        yield name, numbers((rows, width), dtype)
        scale_dtype = torch.float32 if form == "int8" else torch.bfloat16
        yield name + int8.SCALE, torch.full((rows, groups), STD * 3**0.5 / largest, dtype=scale_dtype)


@cache
def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers, all bits of integers."""
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min + 1, info.max, shape, dtype=dtype)


def anonymous() -> int:
    """The bytes of this process that belong to no file."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()

"""Decode steps that leave out activations that are zeros, against the same model with its dense products alone.

    python benchmarks/bench_sparsity.py --hardware NAME [--sizes opt-125m opt-1.3b] [--dtypes float32 bfloat16 int8]

Weights are random. Densities, the shares of activations behind the relu that are not zero, are planted: fc1's biases
are shifted until as many pre-activations of random tokens are positive. Both ways run in one process, on the same
weights and in turn. The small model of the package runs as it is. A run replaces cases of the same day, size and dtype.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from inference_child import resident_mb
from torch import Tensor

import minopt
from minopt import int8
from minopt.inference.linear import build_product
from minopt.inference.sparse import Sparse

CASES = [(density, 1) for density in (0.03, 0.05, 0.1, 0.2, 0.5, 1.0)]
CASES += [(0.05, rows) for rows in (2, 4, 8)] + [(1.0, 8)]  # more rows run as without zeros
STEPS = {"opt-125m": (9, 7), "opt-1.3b": (5, 4), "demo": (64, 7)}  # new tokens of a text, and rounds
PROMPT = 12


def plant(model: Any, density: float) -> None:
    """Shifts the biases of each fc1 until this share of its activations is not zero."""
    ids = torch.randint(10, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))

    def planting(layer: Any) -> Callable[[Tensor], Tensor]:
        weight, scale = layer._fc1.weight()

        def first(x: Tensor) -> Tensor:
            whole = weight.float() if scale is None else int8.dequantize(weight, scale)
            y = F.linear(x.float(), whole).flatten().sort().values
            least = y[int(len(y) * (1 - density))] if density < 1 else 3 * y[0]
            bias = torch.full((len(weight),), -least.item(), dtype=model.dtype)
            layer._fc1 = build_product(weight, bias, "relu", scale)
            return layer._fc1(x)

        return first

    for layer in model.layers:
        layer._fc1 = planting(layer)
    model(ids)


def densities(model: Any, run: Callable[[], object]) -> list[float]:
    """The share of activations of single rows that are not zero, layer by layer."""
    found: list[list[float]] = [[] for _ in model.layers]
    before = [layer._fc1 for layer in model.layers]

    def counting(index: int) -> Callable[[Tensor], Tensor]:
        def count(x: Tensor) -> Tensor:
            y = before[index](x)
            if y.shape[1] == 1:  # a step, not the prompt
                found[index].append((y != 0).float().mean().item())
            return y

        return count

    for index, layer in enumerate(model.layers):
        layer._fc1 = counting(index)
    run()
    for layer, product in zip(model.layers, before, strict=True):
        layer._fc1 = product
    return [round(statistics.mean(shares), 4) for shares in found]


def measure(model: Any, ids: Tensor, new: int, rounds: int) -> dict[str, Any]:
    """A step of each way in milliseconds, whether both give the same tokens, and what memory the copies take."""
    sparse: list[Any] = [layer._fc2 for layer in model.layers]
    ways = {"sparse": sparse, "dense": [product._dense for product in sparse]}
    times: dict[str, list[float]] = {way: [] for way in ways}
    tokens = {}

    def run(way: str, count: int) -> float:
        for layer, product in zip(model.layers, ways[way], strict=True):
            layer._fc2 = product
        begin = time.perf_counter()
        tokens[way] = minopt.generate(model, ids, max_new_tokens=count, eos_token_id=()).sequences
        return time.perf_counter() - begin

    run("sparse", 2)
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            first = run(way, 1)
            times[way].append((run(way, new) - first) / (new - 1))
    same = (tokens["sparse"] == tokens["dense"])[:, ids.shape[1] :].cumprod(1).sum(1)  # until the first other one
    found = densities(model, lambda: run("sparse", new))
    tables = [product._table for product in sparse if product._table is not None]
    copies = sum(t._rows.nbytes for t, p in zip(tables, sparse, strict=False) if p._dense.blocks() is None)
    return {
        **{way: common.summary(samples) for way, samples in times.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(times["sparse"], times["dense"], strict=True)), 3),
        "found": round(statistics.mean(found), 4),
        "same_tokens": same.tolist(), "of_tokens": new, "copies_mb": round(copies / 1e6, 1),
    }  # fmt: skip


def load(folder: Any, dtype: str) -> Any:
    options = {"dtype": "float32", "quantize": "int8"} if dtype == "int8" else {"dtype": dtype}
    return minopt.load(folder, device="cpu", **options)


def planted(folder: Path, size: str, dtype: str) -> list[dict[str, Any]]:
    """All cases of a size and dtype: none where the weights are so small that they keep the whole product."""
    model, cases = load(folder, dtype).model, []
    held = sum(resident_mb())
    for density, rows in CASES if isinstance(model.layers[0]._fc2, Sparse) else ():
        if not cases or cases[-1]["density"] != density:
            plant(model, density)
            for layer in model.layers:  # as if it had just been loaded
                layer._fc2 = layer._fc2.__reduce__()[0](*layer._fc2.__reduce__()[1])
        ids = torch.randint(10, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        case = {"model": size, "dtype": dtype, "density": density, "rows": rows}
        cases.append(case | measure(model, ids, *STEPS[size]) | {"loaded_mb": round(held)})
        print(cases[-1], flush=True)
    return cases


def demo(dtype: str) -> dict[str, Any]:
    """The small model of the package, whose weights stay in caches: so it is made to leave out zeros here."""
    lm = load(minopt.DEMO, dtype)
    config = lm.model.config
    for layer in lm.model.layers:
        layer._fc2 = Sparse(layer._fc2, config.ffn_dim, [config.ffn_dim // 3] * 9)
    assert lm.tokenizer is not None
    ids = torch.tensor([lm.tokenizer.encode("The ship sailed at dawn, and")])
    return {"model": "demo", "dtype": dtype, "rows": 1} | measure(lm.model, ids, *STEPS["demo"])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", nargs="*", default=["demo", "opt-125m", "opt-1.3b"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--folder", type=Path, help="where weights are kept from run to run")
    args = parser.parse_args()
    path = common.kept("sparsity", args.hardware)
    with tempfile.TemporaryDirectory() as temporary:
        for size, dtype in ((size, dtype) for size in args.sizes for dtype in args.dtypes):
            if size == "demo":
                cases = [demo(dtype)]
            else:
                folder = common.write_model(args.folder or Path(temporary), size, torch.bfloat16)
                cases = planted(folder, size, dtype)
            kept = json.loads(path.read_text())["cases"] if path.exists() else []
            cases = [case for case in kept if (case["model"], case["dtype"]) != (size, dtype)] + cases
            common.keep("sparsity", args.hardware, {"topic": "sparsity", **common.machine("cpu"), "cases": cases})


if __name__ == "__main__":
    main()

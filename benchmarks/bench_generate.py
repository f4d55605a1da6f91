"""Decode and prefill of an opt-125m-size model, minopt and transformers in turn in one run.

    python benchmarks/bench_generate.py [--hardware NAME] [--device cuda] [--samples 20]

Random weights, written by transformers, so that both read the same file; greedy tokens are compared too. A sample is
one call of each, in alternating order; the ratio is the median over samples of transformers' time by minopt's.
Decode is the time of a generation of many tokens less that of one token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
import transformers

import minopt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=31)
    parser.add_argument("--dtypes", nargs="+", help="default: float32 bfloat16, and float16 on a GPU")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    dtypes = args.dtypes or ["float32", "bfloat16"] + (["float16"] if args.device != "cpu" else [])
    bandwidth = common.read_bytes_per_second(args.device)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = common.write_model(Path(temporary))
        for dtype in dtypes:
            rate = common.matmul_flops_per_second(DTYPES[dtype], args.device)
            ours = minopt.load_model(folder, device=args.device, dtype=dtype)
            theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(args.device)
            for batch, prompt in ((1, 9), (8, 128)):
                case = compare(ours, theirs, batch, prompt, args.new_tokens, args)
                weights = sum(p.nbytes for p in ours.parameters()) - ours.embed_positions.weight.nbytes
                cached = 2 * 12 * batch * (prompt + args.new_tokens / 2) * 768 * DTYPES[dtype].itemsize
                case |= {"dtype": dtype, "limit_ms": round((weights + cached) / bandwidth * 1e3, 3)}
                case["share_of_limit"] = round(case["limit_ms"] / case["minopt"]["median_ms"], 3)
                cases.append(case)
                print(line(case), flush=True)
            case = compare(ours, theirs, 1, 512, 1, args)
            linear = sum(p.numel() for name, p in ours.named_parameters() if "layers" in name and p.ndim == 2)
            flops = 2 * linear * 512 + 12 * 4 * 512 * 512 * 768 / 2 + 2 * ours.embed_tokens.weight.numel()
            case |= {"dtype": dtype, "limit_ms": round(flops / rate * 1e3, 3)}
            case["share_of_limit"] = round(case["limit_ms"] / case["minopt"]["median_ms"], 3)
            cases.append(case)
            print(line(case), flush=True)
            del ours, theirs
    result = {"topic": "generate", **common.machine(args.device)}
    result |= {"read_gb_per_second": round(bandwidth / 1e9, 1), "samples": args.samples, "cases": cases}
    common.keep("generate", args.hardware, result)


def compare(
    ours: minopt.OPT, theirs: Any, batch: int, prompt: int, new_tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Times ``new_tokens`` (decode) or, where that is 1, the prompt alone (prefill)."""
    ids = torch.randint(10, 50000, (batch, prompt), generator=torch.Generator().manual_seed(1)).to(args.device)
    mask = torch.ones_like(ids)

    def run_ours(n: int) -> torch.Tensor:
        return minopt.generate(ours, ids, max_new_tokens=n, eos_token_id=()).sequences

    def run_theirs(n: int) -> torch.Tensor:
        return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    same = (run_ours(new_tokens)[:, prompt:] == run_theirs(new_tokens)[:, prompt:]).float().mean().item()
    samples: dict[str, list[float]] = {"minopt": [], "transformers": []}
    runs = [("minopt", run_ours), ("transformers", run_theirs)]
    for number in range(args.samples):
        for name, run in runs if number % 2 else runs[::-1]:
            one = common.seconds(lambda run=run: run(1), args.device)
            if new_tokens == 1:
                samples[name].append(one)
            else:
                all_tokens = common.seconds(lambda run=run: run(new_tokens), args.device)
                samples[name].append((all_tokens - one) / (new_tokens - 1))
    ratios = [t / o for o, t in zip(samples["minopt"], samples["transformers"], strict=True)]
    work = "prefill" if new_tokens == 1 else "decode"
    case = {"work": work, "batch": batch, "prompt": prompt, "new_tokens": new_tokens, "same_tokens": round(same, 4)}
    return case | {name: common.summary(values) for name, values in samples.items()} | {
        "ratio": round(statistics.median(ratios), 3)
    }  # fmt: skip


def line(case: dict[str, Any]) -> str:
    """One case as a row."""
    return (
        f"{case['work']:8} {case['dtype']:9} batch {case['batch']} prompt {case['prompt']:4}: minopt "
        f"{case['minopt']['median_ms']:8.2f} ms, transformers {case['transformers']['median_ms']:8.2f} ms, "
        f"ratio {case['ratio']:.2f}, {case['share_of_limit']:.0%} of the limit, same tokens {case['same_tokens']:.1%}"
    )


if __name__ == "__main__":
    main()

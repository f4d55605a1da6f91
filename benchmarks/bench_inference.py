"""Inference: minopt, transformers and CTranslate2 in turn in one run (``pip install -e ".[bench]"``).

    python benchmarks/bench_inference.py [--hardware NAME] [--device cuda] [--samples 20] [--cases decode1 beams ...]

Random weights, written by transformers, that all libraries read, each in a process of its own. A sample is one
generation, and each round takes one of every variant, in an order that turns round by round: ratios are medians over
the rounds that both took part in.
Decode is the time of a generation less that to its first token, by the tokens after the first; prefill the time to the
only token. "Read" is what a step must read: all weights but the position table, and the cached keys and values.

Groups of cases are run and kept apart: --cases replaces only these in the result of the same day and hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from inference_variants import OURS, SETTLE_SECONDS, Checkpoint, NotAvailable, Running, Variant

import minopt
from minopt import int8
from minopt.inference.linear import build_product

CHILD = Path(__file__).with_name("inference_child.py")

# What runs in each precision on a CPU, and which of the others it is to be compared with above all.
COMPARED = {
    "float32": ("minopt", "exported", "ctranslate2", "transformers", "plain"),
    "bfloat16": ("minopt", "exported", "transformers", "plain"),
    "int8": ("minopt", "exported", "ctranslate2"),
}
PEERS = {"float32": "ctranslate2", "bfloat16": "transformers", "int8": "ctranslate2"}


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Attributes:
        group: which ``--cases`` runs it.
        model: an OPTConfig preset.
        new_tokens: 1 measures the prompt alone.
        variants: what runs, ``"minopt"`` first.
        options: of generation, under minopt's names.
        others_every: those that are neither minopt's best nor its main peer run in every that many rounds only.
    """

    group: str
    precision: str
    batch: int
    prompt: int
    new_tokens: int
    model: str = "opt-125m"
    variants: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    others_every: int = 1

    def in_round(self, variant: str, number: int) -> bool:
        """Whether a variant runs in a round."""
        always = variant in (*OURS, "products", PEERS.get(self.precision))
        return always or number % self.others_every == 0


def on_cpu(group: str, batch: int, prompts: list[int], new_tokens: int, precisions: str, **more: Any) -> list[Case]:
    """A case for each precision and prompt, those of a precision together: they share the loaded models."""
    return [
        Case(group, precision, batch, prompt, new_tokens, **{"variants": COMPARED[precision]} | more)
        for precision in precisions.split()
        for prompt in prompts
    ]


ALL = "float32 bfloat16 int8"
BEAMS = {"num_beams": 5, "no_repeat_ngram_size": 3}
WITH_PRODUCTS = {"variants": (*COMPARED["bfloat16"], "products"), "others_every": 4}
ON_GPU = ("minopt", "transformers", "transformers static")

CASES: dict[str, list[Case]] = {
    "decode1": on_cpu("decode1", 1, [9], 25, ALL),
    "decode8": on_cpu("decode8", 8, [128], 13, ALL, others_every=4),
    "decode32": on_cpu("decode32", 32, [128], 9, ALL, others_every=5),
    **{
        f"prefill{prompt}": on_cpu(f"prefill{prompt}", 1, [prompt], 1, "float32", others_every=4)
        + on_cpu(f"prefill{prompt}", 1, [prompt], 1, "bfloat16", **WITH_PRODUCTS)
        for prompt in (512, 1536)
    },
    "beams": on_cpu("beams", 1, [9, 1400], 13, "float32 int8", options=BEAMS, others_every=5),
    "sizes": on_cpu("sizes", 1, [9], 13, ALL, model="opt-350m", others_every=4)
    + on_cpu("sizes", 1, [9], 9, "bfloat16 int8", model="opt-1.3b", others_every=4),
    # Prompts that make 64, 512, 1,024 and 2,000 tokens of context, the mean over the steps.
    "length": on_cpu("length", 1, [59, 507, 1019, 1995], 9, ALL, variants=OURS),
    "cold": [],
    "memory": [],
    "gpu": [
        Case("gpu", precision, batch, 128, 65, f"opt-{size}", ON_GPU)
        for size in ("125m", "1.3b", "6.7b")
        for precision in ("bfloat16", "float16")
        for batch in (1, 8, 64)
    ],
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of each library, on a CPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all that run on the device")
    parser.add_argument("--quick", action="store_true", help="models of 2 layers, few tokens; nothing is kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started
    groups = args.cases or [group for group in CASES if (group == "gpu") == (args.device != "cpu")]
    bandwidth = bandwidths(args.device)
    print({name: f"{value / 1e9:.1f} GB/s" for name, value in bandwidth.items()}, flush=True)
    result = {"topic": "inference", **common.machine(args.device)}
    if find_spec("ctranslate2"):
        result["ctranslate2"] = version("ctranslate2")
    result["read_gb_per_second"] = {name: round(value / 1e9, 1) for name, value in bandwidth.items()}
    with tempfile.TemporaryDirectory() as temporary:
        models = Models(Path(temporary), args)
        for group in groups:
            begin = time.perf_counter()
            run = {"cold": cold, "memory": memory}.get(group)
            lines = list(run(models, args) if run else measured(CASES[group], models, max(bandwidth.values()), args))
            print(f"{group}: {time.perf_counter() - begin:.0f} s", flush=True)
            origin = {"group": group, "commit": result["commit"]}
            if not args.quick:
                keep(result, [origin | line for line in lines], args.hardware)
    if not args.quick:
        print(json.dumps(json.loads(common.kept("inference", args.hardware).read_text())))


def keep(result: dict[str, Any], lines: list[dict[str, Any]], hardware: str) -> None:
    """Puts the cases of one group into today's result, in place of those that it has of the group."""
    path = common.kept("inference", hardware)
    cases = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = [case for case in cases if case["group"] != lines[0]["group"]] + lines
    cases.sort(key=lambda case: list(CASES).index(case["group"]))
    path.write_text(json.dumps({**result, "cases": cases}, indent=1) + "\n")


class Models:
    """Checkpoints of random weights, each written when it is first asked for."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.written: dict[str, Checkpoint] = {}

    def __call__(self, name: str) -> Checkpoint:
        if name not in self.written:
            dtype = torch.float32 if name in ("opt-125m", "opt-350m") else torch.bfloat16
            path = common.write_model(self.folder, name, dtype, 2 if self.args.quick else None)
            self.written[name] = Checkpoint(path, self.args.device)
        return self.written[name]


def bandwidths(device: str) -> dict[str, float]:
    """Bytes a second of a plain sum, and of the product of one token and opt-125m's head in each precision."""
    found = {"sum of 800 MB": common.read_bytes_per_second(device)}
    if device == "cpu":
        found |= {f"{precision} head": head_bytes_per_second(precision) for precision in ALL.split()}
    return found


def head_bytes_per_second(precision: str) -> float:
    """Of minopt's product of one token, best of 10 times 8 heads in turn: each is out of the caches by then."""
    dtype, weight, scale = getattr(torch, precision), torch.randn(50272, 768), None
    if precision == "int8":
        weight, scale = int8.quantize(weight)
    heads = [build_product(weight.to(dtype).clone(), None, scale=scale) for _ in range(8)]
    x = torch.randn(1, 768).to(torch.float32 if precision == "int8" else dtype)
    with torch.inference_mode():
        best = min(common.seconds(partial(head, x)) for _ in range(10) for head in heads)
    return weight.numel() * dtype.itemsize / best


def measured(cases: list[Case], models: Models, bandwidth: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs cases, those of the same weights in the same processes."""
    for (model, precision), of_model in groupby(cases, key=lambda case: (case.model, case.precision)):
        together = list(of_model)
        checkpoint, variants = models(model), dict[str, Running]()
        for name in dict.fromkeys(name for case in together for name in case.variants):
            try:
                variants[name] = Running(name, checkpoint, precision)
            except NotAvailable as reason:
                note(f"without {name}: {reason}")
        for case in together:
            yield compared(case, variants, checkpoint.config, bandwidth, args)
        for variant in variants.values():
            variant.stop()


@cache
def note(text: str) -> None:
    """Says it once."""
    print(text, flush=True)


def compared(
    case: Case, loaded: Mapping[str, Variant], config: minopt.OPTConfig, bandwidth: float, args: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one case."""
    variants = {name: loaded[name] for name in case.variants if name in loaded}
    new_tokens = min(case.new_tokens, 4) if args.quick else case.new_tokens
    ids = torch.randint(10, 50000, (case.batch, case.prompt), generator=torch.Generator().manual_seed(1))
    for _ in range(1 if args.device == "cpu" else 2):  # what is compiled settles in the second
        texts = {name: run(ids, new_tokens, **case.options).tokens for name, run in variants.items()}
    samples: dict[str, dict[int, float]] = {name: {} for name in variants}
    for number in range(args.samples):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            if case.in_round(name, number):
                time.sleep(SETTLE_SECONDS)
                samples[name][number] = variants[name](ids, new_tokens, **case.options).seconds(new_tokens)
    line: dict[str, Any] = {
        "work": "prefill" if new_tokens == 1 else "decode", "model": case.model, "dtype": case.precision,
        "batch": case.batch, "prompt": case.prompt, "new_tokens": new_tokens, "options": dict(case.options),
        "variants": {name: {"samples": len(s), **common.summary(list(s.values()))} for name, s in samples.items()},
        "ratios": ratios(samples),
    }  # fmt: skip
    if case.precision == "float32":
        line["same_tokens"] = {
            name: round((torch.tensor(tokens) == torch.tensor(texts["minopt"])).float().mean().item(), 4)
            for name, tokens in texts.items()
            if name != "minopt" and tokens is not None
        }
    if line["work"] == "decode":
        line |= reading(case, config, new_tokens, line["variants"], bandwidth)
    print(as_row(line), flush=True)
    return line


def ratios(samples: dict[str, dict[int, float]]) -> dict[str, float]:
    """``"peer / ours"``: the time of each other variant by that of each of ours, medians over the rounds of both."""
    return {
        f"{peer} / {ours}": round(statistics.median(theirs[n] / samples[ours][n] for n in theirs), 3)
        for ours in OURS
        for peer, theirs in samples.items()
        if ours in samples and peer not in OURS
    }


def reading(
    case: Case, config: minopt.OPTConfig, new_tokens: int, variants: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    """What a step must read, and how close to the memory's speed each variant does it if nothing else is to do."""
    itemsize = 4 if case.precision == "int8" else getattr(torch, case.precision).itemsize
    tokens = case.batch * (case.prompt + case.options.get("num_beams", 1) * (new_tokens + 1) / 2)
    cached = 2 * config.num_hidden_layers * config.hidden_size * itemsize * tokens
    weights = weight_bytes(config, case.precision)["read"]
    found: dict[str, Any] = {"weights_read_mb": round(weights / 1e6, 1), "cache_read_mb": round(cached / 1e6, 1)}
    if case.batch == 1:
        speed = {name: (weights + cached) / times["median_ms"] * 1e3 for name, times in variants.items()}
        found["best_gb_per_second"] = round(bandwidth / 1e9, 1)
        found["read_gb_per_second"] = {name: round(value / 1e9, 1) for name, value in speed.items()}
        found["share_of_bandwidth"] = {name: round(value / bandwidth, 3) for name, value in speed.items()}
    return found


def weight_bytes(config: minopt.OPTConfig, precision: str) -> dict[str, int]:
    """Bytes of all weights, and of those that a step reads."""
    sizes = {}
    for name, weight in minopt.OPT(config, device="meta").named_parameters():
        one_byte = precision == "int8" and (int8.is_quantized(name) or name == "embed_tokens.weight")
        itemsize = 1 if one_byte else 4 if precision == "int8" else getattr(torch, precision).itemsize
        sizes[name] = weight.numel() * itemsize
    read = sum(sizes.values()) - sizes["embed_positions.weight"]
    # The token table is also the head, but where that is int8.
    return {"all": sum(sizes.values()) + (4 * sizes["embed_tokens.weight"] if precision == "int8" else 0), "read": read}


def as_row(line: dict[str, Any]) -> str:
    """One case as a row."""
    beams = f", {line['options']['num_beams']} beams" if line["options"] else ""
    times = ", ".join(f"{name} {times['median_ms']:.2f}" for name, times in line["variants"].items())
    parts = [f"{name} {value:.2f}" for name, value in line["ratios"].items()]
    parts += [f"{share:.0%} of bandwidth" for share in [line.get("share_of_bandwidth", {}).get("minopt")] if share]
    parts += [f"{name} {share:.1%} same tokens" for name, share in line.get("same_tokens", {}).items()]
    return (
        f"{line['work']} {line['model']} {line['dtype']} batch {line['batch']} prompt {line['prompt']}{beams}: "
        f"{times} ms; {', '.join(parts)}"
    )


def cold(models: Models, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From the start of a process to its first token; a quarter of the samples, for each takes seconds."""
    for name, folder in (("embedded", minopt.DEMO), ("opt-125m", str(models("opt-125m").folder))):
        samples: dict[str, dict[int, float]] = {"minopt": {}, "plain": {}, "transformers": {}}
        for number in range(-(-args.samples // 4)):
            for variant in list(samples)[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                with subprocess.Popen(child("cold", variant, folder, "float32"), stdout=subprocess.PIPE) as process:
                    assert process.stdout is not None
                    process.stdout.readline()
                    samples[variant][number] = time.perf_counter() - begin
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args)
        times = {name: {"samples": len(s), **common.summary(list(s.values()))} for name, s in samples.items()}
        line = {"work": "cold start", "model": name, "dtype": "float32", "variants": times, "ratios": ratios(samples)}
        print(as_row(line | {"batch": 1, "prompt": 9, "options": {}}), flush=True)
        yield line


def memory(models: Models, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Largest resident memory above the imports, while loading and in generation, a process each."""
    checkpoint = models("opt-125m")
    for precision in ("float32", "bfloat16", "int8"):
        for variant in ("minopt", "plain", "transformers")[: 1 if precision == "int8" else None]:
            command = child("memory", variant, str(checkpoint.folder), precision)
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            weights = weight_bytes(checkpoint.config, precision)["all"] / 1e6
            line: dict[str, Any] = {"work": "memory", "model": "opt-125m", "dtype": precision, "variant": variant}
            line["weights_mb"] = round(weights, 1)
            for phase, (anonymous, files) in json.loads(output.splitlines()[-1]).items():
                line[phase] = {"peak_mb": round(anonymous + files, 1), "anonymous_mb": anonymous, "file_mb": files}
                line[phase]["peak_by_weights"] = round((anonymous + files) / weights, 3)
            print(line, flush=True)
            yield line


def child(*arguments: str) -> list[str]:
    """The command of a process of its own."""
    return [sys.executable, str(CHILD), *arguments]


if __name__ == "__main__":
    main()

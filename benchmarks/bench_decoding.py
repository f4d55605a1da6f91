"""What decoding costs beside the model, and what cutting many prompts into batches gains.

    python benchmarks/bench_decoding.py [--hardware NAME] [--device cuda] [--squad ../shared/data/squad/dev.json]

Steps: random weights of opt-125m's shape, minopt and transformers in turn in one run, 5 beams and greedy, both with
``no_repeat_ngram_size=3``. A sample is one step, from one call of the model to the next; the model's part is the time
in its call. In a separate run of minopt the rest is split by function.

Prompts: SQuAD questions behind their context (``--squad``), the model's weights random, the tokenizer OPT's
(``--tokenizer``): one by one, in batches in the given order, and in ``LanguageModel.generate``'s batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
import transformers
from torch import Tensor

import minopt
from minopt.generation import beams, request
from minopt.generation.batches import MAX_BATCH_TOKENS, cut_batches
from minopt.generation.continuous import SCORES_IN_TOKENS
from minopt.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STRATEGIES = {"beams": {"num_beams": 5}, "greedy": {}}

# The functions of a step that are not the model, and what each is counted as.
PARTS = {
    "choosing": [(beams, "_candidates"), (beams, "_ended"), (beams.Texts, "best"), (beams, "_may_improve"),
                 (request.Stopper, "__call__")],
    "reordering": [(beams, "beam_mask"), (beams, "_compact")],
}  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2, help="generations of each library and case")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--squad", default="../shared/data/squad/dev.json")
    parser.add_argument("--tokenizer", default="../shared/data/opt-tokenizer")
    parser.add_argument("--prompts", type=int, default=256)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = common.write_model(Path(temporary))
        for dtype in args.dtypes:
            ours = minopt.load_model(folder, device=args.device, dtype=dtype)
            theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(args.device)
            for prompt in (20, 1400):
                for batch in (1, 4):
                    for name, options in STRATEGIES.items():
                        case = {"strategy": name, "dtype": dtype, "batch": batch, "prompt": prompt}
                        steps.append(case | compare(ours, theirs, batch, prompt, options, args))
                        print(line(steps[-1]), flush=True)
            del ours, theirs
        prompts = many_prompts(folder, args) if Path(args.squad).is_file() else None
    result = {"topic": "decoding", **common.machine(args.device), "new_tokens": args.new_tokens, "steps": steps}
    common.keep("decoding", args.hardware, result | {"prompts": prompts})


class Timer:
    """Adds up the time of calls by name, the outermost of nested ones; keeps when those of the model begin and end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.model: list[tuple[float, float]] = []
        self.depth = 0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            self.depth += 1
            common.synchronize(self.device)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                common.synchronize(self.device)
                end = time.perf_counter()
                self.spent[name] += end - begin
                if name == "model":
                    self.model.append((begin, end))
                self.depth -= 1

        return timed

    def steps(self) -> tuple[list[float], list[float]]:
        """Seconds of each step but the prompt's, from one call of the model to the next, and the model's part."""
        pairs = list(zip(self.model[1:], self.model[2:], strict=False))
        return [after[0] - call[0] for call, after in pairs], [call[1] - call[0] for call, _ in pairs]


def compare(
    ours: minopt.OPT, theirs: Any, batch: int, prompt: int, options: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Steps of both libraries, alternating, and the split of minopt's."""
    ids = torch.randint(10, 50000, (batch, prompt), generator=torch.Generator().manual_seed(1)).to(args.device)
    options = {"no_repeat_ngram_size": 3, **options}

    def run_ours(new_tokens: int) -> Tensor:
        return minopt.generate(ours, ids, max_new_tokens=new_tokens, eos_token_id=(), **options).sequences

    def run_theirs(new_tokens: int) -> Tensor:
        return theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, **options,
        )  # fmt: skip

    found: dict[str, Any] = {"minopt": ([], []), "transformers": ([], [])}
    texts: dict[str, Tensor] = {}
    for round_ in range(args.rounds):
        for name, run in (("minopt", run_ours), ("transformers", run_theirs))[:: 1 if round_ % 2 else -1]:
            timer = Timer(args.device)
            with model_timed(timer, ours, theirs):
                texts[name] = run(args.new_tokens)
            for kept, values in zip(found[name], timer.steps(), strict=True):
                kept.extend(values)
    case: dict[str, Any] = {}
    for name, (whole, model) in found.items():
        rest = [w - m for w, m in zip(whole, model, strict=True)]
        case[name] = {"step": common.summary(whole), "model": common.summary(model), "rest": common.summary(rest)}
    case["ratio"] = round(case["transformers"]["step"]["median_ms"] / case["minopt"]["step"]["median_ms"], 3)
    case["rest_of_model"] = round(case["minopt"]["rest"]["median_ms"] / case["minopt"]["model"]["median_ms"], 4)
    case["same_tokens"] = round((texts["minopt"] == texts["transformers"])[:, prompt:].float().mean().item(), 4)
    case["split_ms"] = split(ours, run_ours, args)
    return case


@contextlib.contextmanager
def model_timed(timer: Timer, ours: minopt.OPT, theirs: Any | None = None) -> Iterator[None]:
    """Counts as "model" how often the two models are asked for logits."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ours, "read", timer.wrap("model", ours.read)))
        if theirs is not None:
            stack.enter_context(mock.patch.object(theirs, "forward", timer.wrap("model", theirs.forward)))
        yield


def split(ours: minopt.OPT, run: Callable[..., Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Mean milliseconds a step of each part of minopt's, in a run of its own: the clock itself costs time."""
    timer = Timer(args.device)
    build_rules = request.build_rules

    def timed_rules(*rule_args: Any) -> list[Any]:
        return [timer.wrap("rules", rule) for rule in build_rules(*rule_args)]

    with contextlib.ExitStack() as stack:
        stack.enter_context(model_timed(timer, ours))
        stack.enter_context(mock.patch.object(request, "build_rules", timed_rules))
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, timer.wrap(part, getattr(owner, name))))
        run(1)
        first = dict(timer.spent)
        run(args.new_tokens)
    parts = {name: seconds - 2 * first.get(name, 0.0) for name, seconds in timer.spent.items()}
    return {name: round(value / (args.new_tokens - 1) * 1e3, 3) for name, value in parts.items()}


def many_prompts(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and the share of padding of many real prompts, in three orders."""
    lm = minopt.LanguageModel(minopt.load_model(folder, device=args.device), Tokenizer.load(args.tokenizer))
    prompts = squad_prompts(Path(args.squad), args.prompts)
    lengths = [len(lm.tokenizer.encode(prompt)) for prompt in prompts]  # type: ignore[union-attr]
    new = 32
    options = {"max_new_tokens": new, "eos_token_id": (), "show_progress": False}
    given = [list(range(i, min(i + 16, len(prompts)))) for i in range(0, len(prompts), 16)]
    ways: dict[str, tuple[list[list[int]], Callable[[], Any]]] = {
        "one by one": ([[i] for i in range(len(prompts))], lambda: [lm.generate(p, **options) for p in prompts]),
        "16 in the given order": (given, lambda: [lm.generate([prompts[i] for i in b], **options) for b in given]),
        "16 of like length": (cut_batches(lengths, 16), lambda: lm.generate(prompts, batch_size=16, **options)),
        f"{MAX_BATCH_TOKENS} tokens of like length (default)": (
            cut_batches([n + new + SCORES_IN_TOKENS for n in lengths]), lambda: lm.generate(prompts, **options)),
    }  # fmt: skip
    lm.generate(prompts[:2], **options)
    found = []
    for name, (batches, run) in ways.items():
        elapsed = common.seconds(run, args.device)
        width = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        found.append({
            "way": name, "seconds": round(elapsed, 2), "padding": round(1 - sum(lengths) / width, 4),
            "new_tokens_per_second": round(len(prompts) * new / elapsed, 1),
            "all_tokens_per_second": round((sum(lengths) + len(prompts) * new) / elapsed, 1),
        })  # fmt: skip
        print(found[-1], flush=True)
    for way in found:
        way["speedup"] = round(found[0]["seconds"] / way["seconds"], 3)
    spread = {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)}
    return {"count": len(prompts), "tokens": sum(lengths), **spread, "new_tokens": new, "ways": found}


def squad_prompts(path: Path, count: int) -> list[str]:
    """Contexts with a question, from all over the file."""
    articles = json.loads(path.read_text())["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    all_prompts = [f"{p['context']}\nQuestion: {qa['question']}\nAnswer:" for p in paragraphs for qa in p["qas"]]
    return all_prompts[:: len(all_prompts) // count][:count]


def line(case: dict[str, Any]) -> str:
    """One case as a row."""
    ours, theirs = case["minopt"], case["transformers"]
    return (
        f"{case['strategy']:6} {case['dtype']:9} batch {case['batch']} prompt {case['prompt']:4}: "
        f"minopt {ours['step']['median_ms']:8.2f} ms (model {ours['model']['median_ms']:8.2f}), "
        f"transformers {theirs['step']['median_ms']:8.2f} ms, ratio {case['ratio']:.2f}, "
        f"rest/model {case['rest_of_model']:.1%}, same {case['same_tokens']:.1%}, {case['split_ms']}"
    )


if __name__ == "__main__":
    main()

"""Many prompts whose answers end after 1 to 60 tokens: batch by batch, in full batches, and by CTranslate2.

    python benchmarks/bench_batches.py [--hardware NAME] [--dtypes float32 ...] [--lists squad questions]

The model has opt-125m's shape and random weights, the tokenizer is OPT's. ``squad`` is contexts with a question, as
``bench_decoding.py`` has them; ``questions`` is the questions alone. Each prompt has a length of its answer, the same
for all ways. In minopt a criterion ends a row; it knows a prompt by its first tokens. In CTranslate2 the callback of
``generate_batch`` does. "batches" gives ``LanguageModel.generate`` one batch at a time, "full" all prompts. The time of
prompts is that of all passes with several tokens a row. Each measurement is a process of its own. A case is kept beside
those that the result's file of this day has already.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from bench_decoding import squad_prompts
from inference_variants import Checkpoint
from torch import Tensor

import minopt
from minopt.generation.batches import MAX_BATCH_TOKENS, cut_batches
from minopt.generation.continuous import SCORES_IN_TOKENS
from minopt.tokenizer import Tokenizer

NEW = 60


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--lists", nargs="+", default=["squad", "questions"])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--peers", nargs="+", default=["batches", "full", "ctranslate2"])
    parser.add_argument("--squad", default="../shared/data/squad/dev.json")
    parser.add_argument("--tokenizer", default="../shared/data/opt-tokenizer")
    parser.add_argument("--folder", help="where the model is kept for the next call (a temporary one)")
    args = parser.parse_args()
    path = common.kept("batches", args.hardware)
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = common.write_model(Path(args.folder or temporary))
        for dtype, name, peer in product(args.dtypes, args.lists, args.peers):
            if (peer, dtype) == ("ctranslate2", "bfloat16"):
                continue
            case = cases.setdefault(f"{name} {dtype}", {})
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory and OpenMP threads of its own
                case |= pool.apply(measure, (folder, name, dtype, peer, args))
            for other in {"batches", "ctranslate2"} & case.keys():
                if "full" in case:
                    case["full"][f"to {other}"] = round(case[other]["seconds"] / case["full"]["seconds"], 3)
            print(name, dtype, peer, case, flush=True)
            common.keep("batches", args.hardware, {"topic": "batches", **common.machine("cpu"), "cases": cases})


def measure(folder: Path, name: str, dtype: str, peer: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, new tokens and the process' peak memory of one list in one dtype, by one way."""
    tokenizer = Tokenizer.load(args.tokenizer)
    texts = squad_prompts(Path(args.squad), 2 * args.prompts)
    if name == "questions":
        texts = [text[text.rindex("\nQuestion: ") + 11 : text.rindex("\nAnswer:")] for text in texts]
    each = {tuple(ids[: min(len(ids), 40)]): (text, ids) for text in texts if (ids := tokenizer.encode(text))}
    chosen = dict(list(each.items())[: args.prompts])
    numbers = random.Random(0)
    ends = {key: len(ids) + numbers.randint(1, NEW) for key, (_, ids) in chosen.items()}
    texts, rows = [text for text, _ in chosen.values()], [ids for _, ids in chosen.values()]
    limits = [end - len(ids) for end, ids in zip(ends.values(), rows, strict=True)]
    case: dict[str, Any] = {
        "prompts": len(rows), "prompt_tokens": sum(map(len, rows)), "longest": max(map(len, rows)),
        "new_tokens": sum(limits),
    }  # fmt: skip
    if peer == "ctranslate2":
        found = theirs(folder, dtype, rows, limits)
    else:
        found = Ours(folder, dtype, tokenizer, ends)(texts, rows, is_full=peer == "full")
        assert found.pop("new_tokens") == sum(limits)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    return case | {peer: found | {"new_tokens_per_second": round(sum(limits) / found["seconds"], 1)}}


class Ours:
    """minopt's two ways."""

    def __init__(self, folder: Path, dtype: str, tokenizer: Tokenizer, ends: dict[tuple[int, ...], int]) -> None:
        options = {"quantize": "int8", "dtype": "float32"} if dtype == "int8" else {"dtype": dtype}
        self.ends, self.sizes = ends, sorted({len(key) for key in ends}, reverse=True)
        self.lm = minopt.LanguageModel(minopt.load(folder, device="cpu", **options).model, tokenizer)
        self.lm.generate("warm", max_new_tokens=3)

    def ends_here(self, ids: Tensor, scores: object) -> Tensor:
        found = []
        for row in ids.tolist():
            real = row[next(at for at, token in enumerate(row) if token != 1) :]
            key = next(key for size in self.sizes if (key := tuple(real[:size])) in self.ends)
            found.append(len(real) >= self.ends[key])
        return torch.tensor(found)

    def __call__(self, texts: list[str], rows: list[list[int]], is_full: bool) -> dict[str, Any]:
        read, counts, logits = self.lm.model.read, list[int](), list[Tensor]()
        spent, sizes = {"of_prompts": 0.0, "of_steps": 0.0}, list[int]()

        def timed(ids: Tensor, *more: Any) -> Tensor:
            is_step = ids.shape[1] == 1
            sizes.extend([len(ids)] * is_step)
            spent["of_steps" if is_step else "of_prompts"] += common.seconds(lambda: logits.append(read(ids, *more)))
            return logits.pop()

        batches = [[*range(len(texts))]]
        if not is_full:
            batches = cut_batches([len(row) + NEW + SCORES_IN_TOKENS for row in rows], None, MAX_BATCH_TOKENS)
        options: dict[str, Any] = {
            "max_new_tokens": NEW, "stopping_criteria": self.ends_here, "eos_token_id": (), "show_progress": False,
            "return_details": True,
        }  # fmt: skip

        def run() -> None:
            for batch in batches:
                found = self.lm.generate([texts[i] for i in batch], **options)
                counts.extend(len(record.token_ids) for record in found)

        with mock.patch.object(self.lm.model, "read", timed):
            seconds = common.seconds(run)
        parts = {"seconds": seconds, **spent, "rows_of_a_step": sum(sizes) / len(sizes)}
        return {key: round(number, 2) for key, number in parts.items()} | {
            "steps": len(sizes), "row_steps": sum(sizes), "new_tokens": sum(counts),
        }  # fmt: skip


def theirs(folder: Path, dtype: str, rows: list[list[int]], limits: list[int]) -> dict[str, Any]:
    """CTranslate2's time, with the best of a few batch sizes on 128 of the prompts."""
    import ctranslate2

    compute = {"int8": "int8_float32"}.get(dtype, dtype)
    path, threads = str(Checkpoint(folder, "cpu").converted()), torch.get_num_threads()
    generator = ctranslate2.Generator(path, "cpu", compute_type=compute, intra_threads=threads)

    def run(part: list[int], **options: Any) -> Callable[[], None]:
        prompts, most = [[str(number) for number in rows[i]] for i in part], [limits[i] for i in part]
        counts = [0] * len(most)

        def ended(step: Any) -> bool:  # its steps count tokens of prompts too that are longer than the shortest one
            counts[step.batch_id] += 1
            return counts[step.batch_id] >= most[step.batch_id]

        def call() -> None:
            found = generator.generate_batch(
                prompts, max_length=NEW, end_token=[], include_prompt_in_result=False, callback=ended, **options,
            )  # fmt: skip
            got = [len(each.sequences_ids[0]) for each in found]
            assert got == most, (got[:9], most[:9])

        return call

    sizes: list[dict[str, Any]] = [{"max_batch_size": n} for n in (16, 32, 64, 84)]
    sizes.append({"max_batch_size": MAX_BATCH_TOKENS, "batch_type": "tokens"})
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    part = order[max(0, len(rows) // 2 - 64) : len(rows) // 2 + 64]  # of like length, as batches of many are
    trials = [(round(common.seconds(run(part, **options)), 2), options) for options in sizes]
    best = min(trials, key=lambda trial: trial[0])[1]
    return {"seconds": round(common.seconds(run(order, **best)), 2), **best, "trials": trials}


if __name__ == "__main__":
    main()

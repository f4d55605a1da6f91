"""Writes the tables of the docs from the kept results: everything between ``<!-- name -->`` and ``<!-- /name -->``.

    python benchmarks/tables.py            # rewrite the tables in README.md, docs/ and benchmarks/README.md

A table takes the result of its topic that is named last in ``benchmarks/results``. Tests check that the docs hold what
this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minopt import OPT, OPTConfig
from minopt.config import PRESETS
from minopt.inference.plan import rows_that_fit

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/parallel.md", "docs/training.md")
VARIANTS = ("minopt", "exported", "ctranslate2", "transformers")
PEERS = {"float32": "ctranslate2", "bfloat16": "transformers", "int8": "ctranslate2"}
WAYS = ("batches", "full", "ctranslate2")
IN_README = ("decode1", "decode8", "prefill512")


def newest(topic: str, hardware: str = "xeon2") -> Any:
    """The last result of a topic on a kind of machine."""
    path = max((ROOT / "benchmarks" / "results").glob(f"{topic}_{hardware}_*.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown."""
    cells = head.split(" | ")
    lines = [f"| {head} |", f"|{' --- |' * len(cells)}", *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    return "\n".join(lines).replace("|  |", "| |")


def inference(hardware: str = "xeon2") -> str:
    rows = []
    for case in newest("inference", hardware)["cases"]:
        if case["group"] in ("decode1", "decode8", "decode32", "prefill512", "prefill1536", "beams", "sizes"):
            times, ratio = times_of(case), ratios_of(case)
            rows.append([name_of(case), *(times.get(name, "") for name in VARIANTS), f"**{ratio[0]}**", ratio[1]])
    return table("work | minopt | exported | CTranslate2 | transformers | ratio | ratio, exported", rows)


def speed() -> str:
    """The cases of ``IN_README`` on both processors, side by side."""
    found: dict[str, list[str]] = {}
    for hardware in ("xeon2", "epyc2-noamx"):
        for case in newest("inference", hardware)["cases"]:
            if case["group"] in IN_README:
                times, ratio = times_of(case), ratios_of(case)
                peer = times[PEERS[case["dtype"]]]
                row = found.setdefault(name_of(case), [])
                row += [times["minopt"], times.get("exported", ""), peer, f"**{ratio[0]}**, {ratio[1]}"]
    columns = "minopt | exported | peer | ratios"
    return table(f"work | Intel: {columns} | AMD: {columns}", ([name, *cells] for name, cells in found.items()))


def name_of(case: Mapping[str, Any]) -> str:
    size = "" if case["model"] == "opt-125m" else case["model"].removeprefix("opt-") + ", "
    beams = ", 5 beams" if case["options"] else ""
    return f"{size}{case['work']}{beams}, batch {case['batch']}, prompt {case['prompt']:,}, {case['dtype']}"


def times_of(case: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{found['median_ms']:.1f} ms" for name, found in case["variants"].items()}


def ratios_of(case: Mapping[str, Any]) -> list[str]:
    """The peer's time by minopt's and by its program's."""
    keys = [f"{PEERS[case['dtype']]} / {name}" for name in VARIANTS[:2]]
    return [f"{case['ratios'][key]:.2f}x" if key in case["ratios"] else "" for key in keys]


def contexts() -> str:
    cases = [case for case in newest("inference")["cases"] if case["group"] == "length"]
    return table("prompt | a step reads | minopt | exported", (
        [f"{case['prompt']:,} tokens, {case['dtype']}", f"{case['weights_read_mb'] + case['cache_read_mb']:.0f} MB",
         *(f"{case['variants'][name]['median_ms']:.1f} ms" for name in VARIANTS[:2])]
        for case in cases
    ))  # fmt: skip


def start() -> str:
    rows = []
    for case in newest("inference")["cases"]:
        if case["group"] == "cold":
            times = [
                f"{case['variants'][name]['median_ms'] / 1e3:.2f} s" for name in ("minopt", "plain", "transformers")
            ]
            rows.append(
                [f"{case['model']}, {case['dtype']}", *times, f"**{case['ratios']['transformers / minopt']:.2f}x**"]
            )
    return table("process start to first token | minopt | plain | transformers | ratio", rows)


def peaks() -> str:
    def cell(found: Mapping[str, float]) -> str:
        return f"{found['anonymous_mb']:.0f} + {found['file_mb']:.0f} MB"

    return table("anonymous + file pages | weights | peak while loading | while generating", (
        [f"{case['variant']}, {case['dtype']}", f"{case['weights_mb']:.0f} MB",
         cell(case["load"]), cell(case["generation"])]
        for case in newest("inference")["cases"]
        if case["group"] == "memory"
    ))  # fmt: skip


def steps() -> str:
    rows = []
    for case in newest("decoding")["steps"]:
        strategy = "5 beams" if case["strategy"] == "beams" else "greedy"
        split = case["split_ms"]
        rows.append([
            f"{strategy}, batch {case['batch']}, prompt {case['prompt']:,}, {case['dtype']}",
            f"{case['minopt']['step']['median_ms']:.1f} ms", f"{case['transformers']['step']['median_ms']:.1f} ms",
            f"**{case['ratio']:.2f}x**", f"{case['rest_of_model']:.1%}",
            *(f"{split.get(part, 0):.2f} ms" for part in ("rules", "choosing", "reordering")),
        ])  # fmt: skip
    return table("step | minopt | transformers | ratio | beside the model | rules | choosing | reordering", rows)


def prompts() -> str:
    ways = newest("decoding")["prompts"]["ways"]
    return table("batches | padding | new tokens | speed", (
        [way["way"], f"{way['padding']:.1%}", f"{way['new_tokens_per_second']} tokens/s", f"**{way['speedup']:.2f}x**"]
        for way in ways
    ))  # fmt: skip


def finetune(hardware: str = "xeon2") -> str:
    cases = newest("finetune", hardware)["cases"]
    names = [name for name in ("minopt packed", "minopt grouped", "minopt padded", "transformers padded",
                               "transformers grouped") if name in cases[0]]  # fmt: skip
    peers = [name for name in names if name.startswith("transformers")]
    head = " | ".join(["batch", *names, *(f"to {peer.removeprefix('transformers ')}" for peer in peers)])
    return table(head, (
        [f"{case['batch_size']}, {case['dtype']}",
         *(f"{case[name]['tokens_per_second']:.0f} tokens/s, {case[name]['peak_mb'] / 1e3:.1f} GB" for name in names),
         *(f"**{case[f'packed to {peer}']:.2f}x**" for peer in peers)]
        for case in cases
    ))  # fmt: skip


def squad() -> str:
    names = {"before": "untrained", "after copying": "after copying", "after": "after the questions"}
    scores = newest("squad")["scores"]
    return table("model | dev loss | exact match | F1", (
        [name, f"{scores[key]['loss']:.2f}", f"{scores[key]['exact_match']:.1f}", f"{scores[key]['f1']:.1f}"]
        for key, name in names.items()
    ))  # fmt: skip


def int8() -> str:
    result = newest("int8")
    names = {"int8, rest of activations too": "int8 as from 6.7b on"}
    columns = (*result["perplexity"].values(), *result["logit_error"].values())
    formats = ("{:.2f}", "{:.2f}", "{:.1%}", "{:.1%}")
    return table("weights | The Time Machine | Peter Pan | logit error | with outlier channels", (
        [names.get(scheme, scheme), *(form.format(column[scheme]) for form, column in
           zip(formats, columns, strict=True))]
        for scheme in columns[0]
    ))  # fmt: skip


def int4(hardware: str = "epyc2-noamx") -> str:
    result, forms = newest("int4", hardware), ("bfloat16", "int8", "int4")
    rows = [
        [name, *(f"{case[form]['median_ms']:.1f} ms" for form in forms), case["to_int8"], case["to_bfloat16"]]
        for name, case in result.items()
        if name.startswith(("step", "prompt"))
    ]
    held = [result["memory_MB"][form] for form in forms]
    rows.append(["memory", *(f"{megabytes:,} MB" for megabytes in held), held[2] / held[1], held[2] / held[0]])
    return table(" | bfloat16 | int8 | int4 | to int8 | to bfloat16", (
        [*cells, f"**{to_int8:.2f}**", f"{to_bfloat16:.2f}"] for *cells, to_int8, to_bfloat16 in rows
    ))  # fmt: skip


def load() -> str:
    def cell(found: Mapping[str, float]) -> str:
        return f"{found['load_seconds']:.3f} s, {found['peak_mb']:.0f} MB"

    return table("file | minopt | transformers | ratio of times", (
        [f"{case['file']} ({case['file_mb']:.0f} MB) as {case['dtype']}", cell(case["minopt"]),
         cell(case["transformers"]), f"**{case['seconds_ratio']}x**"]
        for case in newest("load")["cases"]
    ))  # fmt: skip


def convert() -> str:
    return table("conversion | minopt | to copy the output | peak memory | largest output file", (
        [name, *(f"{row[key]} s" for key in ("seconds", "copy_seconds")),
         *(f"{row[key]} MB" for key in ("peak_mb", "largest_file_mb"))]
        for name, row in newest("convert")["conversions"].items()
    ))  # fmt: skip


def processes() -> str:
    found: dict[str, dict[str, list[float]]] = {}
    for case in newest("parallel")["cases"]:
        if case["case"] == "speed":
            name = "one process" if case["processes"] == 1 else f"{case['processes']} processes"
            times = found.setdefault(f"{case['model']}, {case['dtype']}, {name}", {})
            slowest = [max(rank[key] for rank in case["ranks"]) for key in ("ms_per_token", "in_collectives")]
            times[case["form"]] = slowest
    return table("milliseconds a token | minopt | of it in messages | by hand | by DTensor", (
        [name, f"{times['minopt'][0]:.1f}", f"{times['minopt'][1]:.0%}", f"{times['plain'][0]:.1f}",
         f"{times['dtensor'][0]:.1f}"]
        for name, times in found.items()
    ))  # fmt: skip


def memory() -> str:
    rows = []
    for case in newest("plan")["cases"]:
        way = f"{case['processes']} processes" if case["processes"] > 1 else "one process"
        way = f"--offload {case['offload']}" if case["offload"] else way
        rows.append([
            f"{case['model']}, {case['quantize'] or case['dtype']}",
            way + (f", cgroup of {case['limit'] / 1e9:.0f} GB" if case["limit"] else ""),
            f"{case['batch']} x {case['length']:,} tokens", f"{case['peak_mb'] / 1e3:.2f} GB",
            f"{case['planned_mb'] / 1e3:.2f} GB", f"{case['error']:+.1%}", f"{case['step_seconds']:.2f} s",
        ])  # fmt: skip
    return table("model | form | texts | peak memory | planned | error | a step", rows)


def plan() -> str:
    """How many rows of 2,048 tokens fit in 16 bits into GPUs of several sizes, for 1, 2, 4 and 8 of them."""
    memories, rows = (16, 24, 40, 80, 141), []
    for name in PRESETS:
        if name.startswith("opt-"):
            config = OPTConfig.preset(name)
            count = sum(p.numel() for p in OPT(config, device="meta").parameters())
            cells = [" / ".join(fitting(config, devices, g * 10**9) for devices in (1, 2, 4, 8)) for g in memories]
            rows.append([name, f"{count / 1e9:.2f} billion", *cells])
    return table("model | parameters | " + " | ".join(f"{gigabytes} GB" for gigabytes in memories), rows)


def fitting(config: OPTConfig, devices: int, memory: int) -> str:
    if config.num_attention_heads % devices:
        return "-"
    rows = rows_that_fit(config, memory, dtype=torch.float16, device="cuda", devices=devices)
    return f"{rows:,}" if rows else "-"


def methods() -> str:
    first, *_ = rows = newest("methods", "epyc2")["peak_bytes"]
    return table(" | opt-125m | opt-1.3b", ([row["way"], *(
        f"{row[size] / 1e9:.2f} GB ({row[size] / first[size]:.2f})" for size in ("opt-125m", "opt-1.3b")
    )] for row in rows))  # fmt: skip


def batches(hardware: str = "epyc2-noamx") -> str:
    rows = []
    for name, case in newest("batches", hardware)["cases"].items():
        speeds = [
            "{new_tokens_per_second:.0f}, {peak_mb:,} MB".format(**case[way]) if way in case else "" for way in WAYS
        ]
        after = [case[way]["seconds"] - case[way]["of_prompts"] for way in WAYS[:2]]
        to = case["full"].get("to ctranslate2")
        rows.append([name, f"{case['prompts']} of {case['prompt_tokens'] / case['prompts']:.0f} tokens", *speeds,
                     f"**{case['full']['to batches']:.2f}x**", f"{after[0] / after[1]:.2f}x",
                     "" if to is None else f"{to:.2f}x"])  # fmt: skip
    return table(
        "list | prompts | by batches | full | CTranslate2 | to batches | behind the prompts | to CTranslate2", rows
    )


def sparsity(hardware: str = "epyc2-noamx") -> str:
    found: dict[str, dict[tuple[float, int], Any]] = {}
    for case in newest("sparsity", hardware)["cases"]:
        if "density" in case:
            found.setdefault(f"{case['model']}, {case['dtype']}", {})[case["density"], case["rows"]] = case
    cases = list(next(iter(found.values())))
    names = (f"{density:.0%}" + (f", {rows} rows" if rows > 1 else "") for density, rows in cases)
    return table("weights | whole product | 5% | copy | " + " | ".join(names), (
        [name, *(f"{of[0.05, 1][way]['median_ms']:.1f} ms" for way in ("dense", "sparse")),
         f"{max(case['copies_mb'] for case in of.values()):.0f} MB", *(f"{of[case]['ratio']:.2f}" for case in cases)]
        for name, of in found.items()
    ))  # fmt: skip


def drafts(hardware: str = "epyc2-noamx") -> str:
    return table("case | dtype | without | with the draft | ratio | accepted of drafted | 1 - total variation", ([
        case["case"] + (f", layers x {case['layers_times']}" if "layers_times" in case else ""), case["dtype"],
        f"{case['without_ms']:.1f} ms", f"{case['with_ms']:.1f} ms", f"**{case['ratio']:.2f}x**",
        f"{case['accepted']} of {case['drafted']}", case.get("best_possible", "")
    ] for case in newest("drafts", hardware)["cases"]))  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "inference_amd": lambda: inference("epyc2-noamx"),
    "finetune_amd": lambda: finetune("epyc2-noamx"),
    **{f"{build.__name__}_intel": partial(build, "xeon2") for build in (int4, batches, sparsity, drafts)},
    **{build.__name__: build for build in (inference, speed, contexts, start, peaks, steps, prompts, finetune, squad,
                                           int8, int4, load, convert, memory, processes, plan, methods, batches,
                                           sparsity, drafts)},
}  # fmt: skip


def render(text: str) -> str:
    """A document with its tables written anew."""
    for name, build in TABLES.items():
        if f"<!-- {name} -->" in text:
            text = re.sub(
                rf"<!-- {name} -->\n.*?<!-- /{name} -->",
                lambda _, name=name, build=build: f"<!-- {name} -->\n{build()}\n<!-- /{name} -->",
                text, flags=re.S,
            )  # fmt: skip
    return text


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

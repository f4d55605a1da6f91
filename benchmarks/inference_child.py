"""One load in a process of its own, for bench_inference.py; nothing is imported that the library does not ask for.

    python benchmarks/inference_child.py cold|memory VARIANT FOLDER PRECISION

``cold`` prints the first token. ``memory`` prints what the process holds above its imports, in MB: the largest sum of
anonymous and file pages while it loads and while it generates, read every 2 ms, and how that is made up.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TEXT = "It is a truth universally acknowledged, that"
IDS = [2, 1092, 16, 10, 3563, 20391, 8860, 6, 14]  # where there is no tokenizer
NEW_TOKENS = 32


def main() -> None:
    what, variant, folder, precision = sys.argv[1:]
    import_, open_ = LIBRARIES[variant]
    import_()
    if what == "cold":
        print(open_(folder, precision)(1), flush=True)
        return
    before = resident_mb()
    with Watch() as load:
        generate = open_(folder, precision)
    with Watch() as generation:
        generate(NEW_TOKENS)
    phases = {"load": load.peak, "generation": generation.peak}
    print(json.dumps({name: [round(a - b, 1) for a, b in zip(p, before, strict=True)] for name, p in phases.items()}))


def import_minopt() -> None:
    from minopt import generate, load  # noqa: F401  the names are resolved on first use


def open_minopt(folder: str, precision: str, **options: Any) -> Callable[[int], Any]:
    """minopt's generation of a number of tokens."""
    import torch

    import minopt

    options |= {"dtype": "float32", "quantize": "int8"} if precision == "int8" else {"dtype": precision}
    lm = minopt.load(folder, device="cpu", **options)
    ids = torch.tensor([IDS if lm.tokenizer is None else lm.tokenizer.encode(TEXT)])
    return lambda count: minopt.generate(
        lm.model, ids, max_new_tokens=count, eos_token_id=(), draft=lm.draft
    ).sequences[0, -1]


def import_transformers() -> None:
    from transformers import AutoTokenizer, OPTForCausalLM  # noqa: F401


def open_transformers(folder: str, precision: str) -> Callable[[int], Any]:
    """transformers' generation of a number of tokens."""
    import torch
    from transformers import AutoTokenizer, OPTForCausalLM, logging

    logging.disable_progress_bar()
    model = OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision)).eval()
    has_tokenizer = (Path(folder) / "tokenizer.json").exists()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] if has_tokenizer else IDS])
    mask = torch.ones_like(ids)
    return lambda count: model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )[0, -1]


LIBRARIES: dict[str, tuple[Callable[[], None], Callable[[str, str], Callable[[int], Any]]]] = {
    "minopt": (import_minopt, open_minopt),
    "plain": (import_minopt, partial(open_minopt, optimize=False)),
    "draft": (import_minopt, partial(open_minopt, draft="int8")),
    "transformers": (import_transformers, open_transformers),
}


def resident_mb() -> tuple[float, float]:
    """Anonymous and file pages of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return anonymous, files


class Watch(threading.Thread):
    """Keeps the largest ``resident_mb`` of what runs within."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = resident_mb(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, resident_mb(), key=sum)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()
        self.peak = max(self.peak, resident_mb(), key=sum)


if __name__ == "__main__":
    main()

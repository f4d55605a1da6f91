"""What drafts save: one row, with the model's int8 form as draft and without, in turn in one run.

    OMP_NUM_THREADS=2 python benchmarks/bench_drafts.py [--hardware NAME]

Random weights of opt-125m's shape nearly tie their best tokens, so int8 often decides otherwise than the model does.
For a decided text, all that the layers add to the residual stream is scaled down: then the newest token itself is the
most probable next one. A step reads and computes the same. The factor sets how often a draft is right, which is
reported: read a speed as that of its acceptance. The package's small model is a real case of acceptance.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file, save_file

import minopt

CHILD = Path(__file__).with_name("inference_child.py")
PROMPT, NEW = 16, 60
FACTORS = (1.0, 0.05)  # by which what layers add is scaled, one after the other
STRATEGIES: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 0, "seed": 1}}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = common.write_model(Path(temporary))
        for factor in FACTORS:
            scale_layers(folder, factor)
            for dtype in ("float32", "bfloat16"):
                lm = minopt.load(folder, device="cpu", dtype=dtype, draft="int8")
                for name, options in STRATEGIES.items():
                    case = {"case": f"opt-125m's shape, {name}", "layers_times": factor, "dtype": dtype}
                    cases.append(case | compare(lm, options, args.rounds))
                    print(cases[-1], flush=True)
                del lm
    for dtype in ("float32", "bfloat16"):
        lm = minopt.load(minopt.DEMO, device="cpu", dtype=dtype, draft="int8")
        for name, options in STRATEGIES.items():
            case = {"case": f"the package's model, {name}", "dtype": dtype, **compare(lm, options, args.rounds)}
            cases.append(case | {"best_possible": overlap(lm)})
            print(cases[-1], flush=True)
    result = {"topic": "drafts", **common.machine("cpu"), "new_tokens": NEW, "cases": cases, "memory": memory()}
    common.keep("drafts", args.hardware, result)


def memory() -> list[dict[str, Any]]:
    """Anonymous and file pages above the imports' at opt-125m's shape in MB, the most at once, a process each."""
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for stored in (torch.float32, torch.float16):
            folder = common.write_model(Path(temporary), dtype=stored)
            for dtype, variant in itertools.product(("float32", "bfloat16"), ("minopt", "draft")):
                command = [sys.executable, str(CHILD), "memory", variant, str(folder), dtype]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                of = {"files": str(stored).removeprefix("torch."), "dtype": dtype, "variant": variant}
                lines.append(of | json.loads(found.splitlines()[-1]))
                print(lines[-1], flush=True)
    return lines


def scale_layers(folder: Path, factor: float) -> None:
    """Scales the output weights of all layers of a checkpoint in place."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        for name in tensors:
            if name.endswith(("fc2.weight", "out_proj.weight", "fc2.bias", "out_proj.bias")):
                tensors[name] *= factor
        save_file(tensors, file, metadata={"format": "pt"})


def compare(lm: minopt.LanguageModel, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Times of generation with a draft and without, and what was accepted."""
    vocab = min(lm.decoder.config.vocab_size, 2000)
    ids = torch.randint(10, vocab, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    times: dict[bool, list[float]] = {True: [], False: []}
    found: dict[bool, Any] = {}
    for number in range(rounds + 1):
        for with_draft in (True, False)[:: 1 if number % 2 else -1]:

            def run(draft: Any = lm.draft if with_draft else None, key: bool = with_draft) -> None:
                found[key] = minopt.generate(
                    lm.decoder, ids, max_new_tokens=NEW, eos_token_id=(), draft=draft, **options
                )

            took = common.seconds(run)
            if number:
                times[with_draft].append(took)
    ms = {key: statistics.median(values) * 1e3 / NEW for key, values in times.items()}
    drafted, accepted = sum(found[True].drafted_tokens), sum(found[True].accepted_tokens)
    same = (found[True].sequences == found[False].sequences).float().mean().item()
    return {"without_ms": round(ms[False], 3), "with_ms": round(ms[True], 3), "ratio": round(ms[False] / ms[True], 3),
            "drafted": drafted, "accepted": accepted, "same_tokens": round(same, 4)}  # fmt: skip


@torch.inference_mode()
def overlap(lm: minopt.LanguageModel) -> float:
    """1 - total variation distance of model and draft, the mean over places of a text that the model sampled."""
    assert lm.draft is not None
    ids = minopt.generate(lm.decoder, torch.tensor([[2]]), max_new_tokens=300, do_sample=True, top_k=0, seed=1,
                          eos_token_id=()).sequences  # fmt: skip
    ours, theirs = (model.as_opt()(ids).float().softmax(-1) for model in (lm.decoder, lm.draft.decoder))
    return round(1 - float((ours - theirs).abs().sum(-1).mean()) / 2, 4)


if __name__ == "__main__":
    main()

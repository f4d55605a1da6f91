"""Peak memory above the imports' of two steps, of 2 texts of 128 tokens: all weights, LoRA, MeZO, the loss alone.

All weights of opt-1.3b take 21 GB: they are measured in 2 and 6 of its layers, and the peak of 24 follows from these.
"""

import sys
import tempfile
from dataclasses import replace
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from common import keep, machine, parser, torchrun

import minopt
from minopt.training import trainer
from minopt.training.method import method_of

HALF, LORA, MEZO = {"base_dtype": "bfloat16"}, {"lora_rank": 8, "lora_alpha": 16.0}, {"optimizer": "mezo"}
WAYS: dict[str, Any] = {"inference": MEZO, "MeZO": MEZO, "LoRA": LORA, "all weights": {}}
WAYS |= {f"{way}, bfloat16": WAYS[way] | HALF for way in ("inference", "MeZO", "LoRA")}
peak = lambda: getrusage(RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731


def measure(preset: str, layers: int, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled("inference" not in way):
        config = minopt.TrainingConfig(output_dir=folder, max_steps=2, per_device_train_batch_size=2, src_length=64,
                                       tgt_length=64, keep_last=0, device="cpu", **WAYS[way])  # fmt: skip
        method_of(config)  # imports peft
        if "inference" in way:
            trainer.Run.move = lambda run, rows, *_: (run.losses(run.collate(rows[0])).item(), 0.0)
        trainer.Run._save = lambda run: print(peak() - before) or sys.exit()
        before, shape = peak(), minopt.OPTConfig.preset(preset)
        model = minopt.OPT(replace(shape, num_hidden_layers=layers), dtype=getattr(torch, config.base_dtype))
        trainer.train(model, "word " * 1024, config, tokenizer=minopt.Tokenizer.load(minopt.DEMO))


options = parser(__doc__)
options.add_argument("--one", nargs=3)
given, rows = options.parse_args(), []
if given.one:
    measure(given.one[0], int(given.one[1]), given.one[2])
for way in WAYS:
    sizes = [("opt-125m", 12), *([("opt-1.3b", 24)] if WAYS[way] else [("opt-1.3b", 2), ("opt-1.3b", 6)])]
    small, large, *more = [torchrun(1, __file__, "--one", *size, way) for size in sizes]
    rows.append({"way": way, "opt-125m": small, "opt-1.3b": large + sum(22 * (six - large) // 4 for six in more)})
keep("methods", given.hardware, {**machine("cpu"), "peak_bytes": rows})

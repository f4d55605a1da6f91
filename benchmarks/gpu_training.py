"""The checks of gpu_acceptance.py that train, and those that run under torchrun."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
from typing import Any

import torch
from bench_finetune import flops_per_token
from gpu_here import WORDS, Here, examples, fit, in_half

import minopt
from minopt import DEMO, OPT
from minopt.devices import has_bfloat16
from minopt.training.run import RunFolder


def training(here: Here) -> None:
    """A few steps are those of the CPU, in 16 bits nearly; a resumed run is the run that was not interrupted."""
    runs: dict[str, dict[str, Any]] = {
        "truth": {"device": "cpu"}, "float32, packed": {}, "float32, padded": {"batching": "padded"},
        "float32, recomputed": {"recompute": True}, "float32, compiled": {"compile": True},
        "16 bits, fp16": {"fp16": True}, "16 bits, bf16": {"bf16": True},
    }  # fmt: skip
    losses = {}
    for name, settings in runs.items():
        kind, _, case = name.partition(", ")
        if case == "bf16" and not has_bfloat16(here.device):
            here.say(f"difference of losses in {kind}", None, case, "CUDA: this GPU emulates bfloat16")
            continue
        lines = fit(here, name, examples(32), max_steps=6, **settings)
        losses[name] = [line["loss"] for line in lines]
        # A step is skipped where its scaled loss overflows; the next ones then see other weights.
        skipped = next((number for number, line in enumerate(lines, 1) if line["skipped_steps"]), len(lines))
        gap = max(abs(a / b - 1) for a, b in zip(losses[name][:skipped], losses["truth"], strict=False))
        if case:
            here.say(f"difference of losses in {kind}", gap, case)
    fit(here, "whole", examples(32), max_steps=6, save_steps=3)
    begun = here.folder / "whole" / "checkpoints" / "step-00000003"
    fit(here, "resumed", examples(32), max_steps=6, save_steps=3, resume=str(begun))
    models = [minopt.load_model(here.folder / name, device="cpu").state_dict() for name in ("whole", "resumed")]
    largest = max(tensor.abs().max() for tensor in models[0].values())
    gap = max((tensor - models[1][name]).abs().max() for name, tensor in models[0].items())
    here.say("difference of a resumed run's weights", (gap / largest).item())


def training_speed(here: Here) -> None:
    """Packed against padded batches of one order, and the share of the matrix peak in fine-tuning opt-1.3b."""
    RunFolder.save = lambda *_: None  # type: ignore  # no checkpoints, which take 16 GB
    settings: dict[str, Any] = {"max_steps": here.count(25, 4), **in_half(here)}
    speeds = {}
    for batching in ("padded", "packed"):
        model = OPT(here.size("opt-125m"), device=here.device)
        data = examples(400, here.count(300, 30))
        lines = fit(here, batching, data, model, batching=batching, per_device_train_batch_size=16, src_length=300,
                    **settings)  # fmt: skip
        speeds[batching] = statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 3 :])
        here.say("tokens a second", speeds[batching], batching)
    here.say("packed to padded", speeds["packed"] / speeds["padded"])
    del model
    here.release()
    if not here.rehearse and not has_bfloat16(here.device):
        here.say("MFU of opt-1.3b", None, reason="CUDA: this GPU emulates bfloat16")
        return
    if (free := here.free_bytes()) < 4e10:
        here.say("MFU of opt-1.3b", None, reason=f"CUDA: takes 40 GB, {free / 1e9:.0f} GB are free")
        return
    config, rows = here.size("opt-1.3b"), 8 if free > 7e10 else 4
    T = config.max_position_embeddings
    text = " ".join(example.prompt for example in examples(here.count(15_000, 300)))
    settings |= {"max_steps": here.count(15, 2), "src_length": T - 32, "per_device_train_batch_size": rows}
    found = []
    for compiled in (False, True):
        model = OPT(config, device=here.device)
        lines = fit(here, f"mfu-{compiled}", text, model, compile=compiled, **settings)
        rate = statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :])
        found.append(rate * flops_per_token(config, T) / here.matrix_peak())
        here.say("MFU" + ", compiled" * compiled, found[-1], f"{rows} rows of {T} tokens, {rate:.0f} tokens/s")
        del model
        here.release()
        shutil.rmtree(here.folder / f"mfu-{compiled}")
    here.say("MFU of opt-1.3b", max(found))


def torchrun(here: Here) -> None:
    """The commands under torchrun, in one process and in as many as there are GPUs."""
    data, prompts = here.folder / "data.jsonl", [" ".join(WORDS[n : n + 4]) for n in range(8)]
    here.folder.mkdir(parents=True)
    pairs = [{"prompt": e.prompt, "completion": e.completion} for e in examples(32)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    (here.folder / "prompts.txt").write_text("\n".join(prompts))
    expected = minopt.load(DEMO, device=here.device, dtype="float32").generate(prompts, max_new_tokens=16)
    losses = [line["loss"] for line in fit(here, "alone", minopt.read_data(data), max_steps=4)]
    gpus = 1 if here.rehearse else torch.cuda.device_count()
    for count in sorted({1, min(2, gpus), gpus}):
        case, out, run = f"{count} processes", here.folder / f"out-{count}.jsonl", here.folder / f"run-{count}"
        start(here, count, "generate", "--input", here.folder / "prompts.txt", "--output", out, "--dtype", "float32",
              "--max-new-tokens", 16)  # fmt: skip
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        here.say("texts that differ", sum(a != b for a, b in zip(texts, expected, strict=True)), case)
        start(here, count, "finetune", "--model", DEMO, "--train-file", data, "--output-dir", run, "--max-steps", 4,
              "--per-device-train-batch-size", 4 // count or 1, "--logging-steps", 1, "--learning-rate", 1e-4,
              "--src-length", 96, "--tgt-length", 32, "--dropout", 0.0, "--tf32", "false")  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if count in (1, 2, 4):  # others have larger batches
            gaps = [abs(line["loss"] / loss - 1) for line, loss in zip(lines, losses, strict=True)]
            here.say("difference of losses", max(gaps), case)


def start(here: Here, count: int, *words: object) -> None:
    """Runs a command under torchrun; ends it after a minute, with all processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone", "-m",
               "minopt", *map(str, words), "--device", here.kind]  # fmt: skip
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        assert child.wait(80) == 0, f"{words[0]} in {count} processes ended with {child.returncode}"
    finally:
        child.send_signal(signal.SIGTERM)  # which torchrun passes on
        child.wait(20)

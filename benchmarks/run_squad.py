"""Fine-tunes a model on all of a SQuAD file by the command line, and keeps what it was worth before and after.

    python benchmarks/run_squad.py --train-file TRAIN.json --dev-file DEV.json [--hardware NAME] [--model NAME_OR_PATH]

Keeps `results/squad_<hardware>_<yyyymmdd>.json` with the metrics, and the curves as a picture of the same name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import common

import minopt

SETTINGS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05, "lr_decay_ratio": 0.05, "weight_decay": 0.1, "dropout": 0.1, "tgt_length": 32,
    "logging_steps": 50, "save_steps": 1000, "evaluation_strategy": "steps", "eval_steps": 495,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--dev-file", required=True)
    parser.add_argument("--model", default=minopt.DEMO, help="(default: the small model that minopt carries)")
    parser.add_argument("--hardware", default="local", help="short name of the machine, for the result's files")
    parser.add_argument("--epochs", type=float, default=SETTINGS["num_train_epochs"])
    parser.add_argument("--max-eval-samples", type=int, default=500)
    args = parser.parse_args()
    settings = SETTINGS | {"num_train_epochs": args.epochs}
    evaluation = ["--dev_file", args.dev_file, "--tgt_length", str(SETTINGS["tgt_length"]),
                  "--max_eval_samples", str(args.max_eval_samples), "--per_device_eval_batch_size", "32"]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "squad"
        before = evaluate(args.model, evaluation)
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        begin = time.perf_counter()
        files = ["--model_name_or_path", args.model, "--train_file", args.train_file, "--output_dir", str(run)]
        minopt_command("finetune", *files, *flags, *evaluation, "--do_train", "--do_eval")
        seconds = time.perf_counter() - begin
        after, best = evaluate(str(run), evaluation), evaluate(str(run / "best"), evaluation)
        picture = common.RESULTS / f"squad_{args.hardware}_{date.today():%Y%m%d}.png"
        plot = Path(__file__).parents[1] / "examples" / "plot_run.py"
        subprocess.run([sys.executable, str(plot), str(run), "--output", str(picture)], check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "topic": "squad", **common.machine("cpu"), "model": "demo" if args.model == minopt.DEMO else args.model,
        "settings": settings, "max_eval_samples": args.max_eval_samples, "seconds": round(seconds),
        "before": before, "after": after, "best": best, "metrics": lines,
    }  # fmt: skip
    common.keep("squad", args.hardware, result)


def evaluate(model: str, flags: list[str]) -> dict[str, Any]:
    """What `minopt evaluate` says."""
    return json.loads(minopt_command("evaluate", "--task", "squad", "--model", model, *flags, "--json"))


def minopt_command(*arguments: str) -> str:
    """Runs a command, whose own lines pass through; returns what it writes to stdout."""
    command = [sys.executable, "-m", "minopt", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()

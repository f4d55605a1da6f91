"""Teaches a model to answer SQuAD's questions by the command line, and keeps what it was worth before and after.

    python benchmarks/run_squad.py --train-file TRAIN.json --dev-file DEV.json --folder RUNS [--hardware NAME]

Two runs of ``minopt finetune``, for a model that has never had to look anything up; all of it is made of TRAIN.json:

1. ``copy``: pieces of the contexts, to be said again.
2. ``squad``: every question, and among them passages of the contexts with a gap, to be filled from the context.

What is in RUNS is gone on with, or taken as it is. Keeps `results/squad_<hardware>_<yyyymmdd>.json`, and the curves of
the second run as a picture of the same name.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import common

import minopt

COPIES, GAPS = 16_000, 13_000  # how many examples are made
TOKENS = 32  # the longest answer
COPY = {
    "num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05, "lr_decay_ratio": 0.5, "weight_decay": 0.1, "tgt_length": 300, "logging_steps": 50,
    "evaluation_strategy": "steps", "eval_steps": 500, "save_steps": 500, "max_eval_samples": 50,
    "per_device_eval_batch_size": 16,
}  # fmt: skip
SQUAD = {
    "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.03, "lr_decay_ratio": 0.1, "weight_decay": 0.1, "tgt_length": TOKENS, "logging_steps": 100,
    "evaluation_strategy": "steps", "eval_steps": 500, "save_steps": 500, "max_eval_samples": 200,
    "per_device_eval_batch_size": 32,
}  # fmt: skip
EVALUATION = {"tgt_length": TOKENS, "max_eval_samples": 500, "per_device_eval_batch_size": 32}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--dev-file", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where data and runs go")
    parser.add_argument("--model", default=minopt.DEMO, help="(default: the small model that minopt carries)")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [p for article in json.loads(args.train_file.read_text())["data"] for p in article["paragraphs"]]
    contexts = [paragraph["context"] for paragraph in paragraphs]
    copies, copies_dev, squad = (args.folder / name for name in ("copy.jsonl", "copydev.jsonl", "mix.jsonl"))
    write(copies, made(copied, contexts, COPIES, seed=1))
    write(copies_dev, made(copied, contexts, 200, seed=2))
    write(squad, [*made(with_a_gap, contexts, GAPS, seed=3), *questions(paragraphs)])

    first, second = args.folder / "copy", args.folder / "squad"
    train(args.model, first, copies, copies_dev, COPY)
    train(first, second, squad, args.dev_file, SQUAD)

    models = {"before": args.model, "after copying": first, "after": second}
    scores = {name: evaluate(model, args.dev_file) for name, model in models.items()}
    picture = common.RESULTS / f"squad_{args.hardware}_{date.today():%Y%m%d}.png"
    plot = Path(__file__).parents[1] / "examples" / "plot_run.py"
    subprocess.run([sys.executable, str(plot), str(second), "--output", str(picture)], check=True)
    result = {
        "topic": "squad", **common.machine("cpu"), "model": "demo" if args.model == minopt.DEMO else args.model,
        "settings": {"copy": COPY, "squad": SQUAD, "evaluation": EVALUATION},
        "examples": {"copy": COPIES, "gaps": GAPS, "questions": sum(len(p["qas"]) for p in paragraphs)},
        "scores": scores,
        "metrics": {run.name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    for run in (first, second)},
    }  # fmt: skip
    common.keep("squad", args.hardware, result)


def made(
    make: Callable[[random.Random, str], tuple[str, str]], contexts: list[str], count: int, seed: int
) -> Iterator[tuple[str, str]]:
    """Prompts and completions out of contexts that are drawn."""
    rng = random.Random(seed)
    return (make(rng, rng.choice(contexts)) for _ in range(count))


def copied(rng: random.Random, context: str) -> tuple[str, str]:
    words = context.split(" ")
    count = rng.randint(20, 60)
    first = rng.randrange(max(1, len(words) - count))
    text = " ".join(words[first : first + count])
    return f"{text}\nAgain:", f" {text}"


def with_a_gap(rng: random.Random, context: str) -> tuple[str, str]:
    words = context.split(" ")
    count = rng.choice([1, 1, 2, 2, 3, 4])
    first = rng.randrange(max(1, len(words) - count))
    before, after = rng.randint(2, 8), rng.randint(2, 8)
    left, right = words[max(0, first - before) : first], words[first + count : first + count + after]
    question = f"{' '.join(left)} what {' '.join(right)}"
    return f"{context}\nQuestion: {question}?\nAnswer:", f" {' '.join(words[first : first + count])}"


def questions(paragraphs: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for paragraph in paragraphs:
        for asked in paragraph["qas"]:
            prompt = f"{paragraph['context']}\nQuestion: {asked['question']}\nAnswer:"
            yield prompt, f" {asked['answers'][0]['text']}"


def write(path: Path, examples: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in examples)
    path.write_text("".join(f"{line}\n" for line in lines))


def train(model: str | Path, run: Path, data: Path, dev: Path, settings: dict[str, Any]) -> None:
    if (run / "model.safetensors").exists():
        print(f"{run}: is there", file=sys.stderr)
        return
    files = ["--train_file", str(data), "--dev_file", str(dev), "--output_dir", str(run)]
    minopt_command("finetune", "--model_name_or_path", str(model), *files, *flags(settings), "--do_train")


def evaluate(model: str | Path, dev: Path) -> dict[str, Any]:
    """What `minopt evaluate` says."""
    files = ["--model", str(model), "--dev_file", str(dev)]
    return json.loads(minopt_command("evaluate", "--task", "squad", *files, *flags(EVALUATION), "--json"))


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def minopt_command(*arguments: str) -> str:
    """Runs a command, whose own lines pass through; returns what it writes to stdout."""
    command = [sys.executable, "-m", "minopt", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()

"""Speed and peak memory of fine-tuning an opt-125m-size model on SQuAD, minopt and transformers' Trainer in turn.

    python benchmarks/bench_finetune.py --train-file TRAIN.json --tokenizer FOLDER [--hardware NAME]

Each sample is a step of a process of its own; processes of all variants take turns. The padded variants see the same
examples in the same order. A token is real if it is no padding; tokens a second are those of a step's examples over
its whole time, from the end of the step before: data, forward, backward, clipping, optimizer, logging. Peak memory is
the process', before anything is saved.

Rows (--batch-sizes, --dtypes), --loss and --evaluation can be measured one by one: others in the result of the same day
and hardware are kept. ``--dtypes`` without a value measures no row.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import common
import torch

VARIANTS = ("minopt packed", "transformers padded", "minopt grouped", "transformers grouped", "minopt padded")
WARM_UP = 2  # steps


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--train-file", type=Path, help="SQuAD's JSON")
    parser.add_argument("--tokenizer", type=Path, help="folder of OPT's tokenizer files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, of a process")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--loss", action="store_true", help="measure the head and its loss alone too")
    parser.add_argument("--evaluation", action="store_true", help="measure an evaluation with 5 beams too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work = loss_once if "whole" in args.worker else evaluations if "rounds" in args.worker else run
        print(json.dumps(work(**args.worker)))
        return
    if args.train_file is None or args.tokenizer is None:
        parser.error("--train-file and --tokenizer are needed")
    with tempfile.TemporaryDirectory() as temporary:
        cases = [compare(args, temporary, b, d) for d in args.dtypes for b in args.batch_sizes]
        measured: dict[str, Any] = {}
        if args.loss:
            measured["loss"] = compare_losses(args)
        if args.evaluation:
            model = str(model_in(args, temporary))
            work = {"model": model, "train_file": str(args.train_file), "rounds": args.rounds}
            measured["evaluation"] = {dtype: in_a_process(dtype=dtype, **work) for dtype in ("float32", "bfloat16")}
    path = common.kept("finetune", args.hardware)
    before = json.loads(path.read_text()) if path.exists() else {"cases": []}
    rows = {(case["dtype"], case["batch_size"]): case for case in before["cases"] + cases}
    result = {"topic": "finetune", **common.machine(args.device), "rounds": args.rounds, "steps": args.steps}
    result["cases"] = [rows[row] for row in sorted(rows, reverse=True)]
    result |= {key: before[key] for key in ("loss", "evaluation") if key in before} | measured
    common.keep("finetune", args.hardware, result)


def compare(args: argparse.Namespace, temporary: str, batch_size: int, dtype: str) -> dict[str, Any]:
    """All variants in turn at one batch size and precision."""
    model = model_in(args, temporary)
    samples: dict[str, list[float]] = {variant: [] for variant in args.variants}
    peaks: dict[str, list[int]] = {variant: [] for variant in args.variants}
    for round_ in range(args.rounds):
        for variant in args.variants:
            found = in_a_process(
                variant=variant, model=str(model), train_file=str(args.train_file), device=args.device,
                batch_size=batch_size, dtype=dtype, steps=args.steps, seed=round_, temporary=temporary,
            )  # fmt: skip
            samples[variant] += found["tokens_per_second"]
            peaks[variant].append(found["peak_bytes"])
            print(round_, variant, batch_size, dtype, round(statistics.median(found["tokens_per_second"])), flush=True)
    case: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "commit": common.commit()}
    for variant in args.variants:
        values = sorted(samples[variant])
        case[variant] = {
            "tokens_per_second": round(statistics.median(values), 1),
            "p10": round(values[len(values) // 10], 1),
            "samples": len(values),
            "peak_mb": round(max(peaks[variant]) / 1e6),
        }
    for peer in (variant for variant in args.variants if variant.startswith("transformers")):
        ours, theirs = case["minopt packed"]["tokens_per_second"], case[peer]["tokens_per_second"]
        case[f"packed to {peer}"] = round(ours / theirs, 3)
    print(json.dumps(case), flush=True)
    return case


def model_in(args: argparse.Namespace, temporary: str) -> Path:
    """A folder with random weights and the tokenizer."""
    model = common.write_model(Path(temporary))
    for path in args.tokenizer.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    return model


def evaluations(model: str, train_file: str, dtype: str, rounds: int) -> dict[str, float]:
    """Seconds of evaluating 8 examples with 5 beams of 20 tokens: in a run, by the plain model, and by a loaded one."""
    from minopt import load, load_model
    from minopt.distributed import World
    from minopt.evaluation.answers import evaluate
    from minopt.training.config import TrainingConfig
    from minopt.training.data import references_of
    from minopt.training.method import Method
    from minopt.training.run import Signals

    tokenizer, examples, tokens = data_for(model, train_file, 8, 1, 0)
    run = Method()
    run.config = TrainingConfig(output_dir="x", num_beams=5, tgt_length=20, min_tgt_length=20, bf16=dtype == "bfloat16")
    run.world, run.is_sharded, run.tokenizer = World(0, 1, torch.device("cpu")), False, tokenizer
    run.dtype = torch.bfloat16 if run.config.bf16 else None
    run.model, run.eval_tokens, run.eval_data = load_model(model, dtype="float32"), tokens, examples
    run.signals = Signals()
    forms = {"plain": load_model(model, dtype=dtype), "load": load(model, dtype=dtype).model}

    def alone(form: Any) -> None:
        task, references = run.config.resolved_task(), references_of(examples)
        evaluate(form, tokenizer, tokens.rows, references, task.scores, run.config.generation, run.world, batch_size=8)

    samples: dict[str, list[float]] = {name: [] for name in ("run", *forms)}
    for _ in range(rounds + 1):
        samples["run"].append(common.seconds(run.measure))
        for name, form in forms.items():
            samples[name].append(common.seconds(lambda form=form: alone(form)))
    return {name: round(statistics.median(values[1:]), 3) for name, values in samples.items()}


def compare_losses(args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of the head and its loss alone, all positions learned: logits whole, and in chunks."""
    result: dict[str, Any] = {"positions": 4096, "dtype": "float32"}
    for name, whole in (("whole", True), ("chunks", False)):
        samples = [in_a_process(whole=whole, device=args.device, positions=4096) for _ in range(args.rounds)]
        result[name] = {key: round(statistics.median(s[key] for s in samples), 3) for key in samples[0]}
    print(json.dumps(result), flush=True)
    return result


def loss_once(whole: bool, device: str, positions: int) -> dict[str, float]:
    """Seconds and peak memory above what is there before, with a head of opt-125m's size."""
    import torch.nn.functional as F

    from minopt.training.loss import cross_entropy_sum

    torch.manual_seed(0)
    weight = (0.02 * torch.randn(50272, 768, device=device)).requires_grad_()
    h = torch.randn(positions, 768, device=device, requires_grad=True)
    targets = torch.randint(50272, (positions,), device=device)

    def step() -> None:
        if whole:
            F.cross_entropy(F.linear(h, weight), targets, reduction="sum").backward()
        else:
            cross_entropy_sum(h, weight, targets).backward()

    before = peak_bytes(device)
    seconds = min(common.seconds(step, device) for _ in range(3))
    return {"seconds": seconds, "peak_mb": (peak_bytes(device) - before) / 1e6}


def in_a_process(**work: Any) -> dict[str, Any]:
    """One sample."""
    command = [sys.executable, __file__, "--worker", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{work}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(variant: str, steps: int, device: str, temporary: str, **work: Any) -> dict[str, Any]:
    """Trains some steps and says how fast each was."""
    library, _, batching = variant.partition(" ")
    with tempfile.TemporaryDirectory(dir=temporary) as folder:
        train = train_minopt if library == "minopt" else train_transformers
        times, tokens, peak = train(
            batching=batching, steps=WARM_UP + steps, device=device, folder=Path(folder), **work
        )
    rates = [n / (end - begin) for n, begin, end in zip(tokens[1:], times, times[1:], strict=False)]
    return {"tokens_per_second": rates[WARM_UP - 1 :], "peak_bytes": peak}


def peak_bytes(device: str) -> int:
    """The most memory that the process has held, the GPU's where there is one."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_for(model: str, train_file: str, batch_size: int, steps: int, seed: int) -> tuple[Any, Any, Any]:
    """The model's tokenizer, as many random examples as the steps take, and their tokens."""
    import random

    from minopt import OPTConfig, Tokenizer
    from minopt.evaluation.tasks import EvaluationConfig
    from minopt.training.batches import tokenise
    from minopt.training.data import read_data

    tokenizer = Tokenizer.load(model)
    examples = read_data(train_file)
    assert not isinstance(examples, str)
    examples = random.Random(seed).sample(examples, batch_size * steps)
    config = OPTConfig.preset("opt-125m")
    return tokenizer, examples, tokenise(examples, tokenizer, config, EvaluationConfig(), training=True)


def train_minopt(
    batching: str, steps: int, device: str, folder: Path, model: str, train_file: str, batch_size: int, dtype: str,
    seed: int,
) -> tuple[list[float], list[int], int]:  # fmt: skip
    """Times at which steps ended, real tokens of each, and the peak memory."""
    from minopt import load_model
    from minopt.training import trainer
    from minopt.training.batches import microbatches
    from minopt.training.config import TrainingConfig

    tokenizer, examples, tokens = data_for(model, train_file, batch_size, steps, seed)
    peaks = []
    save = trainer.Run._save

    def measured_save(self: Any) -> None:
        peaks.append(peak_bytes(device))
        save(self)

    trainer.Run._save = measured_save  # type: ignore[method-assign]
    config = TrainingConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=batch_size, max_steps=steps, logging_steps=1,
        learning_rate=3e-5, batching=batching, bf16=dtype == "bfloat16", seed=seed, device=device, save_steps=10**6,
    )  # fmt: skip
    trainer.train(load_model(model, device=device, dtype="float32"), examples, config, tokenizer=tokenizer)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    lengths = [len(ids) for ids, _ in tokens.rows]
    order = islice(microbatches(lengths, batch_size, 1, seed, grouped=batching == "grouped"), steps)
    counts = [sum(lengths[i] for i in examples) for (examples,) in order]
    return [line["time"] for line in lines], counts, peaks[0]


def train_transformers(
    batching: str, steps: int, device: str, folder: Path, model: str, train_file: str, batch_size: int, dtype: str,
    seed: int,
) -> tuple[list[float], list[int], int]:  # fmt: skip
    """The same, with transformers' Trainer as its users have it: labels of -100 on prompts, padding on the right."""
    import time

    from transformers import OPTForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from minopt.training.batches import microbatches

    _, _, tokens = data_for(model, train_file, batch_size, steps, seed)
    order = islice(microbatches([len(ids) for ids, _ in tokens.rows], batch_size, 1, seed, grouped=False), steps)
    rows = [tokens.rows[i] for (examples,) in order for i in examples]
    data = [
        {"input_ids": ids.tolist(), "labels": [-100] * start + ids[start:].tolist(), "length": len(ids)}
        for ids, start in rows
    ]
    counts: list[int] = []
    times: list[float] = []

    def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        counts.append(sum(len(e["input_ids"]) for e in examples))
        gaps = [longest - len(e["input_ids"]) for e in examples]
        padded = list(zip(examples, gaps, strict=True))
        return {
            "input_ids": torch.tensor([e["input_ids"] + [1] * gap for e, gap in padded]),
            "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * gap for e, gap in padded]),
            "labels": torch.tensor([e["labels"] + [-100] * gap for e, gap in padded]),
        }

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            common.synchronize(device)
            times.append(time.time())

    arguments = TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=3e-5,
        bf16=dtype == "bfloat16", use_cpu=device == "cpu", save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1, seed=seed, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if batching == "grouped" else "sequential",
    )  # fmt: skip
    trainer = Trainer(
        OPTForCausalLM.from_pretrained(model),
        arguments,
        pad,
        data,
        callbacks=[Clock()],  # type: ignore[arg-type]
    )
    trainer.train()
    return times, counts, peak_bytes(device)


def flops_per_token(config: Any, length: int) -> float:
    """Of forward and backward (twice the forward), recomputation not counted; attention over what causality leaves."""
    C, F, L, V, E = (
        config.hidden_size, config.ffn_dim, config.num_hidden_layers, config.vocab_size, config.embed_dim,
    )  # fmt: skip
    layer = 2 * (4 * C * C + 2 * C * F) + 2 * 2 * C * length / 2
    return 3 * (L * layer + 2 * V * E)


if __name__ == "__main__":
    main()

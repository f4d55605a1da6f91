"""The checks of gpu_acceptance.py, each a function that is run in a process of its own.

python benchmarks/gpu_checks.py CHECK FOLDER [--rehearse]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_finetune import flops_per_token
from gpu_here import (
    FORMS,
    KINDS,
    SMALL,
    WAYS,
    Here,
    Skipped,
    built,
    draw,
    error,
    examples,
    fit,
    in_half,
    lively,
    new_tokens,
    padded,
    reference,
)
from gpu_training import torchrun, training, training_speed
from inference_child import resident_mb
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import minopt
from minopt import DEMO, OPT, OPTConfig
from minopt.checkpoint.names import parameter_shapes
from minopt.devices import has_bfloat16
from minopt.generation.scoring import token_logprobs
from minopt.inference import graphs
from minopt.inference.plan import RUNTIME_BYTES, plan_generation
from minopt.training.batches import collate
from minopt.training.loss import ModelWithLoss


def machine(here: Here) -> None:
    """What the GPU is and what it can do."""
    if not here.rehearse:
        here.say("device", torch.cuda.get_device_name())
        here.say("capability", "{}.{}".format(*torch.cuda.get_device_capability()))
        here.say("CUDA", str(torch.version.cuda))
        here.say("GPUs", torch.cuda.device_count())
        here.say("memory in GB", torch.cuda.get_device_properties(0).total_memory / 1e9)
    here.say("bandwidth in GB/s", here.bandwidth() / 1e9)
    here.say("matrix peak in TFLOP/s", here.matrix_peak() / 1e12)


def parity(here: Here) -> None:
    """Each kind of OPT, form and way to decode in float32: what the plain model on the CPU gives is right."""
    for kind, changes in KINDS.items():
        torch._dynamo.reset()
        config, folder = OPTConfig(**SMALL | changes), here.folder / kind
        minopt.save_model(lively(config, 0.3), folder)
        ids, mask = padded(config)
        expected: dict[str, Tensor] = {}
        for form, optimize in {"truth": False, **FORMS}.items():
            place = "cpu" if form == "truth" else here.device
            lm = minopt.load(folder, device=place, dtype="float32", optimize=optimize)
            with torch.inference_mode():
                found = {"logits": lm.model(ids.to(place), mask.to(place)).cpu() * mask[..., None]}
            rows = [row.tolist() for row in ids]
            found["log-probabilities"] = torch.stack(token_logprobs(lm.decoder, rows, [1, 1]))
            for way, options in WAYS.items():
                found[way] = new_tokens(lm.decoder, ids, mask, **options)
            if form == "truth":
                expected = found
                continue
            if form == "plain":  # a GPU draws other numbers than a CPU
                expected["sampling"] = found["sampling"]
            case = f"{kind}, {form}"
            scale = expected["logits"].abs().max()
            here.say("difference of logits", (found["logits"] - expected["logits"]).abs().max() / scale, case)
            gap = (found["log-probabilities"] - expected["log-probabilities"]).abs().max()
            here.say("difference of log-probabilities", gap, case)
            for way in WAYS:
                here.say("tokens that differ", (found[way] != expected[way]).sum(), f"{case}, {way}")
        drawn_from(here, folder, ids[:1], kind)
    model = minopt.load_model(folder.with_name("125m"), device=here.device, dtype="float32")
    with torch.inference_mode():  # what a difference looks like
        model.layers[0].fc1.bias.zero_()
        logits = minopt.load_model(folder.with_name("125m"), device="cpu", dtype="float32")(ids)
        here.say("difference of logits without one bias", error(model(ids.to(here.device)).cpu(), logits))


def drawn_from(here: Here, folder: Path, ids: Tensor, kind: str) -> None:
    """Tokens are drawn by their probabilities. So many draws are 0.02 from them by chance."""
    model = minopt.load_model(folder, device=here.device, dtype="float32")
    drawn = new_tokens(model, ids, None, 1, do_sample=True, seed=1, top_k=0, num_return_sequences=8192)[:, -1]
    shares = torch.bincount(drawn, minlength=model.config.vocab_size) / len(drawn)
    with torch.inference_mode():
        probabilities = model.to("cpu")(ids)[0, -1].softmax(0)
    here.say("distance of drawn tokens from the probabilities", (shares - probabilities).abs().sum() / 2, kind)


def rounding(here: Here) -> None:
    """How far 16 bits are from float64 with the same weights, a prompt's logits and a step's."""
    config = here.size("opt-125m")
    ids = draw(config, 2, 64).to(here.device)
    for name, dtype in {"float16": torch.float16, "bfloat16": torch.bfloat16}.items():
        if dtype == torch.bfloat16 and not has_bfloat16(here.device):
            here.say(f"error in {name}", None, reason="CUDA: this GPU emulates bfloat16")
            continue
        model = lively(config, 0.02, device=here.device, dtype=dtype)
        ours = graphs.GraphedOPT(config, model.state_dict().items())
        theirs = reference(here, config, model.state_dict(), dtype)
        with torch.inference_mode():
            truth = model.double()(ids)
            cache, position_ids = ours.new_cache(2, 64), torch.arange(64, device=here.device).expand(2, 64)
            ours.read(ids[:, :63], position_ids[:, :63], None, ids.new_tensor([62, 125]), cache)
            step = ours.read(ids[:, 63:], position_ids[:, 63:], None, None, cache)
            of_prompt, of_step = error(ours(ids), truth), error(step, truth[:, -1])
            here.say(f"error in {name}", of_prompt, "prompt")
            here.say(f"error in {name}", of_step, "step")
            if theirs is None:
                here.say("error, to transformers'", None, name, "transformers is not installed")
            else:
                here.say("error, to transformers'", max(of_prompt, of_step) / error(theirs(ids).logits, truth), name)


def captured(here: Here) -> None:
    """Graphs are used again for texts of other lengths, and take no more memory; torch compiles all steps."""
    config, made = here.size("opt-125m"), list[int]()
    decoder, capture = built(here, config), graphs.capture

    def counted(*args: Any) -> Any:
        made.append(1)
        return capture(*args)

    with mock.patch.object(graphs, "capture", counted):
        for rows in (1, 4):
            for number in range(10):  # in one bucket of the cache's slots, the longest first
                minopt.generate(decoder, draw(config, rows, 460 - 20 * number), max_new_tokens=24, eos_token_id=())
                if number == 1:
                    before = torch.cuda.memory_reserved() if not here.rehearse else 1
            after = torch.cuda.memory_reserved() if not here.rehearse else 1
            here.say("growth of reserved memory after two texts", after / before - 1, f"batch {rows}")
        here.say("captures for 20 texts", len(made))
        made.clear()
        for number in range(6):
            new_tokens(decoder, draw(config, (1, 4)[number % 2], 300 + number))
        here.say("captures for 6 texts of batches of 1 and 4 in turn", len(made))
    small, compile_ = OPTConfig(**SMALL), torch.compile
    eager = lambda run, **options: compile_(run, backend="eager", dynamic=options.get("dynamic"))  # noqa: E731
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(torch, "compile", eager):
        compiled = built(here, small, compiled=True)
        for rows in range(1, 11):
            new_tokens(compiled, draw(small, rows, 8), count=3)
    here.say("compiled steps of 10 batch sizes", torch._dynamo.utils.counters["stats"]["unique_graphs"])


def lengths(here: Here) -> None:
    """A length that was not there before costs nothing: cuDNN's attention would plan it for tenths of a second."""
    config = here.size("opt-125m")
    decoder = built(here, config)

    def generated(tokens: int) -> Callable[[], object]:
        return partial(minopt.generate, decoder, draw(config, 2, tokens), max_new_tokens=1, eos_token_id=())

    model = ModelWithLoss(OPT(config, device=here.device).train())

    def trained(longest: int) -> Callable[[], object]:
        rows = [(draw(config, 1, longest - 3 * n)[0], 2) for n in range(4)]
        batch = collate(rows, here.device, packed=True)

        def step() -> None:
            with torch.autocast(here.kind, dtype=here.half):
                loss = model(batch)
            loss.backward()

        return step

    def attended(tokens: int) -> Callable[[], object]:
        q = torch.randn(1, 12, tokens, 64, dtype=here.half, device=here.device)
        return partial(torch.nn.functional.scaled_dot_product_attention, q, q, q, is_causal=True)

    figures = {"first call of a prompt's length": generated, "first step of packed lengths": trained}
    for figure, make in figures.items():
        runs = [make(length) for length in (450, 440, *range(300, 421, here.count(10, 60)))]
        beyond = [(here.seconds(run) - here.seconds(run)) * 1e3 for run in runs][2:]
        here.say(f"{figure} beyond the second, median ms", statistics.median(beyond))
        here.say(f"{figure} beyond the second, longest ms", max(beyond))
    try:  # what this would see
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            runs = [attended(length) for length in range(300, 421, 10)]
            beyond = [(here.seconds(run) - here.seconds(run)) * 1e3 for run in runs][2:]
            here.say("cuDNN's plan of a length, median ms", statistics.median(beyond))
    except RuntimeError as reason:
        here.say("cuDNN's plan of a length, median ms", None, reason=f"CUDA: {str(reason).splitlines()[0]}")


def waits(here: Here) -> None:
    """How often the host waits for the GPU."""
    config = here.size("opt-125m")
    decoder, (ids, mask) = built(here, config), padded(config)

    def of_a_token(run: Callable[[int], object], figure: str, case: str = "") -> None:
        run(48)
        found = []
        for count in (16, 48):
            with here.waits() as where:
                run(count)
            found.append(where)
        most = ", ".join(f"{line} {number}" for line, number in (found[1] - found[0]).most_common(3))
        here.say(figure, (found[1].total() - found[0].total()) / 32, case, most)

    for way, options in WAYS.items():
        figure = f"waits of a token, {way}" if way in ("beams", "drafts") else "waits of a token"
        run = partial(new_tokens, decoder, ids, mask, **options)
        of_a_token(lambda count, run=run: run(count=count), figure, way)
    small = minopt.load(DEMO, device=here.device, dtype=here.half)
    of_a_token(
        lambda n: list(small.stream("The ship", max_new_tokens=n, min_new_tokens=n)), "waits of a token, streamed"
    )
    model = ModelWithLoss(OPT(config, device=here.device).train())
    for packed in (True, False):
        batch = collate([(draw(config, 1, 60 - 7 * n)[0], 2) for n in range(4)], here.device, packed=packed)
        for _ in range(2):
            with here.waits() as where, torch.autocast(here.kind, dtype=here.half):
                model(batch).backward()
        places = ", ".join(f"{line} {number}" for line, number in where.most_common(3))
        here.say("waits of forward and backward", where.total(), "packed" if packed else "padded", places)
    found = []
    for steps in (4, 12):
        with here.waits() as where:
            fit(here, f"run-{steps}", examples(64), max_steps=steps, logging_steps=100, **in_half(here))
        found.append(where)
    most = ", ".join(f"{line} {number}" for line, number in (found[1] - found[0]).most_common(3))
    here.say("waits of a training step", (found[1].total() - found[0].total()) / 8, reason=most)


def speed(here: Here, name: str) -> None:
    """A token's time in 16 bits, against transformers with a static cache and what the GPU can read."""
    config = here.size(name)
    size = sum(math.prod(shape) for shape in parameter_shapes(config).values()) * 2
    if (free := here.free_bytes()) < 1.3 * size + 2e9:
        raise Skipped(f"CUDA: {name} takes {1.3 * size / 1e9 + 2:.0f} GB, {free / 1e9:.0f} GB are free")
    read, ours = size - (config.max_position_embeddings + 2) * config.hidden_size * 2, timed(here, config, (1, 8))
    cached = 2 * config.num_hidden_layers * config.hidden_size * 2 * 128  # half the tokens of a row
    here.say("share of bandwidth, batch 1", (read + cached) / (ours[1] / 1e3) / here.bandwidth())
    if name != "opt-125m":
        for rows, ms in timed(here, config, (1, 8), ", int8", quantize=True).items():
            here.say(f"int8 to 16 bits, batch {rows}", ours[rows] / ms)
    beside_transformers(here, config, ours)
    rows_of = (1, 8) if name == "opt-125m" else (1,)  # compiling takes minutes
    for rows, ms in timed(here, config, rows_of, ", compiled", compiled=True).items():
        here.say("compiled to load()", ours[rows] / ms, f"batch {rows}")


def timed(here: Here, config: OPTConfig, rows_of: tuple[int, ...], kind: str = "", **options: bool) -> dict[int, float]:
    """The time of a token by the number of rows, and once that of a prompt."""
    here.release()
    decoder, found = built(here, config, **options), {}
    for rows in rows_of:
        found[rows] = ms_per_token(here, decoder, config, rows)
        here.say(f"ms a token{kind}", found[rows], f"batch {rows}")
    if not options:
        prefill(here, decoder, config)
    return found


def beside_transformers(here: Here, config: OPTConfig, ours: dict[int, float]) -> None:
    """The time of a token in transformers, whatever becomes of it there."""
    here.release()
    figure = "to transformers with a static cache"
    try:
        if (model := reference(here, config, None, here.half)) is None:
            here.say(figure, None, reason="transformers is not installed")
            return
        for rows, ms in ours.items():
            theirs = ms_per_token_there(here, model, config, rows)
            here.say("ms a token, transformers", theirs, f"batch {rows}")
            here.say(figure, theirs / ms, f"batch {rows}")
    except Exception as reason:
        here.say(figure, None, reason=f"transformers: {(str(reason).splitlines() or ['failed'])[0]}")


def ms_per_token(here: Here, decoder: Any, config: OPTConfig, rows: int) -> float:
    """Of minopt: what more tokens cost, so that the prompt does not count."""
    ids, few, many = draw(config, rows, 64), 16, here.count(144, 32)

    def run(count: int) -> Callable[[], object]:
        return partial(minopt.generate, decoder, ids, max_new_tokens=count, eos_token_id=())

    run(many)()
    times = [here.seconds(run(many)) - here.seconds(run(few)) for _ in range(here.count(7, 2))]
    return statistics.median(times) / (many - few) * 1e3


def ms_per_token_there(here: Here, model: Any, config: OPTConfig, rows: int) -> float:
    """Of transformers, which waits for the GPU after each token."""
    ids, times = draw(config, rows, 64).to(here.device), list[float]()

    def clock(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    count = here.count(144, 8)
    for _ in range(here.count(3, 1)):  # the first ones compile
        times.clear()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            cache_implementation="static", stopping_criteria=[clock],
        )  # fmt: skip
    return statistics.median(after - before for before, after in pairwise(times)) * 1e3


def prefill(here: Here, decoder: Any, config: OPTConfig) -> None:
    """The time to the first token of a prompt as long as the model's positions."""
    T, C = config.max_position_embeddings - 1, config.hidden_size
    run = partial(minopt.generate, decoder, draw(config, 1, T), max_new_tokens=1, eos_token_id=())
    seconds = statistics.median([here.seconds(run) for _ in range(here.count(8, 2))][1:])
    flops = flops_per_token(config, T) / 3 * T - 2 * config.vocab_size * config.embed_dim * (
        T - 1
    )  # one token's logits
    here.say("prefill in ms", seconds * 1e3, f"{T + 1} x {C}")
    here.say("prefill, share of the matrix peak", flops / seconds / here.matrix_peak())


def offload(here: Here) -> None:
    """A model whose layers wait elsewhere gives the same tokens, and holds the memory that was planned."""
    config = here.size("opt-1.3b")
    folder, (ids, mask) = here.folder / "model", padded(config)
    minopt.save_model(lively(config, 0.02, device=here.device, dtype=here.half), folder)
    expected = new_tokens(minopt.load(folder, device=here.device, optimize=False).decoder, ids, mask)
    planned = plan_generation(config, dtype=here.half, device="cuda", offload="cpu").host
    here.release()
    for place in ("cpu", "disk"):
        if place == "cpu" and here.rehearse:
            here.say("host memory to the plan", None, reason="CUDA pins the memory")
            continue
        before = resident_mb()
        lm = minopt.load(folder, device=here.device, offload=place)
        held = resident_mb()
        here.say("tokens that differ", (new_tokens(lm.decoder, ids, mask) != expected).sum().item(), place)
        if place == "cpu":
            here.say("host memory to the plan", (held[0] - before[0]) * 1e6 / planned)
        del lm


def plan(here: Here) -> None:
    """What ``minopt plan`` says of a GPU's memory against what it takes."""
    for name, rows, length in (("opt-125m", 8, 512), ("opt-1.3b", 1, 2048), ("opt-1.3b", 8, 512)):
        config, folder = here.size(name), here.folder / name
        if not folder.exists():
            minopt.save_model(lively(config, 0.02, device=here.device, dtype=here.half), folder)
        here.release()
        case, length = f"{name}, {rows} x {length}", min(length, config.max_position_embeddings)
        lm = minopt.load(folder, device=here.device)
        new_tokens(lm.decoder, draw(config, rows, length - 16), None, 16)
        planned = plan_generation(config, dtype=here.half, device="cuda", batch=rows, length=length)
        reserved = 1 if here.rehearse else torch.cuda.max_memory_reserved()
        here.say("reserved to the plan", reserved / (planned.total - planned.runtime), case)
        del lm
    if not here.rehearse:
        free, total = torch.cuda.mem_get_info()  # others on this GPU count too
        here.say("CUDA's own memory to the plan", (total - free - torch.cuda.memory_reserved()) / RUNTIME_BYTES["cuda"])
    else:
        here.say("CUDA's own memory to the plan", None, reason="CUDA is not here")


def export(here: Here) -> None:
    """A program for this device gives the tokens of the model."""
    if shutil.which("g++") is None:
        raise Skipped("a C++ compiler is not installed")
    config = replace(here.size("opt-125m"), num_hidden_layers=here.count(4, 1))
    folder, (ids, mask) = here.folder / "model", padded(config)
    minopt.save_model(lively(config, 0.3 if here.rehearse else 0.05), folder)
    for dtype in (torch.float32, here.half)[: here.count(2, 1)]:
        began, program = time.perf_counter(), here.folder / f"program-{dtype}"
        minopt.export_model(folder, program, dtype=dtype, device=here.kind)
        here.say("seconds to export", time.perf_counter() - began, str(dtype))
        lm = minopt.load(program, device=here.kind)
        plain = minopt.load(folder, device=here.device, dtype=dtype, optimize=False)
        differ = (new_tokens(lm.decoder, ids, mask) != new_tokens(plain.decoder, ids, mask)).sum()
        here.say("tokens that differ" + " in 16 bits" * (dtype != torch.float32), differ, str(dtype))
        runs = [partial(new_tokens, lm.decoder, draw(config, 2, length), None, 1) for length in range(100, 201, 10)]
        beyond = [(here.seconds(run) - here.seconds(run)) * 1e3 for run in runs][2:]
        here.say("first call of a prompt's length beyond the second, median ms", statistics.median(beyond), str(dtype))


def second_gpu(here: Here) -> None:
    """On another GPU than the first, tokens are the same."""
    if not here.rehearse and torch.cuda.device_count() < 2:
        raise Skipped("CUDA: there is one GPU")
    config, folder = here.size("opt-125m"), here.folder / "model"
    minopt.save_model(lively(config, 0.02, device=here.device, dtype=here.half), folder)
    ids, mask = padded(config)
    places = (here.device, "cpu" if here.rehearse else "cuda:1")
    for way, options in WAYS.items():
        first, second = (new_tokens(minopt.load(folder, device=p).decoder, ids, mask, **options) for p in places)
        here.say("tokens that differ", (first != second).sum().item(), way)


CHECKS: dict[str, Callable[[Here], None]] = {
    "machine": machine, "parity": parity, "rounding": rounding, "graphs": captured, "lengths": lengths,
    "waits": waits, **{f"speed-{size}": partial(speed, name=f"opt-{size}") for size in ("125m", "1.3b", "6.7b")},
    "training": training, "training-speed": training_speed, "offload": offload, "plan": plan, "export": export,
    "torchrun": torchrun, "second-gpu": second_gpu,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    here = Here(args.folder, args.rehearse)
    try:
        CHECKS[args.check](here)
    except Skipped as reason:
        here.say("", None, reason=str(reason))
    sys.stdout.flush()
    os._exit(0)  # gloo's and the compiler's threads


if __name__ == "__main__":
    main()

"""What is tried on a GPU that is not there; a process of its own writes what came of it as JSON (see fake.py)."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu.fake import Run, gpu, load_library

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        load_library(Path(place))

import torch

import minopt
from minopt import int8
from minopt.checkpoint.names import parameter_shapes
from minopt.config import OPTConfig
from minopt.distributed import World
from minopt.generation import decode
from minopt.generation.options import GenerationConfig
from minopt.generation.request import prepare
from minopt.generation.scoring import token_logprobs
from minopt.inference.fast import FastOPT
from minopt.inference.graphs import GraphedOPT
from minopt.model import OPT
from minopt.training import trainer

L, N, STEPS = 2, 17, 2  # layers, new tokens, steps of training
SIZE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": L, "num_attention_heads": 2,
                        "ffn_dim": 512, "max_position_embeddings": 600, "eos_token_id": None}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 64},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5, "top_p": 0.9, "num_return_sequences": 2},
    "rules": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "output_logprobs": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def build(form: str, kind: str, dtype: torch.dtype, device: str) -> Any:
    config = OPTConfig(**(SIZE | KINDS[kind]))
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in parameter_shapes(config).items()}
    if form == "plain":
        model = OPT(config, device="meta", dtype=dtype)
        model.load_state_dict(weights, assign=True)
        return model.eval()
    for name in [*filter(int8.is_quantized, weights)] if form == "int8" else []:
        weights[name], weights[name + int8.SCALE] = int8.quantize(weights[name])
    return (FastOPT if form == "fast" else GraphedOPT)(config, weights.items())


def generation(
    form: str, kind: str, dtype: torch.dtype, options: str, padded: bool, device: str = "cuda:0", times: int = 1
) -> Run:
    """Continues two prompts, some times over."""
    ids, mask = torch.randint(5, 500, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[0, : 3 * padded] = False
    with gpu(N):
        model = build(form, kind, dtype, device)
    request = prepare(model, ids, mask, GenerationConfig(max_new_tokens=N, **OPTIONS[options]))
    with gpu(N) as run:
        for _ in range(times):
            found = decode.run(request)
            assert str(found.sequences.device) == device
    return run


def scoring(form: str, kind: str, dtype: torch.dtype) -> Run:
    rows = [[2, *range(5, 5 + length)] for length in (30, 7, 19)]
    with gpu(N):
        model = build(form, kind, dtype, "cuda:0")
    with gpu(N, on_cpu=6) as run:
        token_logprobs(model, rows, [3, 2, 5])
    return run


def streaming() -> Run:
    with gpu(N):
        model = build("graphed", "125m", torch.float16, "cuda:0")
    lm = minopt.LanguageModel(model, minopt.Tokenizer.load(minopt.DEMO))
    with gpu(N, lists={(3,): [17, 1, 0]}) as run:  # a token, which is new, of a row that goes on
        assert sum(1 for _ in lm.stream("The ship", max_new_tokens=N)) > 1
    return run


def training(capability: tuple[int, int] = (9, 0), heads: int = 2, **settings: Any) -> Run:
    """Some steps of a run, as the loop does them; each has texts of several lengths."""
    examples = [minopt.Example("the ship sailed " * (2 + i), "at dawn " * (1 + i % 3), id=str(i)) for i in range(8)]
    tokenizer = minopt.Tokenizer.load(minopt.DEMO)
    with tempfile.TemporaryDirectory() as folder:
        config = minopt.TrainingConfig(
            output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, device="cuda", **settings
        )
        with gpu(1):
            changed = {"vocab_size": 2048, "dropout": 0.1, "num_attention_heads": heads}
            model: Any = OPT(OPTConfig(**(SIZE | changed)), device="cuda:0")
        model.float = model.to = lambda *_: model  # it is there, in float32; FakeTensors cannot be swapped
        run = trainer.Run(model, tokenizer, config, World(0, 1, torch.device("cuda:0")), examples, None)
        run.total_steps, run.microbatches = STEPS, iter([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
        with gpu(1, capability=capability) as seen, run.wrapped(None):
            for _ in range(STEPS):
                assert not run._step()
    return seen


def cases() -> dict[str, Callable[[], Run]]:
    found: dict[str, Callable[[], Run]] = {}
    ways = [*itertools.product(("plain", "fast", "graphed"), KINDS), ("int8", "125m")]
    for number, (form, kind) in enumerate(ways):
        dtype = DTYPES[number % 3]
        for options in OPTIONS:
            found[f"{form}, {kind}, {options}"] = partial(generation, form, kind, dtype, options, padded=True)
        found[f"{form}, {kind}, no padding"] = partial(generation, form, kind, dtype, "greedy", padded=False)
        found[f"{form}, {kind}, scoring"] = partial(scoring, form, kind, dtype)
    found["streaming"] = streaming
    for precision, batching in itertools.product(("fp16", "bf16", "tf32"), ("packed", "grouped")):
        found[f"training, {precision}, {batching}"] = partial(training, **{precision: True}, batching=batching)
    found["training, fp16 on a T4"] = partial(training, (7, 5), fp16=True)
    found["training, recomputed"] = partial(training, bf16=True, recompute=True)
    found["training, bf16 with heads of 4"] = partial(training, heads=32, bf16=True)
    found["second GPU"] = partial(generation, "graphed", "125m", torch.float16, "greedy", True, "cuda:1")
    found["again"] = partial(generation, "graphed", "125m", torch.float16, "sampling", False, times=3)
    return found


def main() -> None:
    results = {}
    for name, case in cases().items():
        try:
            results[name] = vars(case())
        except Exception:  # a line for each operator that torch has is of no use
            lines = [line for line in traceback.format_exc().splitlines() if "registered at" not in line]
            results[name] = {"error": "\n".join(lines[-30:])[:3000]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

"""What the checks of gpu_acceptance.py share: where they run, models without files, and texts.

``Here`` is a GPU, or in a rehearsal the CPU with tiny models and stand-ins for what only CUDA has.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

import minopt
from minopt import DEMO, OPT, Example, OPTConfig, Tokenizer, int8, loading
from minopt.checkpoint.names import parameter_shapes, to_hf
from minopt.devices import has_bfloat16
from minopt.inference import graphs, linear
from minopt.training.config import TrainingConfig

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128,
         "max_position_embeddings": 512, "word_embed_proj_dim": 64}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
}
FORMS: dict[str, Any] = {"plain": False, "load()": True, "compiled": "compile"}  # the option optimize
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 1},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "n-grams": {"no_repeat_ngram_size": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
}
WORDS = ["the", "ship", "sailed", "out", "upon", "a", "dark", "sea", "and", "we", "saw", "no", "land", "for", "days"]


class Skipped(Exception):
    """A check cannot run here; the text says why."""


class Here:
    """Where checks run: a GPU, or in a rehearsal the CPU with tiny models and stand-ins for what only CUDA has."""

    def __init__(self, folder: Path, rehearse: bool) -> None:
        self.folder, self.rehearse = folder, rehearse
        self.device, self.kind = torch.device("cpu" if rehearse else "cuda:0"), "cpu" if rehearse else "cuda"
        self.half = torch.bfloat16 if has_bfloat16(self.device) else torch.float16
        if rehearse:
            stand_in()

    def say(self, figure: str, value: Any, case: str = "", reason: str = "") -> None:
        """Reports a figure: a number, a text, or ``None`` with the reason why it is not there."""
        if not isinstance(value, (str, type(None))):
            value = float(f"{float(value):.5g}") if math.isfinite(value) else None
        print(json.dumps({"figure": figure, "case": case, "value": value, "reason": reason}), flush=True)

    def size(self, name: str) -> OPTConfig:
        """A published size; in a rehearsal a tiny model that reads the small model's tokens."""
        config = OPTConfig.preset(name)
        return replace(config, **SMALL | {"vocab_size": 2048}) if self.rehearse else config

    def seconds(self, run: Callable[[], object]) -> float:
        return common.seconds(run, self.kind)

    def count(self, usual: int, rehearsed: int) -> int:
        return rehearsed if self.rehearse else usual

    def free_bytes(self) -> int:
        return 10**11 if self.rehearse else torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Gives back the memory of models that are gone; graphs and their model refer to each other."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def bandwidth(self) -> float:
        """Bytes a second, reading."""
        return common.read_bytes_per_second(self.kind, self.count(400_000_000, 1_000_000))

    def matrix_peak(self) -> float:
        """FLOPs a second of a large product in 16 bits."""
        return 1e12 if self.rehearse else common.matmul_flops_per_second(self.half, self.kind)

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Counts by line of code how often the host waits for the GPU within, which it never does for a CPU."""
        found = Counter[str]()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not self.rehearse:
                torch.cuda.set_sync_debug_mode("warn")
            yield found
            if not self.rehearse:
                torch.cuda.set_sync_debug_mode("default")
        places = [w for w in caught if "called a synchronizing" in str(w.message)]
        found.update(f"{Path(place.filename).name}:{place.lineno}" for place in places)


def stand_in() -> None:
    """Makes the CPU take a GPU's ways: its products, graphs that run their step, a compiler that only traces it."""
    fits: dict[str, Any] = {"graphs": lambda options, _: bool(options.optimize), "compile": lambda *_: False}
    loading.FORMS = tuple(replace(form, fits=fits.get(form.name, form.fits)) for form in loading.FORMS)
    graphs.capture = lambda step, *_: step() is not None and step  # it runs before it is captured
    linear.kind_on_cpu = lambda _: linear.OnGPU  # type: ignore
    linear._works = lambda *_: False  # type: ignore  # other products of int8
    compile_ = torch.compile
    torch.compile = lambda run, **options: compile_(run, backend="eager", dynamic=options.get("dynamic"))  # type: ignore


def lively(config: OPTConfig, by: float, **where: Any) -> OPT:
    """A model each of whose parameters is moved: as drawn, biases are 0 and norms 1, which hides their loss."""
    torch.manual_seed(0)
    model = OPT(config, **where).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
        if by > 0.1:  # or texts settle on one token
            model.embed_positions.weight.mul_(3)
            for name, parameter in model.named_parameters():
                if not config.do_layer_norm_before and name.endswith(("fc2.weight", "out_proj.weight")):
                    parameter.mul_(0.1)
    return model


def weights(config: OPTConfig, here: Here, quantize: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights drawn on the device one after another: a whole model is never there twice."""
    torch.manual_seed(0)
    for name, shape in parameter_shapes(config).items():
        weight = torch.empty(shape, dtype=here.half, device=here.device).normal_(std=0.02)
        if name.endswith("norm.weight"):
            weight += 1
        if quantize and int8.is_quantized(name):
            weight, scale = int8.quantize(weight)
            yield name + int8.SCALE, scale
        yield name, weight


def built(here: Here, config: OPTConfig, *, quantize: bool = False, compiled: bool = False) -> graphs.GraphedOPT:
    """The decoder that ``load`` makes, without files."""
    return graphs.GraphedOPT(config, weights(config, here, quantize), compile_step=compiled)


def draw(config: OPTConfig, rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def new_tokens(decoder: Any, ids: Tensor, mask: Tensor | None = None, count: int = 20, **options: Any) -> Tensor:
    """The tokens of ``generate``, prompts too, on the CPU."""
    return minopt.generate(decoder, ids, mask, max_new_tokens=count, eos_token_id=(), **options).sequences.cpu()


def padded(config: OPTConfig) -> tuple[Tensor, Tensor]:
    """Two prompts of 12 and 7 tokens that repeat themselves."""
    ids = (torch.arange(24).view(2, 12) % 4 * 7 + 5) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def reference(here: Here, config: OPTConfig, state: Mapping[str, Tensor] | None, dtype: torch.dtype) -> Any:
    """transformers' model with these weights, or its own; ``None`` where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never larger than it has to be
    with torch.device(here.device):
        model = transformers.OPTForCausalLM(transformers.OPTConfig.from_dict(config.to_dict())).eval()
    torch.set_default_dtype(default)
    if state is not None:
        left = model.load_state_dict({to_hf(name): tensor for name, tensor in state.items()}, strict=False)
        assert not left.unexpected_keys
        assert set(left.missing_keys) <= {"lm_head.weight"}
    return model


def in_half(here: Here) -> dict[str, bool]:
    """The settings of a run in 16 bits."""
    return {"bf16": True} if here.half == torch.bfloat16 else {"fp16": True}


def examples(count: int, words: int = 30) -> list[Example]:
    drawn = random.Random(0)

    def text(most: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(3, most)))

    return [Example(text(words), f" {text(8)}", id=str(n)) for n in range(count)]


def fit(here: Here, name: str, data: Any, model: OPT | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Trains a model (the small one of the package) in a folder of that name; the lines of its metrics."""
    model = minopt.load_model(DEMO, device="cpu", dtype="float32") if model is None else model
    defaults = {"device": here.kind, "per_device_train_batch_size": 4, "src_length": 96, "tgt_length": 32,
                "tf32": False, "dropout": 0.0, "learning_rate": 1e-4, "logging_steps": 1,
                "save_steps": 10**6}  # fmt: skip
    config = TrainingConfig(output_dir=str(here.folder / name), **defaults | settings)
    minopt.train(model, data, config, tokenizer=Tokenizer.load(DEMO))
    return [json.loads(line) for line in (here.folder / name / "metrics.jsonl").read_text().splitlines()]

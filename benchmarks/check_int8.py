"""What int8 costs in quality: perplexity of the embedded model, and errors of logits where activations have outliers.

    python benchmarks/check_int8.py --books the-time-machine.txt peter-pan.txt [--hardware NAME]

Perplexity: on books that the model was not trained on, in windows that do not overlap. Errors: of an opt-125m-size
model with random weights, and of the same with six channels 60 times as large behind each norm (and the weights that
read them as much smaller, so that it is the same function); the norm of the difference from float32 as a share of that
of the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from torch import Tensor

import minopt
from minopt import OPT, OPTConfig, Tokenizer, int8
from minopt.evaluation.perplexity import window_perplexity
from minopt.inference import fast, linear
from minopt.inference.fast import FastOPT

OUTLIERS = (3, 77, 200, 411, 600, 701)
FACTOR = 60.0

# Which weights, and how activations are rounded; None of them is float32.
SCHEMES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantize": True},
    "int8, rest of activations too": {"quantize": True, "outliers": True},
    "int8 weights alone": {"quantize": True, "weights_alone": True},
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--books", nargs="+", required=True, type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"topic": "int8", **common.machine("cpu"), "perplexity": {}, "logit_error": {}}
    model, tokenizer = minopt.load_model(minopt.DEMO, device="cpu"), Tokenizer.load(minopt.DEMO)
    for book in args.books:
        ids = tokenizer.encode(book.read_text(encoding="utf-8"))
        found = {name: window_perplexity(build(model, **how), ids).perplexity for name, how in SCHEMES.items()}
        result["perplexity"][book.stem] = {name: round(value, 4) for name, value in found.items()}
        print(book.stem, result["perplexity"][book.stem], flush=True)
    model = random_model()
    ids = torch.randint(10, model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    for name in ("random weights", "outlier channels"):
        if name == "outlier channels":
            plant(model)
        with torch.inference_mode():
            expected = model(ids)
            result["logit_error"][name] = {
                scheme: round(error(build(model, **how)(ids), expected), 6) for scheme, how in SCHEMES.items()
            }
        print(name, result["logit_error"][name], flush=True)
    common.keep("int8", args.hardware, result)


def build(
    model: OPT, *, dtype: torch.dtype = torch.float32, quantize: bool = False, outliers: bool = False,
    weights_alone: bool = False,
) -> FastOPT:  # fmt: skip
    """A fast model of the same weights by one of the schemes."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    with (
        mock.patch.object(fast, "OUTLIERS_FROM", 1 if outliers else fast.OUTLIERS_FROM),
        mock.patch.object(linear, "_works", (lambda *_: False) if weights_alone else linear._works),
    ):
        for name in filter(int8.is_quantized, list(state) if quantize else []):
            state[name], state[name + int8.SCALE] = int8.quantize(model.state_dict()[name])
        return FastOPT(model.config, state.items())


def random_model() -> OPT:
    """opt-125m's shape, weights as a trained model's in size, so that logits are no noise of rounding."""
    torch.manual_seed(0)
    model = OPT(OPTConfig.preset("opt-125m")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.04)
            elif "norm" not in name:
                parameter.normal_(std=0.02)
    return model


@torch.no_grad()
def plant(model: OPT) -> None:
    """Makes some channels large behind each norm and the weights that read them small: the same function."""
    for layer in model.layers:
        for norm, readers in (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("final_layer_norm", ("fc1",)),
        ):
            layer.get_submodule(norm).weight[list(OUTLIERS)] *= FACTOR
            layer.get_submodule(norm).bias[list(OUTLIERS)] *= FACTOR
            for reader in readers:
                layer.get_submodule(reader).weight[:, list(OUTLIERS)] /= FACTOR


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()

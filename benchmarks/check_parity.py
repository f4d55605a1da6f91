"""How far minopt is from transformers: logits and greedy tokens of the three kinds of OPT, parameters perturbed.

    python benchmarks/check_parity.py [--hardware NAME]

Differences are relative to the largest logit. Each kind is checked with and without left padding, in float32 and
float64, and once at the size of opt-125m; a model that is broken on purpose shows what a difference looks like.
"""

from __future__ import annotations

from typing import Any

import common
import torch
import transformers

from minopt import OPT, OPTConfig, generate
from minopt.checkpoint.names import HF_HEAD, from_hf

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64,
         "max_position_embeddings": 64}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "pre-norm (125m)": SMALL,
    "post-norm, projections (350m)": SMALL | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "no biases, gelu (Galactica)": SMALL
    | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "opt-125m's size": {},
}


def main() -> None:
    parser = common.parser(__doc__)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for kind, shape in KINDS.items():
        for dtype in (torch.float32, torch.float64):
            reference, model = build(shape, dtype)
            row = {
                "kind": kind,
                "dtype": str(dtype).removeprefix("torch."),
                "logits": logits_difference(reference, model),
            }
            if dtype == torch.float32:
                row["greedy_tokens_equal"] = greedy(reference, model)
                row["negative_control"] = negative_control(reference, model)
            rows.append(row)
            print(row, flush=True)
    result = {"topic": "parity", **common.machine("cpu"), "rows": rows}
    common.keep("parity", args.hardware, result)


def build(shape: dict[str, Any], dtype: torch.dtype) -> tuple[Any, OPT]:
    """A reference with every parameter moved, and minopt's model with its weights."""
    torch.manual_seed(0)
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_((0.3 if shape else 0.02) * torch.randn_like(parameter))
    reference = reference.to(dtype)
    model = OPT(OPTConfig.from_dict(reference.config.to_dict()), dtype=dtype).eval()
    model.load_state_dict({from_hf(k): t for k, t in reference.state_dict().items() if k != HF_HEAD})
    return reference, model


def padded_batch(model: OPT, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 1 to 20 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, 20), generator=generator)
    lengths = torch.randint(1, 21, (rows, 1), generator=generator)
    mask = (torch.arange(20) >= 20 - lengths).long()
    return ids.masked_fill(mask == 0, 1), mask


@torch.inference_mode()
def logits_difference(reference: Any, model: OPT) -> dict[str, float]:
    """Largest difference of the logits of real tokens, relative to the largest logit."""
    ids, mask = padded_batch(model, 4, seed=1)
    differences = {}
    for name, attention_mask in (("plain", None), ("padded", mask)):
        expected = reference(ids, attention_mask=attention_mask).logits
        got = model(ids, attention_mask)
        real = mask.bool() if attention_mask is not None else torch.ones_like(mask).bool()
        differences[name] = ((got - expected)[real].abs().max() / expected[real].abs().max()).item()
    return differences


@torch.inference_mode()
def negative_control(reference: Any, model: OPT) -> float:
    """The difference when layer 0's fc1.bias (without biases, row 0 of fc1.weight) of minopt's model is zeroed."""
    layer = model.layers[0]
    victim = layer.fc1.bias if layer.fc1.bias is not None else layer.fc1.weight[0]
    kept = victim.clone()
    victim.zero_()
    difference = logits_difference(reference, model)["plain"]
    victim.copy_(kept)
    return difference


def greedy(reference: Any, model: OPT) -> str:
    """30 greedy tokens of 20 prompts, one at a time and in padded batches of 4."""
    equal = total = 0
    ids, mask = padded_batch(model, 20, seed=2)
    for batch in (1, 4):
        for row in range(0, 20, batch):
            part, part_mask = ids[row : row + batch], mask[row : row + batch]
            start = 20 - int(part_mask.sum(1).max())
            part, part_mask = part[:, start:], part_mask[:, start:]
            options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
            expected = reference.generate(part, attention_mask=part_mask, **options)
            got = generate(model, part, part_mask if batch > 1 else None, max_new_tokens=30, eos_token_id=()).sequences
            equal += int((got == expected).all(1).sum())
            total += len(part)
    return f"{equal} of {total} rows"


if __name__ == "__main__":
    main()

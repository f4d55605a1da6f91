"""What the tests share: small models of the three kinds, written by transformers, with every parameter perturbed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from minopt import OPT, OPTConfig, int8
from minopt.checkpoint.names import HF_HEAD, from_hf
from minopt.masks import causal_mask, positions

torch.set_num_threads(1)  # small models lose time by sharing, most of all on a busy machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

SIZE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 64}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
}


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, on which tests that name no device would run; ``pytest -m gpu`` runs those that want one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that want a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and pytest -m gpu"))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real tokenizer files, SQuAD and books, which a clone alone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data beside the project (real OPT tokenizer files, SQuAD, books)")
    return SHARED_DATA


def copy_of(folder: str | Path, target: Path) -> Path:
    """A copy of a folder's files that can be written to, wherever they come from."""
    target.mkdir(parents=True)
    for path in Path(folder).iterdir():
        shutil.copyfile(path, target / path.name)
    return target


def build_reference(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' OPT of a kind, each parameter moved: as built, biases are 0 and norms 1, which hides their loss."""
    config = transformers.OPTConfig(**(SIZE | KINDS[kind] | changes))
    torch.manual_seed(seed)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def quantized_state(model: OPT) -> dict[str, Tensor]:
    """A model's weights, those of the layers in int8 with scales."""
    state = dict(model.state_dict())
    for name in filter(int8.is_quantized, list(state)):
        state[name], state[name + int8.SCALE] = int8.quantize(state[name])
    return state


def lively(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A reference whose texts do not settle on one token at once, as those of random models do; no eos of its own."""
    reference = build_reference(kind, dtype=torch.float64, **({"eos_token_id": None} | changes))
    with torch.no_grad():
        reference.model.decoder.embed_positions.weight.mul_(3)
        if kind == "350m":  # each of its norms sets the residual stream back, and the branches' constant part wins
            for layer in reference.model.decoder.layers:
                layer.fc2.weight.mul_(0.1)
                layer.self_attn.out_proj.weight.mul_(0.1)
    return reference.to(dtype)


def build_ours(reference: Any) -> OPT:
    """minopt's model with a reference's weights, in its dtype."""
    config = OPTConfig.from_dict(reference.config.to_dict())
    model = OPT(config, dtype=reference.dtype).eval()
    model.load_state_dict({from_hf(key): t for key, t in reference.state_dict().items() if key != HF_HEAD})
    return model


def read_next(decoder: Any, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    """Reads tokens behind those in a cache; returns the logits ``[B, V]`` behind the last of each row.

    ``attention_mask`` says which tokens are real, cached ones included.
    """
    (B, T), past, device = input_ids.shape, int(cache.length), input_ids.device
    mask = None if attention_mask is None else causal_mask(attention_mask, past, T, past + T, device)
    position_ids = positions(attention_mask, past, T, device).expand(B, T)
    logits: Tensor = decoder.read(input_ids, position_ids, mask, torch.arange(T - 1, B * T, T, device=device), cache)
    return logits


def pad_left(rows: list[Tensor], pad: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in rows])
    return ids, torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest number; where one is infinite, the other is too."""
    assert ours.shape == theirs.shape
    finite = theirs.isfinite()
    assert torch.equal(finite, ours.isfinite())
    return ((ours - theirs)[finite].abs().max() / theirs[finite].abs().max()).item()


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each of the three kinds of OPT in turn."""
    return request.param


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a reference model as transformers does: ``write(kind, **config changes) -> folder``."""

    def write(kind: str = "125m", name: str = "model", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path / name
        build_reference(kind, dtype=dtype, **changes).save_pretrained(folder)
        return folder

    return write

"""The one table of parameters, and their names: minopt <-> Hugging Face <-> metaseq.

minopt's names are Hugging Face's without their prefix. A key of a file is translated, ignored on purpose, or given back
as it is, so that it is reported as unexpected.
"""

from __future__ import annotations

import re

from minopt.config import OPTConfig
from minopt.model import POSITION_OFFSET

# Parameters in the model's order: their dims, and the one along which metaseq's model parallel parts split them (its
# scripts/reshard_mp.py; None: each part holds the whole). V vocab_size, E embed_dim, P rows of the table of positions,
# C hidden_size, F ffn_dim.
PARAMETERS: dict[str, tuple[str, int | None]] = {
    "embed_tokens.weight": ("VE", 0),
    "embed_positions.weight": ("PC", None),
    "project_in.weight": ("CE", None),
    "layers.N.self_attn.k_proj.weight": ("CC", 0),
    "layers.N.self_attn.k_proj.bias": ("C", 0),
    "layers.N.self_attn.v_proj.weight": ("CC", 0),
    "layers.N.self_attn.v_proj.bias": ("C", 0),
    "layers.N.self_attn.q_proj.weight": ("CC", 0),
    "layers.N.self_attn.q_proj.bias": ("C", 0),
    "layers.N.self_attn.out_proj.weight": ("CC", 1),
    "layers.N.self_attn.out_proj.bias": ("C", None),
    "layers.N.self_attn_layer_norm.weight": ("C", None),
    "layers.N.self_attn_layer_norm.bias": ("C", None),
    "layers.N.fc1.weight": ("FC", 0),
    "layers.N.fc1.bias": ("F", 0),
    "layers.N.fc2.weight": ("CF", 1),
    "layers.N.fc2.bias": ("C", None),
    "layers.N.final_layer_norm.weight": ("C", None),
    "layers.N.final_layer_norm.bias": ("C", None),
    "final_layer_norm.weight": ("C", None),
    "final_layer_norm.bias": ("C", None),
    "project_out.weight": ("EC", None),
}
MOST_LAYERS = 1000  # the largest OPT has 96

_LAYER = re.compile(r"^layers\.(0|[1-9]\d*)\.")
_OF_LAYER = [name for name in PARAMETERS if name.startswith("layers.")]
_BEFORE_LAYERS = [*PARAMETERS][: [*PARAMETERS].index(_OF_LAYER[0])]
_AFTER_LAYERS = [*PARAMETERS][len(_BEFORE_LAYERS) + len(_OF_LAYER) :]

# Modules that metaseq calls otherwise; it puts "decoder." in front of all.
_TO_METASEQ = {"project_in": "project_in_dim", "project_out": "project_out_dim", "final_layer_norm": "layer_norm"}
_FROM_METASEQ = {theirs: ours for ours, theirs in _TO_METASEQ.items()}

# metaseq's fused projection holds these one after another: keys, values, queries
# (modules/multihead_attention.py splits it so), in each part those of its own heads.
FUSED = ("k_proj", "v_proj", "q_proj")
_FUSED = "qkv_proj"

# Hugging Face: published files carry "model.decoder." (OPTForCausalLM) or "decoder." (OPTModel).
HF_PREFIXES = ("model.decoder.", "decoder.")

# The head is the token table; a file may hold it a second time, which loading compares.
HF_HEAD = "lm_head.weight"
_METASEQ_HEAD = "decoder.output_projection.weight"

# Last parts of keys that mean nothing to the model: a format number of metaseq's, and constants of other programs.
_IGNORED = frozenset({"version", "position_ids", "_float_tensor"})


def parameter_shapes(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of ``OPT(config)``, by name, in its order."""
    sizes = {"V": config.vocab_size, "E": config.embed_dim, "P": config.max_position_embeddings + POSITION_OFFSET,
             "C": config.hidden_size, "F": config.ffn_dim}  # fmt: skip

    def shapes(names: list[str]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(sizes[dim] for dim in PARAMETERS[name][0]) for name in names if _has(config, name)}

    found, layer = shapes(_BEFORE_LAYERS), shapes(_OF_LAYER)
    for i in range(config.num_hidden_layers):
        found |= {name.replace("layers.N.", f"layers.{i}."): shape for name, shape in layer.items()}
    return found | shapes(_AFTER_LAYERS)


def _has(config: OPTConfig, name: str) -> bool:
    """Whether a model of this configuration has a parameter of the table."""
    if "layer_norm" in name:
        return config.layer_norm_elementwise_affine and (name in _OF_LAYER or config.has_final_layer_norm)
    if name.startswith("project"):
        return config.embed_dim != config.hidden_size
    return config.enable_bias or name.endswith("weight")


def shard_dim(name: str) -> int | None:
    """The dim along which model parallel parts split a tensor; ``None`` if each has the whole, or for other names."""
    return PARAMETERS.get(_LAYER.sub("layers.N.", name), ("", None))[1]


def from_hf(key: str) -> str | None:
    """minopt's name of a key of a Hugging Face file; ``None`` if it is ignored; the key if it is not a decoder's."""
    for prefix in HF_PREFIXES:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return None if name.rpartition(".")[2] in _IGNORED else name
    return key


def to_hf(name: str) -> str:
    """The key under which transformers' OPTForCausalLM knows one of minopt's parameters."""
    return HF_PREFIXES[0] + name


def from_metaseq(key: str) -> tuple[str, ...]:
    """minopt's names of what a key of a metaseq file holds, in the order in which it holds them.

    One or ``HF_HEAD``; three for a fused projection; none for what is ignored; the key if it is not a decoder's.
    """
    if key == _METASEQ_HEAD:
        return (HF_HEAD,)
    name = key.removeprefix("decoder.")
    module, _, rest = name.partition(".")
    if name == key or module in _TO_METASEQ:
        return (key,)
    if name.rpartition(".")[2] in _IGNORED:
        return ()
    name = f"{_FROM_METASEQ.get(module, module)}.{rest}"
    names = [name.replace(f".{_FUSED}.", f".{part}.") for part in FUSED] if f".{_FUSED}." in name else [name]
    return tuple(names) if all(_LAYER.sub("layers.N.", n) in PARAMETERS for n in names) else (key,)


def to_metaseq(name: str) -> str:
    """metaseq's key of one of minopt's parameters, projections apart: see ``fused_key``."""
    module, _, rest = name.partition(".")
    return f"decoder.{_TO_METASEQ.get(module, module)}.{rest}"


def fused_key(name: str) -> str | None:
    """metaseq's key of the fused projection that one of minopt's parameters goes into, if it does."""
    for projection in FUSED:
        if f".{projection}." in name:
            return to_metaseq(name).replace(f".{projection}.", f".{_FUSED}.")
    return None

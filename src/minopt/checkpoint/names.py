"""The one table of names: minopt <-> Hugging Face <-> metaseq, and the dim along which metaseq splits each tensor.

minopt's names are Hugging Face's without their prefix. Both ways every key is translated, ignored on purpose, or given
back as it is, so that it is reported as unexpected.
"""

from __future__ import annotations

import re

# Hugging Face: published files carry "model.decoder." (OPTForCausalLM) or "decoder." (OPTModel).
_HF_PREFIXES = ("model.decoder.", "decoder.")

# The head is the token table; a file may hold it a second time, which loading compares.
HF_HEAD = "lm_head.weight"
METASEQ_HEAD = "decoder.output_projection.weight"

# Keys that mean nothing to the model: a format number that metaseq keeps as a buffer.
_IGNORED = frozenset({"version"})

# minopt's name: (metaseq's, the dim along which its model parallel parts split the tensor; None: each has all of it).
# The rules are those of metaseq's scripts/reshard_mp.py.
_METASEQ: dict[str, tuple[str, int | None]] = {
    "embed_tokens.weight": ("embed_tokens.weight", 0),
    "embed_positions.weight": ("embed_positions.weight", None),
    "project_in.weight": ("project_in_dim.weight", None),
    "project_out.weight": ("project_out_dim.weight", None),
    "final_layer_norm.weight": ("layer_norm.weight", None),
    "final_layer_norm.bias": ("layer_norm.bias", None),
    "layers.N.self_attn.k_proj.weight": ("layers.N.self_attn.k_proj.weight", 0),
    "layers.N.self_attn.k_proj.bias": ("layers.N.self_attn.k_proj.bias", 0),
    "layers.N.self_attn.v_proj.weight": ("layers.N.self_attn.v_proj.weight", 0),
    "layers.N.self_attn.v_proj.bias": ("layers.N.self_attn.v_proj.bias", 0),
    "layers.N.self_attn.q_proj.weight": ("layers.N.self_attn.q_proj.weight", 0),
    "layers.N.self_attn.q_proj.bias": ("layers.N.self_attn.q_proj.bias", 0),
    "layers.N.self_attn.out_proj.weight": ("layers.N.self_attn.out_proj.weight", 1),
    "layers.N.self_attn.out_proj.bias": ("layers.N.self_attn.out_proj.bias", None),
    "layers.N.self_attn_layer_norm.weight": ("layers.N.self_attn_layer_norm.weight", None),
    "layers.N.self_attn_layer_norm.bias": ("layers.N.self_attn_layer_norm.bias", None),
    "layers.N.fc1.weight": ("layers.N.fc1.weight", 0),
    "layers.N.fc1.bias": ("layers.N.fc1.bias", 0),
    "layers.N.fc2.weight": ("layers.N.fc2.weight", 1),
    "layers.N.fc2.bias": ("layers.N.fc2.bias", None),
    "layers.N.final_layer_norm.weight": ("layers.N.final_layer_norm.weight", None),
    "layers.N.final_layer_norm.bias": ("layers.N.final_layer_norm.bias", None),
}
_FROM_METASEQ = {theirs: ours for ours, (theirs, _) in _METASEQ.items()}

# metaseq's fused projection holds these one after another: keys, values, queries
# (modules/multihead_attention.py splits it so), in each part those of its own heads.
FUSED = ("k_proj", "v_proj", "q_proj")
_FUSED = "qkv_proj"

# What no Hugging Face file has.
_METASEQ_ONLY = re.compile(r"(^|\.)flat_param_\d+$|\.qkv_proj\.|^decoder\.(layer_norm|project_(in|out)_dim)\.")

_LAYER = re.compile(r"^layers\.(0|[1-9]\d*)\.")

# Keys by which other models can be told, for a helpful error.
_OTHERS = {
    "LLaMA (or a model of its shape)": r"mlp\.gate_proj\.weight$|feed_forward\.w1\.weight$",
    "GPT-2": r"(^|\.)h\.\d+\.attn\.c_attn\.weight$",
    "GPT-NeoX": r"gpt_neox\.layers\.|\.attention\.dense_h_to_4h\.",
    "GPT-J": r"\.h\.\d+\.attn\.q_proj\.weight$",
    "BLOOM or Falcon": r"\.self_attention\.query_key_value\.weight$",
    "BERT or RoBERTa": r"encoder\.layer\.\d+\.attention\.self\.query\.weight$",
    "T5": r"(encoder|decoder)\.block\.\d+\.layer\.",
    "BART or another encoder-decoder": r"(^|\.)encoder\.layers\.\d+\.",
}


def from_hf(key: str) -> str | None:
    """minopt's name of a key of a Hugging Face file.

    Returns:
        The name; ``None`` for a key that is ignored on purpose; the key itself where it is not one of a decoder's,
        so that it is reported as unexpected.
    """
    for prefix in _HF_PREFIXES:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return None if name in _IGNORED else name
    return key


def to_hf(name: str) -> str:
    """The key under which transformers' OPTForCausalLM knows one of minopt's parameters."""
    return _HF_PREFIXES[0] + name


def from_metaseq(key: str) -> tuple[str, ...]:
    """minopt's names of what a key of a metaseq file holds, in the order in which it holds them.

    Returns:
        One name; three for a fused projection, whose first dim is theirs one after another; none for a key that is
        ignored on purpose; the key itself where it is not one of a decoder's.
    """
    prefix, dot, rest = key.partition(".")
    if prefix != "decoder" or not dot:
        return (key,)
    if rest in _IGNORED:
        return ()
    layer = _LAYER.match(rest)
    number = layer.group(1) if layer else ""
    template = _LAYER.sub("layers.N.", rest)
    fused = [template.replace(f".{_FUSED}.", f".{name}.") for name in FUSED] if f".{_FUSED}." in template else []
    names = [_FROM_METASEQ.get(one) for one in fused or [template]]
    if None in names:
        return (key,)
    return tuple(str(name).replace("layers.N.", f"layers.{number}.") for name in names)


def to_metaseq(name: str) -> str:
    """metaseq's key of one of minopt's parameters, projections apart: see ``fused_key``.

    Raises:
        KeyError: if there is no such parameter.
    """
    theirs, _ = _METASEQ[_LAYER.sub("layers.N.", name)]
    layer = _LAYER.match(name)
    return "decoder." + theirs.replace("layers.N.", layer.group() if layer else "")


def fused_key(name: str) -> str | None:
    """metaseq's key of the fused projection that one of minopt's parameters goes into, if it does."""
    for projection in FUSED:
        if f".{projection}." in name:
            return to_metaseq(name).replace(f".{projection}.", f".{_FUSED}.")
    return None


def shard_dim(name: str) -> int | None:
    """The dim along which metaseq's parts split one of minopt's parameters, ``None`` if each holds all of it.

    Raises:
        KeyError: if there is no such parameter.
    """
    return _METASEQ[_LAYER.sub("layers.N.", name)][1]


def is_metaseq(keys: list[str]) -> bool:
    """Whether keys are those of a metaseq file and not of a Hugging Face one."""
    return any(_METASEQ_ONLY.search(key) for key in keys)


def looks_like(keys: list[str]) -> str | None:
    """The name of the other architecture that keys belong to, if they give it away."""
    return next((name for name, form in _OTHERS.items() if any(re.search(form, key) for key in keys)), None)

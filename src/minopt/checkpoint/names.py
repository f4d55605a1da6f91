"""The one table of names: minopt <-> Hugging Face <-> metaseq, and the dim along which metaseq splits each tensor.

minopt's names are Hugging Face's without their prefix. Both ways every key is translated, ignored on purpose, or given
back as it is, so that it is reported as unexpected.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from minopt.checkpoint.errors import CheckpointError, some

logger = logging.getLogger(__name__)

# Hugging Face: published files carry "model.decoder." (OPTForCausalLM) or "decoder." (OPTModel).
_HF_PREFIXES = ("model.decoder.", "decoder.")

# The head is the token table; a file may hold it a second time, which loading compares.
HF_HEAD = "lm_head.weight"
METASEQ_HEAD = "decoder.output_projection.weight"

# Last parts of keys that mean nothing to the model: a format number that metaseq keeps as a buffer, and constants that
# other programs do.
_IGNORED = frozenset({"version", "position_ids", "_float_tensor"})

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
_METASEQ_ONLY = re.compile(r"(^|\.)flat_param_\d+$|\.qkv_proj\.|(^|\.)decoder\.(layer_norm|project_(in|out)_dim)\.")

# Of what PEFT puts into the modules that it adapts.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|ia3_\w+|base_layer|modules_to_save|prompt_encoder)(\.|$)")

_LAYER = re.compile(r"^layers\.(0|[1-9]\d*)\.")

# A key that ends as a decoder's do: what is in front, and the name. The shortest front: a layer has a final_layer_norm.
_IN_DECODER = re.compile(
    r"((?:.*?\.)??)("
    + "|".join(
        re.escape(name).replace(r"layers\.N\.", r"layers\.\d+\.")
        for name in [*_METASEQ, *_FROM_METASEQ, *(f"layers.N.self_attn.{_FUSED}.{end}" for end in ("weight", "bias"))]
    )
    + r"|flat_param_\d+)"
)

# Modules that hold parts of an OPT, by the last parts of their names.
_OWN_MODULES = {"", "decoder"} | {part for name in (*_METASEQ, *_FROM_METASEQ) for part in name.split(".")[:-1]}

_LONGEST = 1000  # characters of a key that is looked at closely

# The attribute in which a wrapper keeps what it wraps: DDP's, and those of torch.compile, FSDP and recomputation.
_WRAPPER = re.compile(r"(?<![^.])(module|_\w+)\.")

# What stands beside a decoder and computes something else from it, by the beginning of its name.
_HEADS = {
    "score": "a classifier's head, as of OPTForSequenceClassification",
    "classifier": "a classifier's head",
    "qa_outputs": "the head of OPTForQuestionAnswering",
    "v_head": "TRL's value head",
    "lm_head": "of a head that is more than the token table, to which OPT's is tied",
}

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


def own_keys(keys: Iterable[str], ignore: Sequence[str], where: object, *, say: bool = True) -> dict[str, str]:
    """The keys of an OPT, as they are where nothing wraps it, by its keys in the files.

    What a wrapper or a larger model has put in front of all of them is taken off, whatever it is. Other parts of a
    larger model are left out. What belongs to the OPT itself, but is none of its tensors, is not.

    Args:
        keys: all of a checkpoint's.
        ignore: patterns of keys to leave out.
        where: they are, for messages.
        say: log what was taken off and left out.

    Raises:
        CheckpointError: if they are of several decoders, or of none.
    """
    plain = {key: _unwrapped(key) for key in keys}
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        ignored = [key for key, name in plain.items() if fnmatchcase(key, pattern) or fnmatchcase(name, pattern)]
        if not ignored:
            logger.warning("%s: ignore: no tensor is called %s.", where, pattern)
        plain = {key: name for key, name in plain.items() if key not in ignored}
    root = _root(list(plain.values()), where)
    own: dict[str, str] = {}
    for key, name in plain.items():
        inside = _without_common(name, root)
        if name.startswith(root) or inside.split(".")[0] in _HEADS:
            own[key] = inside
    wrapped = next((key for key, name in own.items() if key != name and is_decoders(key)), None)
    if say and wrapped is not None:
        beside = Counter(name.partition(".")[0] for key, name in plain.items() if key not in own)
        rest = ""
        if beside:
            parts = some([f"{name} ({count})" for name, count in beside.items()], 8)
            rest = f" Tensors of other parts of a larger model are left out: {parts}."
        logger.warning(
            "%s: names are those of a wrapped model: %s is read as %s.%s", where, wrapped, own[wrapped], rest
        )
    return own


def _unwrapped(key: str) -> str:
    return _WRAPPER.sub("", key) if len(key) <= _LONGEST else key


def _root(names: list[str], where: object) -> str:
    """What stands in front of all names of the one OPT."""
    found: dict[str, set[str]] = {}
    for name in names:
        if len(name) <= _LONGEST and (match := _IN_DECODER.fullmatch(name)):
            found.setdefault(match[1], set()).add(match[2])
    # Encoders have layers of the same names, but no tables of both tokens and positions.
    for tables in ({"embed_positions.weight", "embed_tokens.weight"}, {"embed_positions.weight"}):
        if whole := [front for front, inner in found.items() if tables <= inner]:
            break
    if len(whole) != 1 and (other := looks_like(names)):
        raise CheckpointError(f"{where}: this looks like {other}, not an OPT. minopt opens OPT and Galactica.")
    if len(whole) > 1:
        raise CheckpointError(
            f"{where}: expected one OPT, got {len(whole)} decoders, whose names begin with {some(sorted(whole))}. "
            f'Leave out all but one: ignore=["{max(whole, key=len)}*"] (--ignore "{max(whole, key=len)}*").'
        )
    if any(map(_ADAPTER.search, names)) and not found:
        raise CheckpointError(f"{where}: expected a model's tensors, got {some(names)}. {left_out(names)}")
    if not found:
        raise CheckpointError(
            f"{where}: none of its tensors is called as an OPT's: expected {to_hf('embed_tokens.weight')}, "
            f"{to_hf('layers.0.fc1.weight')} and so on, whatever stands in front, got {some(names) or 'nothing'}."
        )
    front = whole[0] if whole else max(found, key=lambda front: len(found[front]))
    return next((front.removesuffix(end) for end in _HF_PREFIXES if f".{front}".endswith(f".{end}")), front)


def _without_common(name: str, root: str) -> str:
    """A name without the components with which it begins as ``root`` does."""
    parts, own = root.split(".")[:-1], name.split(".")
    count = next((i for i, part in enumerate(parts) if own[i : i + 1] != [part]), len(parts))
    return ".".join(own[count:])


def described(key: str) -> str:
    """A key that an OPT does not have, and what it is if that is known."""
    what = next((_HEADS[part] for part in key.split(".") if part in _HEADS), None)
    return f"{key}: {what}" if what else key


def left_out(keys: Sequence[str]) -> str:
    """What to do about keys that an OPT does not have: leave them out, but for an adapter's."""
    if any(_ADAPTER.search(key) for key in keys):
        return "They are an adapter's: merge it into the model first (PEFT: merge_and_unload)."
    names: dict[str, None] = {}
    for key in keys:
        folder = key.rpartition(".")[0]
        last = folder.rpartition(".")[2]
        name = key if last in _OWN_MODULES or last.isdigit() else f"{folder}.*"
        names[re.sub(r"\.\d+\.(?=[^.]+\.)", ".*.", name)] = None  # of all layers at once
    patterns = list(names)[:5]
    flags = " ".join(f'--ignore "{pattern}"' for pattern in patterns)
    return f"To load all else, leave them out: ignore={patterns} ({flags})."


def is_decoders(key: str) -> bool:
    """Whether a key ends as those of an OPT do, of either kind."""
    return len(key) <= _LONGEST and _IN_DECODER.fullmatch(_unwrapped(key)) is not None


def from_hf(key: str) -> str | None:
    """minopt's name of a key of a Hugging Face file.

    Returns:
        The name; ``None`` for a key that is ignored on purpose; the key itself where it is not one of a decoder's,
        so that it is reported as unexpected.
    """
    for prefix in _HF_PREFIXES:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return None if name.rpartition(".")[2] in _IGNORED else name
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
    if rest.rpartition(".")[2] in _IGNORED:
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


def is_metaseq(keys: Iterable[str]) -> bool:
    """Whether keys are those of a metaseq file and not of a Hugging Face one."""
    return any(_METASEQ_ONLY.search(key) for key in keys)


def looks_like(keys: list[str]) -> str | None:
    """The name of the other architecture that keys belong to, if they give it away."""
    return next((name for name, form in _OTHERS.items() if any(re.search(form, key) for key in keys)), None)

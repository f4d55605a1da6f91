"""Finds the OPT's keys among those of a checkpoint, whatever wraps it or stands beside it.

DDP, FSDP, torch.compile and larger models put names in front of a model's own; heads and other models lie beside them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.names import HF_PREFIXES, PARAMETERS, fused_key, to_hf, to_metaseq

logger = logging.getLogger(__name__)

# What no Hugging Face file has.
_METASEQ_ONLY = re.compile(r"(^|\.)flat_param_\d+$|\.qkv_proj\.|(^|\.)decoder\.(layer_norm|project_(in|out)_dim)\.")

# All names of parameters, minopt's and metaseq's, projections fused or apart.
_NAMES = {name.removeprefix("decoder."): None for ours in PARAMETERS
          for name in (ours, to_metaseq(ours), fused_key(ours) or ours)}  # fmt: skip

# A key that ends as a decoder's do: what is in front, and the name. The shortest front: a layer has a final_layer_norm.
_IN_DECODER = re.compile(
    r"((?:.*?\.)??)("
    + "|".join(re.escape(name).replace(r"layers\.N\.", r"layers\.\d+\.") for name in _NAMES)
    + r"|flat_param_\d+)"
)

# Modules that hold parts of an OPT, by the last parts of their names.
_OWN_MODULES = {"", "decoder"} | {part for name in _NAMES for part in name.split(".")[:-1]}

_LONGEST = 1000  # characters of a key that is looked at closely

# The attribute in which a wrapper keeps what it wraps: DDP's, and those of torch.compile, FSDP and recomputation.
_WRAPPER = re.compile(r"(?<![^.])(module|_\w+)\.")

# Of what PEFT puts into the modules that it adapts.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|ia3_\w+|base_layer|modules_to_save|prompt_encoder)(\.|$)")

# What stands beside a decoder and computes something else from it, by the beginning of its name.
_HEADS = {
    "score": "a classifier's head (OPTForSequenceClassification), which minopt.SequenceClassifier.load opens",
    "classifier": "a classifier's head",
    "qa_outputs": "the head of OPTForQuestionAnswering, which minopt.QuestionAnswering.load opens",
    "v_head": "TRL's value head",
    "lm_head": "of a head that is more than the token table, to which OPT's is tied",
}


def is_metaseq(keys: Iterable[str]) -> bool:
    """Whether keys are those of a metaseq file and not of a Hugging Face one."""
    return any(_METASEQ_ONLY.search(key) for key in keys)


def is_decoders(key: str) -> bool:
    """Whether a key ends as those of an OPT do, of either kind."""
    return len(key) <= _LONGEST and _IN_DECODER.fullmatch(_unwrapped(key)) is not None


def own_keys(keys: Iterable[str], ignore: Sequence[str], where: object, *, say: bool = True) -> dict[str, str]:
    """The keys of the one OPT among those of a checkpoint, and what each is called where nothing wraps the model.

    What stands in front of all keys is taken off. Other parts of a larger model are left out. A key of the OPT that is
    none of its tensors stays, so that it is reported.

    Args:
        keys, where: all keys, and the file or folder that messages name.
        ignore: patterns of keys to leave out.
        say: whether to log what was taken off and left out.
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
        inside, front = name.split("."), root.split(".")[:-1]
        while front and inside[0] == front[0] and len(inside) > 1:  # a head may lie one wrapper further out
            inside, front = inside[1:], front[1:]
        if name.startswith(root) or inside[0] in _HEADS:
            own[key] = ".".join(inside)
    wrapped = next((key for key, name in own.items() if key != name and is_decoders(key)), None)
    if say and wrapped is not None:
        beside = Counter(name.partition(".")[0] for key, name in plain.items() if key not in own)
        parts = some([f"{name} ({count})" for name, count in beside.items()], 8)
        rest = f" Tensors of other parts of a larger model are left out: {parts}." if beside else ""
        logger.warning(
            "%s: names are those of a wrapped model: %s is read as %s.%s", where, wrapped, own[wrapped], rest
        )
    return own


def _unwrapped(key: str) -> str:
    return _WRAPPER.sub("", key) if len(key) <= _LONGEST else key


def _root(names: list[str], where: object) -> str:
    """The prefix of all names of the one OPT."""
    found: dict[str, set[str]] = {}
    for name in names:
        if len(name) <= _LONGEST and (match := _IN_DECODER.fullmatch(name)):
            found.setdefault(match[1], set()).add(match[2])
    # Encoders have layers of the same names, but no tables of both tokens and positions.
    for tables in ({"embed_positions.weight", "embed_tokens.weight"}, {"embed_positions.weight"}):
        if whole := [front for front, inner in found.items() if tables <= inner]:
            break
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
            f"{to_hf('layers.0.fc1.weight')} and so on, whatever stands in front, got {some(names) or 'nothing'}. "
            "minopt opens OPT and Galactica."
        )
    front = whole[0] if whole else max(found, key=lambda front: len(found[front]))
    return next((front.removesuffix(end) for end in HF_PREFIXES if f".{front}".endswith(f".{end}")), front)


def described(key: str) -> str:
    """A key that an OPT does not have, and what it is if that is known."""
    what = next((_HEADS[part] for part in key.split(".") if part in _HEADS), None)
    return f"{key}: {what}" if what else key


def left_out(keys: Sequence[str]) -> str:
    """The advice about keys that an OPT does not have: leave them out, but for an adapter's."""
    if any(_ADAPTER.search(key) for key in keys):
        return ("They are an adapter's: merge it into the model first (PEFT: merge_and_unload). A folder that holds an "
                "adapter alone is given beside its model: --adapter.")  # fmt: skip
    names: dict[str, None] = {}
    for key in keys:
        folder = key.rpartition(".")[0]
        last = folder.rpartition(".")[2]
        name = key if last in _OWN_MODULES or last.isdigit() else f"{folder}.*"
        names[re.sub(r"\.\d+\.(?=[^.]+\.)", ".*.", name)] = None  # of all layers at once
    patterns = list(names)[:5]
    flags = " ".join(f'--ignore "{pattern}"' for pattern in patterns)
    return f"To load all else, leave them out: ignore={patterns} ({flags})."

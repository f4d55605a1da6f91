"""The rule between the names of minopt's parameters and the keys of published files, both ways."""

from __future__ import annotations

# Hugging Face: published files carry "model.decoder." (OPTForCausalLM) or "decoder." (OPTModel).
_HF_PREFIXES = ("model.decoder.", "decoder.")

# The head is the token table; a file may hold it a second time, which loading compares.
HF_HEAD = "lm_head.weight"

# Keys that mean nothing to the model: a format number that metaseq keeps as a buffer.
_IGNORED = frozenset({"version"})


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

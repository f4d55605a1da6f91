"""The configuration that metaseq keeps beside the tensors, as ``cfg``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minopt.checkpoint.pickles import Placeholder
from minopt.config import OPTConfig, is_int

# minopt's names of metaseq's settings (models/transformer_lm.py). What it says of pre-norm is not to be trusted.
_SIZES = {
    "hidden_size": "decoder_embed_dim",
    "ffn_dim": "decoder_ffn_embed_dim",
    "num_hidden_layers": "decoder_layers",
    "word_embed_proj_dim": "decoder_input_dim",
    "num_attention_heads": "decoder_attention_heads",
    "max_position_embeddings": "max_target_positions",
}
_NEGATED = {"enable_bias": "disable_bias", "layer_norm_elementwise_affine": "disable_affine_ln"}
_COPIED = {"activation_function": "activation_fn", "dropout": "dropout", "attention_dropout": "attention_dropout"}

_ALWAYS = {
    **dict.fromkeys(("_name", "arch"), "transformer_lm_megatron"),
    **dict.fromkeys(("decoder_learned_pos", "no_scale_embedding", "no_emb_dropout"), True),
    **dict.fromkeys(("decoder_learned_sinusoidal", "alibi"), False),
    "share_decoder_input_output_embed": True,
}


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file's ``cfg["model"]`` says, or ``args`` in older files, whatever classes these were objects of.

    Returns:
        Fields of a configuration by minopt's names; ``alibi`` and ``no_scale_embedding`` where no OPT has such.
    """
    of_model = _fields(_fields(content.get("cfg")).get("model")) or _fields(content.get("args"))
    plain = {key: _plain(value) for key, value in of_model.items() if isinstance(key, str)}
    plain = {key: value for key, value in plain.items() if not is_int(value) or abs(value) < 2**63}  # can be shown
    told = {ours: plain[theirs] for ours, theirs in _SIZES.items() if is_int(plain.get(theirs))}
    told |= {ours: not plain[theirs] for ours, theirs in _NEGATED.items() if isinstance(plain.get(theirs), bool)}
    told |= {
        ours: plain[theirs] for ours, theirs in _COPIED.items() if isinstance(plain.get(theirs), (str, float, int))
    }
    odd = {"alibi": True, "no_scale_embedding": False}
    return told | {name: value for name, value in odd.items() if plain.get(name) is value}


def to_settings(config: OPTConfig, parts: int) -> dict[str, Any]:
    """The ``cfg["model"]`` that metaseq writes for a model in so many parts."""
    settings = {theirs: getattr(config, ours) for ours, theirs in (_SIZES | _COPIED).items()}
    settings |= {theirs: not getattr(config, ours) for ours, theirs in _NEGATED.items()}
    settings |= dict.fromkeys(("decoder_input_dim", "decoder_output_dim"), config.embed_dim)
    return (
        settings
        | _ALWAYS
        | {
            "decoder_normalize_before": config.do_layer_norm_before,
            "tokens_per_sample": config.max_position_embeddings,
            "model_parallel_size": parts,
        }
    )


def _fields(value: Any) -> Mapping[Any, Any]:
    """The fields of a dict, of an object's state, or of an OmegaConf node, which keeps them in ``_content``."""
    if isinstance(value, Placeholder):
        value = value.state if isinstance(value.state, dict) else value.items
        value = value.get("_content", value)
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    """The value of an OmegaConf leaf, which keeps it in ``_val``, or of an enumeration's member; else as it is."""
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
        value = value.state.get("_val")
    if isinstance(value, Placeholder) and len(value.arguments) == 1:
        value = value.arguments[0]
    return value

"""The configuration that metaseq keeps beside the tensors, as ``cfg``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minopt.checkpoint.config import build_config, infer_config
from minopt.checkpoint.errors import CheckpointError
from minopt.checkpoint.pickles import Placeholder
from minopt.config import OPTConfig, is_int

# Fields of metaseq's configuration that the tensors confirm or contradict.
_CONFIRMED = {"hidden_size": "decoder_embed_dim", "ffn_dim": "decoder_ffn_embed_dim",
              "num_hidden_layers": "decoder_layers", "word_embed_proj_dim": "decoder_input_dim"}  # fmt: skip
_NEGATED = {"enable_bias": "disable_bias", "layer_norm_elementwise_affine": "disable_affine_ln"}
_COPIED = {"activation_function": "activation_fn", "dropout": "dropout", "attention_dropout": "attention_dropout"}
_HEADS = {"num_attention_heads": "decoder_attention_heads"}

SIZES = {**_CONFIRMED, **_HEADS, "max_position_embeddings": "max_target_positions"}
"""The sizes of a model by minopt's names, and by metaseq's."""


def config_of(settings: Mapping[str, Any], facts: Mapping[str, Any], path: object) -> tuple[OPTConfig, str]:
    """The configuration, from ``cfg`` and the tensors, or from the tensors alone; and where it comes from, in words.

    Raises:
        CheckpointError: if the two contradict each other, or the model is not an OPT.
    """
    if not is_int(settings.get("decoder_attention_heads")):
        return infer_config(facts, path), "its tensors"
    told = {ours: settings[theirs] for ours, theirs in _CONFIRMED.items() if is_int(settings.get(theirs))}
    told |= {ours: not settings[theirs] for ours, theirs in _NEGATED.items() if isinstance(settings.get(theirs), bool)}
    wrong = [f"{name} is {value} in its cfg and {facts[name]} in its tensors"
             for name, value in told.items() if facts[name] != value]  # fmt: skip
    if settings.get("alibi") is True:
        wrong.append("its cfg has alibi instead of learned positions, which OPT has")
    if settings.get("no_scale_embedding") is False:
        wrong.append("its cfg scales embeddings, which OPT does not")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}. If the tensors are right, name a config.json with "
                              "--model-config.")  # fmt: skip
    copied = {ours: settings[theirs] for ours, theirs in {**_COPIED, **_HEADS}.items()
              if settings.get(theirs) is not None}  # fmt: skip
    return build_config({**facts, **copied}, path), "its cfg"


def check_agreement(config: OPTConfig, settings: Mapping[str, Any], path: object) -> None:
    """A config.json beside metaseq's files says more than their ``cfg``, but nothing else.

    Raises:
        CheckpointError: naming the fields in which they differ.
    """
    shared = {**_CONFIRMED, **_HEADS, "activation_function": "activation_fn"}
    wrong = [f"{ours} is {getattr(config, ours)} there and {settings[theirs]} in the cfg of the weights"
             for ours, theirs in shared.items()
             if settings.get(theirs) is not None and settings[theirs] != getattr(config, ours)]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}. Name the right one with --model-config.")


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of ``cfg["model"]``, or of ``args`` in older files, whatever classes they were objects of."""
    of_model = _fields(_fields(content.get("cfg")).get("model")) or _fields(content.get("args"))
    plain = ((str(key), _plain(value)) for key, value in of_model.items())
    return {key: value for key, value in plain if _is_setting(value)}


def _is_setting(value: Any) -> bool:
    """Whether a value is a number or a word: what a configuration consists of, and an error can show."""
    if isinstance(value, str):
        return len(value) < 100
    return isinstance(value, (bool, float)) or (is_int(value) and abs(value) < 2**63)


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

"""The configuration of a checkpoint without config.json: from what metaseq kept beside the tensors, and from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.pickles import Placeholder
from minopt.config import PRESETS, OPTConfig, is_int


def facts_of(shapes: Mapping[str, tuple[int, ...]], where: object) -> dict[str, Any]:
    """The fields of a configuration that shapes of tensors give away."""
    needed = (
        "embed_tokens.weight",
        "embed_positions.weight",
        "layers.0.fc1.weight",
        "layers.0.self_attn.k_proj.weight",
    )
    if any(len(shapes.get(name, ())) != 2 for name in needed):
        absent = [name for name in needed if len(shapes.get(name, ())) != 2]
        raise CheckpointError(
            f"{where}: not an OPT's checkpoint, without matrices {some(absent)}: got {some(list(shapes))}."
        )
    (vocab, embed), (positions, hidden) = shapes[needed[0]], shapes[needed[1]]
    affine = "layers.0.self_attn_layer_norm.weight" in shapes
    return {
        "vocab_size": vocab, "hidden_size": hidden, "ffn_dim": shapes[needed[2]][0], "word_embed_proj_dim": embed,
        "num_hidden_layers": len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        "max_position_embeddings": positions - 2,
        "enable_bias": "layers.0.fc1.bias" in shapes, "layer_norm_elementwise_affine": affine,
        # metaseq's model parallel code is pre-norm whatever its configuration says (metaseq issue 388); without
        # norms' weights, only the projections tell 350m's.
        "do_layer_norm_before": "final_layer_norm.weight" in shapes if affine else embed == hidden,
    }  # fmt: skip


def infer_config(facts: Mapping[str, Any], where: object) -> OPTConfig:
    """The configuration of the published size that has such tensors; only there are its heads and activation known.

    Raises:
        CheckpointError: if there is none.
    """
    telling = [name for name in facts if name not in ("vocab_size", "max_position_embeddings")]
    for name in PRESETS:
        preset = OPTConfig.preset(name)
        if all(getattr(preset, field) == facts[field] for field in telling):
            values = {**facts, "num_attention_heads": preset.num_attention_heads, "bos_token_id": preset.bos_token_id,
                      "activation_function": preset.activation_function}  # fmt: skip
            return _build(values, where)
    raise CheckpointError(
        f"{where}: no configuration beside its tensors, and they are of no published size (hidden_size "
        f"{facts['hidden_size']}, {facts['num_hidden_layers']} layers), so the number of heads is unknown. Name a "
        "config.json with --model-config."
    )


def _build(values: Mapping[str, Any], where: object) -> OPTConfig:
    try:
        return OPTConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error} Name a config.json with --model-config.") from None


# Fields of metaseq's configuration that the tensors confirm or contradict.
_CONFIRMED = {"hidden_size": "decoder_embed_dim", "ffn_dim": "decoder_ffn_embed_dim",
              "num_hidden_layers": "decoder_layers", "word_embed_proj_dim": "decoder_input_dim"}  # fmt: skip
_NEGATED = {"enable_bias": "disable_bias", "layer_norm_elementwise_affine": "disable_affine_ln"}
_COPIED = {"activation_function": "activation_fn", "dropout": "dropout", "attention_dropout": "attention_dropout"}


def config_of(settings: Mapping[str, Any], facts: Mapping[str, Any], path: object) -> tuple[OPTConfig, str]:
    """The configuration, from ``cfg`` and the tensors, or from the tensors alone.

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
    copied = {ours: settings[theirs] for ours, theirs in _COPIED.items() if settings.get(theirs) is not None}
    return _build({**facts, **copied, "num_attention_heads": settings["decoder_attention_heads"]}, path), "its cfg"


def check_agreement(config: OPTConfig, settings: Mapping[str, Any], path: object) -> None:
    """A config.json beside metaseq's files says more than their ``cfg``, but nothing else.

    Raises:
        CheckpointError: naming the fields in which they differ.
    """
    shared = {**_CONFIRMED, "num_attention_heads": "decoder_attention_heads", "activation_function": "activation_fn"}
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
    return (
        (is_int(value) and abs(value) < 2**63)
        or isinstance(value, (bool, float))
        or (isinstance(value, str) and len(value) < 100)
    )


def _fields(value: Any) -> Mapping[Any, Any]:
    """The fields of a dict, of an object's state, or of an OmegaConf node, which keeps them in ``_content``."""
    if isinstance(value, Placeholder):
        value = value.state if isinstance(value.state, dict) else value.items
        if "_content" in value:
            value = value["_content"]
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    """The value of an OmegaConf leaf, which keeps it in ``_val``, or of an enumeration's member; else as it is."""
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
        value = value.state.get("_val")
    if isinstance(value, Placeholder) and len(value.arguments) == 1:
        value = value.arguments[0]
    return value

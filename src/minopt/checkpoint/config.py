"""The configuration of a checkpoint: the one that is given, a JSON file's, or what its files and their tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minopt.checkpoint.divided import METADATA
from minopt.checkpoint.errors import CheckpointError, some
from minopt.config import PRESETS, OPTConfig, read_json
from minopt.model import POSITION_OFFSET


def resolve_config(model_config: OPTConfig | str | Path | None) -> OPTConfig | None:
    """A configuration, from itself, the name of a preset ("opt-125m", "facebook/opt-125m", "125m") or a config.json."""
    if model_config is None or isinstance(model_config, OPTConfig):
        return model_config
    if not isinstance(model_config, str | Path):
        raise ValueError(
            f"model_config: expected an OPTConfig, the name of a size or a config.json, got "
            f"{type(model_config).__name__}. OPTConfig.from_dict makes one of a dict."
        )
    if Path(model_config).exists():
        return OPTConfig.load(model_config)
    name = str(model_config).rpartition("/")[2].lower()
    try:
        return OPTConfig.preset(name if "-" in name else f"opt-{name}")
    except ValueError as error:
        raise ValueError(f"model_config: {model_config}: no such file, and {error}") from None


def known_config(folder: Path, given: OPTConfig | None) -> tuple[OPTConfig | None, str]:
    """The configuration that is given or lies in a folder, and where it is from; ``None`` without one."""
    if given is not None:
        return given, "as given"
    is_run = (folder / METADATA).is_file()
    path = next((folder / name for name in ("config.json", "state.json")[: 1 + is_run] if (folder / name).is_file()),
                None)  # fmt: skip
    if path is None:
        return None, ""
    try:
        values = read_json(path) if path.name == "config.json" else read_json(path).get("config")
        return OPTConfig.from_dict(values if isinstance(values, dict) else {}), path.name
    except ValueError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def facts_of(shapes: Mapping[str, tuple[int, ...]], where: object) -> dict[str, Any]:
    """The fields of a configuration that the shapes of tensors, by minopt's names, give away."""
    needed = ("embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.weight",
              "layers.0.self_attn.k_proj.weight")  # fmt: skip
    if absent := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise CheckpointError(
            f"{where}: not an OPT's checkpoint: expected the matrices {some(absent)}, got {some(list(shapes))}."
        )
    (vocab, embed), (positions, hidden) = shapes[needed[0]], shapes[needed[1]]
    affine = "layers.0.self_attn_layer_norm.weight" in shapes
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "ffn_dim": shapes[needed[2]][0],
        "word_embed_proj_dim": embed,
        "num_hidden_layers": len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        "max_position_embeddings": positions - POSITION_OFFSET,
        "enable_bias": "layers.0.fc1.bias" in shapes,
        "layer_norm_elementwise_affine": affine,
        # metaseq's model parallel code is pre-norm whatever its configuration says (metaseq issue 388); without
        # norms' weights, only the projections tell 350m's.
        "do_layer_norm_before": "final_layer_norm.weight" in shapes if affine else embed == hidden,
    }


def infer_config(facts: Mapping[str, Any], where: object) -> OPTConfig:
    """The configuration of the published size that has such tensors; only there are its heads and activation known."""
    telling = facts.keys() - {"vocab_size", "max_position_embeddings"}
    for preset in map(OPTConfig.preset, PRESETS):
        if all(getattr(preset, field) == facts[field] for field in telling):
            unseen = ("num_attention_heads", "bos_token_id", "activation_function")
            return _built({**facts, **{field: getattr(preset, field) for field in unseen}}, where)
    raise CheckpointError(
        f"{where}: no configuration beside its tensors, and they are of no published size (hidden_size "
        f"{facts['hidden_size']}, {facts['num_hidden_layers']} layers), so the number of heads is unknown. Name a "
        "config.json with --model-config."
    )


def config_of(told: Mapping[str, Any], facts: Mapping[str, Any], where: object) -> OPTConfig:
    """The configuration of metaseq's ``cfg``, which may not contradict what the tensors show."""
    told, wrong = dict(told), []
    if told.pop("alibi", False):
        wrong.append("its cfg has alibi instead of learned positions, which OPT has")
    if not told.pop("no_scale_embedding", True):
        wrong.append("its cfg scales embeddings, which OPT does not")
    seen = facts.keys() - {"max_position_embeddings"}
    wrong = [f"{name} is {value} in its cfg and {facts[name]} in its tensors"
             for name, value in told.items() if name in seen and facts[name] != value] + wrong  # fmt: skip
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong)}. If the tensors are right, name a config.json with "
                              "--model-config.")  # fmt: skip
    return _built({**told, **facts}, where)


def check_agreement(config: OPTConfig, told: Mapping[str, Any], path: object) -> None:
    """A config.json beside metaseq's files may say more than their ``cfg``, but nothing else."""
    free = {"dropout", "attention_dropout", "max_position_embeddings"}
    wrong = [f"{name} is {getattr(config, name)} there and {value} in the cfg of the weights" for name, value in
             told.items() if name not in free and value != getattr(config, name, value)]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}. Name the right one with --model-config.")


def _built(values: Mapping[str, Any], where: object) -> OPTConfig:
    """A configuration of fields; ``CheckpointError`` where they break a rule."""
    try:
        return OPTConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error} Name a config.json with --model-config.") from None

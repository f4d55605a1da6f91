"""Writes transformers' reference models as metaseq checkpoints: whole, in model parallel parts, in FSDP shards.

Made from the description of the format and checked against metaseq's own scripts; shares no code with the reader
that it tests. Facts and their sources (facebookresearch/metaseq):

- ``qkv_proj`` holds the rows of K, then V, then Q, in each part its own (modules/multihead_attention.py).
- Parts split token rows, fc1 and K, V, Q by dim 0, out_proj.weight and fc2.weight by dim 1; all else is repeated
  (scripts/reshard_mp.py).
- A shard is an equal piece of a flat parameter, the last pieces padded with zeros, maybe wholly
  (scripts/reshard_fsdp.py, fairscale). Large models have a flat parameter for each layer and one for the rest, small
  ones a single one, where the decoder's norm comes last (pull request 197; min_params_to_wrap).
- ``cfg`` and the iterators of a run are instances of classes that only metaseq and omegaconf define.
"""

from __future__ import annotations

import argparse
import enum
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VERSION = "decoder.version"
HEAD = "decoder.output_projection.weight"
TOKENS = "decoder.embed_tokens.weight"

_BY_ROW = re.compile(r"embed_tokens\.|fc1\.|\.[kvq]_proj\.")
_BY_COLUMN = re.compile(r"(out_proj|fc2)\.weight$")


def metaseq_state(
    reference: Any,
    *,
    fused: bool = True,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    mixed_norms: bool = False,
) -> dict[str, Tensor]:
    """The ``model`` of a singleton, in the order in which metaseq registers parameters: see ``write_metaseq``."""
    theirs = {k.removeprefix("model.decoder."): t.detach() for k, t in reference.state_dict().items()}
    state = {VERSION: torch.tensor([3.0])}

    def take(name: str, source: str | None = None) -> None:
        for kind in ("weight", "bias"):
            if f"{source or name}.{kind}" in theirs:
                state[f"decoder.{name}.{kind}"] = theirs[f"{source or name}.{kind}"]

    take("embed_tokens")
    take("project_in_dim", "project_in")
    take("embed_positions")
    for i in range(reference.config.num_hidden_layers):
        layer = f"layers.{i}"
        if fused:
            for kind in ("weight", "bias"):
                kvq = [theirs.get(f"{layer}.self_attn.{p}_proj.{kind}") for p in "kvq"]
                if kvq[0] is not None:
                    state[f"decoder.{layer}.self_attn.qkv_proj.{kind}"] = torch.cat(kvq)
        for name in [] if fused else ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]:
            take(f"{layer}.{name}")
        for name in ("self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"):
            take(f"{layer}.{name}")
    take("layer_norm", "final_layer_norm")
    take("project_out_dim", "project_out")
    if head is not None:
        rows = state[TOKENS].shape[0]
        state[HEAD] = state[TOKENS][: {"whole": rows, "slice": rows // 2}[head]]

    def cast(key: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32 if mixed_norms and "layer_norm" in key else dtype or tensor.dtype)

    return {key: _own(cast(key, tensor)) for key, tensor in state.items()}


def split_into_parts(state: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Model parallel parts of a singleton. A head, being in no rule but "repeated", is so too."""
    result: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for key, tensor in state.items():
        for part, piece in zip(result, _pieces(key, tensor, parts), strict=True):
            part[key] = _own(piece)
    return result


def _pieces(key: str, tensor: Tensor, parts: int) -> list[Tensor]:
    if "qkv_proj" in key:
        k, v, q = (_equal(t, parts, 0) for t in _equal(tensor, 3, 0))
        return [torch.cat(kvq) for kvq in zip(k, v, q, strict=True)]
    if _BY_ROW.search(key):
        return _equal(tensor, parts, 0)
    return _equal(tensor, parts, 1) if _BY_COLUMN.search(key) else [tensor] * parts


def _equal(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    assert tensor.shape[dim] % count == 0, f"{tuple(tensor.shape)} does not divide by {count}"
    return list(tensor.split(tensor.shape[dim] // count, dim))


def flatten_part(
    state: Mapping[str, Tensor],
    shards: int,
    *,
    metadata: bool = True,
    wrap: bool = True,
    shape: Callable[[torch.Size], Any] = torch.Size,
) -> list[tuple[dict[str, Tensor], dict[str, Any] | None]]:
    """The FSDP shards of a part, which has no head: ``(model, shard_metadata)`` of each; see ``write_metaseq``."""
    assert HEAD not in state, "a flat parameter holds no head"
    result: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        ({}, {"param_metadata": [], "buffer_names": [VERSION]}) for _ in range(shards)
    ]
    for path, keys in _units(state, wrap).items():
        assert len({state[key].dtype for key in keys}) == 1, "a flat parameter has one dtype"
        flat = torch.cat([state[key].flatten() for key in keys])
        size = -(-flat.numel() // shards)
        for i, (model, described) in enumerate(result):
            piece = flat[i * size : (i + 1) * size]
            padding = size - piece.numel()
            model[f"{path}.flat_param_0".lstrip(".")] = _own(F.pad(piece, (0, padding)))
            flat_param = {
                "names": [key.removeprefix(f"{path}.") for key in keys],
                "shapes": [shape(state[key].shape) for key in keys],
                "numels": [state[key].numel() for key in keys],
                "padding": padding,
            }
            described["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": flat_param},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if path else [(TOKENS, HEAD)],
                }
            )
            model[VERSION] = state[VERSION].clone()  # buffers are in every shard, behind the first flat parameter
    return [(model, described if metadata else None) for model, described in result]


def _units(state: Mapping[str, Tensor], wrap: bool) -> dict[str, list[str]]:
    """The keys that each flat parameter holds, by the path of its module: first the root's (``""``)."""
    units: dict[str, list[str]] = {"": []}
    for key in state:
        layer = re.match(r"decoder\.layers\.\d+", key)
        if key not in (VERSION, HEAD):
            units.setdefault(layer[0] if layer and wrap else "", []).append(key)
    return units


def _own(tensor: Tensor) -> Tensor:
    """A copy with a storage of its own, just as large: saving writes whole storages."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _as_views(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as views of a flat one for each layer: what unflattening by reshard_fsdp.py leaves."""
    result = dict(state)
    for keys in _units(state, wrap=True).values():
        flat = torch.cat([state[key].flatten() for key in keys])
        pieces = flat.split([state[key].numel() for key in keys])
        result |= {key: piece.view(state[key].shape) for key, piece in zip(keys, pieces, strict=True)}
    return result


def _foreign(path: str, **members: Any) -> type:
    """A class that claims to come from a module which does not exist."""
    module, _, name = path.rpartition(".")
    return type(name, (), {"__module__": module, "__qualname__": name, **members})


_ModelConfig = _foreign("metaseq.models.transformer_lm.TransformerLanguageModelConfig")
_LockingArray = _foreign(  # pickles as bytes and a count, which only its own __setstate__ could take
    "metaseq.data.document_to_sequence.LockingArray",
    __getstate__=lambda self: (bytes(range(250, 254)), 4),
    __setstate__=lambda self, state: None,
)
_DictConfig = _foreign("omegaconf.dictconfig.DictConfig")
_AnyNode = _foreign("omegaconf.nodes.AnyNode")
_ContainerMetadata = _foreign("omegaconf.base.ContainerMetadata")
_Metadata = _foreign("omegaconf.base.Metadata")
_Backend = enum.Enum("DDP_BACKEND_CHOICES", {"fully_sharded": "fully_sharded"}, module="metaseq.dataclass.constants")
_FOREIGN = (_ModelConfig, _LockingArray, _DictConfig, _AnyNode, _ContainerMetadata, _Metadata, _Backend)


@contextmanager
def foreign_modules() -> Iterator[None]:
    """The modules of the classes in ``config_of`` and ``write_metaseq`` exist inside, as pickling needs, only."""
    modules: dict[str, ModuleType] = {}
    for cls in _FOREIGN:
        words = cls.__module__.split(".")
        for i in range(1, len(words) + 1):
            modules.setdefault(".".join(words[:i]), ModuleType(".".join(words[:i])))
        setattr(modules[cls.__module__], cls.__name__, cls)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def _instance(cls: type, **attributes: Any) -> Any:
    made = cls()
    vars(made).update(attributes)
    return made


def model_fields(reference: Any, parts: int = 1) -> dict[str, Any]:
    """The fields of ``cfg["model"]`` by metaseq's names (models/transformer_lm.py)."""
    config = reference.config
    return {
        **dict.fromkeys(("_name", "arch"), "transformer_lm_megatron"),
        "activation_fn": config.activation_function,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "decoder_embed_dim": config.hidden_size,
        **dict.fromkeys(("decoder_input_dim", "decoder_output_dim"), config.word_embed_proj_dim),
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_normalize_before": config.do_layer_norm_before,
        **dict.fromkeys(("decoder_learned_pos", "share_decoder_input_output_embed", "no_scale_embedding"), True),
        **dict.fromkeys(("decoder_learned_sinusoidal", "alibi", "add_bos_token"), False),
        "no_emb_dropout": True,
        "disable_bias": not config.enable_bias,
        "disable_affine_ln": not config.layer_norm_elementwise_affine,
        "self_attn_doc_sep": -1,
        **dict.fromkeys(("tokens_per_sample", "max_target_positions"), config.max_position_embeddings),
        "ddp_backend": "fully_sharded",
        "model_parallel_size": parts,
    }


def config_of(reference: Any, style: str | None, *, parts: int = 1) -> Any:
    """The ``cfg`` of a file: see ``config`` of ``write_metaseq``."""
    if style is None:
        return None
    fields = model_fields(reference, parts)
    if style in ("class", "omegaconf") and "ddp_backend" in fields:
        fields["ddp_backend"] = _Backend.fully_sharded
    if style == "omegaconf":  # fields of other groups are interpolations
        groups = {"tokens_per_sample": "task", "max_target_positions": "task", "model_parallel_size": "common"}
        fields |= {name: f"${{{group}.{name}}}" for name, group in groups.items() if name in fields}
    positions = reference.config.max_position_embeddings
    cfg = {
        "_name": None,
        "common": {"fp16": True, "seed": 1, "model_parallel_size": parts},
        "task": {"_name": "streaming_language_modeling", "data": "/data", "tokens_per_sample": positions,
                 "max_target_positions": positions},
        "model": fields,
    }  # fmt: skip
    if style == "omegaconf":
        return _omegaconf(cfg)
    wrappers = {"dict": dict, "namespace": argparse.Namespace, "class": lambda **f: _instance(_ModelConfig, **f)}
    return cfg | {"model": wrappers[style](**fields)}


def _omegaconf(value: Any, parent: Any = None, key: str | None = None) -> Any:
    """A value as omegaconf keeps it: nodes that know their parents, types and flags."""
    about = {"ref_type": Any, "object_type": dict if isinstance(value, dict) else None, "optional": True, "key": key,
             "flags": None, "flags_root": False, "resolver_cache": defaultdict(dict)}  # fmt: skip
    if not isinstance(value, dict):
        return _instance(_AnyNode, _metadata=_instance(_Metadata, **about), _parent=parent, _val=value)
    metadata = _instance(_ContainerMetadata, **about, key_type=Any, element_type=Any)
    node = _instance(_DictConfig, _metadata=metadata, _parent=parent)
    node._content = {name: _omegaconf(child, node, name) for name, child in value.items()}
    return node


def _beside_the_weights(cfg: Any) -> dict[str, Any]:
    return {
        "cfg": cfg,
        "args": None,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "MemoryEfficientFP16Optimizer", "num_updates": 143000}],
        "task_state": {},
        "extra_state": {
            "metrics": OrderedDict(default=[(0, "loss", "AverageMeter", {"val": torch.tensor(2.5), "round": 3})]),
            "previous_training_time": 1.5,
            "train_iterator": {"epoch": 1, "n": 6000, "tokenization_cache": _LockingArray()},
        },
    }


def write_metaseq(
    folder: Path,
    reference: Any,
    *,
    parts: int = 1,
    shards: int = 0,
    fused: bool = True,
    config: str | None = "namespace",
    metadata: bool = True,
    head: str | None = None,
    legacy: bool = False,
    dtype: torch.dtype | None = None,
    mixed_norms: bool = False,
    views: bool = False,
    wrap: bool = True,
    shape: Callable[[torch.Size], Any] = torch.Size,
    stem: str | None = None,
    pattern: str | None = None,
) -> list[Path]:
    """Writes transformers' OPTForCausalLM as a checkpoint of metaseq, and returns its files.

    Args:
        folder, reference: where, and what.
        parts, shards: model parallel parts, and FSDP shards of each, flattened; 0 shards: parts are not flattened.
        fused: ``qkv_proj`` (what trains) or ``k_proj``, ``v_proj``, ``q_proj`` (what convert_to_singleton leaves).
        config: how ``cfg["model"]`` is held: ``"namespace"``, ``"dict"``, ``"class"`` (an instance of metaseq's);
            ``"omegaconf"``: all of ``cfg`` is DictConfig and AnyNode, with ``${...}`` in it; ``None``: there is none.
        metadata: whether ``shard_metadata`` is there, which it may be in files that are not flattened too.
        head: ``None``, ``"whole"`` (each part has all rows), or ``"slice"`` (each part has its own; a single one half).
        legacy: in torch's container from before 1.6.
        dtype, mixed_norms: to cast to, but for norms.
        views: tensors of a layer share one storage (not flattened files only).
        wrap: a flat parameter for each layer; else a single one for all.
        shape: what the metadata gives shapes as. Files were seen with ``torch.Size``, tuples, and lists.
        stem, pattern: the name's beginning, or the whole name with ``{part}`` and ``{shard}``.
    """
    stem = stem or ("checkpoint_last" if shards else "reshard")
    part_in_name = "-model_part-{part}" if parts > 1 or shards else ""
    pattern = pattern or stem + part_in_name + ("-shard{shard}.pt" if shards else ".pt")
    whole = head if parts == 1 or head == "whole" else None
    state = metaseq_state(reference, fused=fused, head=whole, dtype=dtype, mixed_norms=mixed_norms)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for p, part in enumerate(split_into_parts(state, parts)):
        if shards:
            files = flatten_part(part, shards, metadata=metadata, wrap=wrap, shape=shape)
        else:
            described = _description(part, shape) if metadata else None
            if head == "slice" and parts > 1:
                part[HEAD] = _own(part[TOKENS])
            files = [(_as_views(part) if views else part, described)]
        for s, (model, described) in enumerate(files):
            path = folder / pattern.format(part=p, shard=s)
            content = {"model": model} | ({} if described is None else {"shard_metadata": described})
            with foreign_modules():
                content |= _beside_the_weights(config_of(reference, config, parts=parts))
                torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            written.append(path)
    return written


def _description(part: Mapping[str, Tensor], shape: Callable[[torch.Size], Any]) -> dict[str, Any] | None:
    """The metadata of the shards that a part was once in, which stays behind in its file."""
    without_dtypes = {key: tensor.float() for key, tensor in part.items() if key != HEAD}
    return flatten_part(without_dtypes, 1, shape=shape)[0][1]

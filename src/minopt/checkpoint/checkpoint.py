"""Opens a checkpoint of any kind: its configuration, and where each of the model's tensors lies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from minopt.checkpoint.config import check_agreement, config_of, facts_of, infer_config, known_config, resolve_config
from minopt.checkpoint.errors import CheckpointError, MissingFileError, some
from minopt.checkpoint.find import Format, Found, check_link, find_files, stem_of
from minopt.checkpoint.huggingface import read_huggingface
from minopt.checkpoint.keys import described, is_decoders, left_out
from minopt.checkpoint.metaseq.read import read_metaseq
from minopt.checkpoint.names import MOST_LAYERS, parameter_shapes, to_hf
from minopt.checkpoint.tensors import SourceTensor, main_dtype, same_numbers
from minopt.config import OPTConfig
from minopt.devices import auto_dtype

logger = logging.getLogger(__name__)

# What reads files of each format: from a ``Found``, a known configuration and patterns to ignore to ``Contents``.
_READERS = {
    Format.HUGGING_FACE: read_huggingface,
    Format.DIVIDED: read_huggingface,
    Format.METASEQ: read_metaseq,
}

# Is imported once an adapter is given: its ``merge(checkpoint, adapter)`` is the checkpoint with the adapter in it.
_ADAPTERS = "minopt.methods.lora"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        found: the checkpoint's files.
        config: the model's.
        config_source: the origin of ``config``, in words.
        tensors: those of ``OPT(config)``, by name, in its order.
        heads: the stored head of each part of the checkpoint that has one.
    """

    found: Found
    config: OPTConfig
    config_source: str
    tensors: dict[str, SourceTensor]
    heads: tuple[SourceTensor | None, ...] = ()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.found.folder)!r}, {len(self.tensors)} tensors)"

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of ``"auto"``: see ``auto_dtype``; stored is the dtype of most numbers."""
        return auto_dtype(main_dtype(self.tensors.values()), device)

    def check_head(self) -> None:
        """Refuses a stored head that differs from the token table, to which OPT's is tied."""
        for number, head in enumerate(self.heads):
            if head is None:
                continue
            table = self.tensors["embed_tokens.weight"]
            begin = 0 if head.shape == table.shape else number * table.shape[0] // len(self.heads)  # all rows, or own
            fits = len(head.shape) == 2 and head.shape[1] == table.shape[1] and begin + head.shape[0] <= table.shape[0]
            if not fits or head.dtype is None:
                raise CheckpointError(f"{self.found.folder}: the stored head has shape {list(head.shape)}, "
                                      f"the token embeddings {list(table.shape)}.")  # fmt: skip
            rows = table.rows(begin, begin + head.shape[0])
            if (head.place is not None and head.place == rows.place) or same_numbers(rows, head):
                continue
            key = head.runs[0].key
            if not same_numbers(rows, head, rounded=True):
                raise CheckpointError(
                    f"{self.found.folder}: {key} differs from the token embeddings; OPT's head is tied to them, and an "
                    "untied one cannot be kept. Was the model trained with tie_word_embeddings false?"
                )
            logger.warning("%s: %s differs from the token embeddings by rounding, and is taken for the same.",
                           self.found.folder, key)  # fmt: skip


def open_checkpoint(
    path: Path,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Opens all files of a checkpoint and checks that they are exactly a model's; no numbers are read but samples.

    Args:
        path: a folder that holds one checkpoint, or any one file of it.
        model_config: instead of what the files say: a configuration, the name of a preset, or a config.json.
        ignore: tensors to leave out, by patterns of their names in the files: ``"score.*"``.
        adapter: the folder of one, which is merged into the tensors when they are read.

    Raises:
        MissingFileError: if a file is not there.
        CheckpointError: if files cannot be read, do not belong together, or are not an OPT's.
        ValueError: if ``model_config`` is none.
    """
    given = resolve_config(model_config)
    found = find_files(path)
    check_link(found.folder / "config.json")
    if found.missing:
        count = found.parts * found.shards
        of = f"of {stem_of(found.files[0])}" if found.format is Format.METASEQ else "in its index"
        raise MissingFileError(f"{found.folder}: {count - len(found.files)} of the {count} files {of} are missing: "
                               f"{some(found.missing)}. Fetch them again.")  # fmt: skip
    known, source = known_config(found.folder, given)
    read = _READERS[found.format](found, known, ignore)
    if known is None:
        facts = facts_of({name: tensor.shape for name, tensor in read.tensors.items()}, found.where)
        if "num_attention_heads" in read.told:
            known, source = config_of(read.told, facts, found.where), "its cfg"
        else:
            known, source = infer_config(facts, found.where), "its tensors"
    elif source == "config.json":
        check_agreement(known, read.told, found.folder / source)
    _check_tensors(read.tensors, known, source.replace("as given", "the given configuration"), found.where)
    checkpoint = Checkpoint(found, known, source, {n: read.tensors[n] for n in parameter_shapes(known)}, read.heads)
    return checkpoint if adapter is None else import_module(_ADAPTERS).merge(checkpoint, Path(adapter))


def _check_tensors(tensors: dict[str, SourceTensor], config: OPTConfig, source: str, where: Path) -> None:
    """Compares tensors with those of a model; names all that are missing, unexpected or wrong."""
    expected_layers = config.num_hidden_layers
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    if expected_layers > min(len(layers), MOST_LAYERS):  # before so many are looked for
        keys = [key for key in map(_key, tensors.values()) if not is_decoders(key)]
        others = f", beside them {some(keys)}, where an OPT has {to_hf('layers.0.fc1.weight')}" if keys else ""
        raise CheckpointError(
            f"{where}: num_hidden_layers is {expected_layers} in {source}, the tensors are of {len(layers)} layers"
            f"{others}. Do config and weights belong together?"
        )
    expected = parameter_shapes(config)
    unexpected = [_key(tensor) for name, tensor in tensors.items() if name not in expected]
    missing = [name for name in expected if name not in tensors]
    wrong = []
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name]:
            wrong.append(f"{name}: expected {list(expected[name])}, got {list(tensor.shape)}")
        elif name in expected and (tensor.dtype is None or not tensor.dtype.is_floating_point):
            kind = tensor.kind if tensor.dtype else "another kind"
            wrong.append(f"{name}: expected float64, float32, float16 or bfloat16, got {kind}")
    problems = {"missing": missing, "unexpected": list(map(described, unexpected)),
                "of the wrong shape or kind": wrong}  # fmt: skip
    if not any(problems.values()):
        return
    hint = "Do config and weights belong together?"
    if unexpected and not any(map(is_decoders, unexpected)):
        hint = left_out(unexpected)
    if missing and {*missing} <= {"final_layer_norm.weight", "final_layer_norm.bias"}:
        hint = (
            "A fine-tune made before transformers 4.20.1 has no final_layer_norm: if this is one, set "
            '"_remove_final_layer_norm": true in its config.json.'
        )
    listed = "; ".join(f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names)
    raise CheckpointError(f"{where}: the tensors are not those of {source}: {listed}. {hint}")


def _key(tensor: SourceTensor) -> str:
    """The name of a tensor in its file."""
    runs = tensor.runs or (tensor.beside[0].runs if tensor.beside else ())
    return runs[0].key if runs else tensor.name

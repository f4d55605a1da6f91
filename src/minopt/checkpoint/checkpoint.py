"""An opened checkpoint: its configuration, and where each of the model's tensors lies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minopt.checkpoint.errors import CheckpointError, some
from minopt.checkpoint.find import Found
from minopt.checkpoint.keys import described, is_decoders, left_out, own_keys
from minopt.checkpoint.names import HF_HEAD, MOST_LAYERS, parameter_shapes, to_hf
from minopt.checkpoint.tensors import Slice, SourceTensor, main_dtype, same_numbers
from minopt.config import OPTConfig
from minopt.progress import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        found: the checkpoint's files.
        config: the model's.
        config_source: the origin of ``config``, in words.
        tensors: the tensors by minopt's names. ``open_checkpoint`` gives those of ``OPT(config)``, in its order.
        heads: a stored head, slice by slice, with the row of the token table at which each begins.
    """

    found: Found
    config: OPTConfig
    config_source: str
    tensors: dict[str, SourceTensor]
    heads: tuple[tuple[Slice, int], ...] = ()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.found.folder)!r}, {len(self.tensors)} tensors)"

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of ``"auto"``: float32 on a CPU, elsewhere the one that most numbers are stored in."""
        return torch.float32 if device.type == "cpu" else main_dtype(self.tensors.values())

    def check_head(self) -> None:
        """Refuses a stored head that differs from the token table, to which OPT's is tied."""
        for head, row in self.heads:
            table = self.tensors["embed_tokens.weight"]
            rows_fit = len(head.shape) == 2 and head.shape[1:] == table.shape[1:]
            if not rows_fit or row + head.shape[0] > table.shape[0] or head.dtype is None:
                raise CheckpointError(f"{self.found.folder}: the stored head has shape {list(head.shape)}, "
                                      f"the token embeddings {list(table.shape)}.")  # fmt: skip
            rows = table.rows(row, row + head.shape[0])
            is_same_tensor = head.place is not None and [head.place] == [piece.place for piece in rows.slices]
            if is_same_tensor or same_numbers(rows, head):
                continue
            if not same_numbers(rows, head, rounded=True):
                raise CheckpointError(
                    f"{self.found.folder}: {head.runs[0].key} differs from the token embeddings; OPT's head is tied to "
                    "them, and an untied one cannot be kept. Was the model trained with tie_word_embeddings false?"
                )
            logger.warning("%s: %s differs from the token embeddings by rounding, and is taken for the same.",
                           self.found.folder, head.runs[0].key)  # fmt: skip

    def matched(self) -> Checkpoint:
        """The checkpoint with its tensors in the model's order; names all that are missing, unexpected or wrong."""
        config, tensors = self.config, self.tensors
        where = self.found.files[0] if self.found.metaseq and len(self.found.files) == 1 else self.found.folder
        source = "the given configuration" if self.config_source == "as given" else self.config_source
        self._check_layers(where, source)
        expected = parameter_shapes(config)
        unexpected = [_key(tensor) for name, tensor in tensors.items() if name not in expected]
        missing = [name for name in expected if name not in tensors]
        wrong = [f"{n}: expected {list(expected[n])}, got {list(t.shape)}"
                 for n, t in tensors.items() if n in expected and t.shape != expected[n]]  # fmt: skip
        wrong += [f"{n}: expected float64, float32, float16 or bfloat16, got {'int8' if t.dtype else 'another kind'}"
                  for n, t in tensors.items()
                  if expected.get(n) == t.shape and t.dtype in (None, torch.int8)]  # fmt: skip
        problems = {"missing": missing, "unexpected": list(map(described, unexpected)),
                    "of the wrong shape or kind": wrong}  # fmt: skip
        if not any(problems.values()):
            return replace(self, tensors={name: tensors[name] for name in expected})
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

    def _check_layers(self, where: Path, source: str) -> None:
        """Before so many are looked for."""
        expected = self.config.num_hidden_layers
        there = {name.split(".")[1] for name in self.tensors if name.startswith("layers.")}
        if expected > len(there):
            keys = [key for key in map(_key, self.tensors.values()) if not is_decoders(key)]
            others = f", beside them {some(keys)}, where an OPT has {to_hf('layers.0.fc1.weight')}" if keys else ""
            raise CheckpointError(
                f"{where}: num_hidden_layers is {expected} in {source}, the tensors are of {len(there)} layers{others}."
                " Do config and weights belong together?"
            )
        if expected > MOST_LAYERS:
            raise CheckpointError(f"{where}: {expected} layers, expected at most {MOST_LAYERS}.")


def named_slices(
    stored: Mapping[str, Slice], names_of: Callable[[str], tuple[str, ...]], ignore: Sequence[str], where: object, *,
    say: bool = True,
) -> dict[str, Slice]:  # fmt: skip
    """The tensors of a checkpoint, or of one part of it, by minopt's names; fused projections are taken apart.

    Args:
        stored: the tensors, by their keys in the files.
        names_of: gives the names of what a key holds: see ``from_metaseq``.
        ignore, where, say: see ``own_keys``.
    """
    named: dict[str, Slice] = {}
    key_of: dict[str, str] = {}
    twice: list[str] = []
    for key, plain in own_keys(stored, ignore, where, say=say).items():
        names, whole = names_of(plain), stored[key]
        if len(names) > 1 and (not whole.shape or whole.shape[0] % len(names)):
            raise CheckpointError(f"{where}: {key} holds {len(names)} tensors, so its first dim must be divisible by "
                                  f"{len(names)}; its shape is {list(whole.shape)}.")  # fmt: skip
        rows = whole.shape[0] // len(names) if len(names) > 1 else 0
        for i, name in enumerate(names):
            twice += [f"{key_of[name]} and {key}"] if name in named else []
            named[name] = whole.rows(i * rows, (i + 1) * rows) if len(names) > 1 else whole
            key_of[name] = key
    if twice:
        number = counted(len(twice), "tensor")
        raise CheckpointError(f"{where}: {number} stored twice ({some(twice)}). Keep one of each.")
    if "embed_tokens.weight" not in named and HF_HEAD in named:
        named["embed_tokens.weight"] = named.pop(HF_HEAD)  # tied, written once under the head's name
    return named


def _key(tensor: SourceTensor) -> str:
    """The name of a tensor in its file."""
    return tensor.slices[0].runs[0].key if tensor.slices[0].runs else tensor.name

"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) as peft writes them, merged into tensors while these are read.

``W + s B A`` takes the place of each adapted ``W`` (section 4.1 there); ``s`` is ``alpha / r``, or ``alpha / sqrt(r)``
for rank-stabilised LoRA (arXiv 2312.03732). Shapes: ``W [out, in]``, ``A [r, in]``, ``B [out, r]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import CheckpointError, MissingFileError, some
from minopt.checkpoint.files import open_file
from minopt.checkpoint.keys import described
from minopt.checkpoint.names import HF_PREFIXES, parameter_shapes
from minopt.checkpoint.tensors import SourceTensor, main_dtype, stored_tensor
from minopt.config import read_json
from minopt.memory import empty

_CONFIG, _FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

# Settings of peft's LoraConfig that are followed here, and those that say how an adapter was made or act on other kinds
# of layers (fan_in_fan_out). All others change what an adapter is.
_FOLLOWED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
             "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "lora_bias", "ensure_weight_tying",
             "peft_type", "init_lora_weights"}  # fmt: skip
_IDLE = {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
         "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
         "revision", "runtime_config", "task_type"}  # fmt: skip
_CALLED = {"use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "aLoRA"}


@dataclass(frozen=True, kw_only=True)
class Adapted(SourceTensor):
    """A tensor that an adapter changes: computed when it is read, in float32 or better, then cast. It lies in no file.

    Attributes:
        runs: the places of all numbers that it is made of.
        base: the checkpoint's tensor, or one that the adapter has in its place.
        up, down: what is added is their product, ``[out, r]`` times ``s``, and ``[r, in]``; ``None``: nothing.
    """

    base: SourceTensor
    up: Tensor | None = None
    down: Tensor | None = None

    @property
    def place(self) -> None:
        """``None``: it lies in no file."""

    def map(self, apart: bool = False) -> None:
        """``None``: it lies in no file."""

    def rows(self, start: int, stop: int) -> SourceTensor:
        up = None if self.up is None else self.up[start:stop]
        return replace(self, shape=(stop - start, *self.shape[1:]), base=self.base.rows(start, stop), up=up)

    def read_into(self, out: Tensor, start: int = 0) -> None:
        self._read_by_rows(out, start)

    def check_copies(self) -> None:
        self.base.check_copies()

    def _computed(self, dtype: torch.dtype) -> Tensor:
        numbers = empty(self.shape, torch.promote_types(dtype, torch.float32))
        self.base.read_into(numbers.view(-1))
        if self.up is not None and self.down is not None:
            numbers += (self.up @ self.down).view(numbers.shape)
        return numbers


# What an adapter holds for a parameter: names and shapes of its tensors (a whole one under the parameter's name; then B
# and A, of a table the transposes A and B), and the scaling of the product.
_Change = tuple[dict[str, tuple[int, ...]], float]


def merge(checkpoint: Checkpoint, adapter: Path) -> Checkpoint:
    """A checkpoint with the tensors of a model into which an adapter is merged; none but the adapter's are read yet.

    Args:
        checkpoint: an open one, of weights in floats.
        adapter: the folder in which peft's ``save_pretrained`` wrote a LoRA over transformers' OPT.

    Raises:
        MissingFileError: if the folder or a file is not there.
        CheckpointError: if it is no plain LoRA or of another model, or head and token table would come apart.
    """
    folder = adapter.expanduser()
    settings = _read_settings(folder)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise MissingFileError(f"{folder}: expected {' or '.join(_FILES)}, got neither. Fetch the folder again.")
    if rounded := [tensor.kind for tensor in checkpoint.tensors.values() if tensor.scale is not None]:
        raise CheckpointError(f"{checkpoint.found.where}: expected weights in floats to merge an adapter into, got "
                              f"{rounded[0]}. Name the model that they were made from.")  # fmt: skip
    file, stored = open_file(path), dict[str, SourceTensor]()
    for key in file.shapes:
        if not {"original_module", "modules_to_save"} & set(key.split(".")):  # a bias that is there a second time
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            stored[name] = stored_tensor(file, key)
    front = next((front for front in HF_PREFIXES if any(name.startswith(front) for name in stored)), "")
    heads = [name for name in stored if name.startswith("lm_head.")]
    tables = [name for name in stored if name.startswith(f"{front}embed_tokens.")]
    if (heads or tables) and not (tables and settings.get("ensure_weight_tying")):
        raise CheckpointError(
            f"{path}: changes {some([*tables, *heads])} without ensure_weight_tying, so that head and token table "
            "differ. OPT's head is the table, and an untied one cannot be kept. Train it with that setting; or, to "
            f'take the table for both, write "ensure_weight_tying": true into {_CONFIG}.'
        )
    for name in heads:  # the same as its table
        del stored[name]
    shapes = {front + name: shape for name, shape in parameter_shapes(checkpoint.config).items()}
    try:
        changes = {name: _change(settings, name, shape, name in stored) for name, shape in shapes.items()}
    except (re.error, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: expected settings of a LoRA, got some that make no sense ({error})."
                              " Fetch it again.") from None  # fmt: skip
    _check_tensors(changes, stored, f"{path}: its tensors are not those of an adapter for {checkpoint.found.where} by "
                   f"its {_CONFIG}", settings.get("base_model_name_or_path"))  # fmt: skip
    if tables:
        checkpoint.check_head()  # against the table that it was stored with
        checkpoint = replace(checkpoint, heads=())
    tensors = {name: _adapted(tensor, front + name, *changes[front + name], stored)
               for name, tensor in checkpoint.tensors.items()}  # fmt: skip
    return replace(checkpoint, tensors=tensors)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; refused where it is of something other than a plain LoRA."""
    path = folder / _CONFIG
    if not path.is_file():
        got = "has a whole model's, which is loaded alone" if (folder / "config.json").is_file() else "has none"
        if not folder.is_dir():
            got = "is a file. Name the folder that it is in" if folder.exists() else "is not there"
        raise MissingFileError(f"adapter: expected a folder with {_CONFIG}, as peft writes it, got {folder}, which "
                               f"{got}.")  # fmt: skip
    settings = read_json(path)
    kind, init = settings.get("peft_type", "no peft_type"), settings.get("init_lora_weights")
    others = [name for name, value in settings.items() if value and name not in _FOLLOWED | _IDLE]
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        others.append(f"init_lora_weights {init}, which changes the model's own weights")
    if kind != "LORA" or others:
        what = f"one with {some([_CALLED.get(name, name) for name in others])}" if kind == "LORA" else str(kind)
        raise CheckpointError(f"{path}: expected a plain LoRA, got {what}. If peft can merge it (merge_and_unload), do "
                              "that, and load the folder that save_pretrained writes.")  # fmt: skip
    return settings


def _change(settings: Mapping[str, Any], name: str, shape: tuple[int, ...], is_stored: bool) -> _Change:
    """What the settings say that an adapter holds for a parameter."""
    module, part = name.rpartition(".")[::2]
    is_table, bias, saved = "embed_" in module, settings.get("bias", "none"), settings.get("modules_to_save") or ()
    is_saved = any(f"{end}." in f"{module}." for end in saved)  # it, or a module that it lies in
    is_adapted = not is_saved and "norm" not in module and _is_target(settings, module, is_table)
    is_bias = part == "bias" and (bias == "all" or (bias == "lora_only" and is_adapted))
    r, alpha = _own(settings, module, "rank_pattern", "r"), _own(settings, module, "alpha_pattern", "lora_alpha")
    # Beside the change to a table peft writes the table.
    found = {name: shape} if is_saved or is_bias or (is_adapted and is_table and is_stored) else {}
    if is_adapted and is_table:
        found |= {f"{module}.lora_embedding_A": (r, shape[0]), f"{module}.lora_embedding_B": (shape[1], r)}
    elif is_adapted and part == "weight":
        found |= {f"{module}.lora_B.weight": (shape[0], r), f"{module}.lora_A.weight": (r, shape[1])}
    elif is_adapted and settings.get("lora_bias"):
        found |= {f"{module}.lora_B.bias": shape}
    return found, alpha / (r**0.5 if settings.get("use_rslora") else r)


def _is_target(settings: Mapping[str, Any], module: str, is_table: bool) -> bool:
    """Whether a linear layer or a table is adapted: peft's ``check_target_module_exists``."""

    def matches(names: Any) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names or ())

    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if matches(settings.get("exclude_modules")):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return not is_table
    if layers in (None, []) or not matches(targets):
        return matches(targets)
    lists = settings.get("layers_pattern") or r"[^.]*"
    found = (
        re.match(rf"(?:^|.*?\.){each}\.(\d+)\.", module) for each in ([lists] if isinstance(lists, str) else lists)
    )
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in (layers if isinstance(layers, list) else [layers])


def _own(settings: Mapping[str, Any], module: str, patterns: str, otherwise: str) -> Any:
    """A module's own value: that of the first pattern that fits the end of its name, or the one for all."""
    own = (value for end, value in (settings.get(patterns) or {}).items() if re.match(rf"(.*\.)?({end})$", module))
    return next(own, settings.get(otherwise, 8))


def _check_tensors(
    changes: Mapping[str, _Change], stored: Mapping[str, SourceTensor], what: str, base: str | None
) -> None:
    """Compares an adapter's tensors with those that its settings and the model ask for; names all that differ."""
    expected = {key: shape for keys, _ in changes.values() for key, shape in keys.items()}
    wrong = [f"{name}: expected {list(shape)}, got {list(stored[name].shape)}" for name, shape in expected.items()
             if name in stored and stored[name].shape != shape]  # fmt: skip
    wrong += [f"{name}: expected a float dtype" for name, t in stored.items() if main_dtype([t]) != t.dtype]
    unexpected = [described(name) for name in stored if name not in expected]
    problems = {"missing": [name for name in expected if name not in stored], "unexpected": unexpected,
                "of the wrong shape or kind": wrong}  # fmt: skip
    if any(problems.values()) or not stored:
        listed = "; ".join(f"{len(names)} {how} ({some(names)})" for how, names in problems.items() if names)
        raise CheckpointError(f"{what}: {listed or 'it has none'}. It was made for {base or 'another model'}.")


def _adapted(
    tensor: SourceTensor, name: str, keys: Mapping[str, object], scaling: float, stored: Mapping[str, SourceTensor]
) -> SourceTensor:
    """A tensor of the checkpoint as the adapter has it."""
    if not keys:
        return tensor
    base, parts = stored[name] if name in keys else tensor, [stored[key] for key in keys if key != name]
    runs = tuple(run for source in (tensor, base, *parts) for run in source.runs)
    found = Adapted(tensor.name, tensor.shape, tensor.dtype, runs, base=base)
    if not parts:
        return found
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    up, down = parts[0].read(exact), parts[-1].read(exact)
    if len(parts) == 1:  # of a bias
        up, down = up[:, None], torch.ones(1, 1, dtype=exact)
    elif "embedding" in parts[0].name:
        up, down = up.T, down.T
    return replace(found, up=up * scaling, down=down)

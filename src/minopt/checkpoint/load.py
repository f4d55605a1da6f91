"""Builds a model from a checkpoint: on the meta device first, then each tensor is checked and assigned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minopt.checkpoint.hub import find_model
from minopt.checkpoint.names import HF_HEAD, from_hf
from minopt.checkpoint.read import CheckpointError, WeightFiles, some
from minopt.config import OPTConfig
from minopt.model import OPT

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
) -> OPT:
    """Loads the plain, trainable model of a checkpoint, in evaluation mode.

    Weights are read straight into place. On a CPU, those that keep their dtype stay memory-mapped: they cost
    nothing until used, and the file must not be changed in place meanwhile (replacing it is fine).

    Args:
        name_or_path: a model's folder, a folder that holds exactly one model's folder, or a name on the hub
            such as ``"facebook/opt-125m"``.
        device: ``None`` is the GPU if there is one, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or the torch dtype; ``"auto"`` is float32
            on a CPU and the file's own elsewhere. Tensors are cast as they are read.
        revision: branch, tag or commit on the hub.
        local_files_only: use what the hub's cache holds, ask nobody.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        ValueError: (``CheckpointError`` where it is the files) if anything is missing, unexpected or of another
            shape, or a pickle wants to run code, or device or dtype is unknown.
        OSError: if the hub cannot be reached or refuses.
    """
    target, number_type = resolve_device(device), resolve_dtype(dtype)  # before anything is downloaded
    folder = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    return load_folder(folder, target, number_type)


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype | None) -> OPT:
    """``load_model`` of a folder that is at hand; ``dtype`` ``None`` is ``"auto"``."""
    config = OPTConfig.load(folder)
    files = WeightFiles(folder)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else files.main_dtype
    model = OPT(config, device="meta", dtype=dtype)
    source = _match(model, files, folder)
    if HF_HEAD in files.shapes and HF_HEAD not in source.values():
        _check_head(folder, source["embed_tokens.weight"])
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    # All or none: one tensor that is kept keeps the mapping of its whole file, with all that was read through it.
    keep = device.type == "cpu" and all(files.dtypes[key] == dtype for key in source.values())
    for name, key in source.items():
        tensor = files.read(key, keep=keep)
        if not tensor.is_contiguous() or tensor.data_ptr() in taken:  # a view, or one tensor under two names
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if keep:
            taken.add(tensor.data_ptr())
        state[name] = tensor.to(device=device, dtype=dtype, copy=not keep)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _match(model: OPT, files: WeightFiles, folder: Path) -> dict[str, str]:
    """The file's key for each of the model's parameters.

    Raises:
        CheckpointError: naming what is missing, unexpected or of the wrong shape, all at once.
    """
    parameters = dict(model.named_parameters())
    source: dict[str, str] = {}
    unexpected, twice, shapes = [], [], []
    for key, shape in files.shapes.items():
        name = from_hf(key)
        if name is None or key == HF_HEAD:
            continue
        if name not in parameters:
            unexpected.append(key)
        elif name in source:
            twice.append(f"{source[name]} and {key}")
        elif shape != tuple(parameters[name].shape):
            source[name] = key
            shapes.append(f"{key}: expected {list(parameters[name].shape)}, got {list(shape)}")
        elif files.dtypes[key] not in _DTYPES.values():
            source[name] = key
            shapes.append(f"{key}: expected float64, float32, float16 or bfloat16, got another kind")
        else:
            source[name] = key
    if "embed_tokens.weight" not in source and files.shapes.get(HF_HEAD) == tuple(model.embed_tokens.weight.shape):
        source["embed_tokens.weight"] = HF_HEAD  # tied, and written once under the head's name
    missing = [name for name in parameters if name not in source]
    problems = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("stored twice", twice),
                            ("of the wrong shape or kind", shapes))
        if names
    ]  # fmt: skip
    if not problems:
        return source
    hint = "Do config.json and the weights belong together?"
    if set(missing) & {"final_layer_norm.weight", "final_layer_norm.bias"}:
        hint = (
            "A fine-tune made before transformers 4.20.1 has no final_layer_norm: if this is one, set "
            '"_remove_final_layer_norm": true in its config.json.'
        )
    raise CheckpointError(f"{folder}: the tensors are not those of config.json: {'; '.join(problems)}. {hint}")


def _check_head(folder: Path, embeddings_key: str) -> None:
    """Compares a stored head with the token table, through mappings of its own that are gone afterwards.

    Raises:
        CheckpointError: if they differ.
    """
    files = WeightFiles(folder)
    if files.shapes[HF_HEAD] == files.shapes[embeddings_key]:
        embeddings = files.read(embeddings_key, keep=True)
        if torch.equal(files.read(HF_HEAD, keep=True).to(embeddings.dtype), embeddings):
            return
    raise CheckpointError(
        f"{folder}: {HF_HEAD} differs from the token embeddings; OPT's head is tied to them, and an untied one "
        "cannot be kept. Was the model trained with tie_word_embeddings false?"
    )


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, by default the GPU if there is one.

    Raises:
        ValueError: if this machine or this torch does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ValueError(f'device: {str(device)!r} is not available here ({reason}). Try "cpu".') from None
    return device


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for, ``None`` for ``"auto"``.

    Raises:
        ValueError: if it is none that an OPT computes in.
    """
    if dtype == "auto":
        return None
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(_DTYPES)} or the torch.dtype, got {dtype!r}.")
    return resolved

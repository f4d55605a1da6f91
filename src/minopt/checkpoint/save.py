"""Writes a model as a folder that transformers opens; an interrupted save leaves the old folder whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from minopt import int4, int8
from minopt.atomic import replacing
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import first_line, some
from minopt.checkpoint.files import DTYPES
from minopt.checkpoint.find import weight_files
from minopt.checkpoint.names import parameter_shapes, to_hf
from minopt.config import TOKEN_IDS, OPTConfig, read_json
from minopt.model import OPT
from minopt.tokenizer import TOKENIZER_FILES, Tokenizer
from minopt.wrapped import decoder_of


class Head(NamedTuple):
    """What stands on a decoder in place of the language model's head."""

    architecture: str  # transformers' class
    tensors: Mapping[str, Tensor]  # by their keys in the file
    settings: Mapping[str, Any]  # what config.json says of it


MAX_SHARD_BYTES = 5_000_000_000  # what transformers 4 splits at


def save_model(
    model: OPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    generation_defaults: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    numbers: Iterator[Tensor] | None = None,
    *,
    force: bool = False,
    head: Head | None = None,
) -> None:
    """Writes config.json, safetensors (several with an index, if large) and the tokenizer's files.

    The folder appears whole; other files that it held stay. If anything fails, it is as it was.

    Args:
        model: saved in its own dtype; one of int8 or int4 weights as ``minopt.convert(..., quantize=...)`` does.
        folder: made if missing. One that is not empty is replaced with ``force`` only, and if it is a model's.
        tokenizer: ``None`` writes none, and keeps the one that is there.
        generation_defaults: options of ``GenerationConfig`` for a generation_config.json; without any, the one that is
            there is kept.
        max_shard_bytes: the most that one file holds, unless a single tensor is larger.
        numbers: the whole parameters in the model's order, each made when it is written, for a model whose parameters
            are sharded; ``None`` takes the model's own.
        force: replace a model that is there.
        head: another head to write too; ``numbers`` has its tensors last.

    Raises:
        FileExistsError: if ``folder`` holds something and ``force`` is not given; if it is a file, a mount point or the
            current folder, or holds something other than a model.
        ValueError: if the model was changed: wrapped, parametrised, layers shared; sharded, or quantised by torchao.
        OSError: if it cannot be written.
    """
    folder, model = Path(folder).expanduser(), decoder_of(model)
    check_destination(folder, force)
    tensors = named_tensors(model) | dict(head.tensors if head else {})
    if numbers is None:
        _check_plain(tensors)
    with replacing_model(folder, TOKENIZER_FILES if tokenizer else ()) as new:
        write_safetensors(new, tensors, numbers or iter(tensors.values()), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)
        if generation_defaults:
            write_json(new / "generation_config.json", _special_tokens(model.config) | dict(generation_defaults))
        is_int8 = any(key.endswith(int8.SCALE) for key in tensors)
        quantization = int4.config_of(tensors) or (int8.CONFIG if is_int8 else None)
        write_config(new, model.config, model.dtype, quantization, head)


def generation_config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of a checkpoint's generation_config.json; without such a file, what its config.json implies."""
    path = checkpoint.found.folder / "generation_config.json"
    return read_json(path) if path.is_file() else {"_from_model_config": True, **_special_tokens(checkpoint.config)}


def _special_tokens(config: OPTConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {name: values[name] for name in TOKEN_IDS}


def write_config(
    folder: Path,
    config: OPTConfig,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
    head: Head | None = None,
) -> None:
    """Writes config.json, for weights of ``dtype``, or for quantized ones beside other tensors of ``dtype``."""
    # The model's head is the token table, whatever the config.json said that was read: loading compares the two.
    own = {
        "architectures": [head.architecture if head else "OPTForCausalLM"],
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **(head.settings if head else {}),
    }
    values = {key: value for key, value in config.to_dict().items() if key not in ("dtype", int8.CONFIG_KEY)}
    write_json(folder / "config.json", values | own | ({int8.CONFIG_KEY: quantization} if quantization else {}))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    folder: Path, shown: Mapping[str, Tensor], numbers: Iterator[Tensor], max_shard_bytes: int
) -> None:
    """Writes tensors to one file, or to several with an index; one tensor at a time is in memory.

    ``shown`` has their shapes and dtypes by key, maybe on the meta device; ``numbers`` gives them in the same order.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in shown.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, {key: shown[key] for key in keys}, numbers)
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in shown.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_file(path: Path, shown: Mapping[str, Tensor], numbers: Iterator[Tensor]) -> None:
    """Writes one file (https://huggingface.co/docs/safetensors); the library's own writer takes all tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {torch.int64: "I64", **{dtype: name for name, dtype in DTYPES.items()}}
    begin = 0
    for key, tensor in sorted(shown.items(), key=lambda item: -item[1].dtype.itemsize):  # so that all are aligned
        offsets = [begin, begin := begin + tensor.nbytes]
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        for key in shown:
            file.seek(data + header[key]["data_offsets"][0])
            part = next(numbers)
            assert (part.dtype, part.shape) == (shown[key].dtype, shown[key].shape), key
            file.write(part.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)


def named_tensors(model: OPT) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's names; ``ValueError`` if they are not just those of an OPT."""
    parameters = dict(model.named_parameters())
    expected = set(parameter_shapes(model.config))
    rounded = {name for name in expected if int8.is_quantized(name)}
    if any(name.endswith(int4.PACKED) for name in parameters):
        expected -= rounded
        expected |= {name + end for name in rounded for end in (int4.PACKED, int8.SCALE, int4.SHAPE)}
    elif any(name.endswith(int8.SCALE) for name in parameters):
        expected |= {name + int8.SCALE for name in rounded}
    if wrong := sorted(parameters.keys() ^ expected):
        raise ValueError(f"model: expected an OPT's own parameters, these differ: {some(wrong)}. Merge or unwrap it.")
    return {to_hf(name): parameter.detach() for name, parameter in parameters.items()}


def _check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are no plain numbers: another program's quantised ones, or shards."""
    for key, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            what = "Save the model before it is quantised; minopt.convert(..., quantize=...) writes quantised ones."
            if hasattr(tensor, "full_tensor"):
                what = (
                    "Gather them on all ranks: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                    "options=StateDictOptions(full_state_dict=True)); load that into a minopt.OPT on rank 0 to save."
                )
            raise ValueError(f"model: expected plain tensors, got {type(tensor).__name__} ({key}). {what}")


def check_destination(folder: Path, force: bool) -> None:
    """Refuses a folder that cannot be written to, or holds something that ``force`` does not allow to replace."""
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        above = "" if file == folder else f" above it, {file}"
        raise FileExistsError(f"{folder}: expected a folder to write to, got a file{above}. Name another.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is there already. Name another folder, or replace it with force=True.")


def check_apart(checkpoint: Checkpoint, destination: Path) -> None:
    """Refuses a destination whose replacement would remove the files that are read."""
    source = checkpoint.found.folder
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"{destination}: is, or holds, the source {source}. Name another destination.")


@contextmanager
def replacing_model(folder: Path, replaced: Iterable[str]) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of ``folder`` if the block ends well.

    Files of ``folder`` come along, but for config.json, quantization.json, weights of any kind and those of the
    names ``replaced``.

    Raises:
        FileExistsError: if ``folder`` is a mount point or the current folder, or holds something other than a model.
        OSError: if it cannot be written; ``folder`` is as it was.
    """
    folder = folder.expanduser().resolve()
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder}: is a mount point, which cannot be replaced. Name a folder in it.")
    if Path.cwd().is_relative_to(folder):
        raise FileExistsError(f"{folder}: is, or holds, the current folder, which cannot be replaced. Name another.")
    weights, is_old = weight_files(folder), folder.is_dir() and any(folder.iterdir())
    if is_old and not weights and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder}: holds files that are not a model's (no config.json). Name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder) as new:
            new.mkdir()
            yield new
            if is_old:
                written = {*replaced, "config.json", int4.RECORD, *weights, *(path.name for path in new.iterdir())}
                shutil.copytree(
                    folder, new, symlinks=True, dirs_exist_ok=True, copy_function=_link,
                    ignore=lambda inner, names: written & set(names) if Path(inner) == folder else set(),
                )  # fmt: skip
    except (OSError, RuntimeError) as error:  # of a file that is written, which torch.save makes a RuntimeError
        is_of_disk = isinstance(error, OSError) and error.errno is not None and error.filename is None
        if not is_of_disk and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)[:200]
        raise OSError(f"{folder}: cannot be written ({reason}). Is the disk full?") from None


def _link(source: str, target: str) -> None:
    """Gives an unchanged file a second name, which takes no space; copies it where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)

"""Writes a model as a folder that transformers opens; an interrupted save leaves the old folder whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minopt.checkpoint.names import to_hf
from minopt.checkpoint.read import PICKLES, SAFETENSORS, some
from minopt.model import OPT
from minopt.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # what transformers 4 splits at

# What a save replaces: weights of every layout, lest an old file shadow the new one.
_REPLACED = (*SAFETENSORS, *PICKLES, "config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                    "special_tokens_map.json")  # fmt: skip


def save_model(
    model: OPT, folder: str | Path, tokenizer: Tokenizer | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes config.json, safetensors (several with an index, if large) and the tokenizer's files.

    Everything is written to a folder beside ``folder`` that then takes its place, together with any other file
    that ``folder`` held. A process killed in the moment between the two renames leaves the old model as ``old`` in
    the hidden ``.NAME.*.saving`` beside.

    Args:
        model: saved in its own dtype.
        folder: made if missing. An existing folder must be a model's (hold a config.json) or be empty.
        tokenizer: ``None`` writes none, and keeps the one that is there.
        max_shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
        FileExistsError: if ``folder`` is a file, a mount point or the current folder, or holds something other than
            a model.
        ValueError: if the model was changed: wrapped, parametrised, layers shared.
        OSError: if it cannot be written; the old folder is as it was.
    """
    folder = Path(folder)
    tensors = _tensors(model)
    shards = _split(tensors, max_shard_bytes)
    # The head is the token table, whatever the file said that the model came from (loading has compared the two).
    values = model.config.to_dict() | {"tie_word_embeddings": True}
    values["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    values.pop("dtype", None)  # the newer name of the same key, from the file that was loaded
    with replacing(folder, _REPLACED + (_TOKENIZER_FILES if tokenizer else ())) as new:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            try:
                save_file({key: t.contiguous() for key, t in shard.items()}, new / name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder}: cannot write {name} ({error}). Is the disk full?") from None
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = sum(t.nbytes for t in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(new / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(new)
        _write_json(new / "config.json", values)
        for path in new.glob("*.safetensors"):
            path.chmod((new / "config.json").stat().st_mode)  # the library writes them for their owner alone


def _tensors(model: OPT) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's names.

    Raises:
        ValueError: if they are not just those of an OPT of its configuration.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    parameters = dict(model.named_parameters())
    expected = OPT(model.config, device="meta").state_dict()
    if wrong := sorted(parameters.keys() ^ expected.keys()):
        raise ValueError(f"model: expected an OPT's own parameters, these differ: {some(wrong)}. Merge or unwrap it.")
    return {to_hf(name): parameter.detach() for name, parameter in parameters.items()}


def _split(tensors: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


@contextmanager
def replacing(folder: Path, replaced: tuple[str, ...]) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of ``folder`` if the block ends well.

    Args:
        folder: what to replace; made, with its parents, if missing.
        replaced: patterns of the files in ``folder`` that the new one does without; all else comes along.

    Raises:
        FileExistsError: if ``folder`` is a file, a mount point or the current folder, or holds something other than
            a model.
    """
    folder = folder.expanduser().resolve()
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder}: is a mount point, which cannot be replaced. Name a folder in it.")
    if Path.cwd().is_relative_to(folder):
        raise FileExistsError(f"{folder}: is, or holds, the current folder, which cannot be replaced. Name another.")
    if folder.exists():
        if not folder.is_dir():
            raise FileExistsError(f"{folder}: expected a folder to save to, got a file. Name another.")
        if any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise FileExistsError(
                f"{folder}: holds files that are not a model's (no config.json). Name another folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent))
    new, old = beside / "new", beside / "old"
    try:
        new.mkdir()
        yield new
        if folder.is_dir():
            skipped = shutil.ignore_patterns(*replaced, *(p.name for p in new.iterdir()))

            def skipped_here(directory: str, names: list[str]) -> set[str]:
                return skipped(directory, names) if Path(directory) == folder else set()

            shutil.copytree(folder, new, ignore=skipped_here, copy_function=_link, symlinks=True, dirs_exist_ok=True)
        for path in new.iterdir():
            _flush_to_disk(path)
        if folder.is_dir():
            folder.rename(old)
        new.rename(folder)
    finally:
        # Here, not in an except around the renames: an interrupt may come as soon as the first one is done.
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A second name for an unchanged file, which costs no space; a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _flush_to_disk(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Writes a model as a folder that transformers opens; an interrupted save leaves the old folder whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from minopt.checkpoint.names import to_hf
from minopt.model import OPT
from minopt.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # what transformers 4 splits at

# What a save replaces: weights of every layout, lest an old file shadow the new one.
_REPLACED = ("model*.safetensors*", "pytorch_model*.bin*", "config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                    "special_tokens_map.json")  # fmt: skip


def save_model(
    model: OPT, folder: str | Path, tokenizer: Tokenizer | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes config.json, safetensors (several with an index, if large) and the tokenizer's files.

    Everything is written to a folder beside ``folder`` that then takes its place, together with any other file
    that ``folder`` held.

    Args:
        model: saved in its own dtype.
        folder: made if missing. An existing folder must be a model's (hold a config.json) or be empty.
        tokenizer: ``None`` writes none, and keeps the one that is there.
        max_shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
        FileExistsError: if ``folder`` is a file, or holds something other than a model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {to_hf(name): parameter.detach() for name, parameter in model.named_parameters()}
    shards = _split(tensors, max_shard_bytes)
    values = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    values.pop("dtype", None)  # the newer name of the same key, from the file that was loaded
    with replacing(folder, _REPLACED + (_TOKENIZER_FILES if tokenizer else ())) as new:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({key: t.contiguous() for key, t in shard.items()}, new / name, metadata={"format": "pt"})
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
        FileExistsError: if ``folder`` is a file, holds something other than a model, or is the current folder.
    """
    folder = folder.expanduser().resolve()
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
    try:
        new, old = beside / "new", beside / "old"
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
        try:
            new.rename(folder)
        except BaseException:
            if old.is_dir():
                old.rename(folder)
            raise
    finally:
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

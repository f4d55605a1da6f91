"""Recognises files and folders that are not what their name says, and tells what to do about them."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = "manifest.json"  # of the folder of an exported program

NO_WEIGHTS = (
    "model: this is an exported program, which generates and scores, but has no weights to train, measure or save. "
    "Load what it was exported from."
)

_FETCH = "Fetch the file again."
_PACKED = "a packed archive. Unpack it, and name what was in it."
_SOURCE = "Name the model that it was made from."
_PROGRAMS = "which other programs open. Take the model that it was made from."
_DEEPSPEED = ("the shards that DeepSpeed divides weights and optimizer into. Put them together first: python "
              "zero_to_fp32.py, which lies beside them.")  # fmt: skip

# How a file begins: what it is, and what to do.
_FILES = {
    b"version https://git-lfs": f"a Git LFS pointer, which git lfs pull replaces by the file. {_FETCH}",
    b"<!doctype": f"a web page. {_FETCH}",
    b"<html": f"a web page. {_FETCH}",
    b"<?xml": f"an XML text, as servers answer with. {_FETCH}",
    b"gguf": f"a GGUF file, {_PROGRAMS}",
    b"\x89hdf": f"an HDF5 file, {_PROGRAMS}",
    **dict.fromkeys((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!", b"\x28\xb5\x2f\xfd"), _PACKED),
    bytes(64): f"zeros, as of a download that did not finish. {_FETCH}",
}

# What lies in a folder: what that is, and what to do.
_FOLDERS = (
    (("program.pt2",), f"a program of minopt export, which has no weights. {_SOURCE}"),
    (("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*"), _DEEPSPEED),
    (("*.incomplete", "*.part", "*.crdownload", "*.aria2"), "a download that did not finish. Start it again."),
    (("*.gguf", "ggml-*.bin"), f"a model for llama.cpp. {_SOURCE}"),
    (("*.onnx",), f"a model for ONNX. {_SOURCE}"),
    (("tf_model*.h5", "*.ckpt.index"), f"a model for TensorFlow. {_SOURCE}"),
    (("flax_model*.msgpack",), f"a model for Flax. {_SOURCE}"),
    (("model.bin",), f"a model for CTranslate2. {_SOURCE}"),
    (("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"), "an archive. Unpack it, and name what was in it."),
    (("*-of-*.safetensors", "*-of-*.bin"), "shards without their index. Fetch the file *.index.json too."),
    (("*.safetensors", "*.bin", "*.pth", "*.ckpt"), "of another name. If it holds the weights, name the file itself."),
)  # fmt: skip


def what_it_is(path: Path) -> str | None:
    """What a file is, to judge by its first bytes, and what to do; ``None`` if that cannot be told."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return f"an empty file. {_FETCH}"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower() if head.strip() else head
    known = next((what for mark, what in _FILES.items() if start.startswith(mark)), None)
    if known is not None or head[257:262] == b"ustar":
        return known or _PACKED
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")) and path.suffix == ".safetensors":
        return "a zip archive or a pickle. If torch.save wrote it, rename it to pytorch_model.bin."
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8 and path.suffix != ".safetensors":
        return "a safetensors file. Rename it to model.safetensors."
    text = head.decode("ascii", errors="replace").strip()
    line = next(iter(text.splitlines()), "\0")
    is_odd = path.suffix not in (".json", ".txt") or line[0] not in "{[#" or line.startswith('{"error"')
    if text.isascii() and b"\0" not in head and line.isprintable() and is_odd:
        return f'a text that begins "{line[:80]}". {_FETCH}'
    return None


def is_exported(path: Path | None) -> bool:
    """Whether a path is a folder that ``minopt export`` wrote."""
    return path is not None and (path / MANIFEST).is_file()


def what_it_holds(folder: Path) -> str | None:
    """What a folder without weights holds, and what to do; ``None`` if that cannot be told."""
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError, RecursionError):
            base = None
        base = base or "the model that it was made for"
        return (f'an adapter for {base}. Name that model, and the adapter beside it: load("{base}", '
                f'adapter="{folder}"), or --model {base} --adapter {folder}.')  # fmt: skip
    if (run := unfinished_run(folder)) is not None:
        return run
    for patterns, what in _FOLDERS:
        if files := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            return f"{', '.join(files[:2])}{f' and {len(files) - 2} more' if len(files) > 2 else ''}: {what}"
    return None


def unfinished_run(folder: Path) -> str | None:
    """Says what to take from a folder of ``minopt.train`` without a model yet; ``None`` if it is no such folder."""
    if not (folder / "run.json").is_file() or (folder / "config.json").is_file():
        return None
    steps = sorted((folder / "checkpoints").glob("step-*"))
    choices = [str(path) for path in (*steps[-1:], folder / "best") if path.is_dir()]
    return "a training run that is not finished. Run it again to go on" + (
        f", or take the model of a checkpoint: {' or '.join(choices)}." if choices else "; it has no checkpoint yet."
    )

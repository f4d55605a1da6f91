"""What a folder holds where it holds no weights that open here, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from minopt.checkpoint.errors import some
from minopt.config import read_json

MANIFEST = "manifest.json"  # of the folder of an exported program

NO_WEIGHTS = (
    "model: this is an exported program, which generates and scores, but has no weights to train, measure or save. "
    "Load what it was exported from."
)

_SOURCE = "Name the model that it was made from."
_DEEPSPEED = ("the shards that DeepSpeed divides weights and optimizer into. Put them together first: python "
              "zero_to_fp32.py, which lies beside them.")  # fmt: skip

_KNOWN = (
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


def is_exported(path: Path | None) -> bool:
    """Whether a path is a folder that ``minopt export`` wrote."""
    return path is not None and (path / MANIFEST).is_file()


def stranger(folder: Path) -> str | None:
    """What a folder without weights is, and what to do; ``None`` if that cannot be told."""
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder / "adapter_config.json")
    if (run := unfinished_run(folder)) is not None:
        return run
    for patterns, what in _KNOWN:
        if files := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            return f"{some(files, 2)}: {what}"
    return None


def unfinished_run(folder: Path) -> str | None:
    """What to take of a folder of ``minopt.train`` that has no model yet; ``None`` if it is no such folder."""
    if not (folder / "run.json").is_file() or (folder / "config.json").is_file():
        return None
    steps = sorted((folder / "checkpoints").glob("step-*"))
    choices = [str(path) for path in (*steps[-1:], folder / "best") if path.is_dir()]
    return "a training run that is not finished. Run it again to go on" + (
        f", or take the model of a checkpoint: {' or '.join(choices)}." if choices else "; it has no checkpoint yet."
    )


def _adapter(path: Path) -> str:
    try:
        base = read_json(path).get("base_model_name_or_path")
    except ValueError:
        base = None
    return (f"an adapter for {base or 'another model'}. Merge the two first (PEFT: merge_and_unload, "
            "save_pretrained), and name that folder.")  # fmt: skip

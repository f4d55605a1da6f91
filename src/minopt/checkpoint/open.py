"""Opens a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.config import resolve_config
from minopt.checkpoint.errors import MissingFileError, some
from minopt.checkpoint.find import Format, check_link, find_files
from minopt.checkpoint.huggingface import open_huggingface
from minopt.checkpoint.metaseq.read import open_metaseq
from minopt.config import OPTConfig

# What opens files of each format.
_OPENERS = {
    Format.HUGGING_FACE: open_huggingface,
    Format.DIVIDED: open_huggingface,
    Format.METASEQ: open_metaseq,
}


def open_checkpoint(
    path: Path, model_config: OPTConfig | str | Path | None = None, ignore: Sequence[str] = ()
) -> Checkpoint:
    """Opens all files of a checkpoint and checks that they are exactly a model's; no numbers are read but samples.

    Args:
        path: a folder that holds one checkpoint, or any one file of it.
        model_config: instead of what the files say: a configuration, the name of a preset, or a config.json.
        ignore: tensors to leave out, by patterns of their names in the files: ``"score.*"``.

    Raises:
        MissingFileError: if a file is not there.
        CheckpointError: if files cannot be read, do not belong together, or are not an OPT's.
        ValueError: if ``model_config`` is none.
    """
    override = resolve_config(model_config)
    found = find_files(path)
    check_link(found.folder / "config.json")
    if found.missing:
        count, of = found.parts * found.shards, f"of {found.metaseq.stem}" if found.metaseq else "in its index"
        raise MissingFileError(f"{found.folder}: {count - len(found.files)} of the {count} files {of} are missing: "
                               f"{some(found.missing)}. Fetch them again.")  # fmt: skip
    return _OPENERS[found.format](found, override, ignore).matched()

"""From a path to the weight files of one checkpoint, whatever its kind: what it is follows from what its files hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import islice, product
from pathlib import Path

from minopt.checkpoint.divided import METADATA
from minopt.checkpoint.errors import AmbiguousPathError, CheckpointError, MissingFileError, some
from minopt.checkpoint.files import TensorFile, open_file
from minopt.checkpoint.keys import is_decoders, is_metaseq
from minopt.config import read_json
from minopt.strangers import what_it_holds

# Every name that weights have in a Hugging Face folder: what is downloaded, and what a save replaces.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
METASEQ = "*.pt"

# In the order of preference where a folder holds several.
LAYOUTS = (*SAFETENSORS[:2], *PICKLES[:2])

# "reshard-model_part-3.pt", "checkpoint_last-model_part-3-shard17.pt", "checkpoint_1_6000.pt-model_part-0.pt"
_NAME = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d{1,4}))?(?:-shard(?P<shard>\d{1,4}))?(?P<suffix>\.\w+)")


class Format(Enum):
    """What files are, by which ``open_checkpoint`` chooses what reads them; the value is its name in words."""

    HUGGING_FACE = "Hugging Face"
    METASEQ = "metaseq"
    DIVIDED = "torch.distributed.checkpoint"
    PROGRAM = "exported program"


@dataclass(frozen=True)
class Found:
    """The weight files that a path leads to.

    Attributes:
        format: what the files are.
        layout: their layout, in words.
        folder: the one that they lie in.
        files: the files that are there, in order.
        parts, shards: the numbers of files there ought to be: model parallel parts, and FSDP shards or files of each.
        missing: names of files that are not there, the first hundred.
        opened: files that have been opened to tell what they are.
    """

    format: Format
    layout: str
    folder: Path
    files: tuple[Path, ...]
    parts: int = 1
    shards: int = 1
    missing: tuple[str, ...] = ()
    opened: Mapping[Path, TensorFile] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """Format and layout in words."""
        return f"{self.format.value}, {self.layout}"

    @property
    def where(self) -> Path:
        """What messages name: the only file, or the folder."""
        return self.files[0] if len(self.files) == 1 else self.folder

    def open(self) -> list[TensorFile]:
        """All files, opened."""
        return [self.opened.get(path) or open_file(path) for path in self.files]


def stem_of(path: Path) -> str:
    """The beginning that the names of all files of a metaseq checkpoint share."""
    match = _NAME.fullmatch(path.name)
    return match["stem"] if match else path.stem


def name_of(path: Path, part: int, shard: int) -> str:
    """The name of the file of a part and shard, after the pattern of another one's."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    name = match["stem"] + (f"-model_part-{part}" if match["part"] else "")
    return name + (f"-shard{shard}" if match["shard"] else "") + match["suffix"]


def group_files(paths: list[Path]) -> list[Found]:
    """Sorts files into metaseq checkpoints by their names."""
    groups: dict[tuple[Path, str, bool, bool], dict[tuple[int, int], Path]] = {}
    for path in sorted(paths):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        group = groups.setdefault((path.parent, match["stem"], match["part"] is None, match["shard"] is None), {})
        key = int(match["part"] or 0), int(match["shard"] or 0)
        if key in group:
            raise CheckpointError(f"{path}: {group[key].name} is the same part and shard. Remove one of them.")
        group[key] = path
    found = []
    for group in groups.values():
        files, (parts, shards) = sorted(group), (max(numbers) + 1 for numbers in zip(*group, strict=True))
        first = group[files[0]]
        gaps = (name_of(first, *key) for key in product(range(parts), range(shards)) if key not in group)
        layout = "FSDP shards" if shards > 1 else "model parallel parts" if len(files) > 1 else "one file"
        there = tuple(group[key] for key in files)
        found.append(Found(Format.METASEQ, layout, first.parent, there, parts, shards, tuple(islice(gaps, 100))))
    return found


def find_files(path: Path) -> Found:
    """The weight files of a folder, or of the checkpoint that one file belongs to.

    Raises:
        CheckpointError: if there are none, or of several checkpoints, or an index names files out of the folder.
    """
    if path.is_dir():
        return _in_folder(path)
    check_link(path)
    if not path.exists() and (parts := parts_of(path)) is not None:
        return parts
    if path.is_symlink() and not (path.parent / "config.json").exists():  # one file of a folder elsewhere
        target = path.resolve()
        path = target if (target.parent / "config.json").is_file() else path
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a folder or a file of a checkpoint, got neither.")
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix in (".json", ".txt", ".distcp") or path.name == METADATA:
        try:
            return _in_folder(path.parent)
        except MissingFileError as error:
            raise MissingFileError(f"{path}: holds no weights, and nothing beside it does: {error}") from None
    for index in (path.parent / layout for layout in LAYOUTS if layout.endswith(".index.json")):
        if index.is_file() and path.name in _shard_names(index):
            return _indexed(index)
    if path.suffix == ".safetensors":
        return _single(path)
    own = next((found for found in group_files(_beside(path)) if path in found.files), None)
    file = _opened(path)
    if file is None:  # opening it again says what is wrong
        return own if own is not None and path.suffix == ".pt" else _single(path)
    return replace(own, opened={path: file}) if own is not None and _is_metaseq(file) else _single(path, file)


def _in_folder(folder: Path) -> Found:
    layout = next((name for name in LAYOUTS if (folder / name).is_file() or (folder / name).is_symlink()), None)
    groups = group_files([path for path in folder.glob(METASEQ) if path.is_file()])  # a pipe would be waited for
    opened = [(found, _opened(found.files[0])) for found in groups]
    # A training run has an optimizer.pt too.
    decoders = [(found, file) for found, file in opened if file is not None and any(map(is_decoders, file.shapes))]
    names = [*([layout] if layout else []), *sorted(found.files[0].name for found, _ in decoders)]
    if len(decoders) > 1 and any(folder.glob("*zero_pp_rank_*_model_states.pt")):
        raise no_weights(folder)
    if len(names) > 1:
        raise AmbiguousPathError(f"{folder}: holds {len(names)} checkpoints ({some(names)}). Name the file of one.")
    if layout is not None:
        return _indexed(folder / layout) if layout.endswith(".index.json") else _single(folder / layout)
    if decoders:
        found, file = decoders[0]
        return replace(found, opened={file.path: file}) if _is_metaseq(file) else _single(file.path, file)
    if (folder / METADATA).is_file():
        paths = tuple(sorted(folder.glob("*.distcp")))
        return Found(Format.DIVIDED, f"{len(paths)} file{'s' * (len(paths) > 1)}", folder, paths, shards=len(paths))
    for path in sorted(path for path in folder.iterdir() if not path.is_dir()):
        check_link(path)
    damaged = [found for found, file in opened if file is None]
    if damaged and (len(groups) == 1 or what_it_holds(folder) is None):  # opening it again says how
        return damaged[0]
    raise no_weights(folder)


def no_weights(folder: Path, name: str | None = None) -> MissingFileError:
    """The error of a folder without weights, a model's of that name, which says what is there instead."""
    if (what := what_it_holds(folder)) is not None:
        return MissingFileError(f"{name or folder}: expected weights, got {what}")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = f"{some(names) or 'nothing'}{' from the hub' if name else ''}"
    return MissingFileError(f"{name or folder}: expected weights ({', '.join((*LAYOUTS, METASEQ))}), got {found}. "
                            "Is this a model's folder, and did its download finish?")  # fmt: skip


def parts_of(path: Path) -> Found | None:
    """The parts or shards of a checkpoint that is called, as metaseq calls it, by a name that no file has."""
    found = [found for found in group_files(_beside(path)) if stem_of(found.files[0]) in (path.stem, path.name)]
    return found[0] if path.suffix and len(found) == 1 else None


def weight_files(folder: Path) -> list[str]:
    """The names of all files in a folder that hold weights, of whatever checkpoints: what a new one replaces."""
    names = {path.name for pattern in (*SAFETENSORS, *PICKLES) for path in folder.glob(pattern)}
    files = [_opened(path) for path in folder.glob(METASEQ) if path.is_file()]
    return sorted(names | {file.path.name for file in files if file is not None and any(map(is_decoders, file.shapes))})


def _beside(path: Path) -> list[Path]:
    """The files of a folder with the same suffix."""
    return [other for other in path.parent.glob("*") if other.suffix == path.suffix and other.is_file()]


def _opened(path: Path) -> TensorFile | None:
    """An opened file; ``None`` if it is damaged or something else."""
    try:
        return open_file(path)
    except CheckpointError:
        return None


def _is_metaseq(file: TensorFile) -> bool:
    return is_metaseq(file.shapes) or (file.is_wrapped and all(key.startswith("decoder.") for key in file.shapes))


def _single(path: Path, file: TensorFile | None = None) -> Found:
    check_link(path)
    layout = "safetensors" if path.suffix == ".safetensors" else "pickle"
    return Found(Format.HUGGING_FACE, layout, path.parent, (path,), opened={} if file is None else {path: file})


def _indexed(index: Path) -> Found:
    """The shards that an index names."""
    check_link(index)
    names = _shard_names(index)
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or len(name.encode(errors="replace")) > 255:
            raise CheckpointError(f"{index}: shards must lie in the folder itself, got {some(names)}.")
        check_link(index.parent / name)
    layout = f"{'safetensors' if 'safetensors' in index.name else 'pickle'} in {len(names)} shards"
    # Beside the index, or where that is a link alone, beside the file that it leads to.
    folders = (index.parent, index.resolve().parent)
    folder = next((f for f in folders if all((f / name).is_file() for name in names)), index.parent)
    missing = tuple(name for name in names if not (folder / name).is_file())
    there = tuple(folder / name for name in names if name not in missing)
    return Found(Format.HUGGING_FACE, layout, folder, there, shards=len(names), missing=missing)


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected a weight_map from keys to files. Fetch it again.")
    return sorted({str(name) for name in weight_map.values()})


def check_link(path: Path) -> None:
    """Refuses a link that leads to no file, and says where it leads; links to any file are followed."""
    if path.is_symlink() and not path.is_file():
        why = "is there, but no file" if path.exists() else "is not there, or a link that leads back here"
        raise MissingFileError(f"{path}: a link to {os.readlink(path)}, which {why}. Repair or remove the link.")

"""From a path to the weight files of one checkpoint, whatever its kind: what it is follows from what its files hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
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


@dataclass(frozen=True)
class FileSet:
    """The files of one metaseq checkpoint, told by their names.

    Attributes:
        folder, stem: the folder and the beginning of names that all files share.
        files: the files by part and shard, in order.
    """

    folder: Path
    stem: str
    files: Mapping[tuple[int, int], Path]

    @property
    def first(self) -> Path:
        return next(iter(self.files.values()))

    def name_of(self, part: int, shard: int) -> str:
        """The name of the file of a part and shard, after the pattern of the others."""
        match = _NAME.fullmatch(self.first.name)
        assert match is not None
        name = self.stem + (f"-model_part-{part}" if match["part"] else "")
        return name + (f"-shard{shard}" if match["shard"] else "") + match["suffix"]


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
        metaseq: the same files as metaseq numbers them; ``None`` for other formats.
        missing: names of files that are not there, the first hundred.
        opened: files that have been opened to tell what they are.
    """

    format: Format
    layout: str
    folder: Path
    files: tuple[Path, ...]
    parts: int = 1
    shards: int = 1
    metaseq: FileSet | None = None
    missing: tuple[str, ...] = ()
    opened: Mapping[Path, TensorFile] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """Format and layout in words."""
        return f"{self.format.value}, {self.layout}"


def group_files(paths: list[Path]) -> list[FileSet]:
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
    return [FileSet(folder, stem, dict(sorted(files.items()))) for (folder, stem, _, _), files in groups.items()]


def find_files(path: Path) -> Found:
    """The weight files of a folder, or of the checkpoint that one file belongs to.

    Raises:
        MissingFileError: if there are none.
        AmbiguousPathError: if there are several checkpoints.
        CheckpointError: if a file cannot be read, or an index names files out of the folder.
    """
    if path.is_dir():
        return _in_folder(path)
    check_link(path)
    if not path.exists() and (parts := parts_of(path)) is not None:
        return _as_metaseq(parts)
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
    for index in (path.parent / layout for layout in LAYOUTS):
        if index.name.endswith(".index.json") and index.is_file() and path.name in _shard_names(index):
            return _indexed(index)
    return _single(path) if path.suffix == ".safetensors" else _of_torch(path)


def _of_torch(path: Path) -> Found:
    """What a file of torch.save belongs to: metaseq's files have others beside them."""
    beside = group_files([p for p in path.parent.iterdir() if p.suffix == path.suffix and p.is_file()])
    files = next((files for files in beside if path in files.files.values()), None)
    try:
        file = open_file(path)
    except CheckpointError:  # opening it again says what is wrong
        return _as_metaseq(files) if files is not None and path.suffix == ".pt" else _single(path)
    return _as_metaseq(files, file) if files is not None and _is_metaseq(file) else _single(path, file)


def _in_folder(folder: Path) -> Found:
    layout = next((name for name in LAYOUTS if (folder / name).is_file() or (folder / name).is_symlink()), None)
    groups = group_files(_files(folder, METASEQ))
    decoders: list[tuple[FileSet, TensorFile]] = []
    errors: list[CheckpointError] = []
    for files in groups:
        try:
            file = open_file(files.first)
        except CheckpointError as error:
            errors.append(error)
        else:  # a training run has an optimizer.pt too
            decoders += [(files, file)] if any(map(is_decoders, file.shapes)) else []
    found = [*([layout] if layout else []), *sorted(files.first.name for files, _ in decoders)]
    if len(decoders) > 1 and any(folder.glob("*zero_pp_rank_*_model_states.pt")):
        raise no_weights(folder)
    if len(found) > 1:
        raise AmbiguousPathError(f"{folder}: holds {len(found)} checkpoints ({some(found)}). Name the file of one.")
    if layout is not None:
        return _indexed(folder / layout) if layout.endswith(".index.json") else _single(folder / layout)
    if decoders:
        files, file = decoders[0]
        return _as_metaseq(files, file) if _is_metaseq(file) else _single(file.path, file)
    if (folder / METADATA).is_file():
        paths = tuple(sorted(folder.glob("*.distcp")))
        layout = f"{len(paths)} file{'s' * (len(paths) > 1)}"
        return Found(Format.DIVIDED, layout, folder, paths, shards=len(paths))
    for path in sorted(folder.glob("*")):
        check_link(path) if not path.is_dir() else None
    if errors and len(groups) == 1:  # damaged: opening it says how
        return _as_metaseq(groups[0])
    if errors and what_it_holds(folder) is None:
        raise errors[0]
    raise no_weights(folder)


def no_weights(folder: Path, name: str | None = None) -> MissingFileError:
    """The error of a folder without weights, a model's of that name, which says what is there instead."""
    if (what := what_it_holds(folder)) is not None:
        return MissingFileError(f"{name or folder}: expected weights, got {what}")
    expected = f"{name or folder}: expected weights ({', '.join((*LAYOUTS, METASEQ))}),"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = f"{some(names) or 'nothing'}{' from the hub' if name else ''}"
    return MissingFileError(f"{expected} got {found}. Is this a model's folder, and did its download finish?")


def parts_of(path: Path) -> FileSet | None:
    """The parts or shards of a checkpoint that is called, as metaseq calls it, by a name that no file has."""
    beside = [p for p in path.parent.glob("*") if p.suffix == path.suffix and p.is_file()]
    sets = [files for files in group_files(beside) if files.stem in (path.stem, path.name)]
    return sets[0] if path.suffix and len(sets) == 1 else None


def weight_files(folder: Path) -> list[str]:
    """The names of all files in a folder that hold weights, of whatever checkpoints: what a new one replaces."""
    names = {path.name for pattern in (*SAFETENSORS, *PICKLES) for path in folder.glob(pattern)}
    for path in _files(folder, METASEQ):
        try:
            names |= {path.name} if any(map(is_decoders, open_file(path).shapes)) else set()
        except CheckpointError:
            continue
    return sorted(names)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files alone: a pipe would wait for somebody to write to it."""
    return [path for path in folder.glob(pattern) if path.is_file()]


def _is_metaseq(file: TensorFile) -> bool:
    return is_metaseq(file.shapes) or (file.is_wrapped and all(key.startswith("decoder.") for key in file.shapes))


def _as_metaseq(files: FileSet, file: TensorFile | None = None) -> Found:
    parts, shards = (max(numbers) + 1 for numbers in zip(*files.files, strict=True))
    wanted = ((part, shard) for part in range(parts) for shard in range(shards))
    missing = tuple(files.name_of(*key) for key in islice((key for key in wanted if key not in files.files), 100))
    layout = "one file" if len(files.files) == 1 else "model parallel parts"
    layout = "FSDP shards" if shards > 1 else layout
    opened = {} if file is None else {file.path: file}
    there = tuple(files.files.values())
    return Found(Format.METASEQ, layout, files.folder, there, parts, shards, files, missing, opened)


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

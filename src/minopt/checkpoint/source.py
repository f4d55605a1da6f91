"""Opens a checkpoint of any kind: what it is follows from what its files hold."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minopt import int8
from minopt.checkpoint.divided import METADATA, open_divided
from minopt.checkpoint.errors import AmbiguousPathError, CheckpointError, MissingFileError, some
from minopt.checkpoint.files import TensorFile, open_file
from minopt.checkpoint.metaseq.config import facts_of, infer_config
from minopt.checkpoint.metaseq.read import FileSet, group_files, open_metaseq
from minopt.checkpoint.names import HF_HEAD, described, from_hf, is_decoders, is_metaseq, left_out, own_keys, to_hf
from minopt.checkpoint.pieces import Slice, SourceTensor, same_numbers
from minopt.checkpoint.quantized import check_quantization, with_scales
from minopt.config import OPTConfig, read_json
from minopt.model import parameter_shapes
from minopt.strangers import what_it_holds

logger = logging.getLogger(__name__)

# Every name that weights have in a Hugging Face folder: what is downloaded, and what a save replaces.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
METASEQ = ("*.pt",)

# In the order of preference where a folder holds several.
LAYOUTS = (*SAFETENSORS[:2], *PICKLES[:2])


_DIVIDED = "torch.distributed.checkpoint"

_MOST_LAYERS = 1000  # the largest OPT has 96


@dataclass(frozen=True)
class Found:
    """The weight files that a path leads to, before they are all opened.

    Attributes:
        kind: in words.
        folder: that they lie in.
        files: all of them, in order.
        metaseq: as parts and shards, where it is a metaseq checkpoint.
        missing: names of files that ought to be there.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]
    metaseq: FileSet | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configuration and where each of the model's tensors lies.

    Attributes:
        found: its files.
        config: of the model.
        config_source: where that comes from, in words.
        tensors: by minopt's names: those of ``OPT(config)``, all of them and no others, in its order.
        heads: a stored head, piece by piece, with the row of the token table at which each begins.
    """

    found: Found
    config: OPTConfig
    config_source: str
    tensors: dict[str, SourceTensor]
    heads: tuple[tuple[Slice, int], ...]

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.found.folder)!r}, {len(self.tensors)} tensors)"

    def check_head(self) -> None:
        """Compares a stored head with the token table, to which OPT's is tied.

        Raises:
            CheckpointError: if they differ.
        """
        for head, row in self.heads:
            table = self.tensors["embed_tokens.weight"]
            rows_fit = len(head.shape) == 2 and head.shape[1:] == table.shape[1:]
            if not rows_fit or row + head.shape[0] > table.shape[0] or head.dtype is None:
                raise CheckpointError(f"{self.found.folder}: the stored head has shape {list(head.shape)}, "
                                      f"the token embeddings {list(table.shape)}.")  # fmt: skip
            start = row * table.shape[1]
            if same_numbers(table, head, start):
                continue
            if not same_numbers(table, head, start, rounded=True):
                raise CheckpointError(
                    f"{self.found.folder}: {head.runs[0].key} differs from the token embeddings; OPT's head is tied to "
                    "them, and an untied one cannot be kept. Was the model trained with tie_word_embeddings false?"
                )
            logger.warning("%s: %s differs from the token embeddings by rounding, and is taken for the same.",
                           self.found.folder, head.runs[0].key)  # fmt: skip


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
    if path.suffix != ".safetensors":
        for files in group_files([p for p in path.parent.iterdir() if p.suffix == path.suffix and p.is_file()]):
            if path in files.files.values() and _looks_metaseq(path):
                return _as_metaseq(files)
    return _single(path)


def _in_folder(folder: Path) -> Found:
    layout = next((name for name in LAYOUTS if (folder / name).is_file() or (folder / name).is_symlink()), None)
    errors: list[CheckpointError] = []
    groups = group_files(_files(folder, "*.pt"))
    sets = [files for files in groups if _holds_decoder(files, errors)]
    found = [f"{layout}"] if layout else []
    found += sorted(next(iter(files.files.values())).name for files in sets)
    if len(sets) > 1 and any(folder.glob("*zero_pp_rank_*_model_states.pt")):
        raise no_weights(folder)
    if len(found) > 1:
        raise AmbiguousPathError(f"{folder}: holds {len(found)} checkpoints ({some(found)}). Name the file of one.")
    if not found and (folder / METADATA).is_file():
        files = tuple(sorted(folder.glob("*.distcp")))
        return Found(f"{_DIVIDED}, {len(files)} file{'s' * (len(files) > 1)}", folder, files)
    if layout is not None:
        return _indexed(folder / layout) if layout.endswith(".index.json") else _single(folder / layout)
    if sets:
        path = next(iter(sets[0].files.values()))
        return _as_metaseq(sets[0]) if _is_metaseq(open_file(path)) else _single(path)
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
    expected = f"{name or folder}: expected weights ({', '.join((*LAYOUTS, *METASEQ))}),"
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
    names |= {
        path.name for path in _files(folder, "*.pt") for files in group_files([path]) if _holds_decoder(files, [])
    }
    return sorted(names)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files alone: a pipe would wait for somebody to write to it."""
    return [path for path in folder.glob(pattern) if path.is_file()]


def _holds_decoder(files: FileSet, errors: list[CheckpointError]) -> bool:
    """Whether files that are called like a checkpoint are one; a training run has an optimizer.pt too."""
    path = next(iter(files.files.values()))
    try:
        file = open_file(path)
    except CheckpointError as error:
        errors.append(error)
        return False
    return any(map(is_decoders, file.shapes))


def _looks_metaseq(path: Path) -> bool:
    """Whether a file is metaseq's; of a damaged one its name tells."""
    try:
        return _is_metaseq(open_file(path))
    except CheckpointError:
        return path.suffix == ".pt"


def _is_metaseq(file: TensorFile) -> bool:
    return is_metaseq(file.shapes) or (file.is_wrapped and all(key.startswith("decoder.") for key in file.shapes))


def _as_metaseq(files: FileSet) -> Found:
    kind = "metaseq, one file" if len(files.files) == 1 else "metaseq, model parallel parts"
    if files.shards > 1:
        kind = "metaseq, FSDP shards"
    paths = tuple(files.files[key] for key in sorted(files.files))
    return Found(kind, files.folder, paths, files, tuple(files.missing))


def _single(path: Path) -> Found:
    check_link(path)
    kind = "Hugging Face, safetensors" if path.suffix == ".safetensors" else "Hugging Face, pickle"
    return Found(kind, path.parent, (path,))


def _indexed(index: Path) -> Found:
    check_link(index)
    names = _shard_names(index)
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or len(name.encode(errors="replace")) > 255:
            raise CheckpointError(f"{index}: shards must lie in the folder itself, got {some(names)}.")
        check_link(index.parent / name)
    kind = f"Hugging Face, {'safetensors' if 'safetensors' in index.name else 'pickle'} in {len(names)} shards"
    # Beside the index, or where that is a link alone, beside the file that it leads to.
    folders = (index.parent, index.resolve().parent)
    folder = next((f for f in folders if all((f / name).is_file() for name in names)), index.parent)
    missing = tuple(name for name in names if not (folder / name).is_file())
    return Found(kind, folder, tuple(folder / name for name in names), missing=missing)


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected a weight_map from keys to files. Fetch it again.")
    return sorted({str(name) for name in weight_map.values()})


def check_link(path: Path) -> None:
    """Says of a link that leads to no file where it leads; whoever made a folder may link to whatever file they like.

    Raises:
        MissingFileError: if there is no file at its end.
    """
    if path.is_symlink() and not path.is_file():
        why = "is there, but no file" if path.exists() else "is not there, or a link that leads back here"
        raise MissingFileError(f"{path}: a link to {os.readlink(path)}, which {why}. Mend or remove the link.")


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
    if found.metaseq is not None:
        path = found.folder / "config.json"
        beside = _read_config(path) if override is None and path.is_file() else None
        content = open_metaseq(found.metaseq, override, beside, ignore)
        checkpoint = Checkpoint(found, content.config, content.config_source, content.tensors, tuple(content.heads))
    else:
        checkpoint = _open_hf(found, override, ignore)
    return _matched(checkpoint)


def _open_hf(found: Found, override: OPTConfig | None, ignore: Sequence[str]) -> Checkpoint:
    if found.missing:
        raise MissingFileError(f"{found.folder}: {len(found.missing)} of the {len(found.files)} files in its index are "
                               f"missing: {some(found.missing)}. Fetch them again.")  # fmt: skip
    quantization = _quantization_of(found.folder, override)
    check_quantization(quantization, found.folder / "config.json")
    where = found.files[0] if len(found.files) == 1 else found.folder
    pieces = open_divided(found.folder) if found.kind.startswith(_DIVIDED) else _pieces(found)
    named: dict[str, tuple[str, Slice]] = {}
    twice, heads = [], []
    for key, short in own_keys(pieces, ignore, where, say=not found.kind.startswith(_DIVIDED)).items():
        name, piece = from_hf(short), pieces[key]
        if short == HF_HEAD:
            heads.append((key, piece))
        elif name in named:
            twice.append(f"{named[name][0]} and {key}")
        elif name is not None:
            named[name] = (key, piece)
    if twice:
        raise CheckpointError(f"{where}: {len(twice)} stored twice ({some(twice)}). Keep one of each.")
    if wrong := [key for key, head in heads if head.dtype == torch.int8]:
        raise CheckpointError(f"{where}: {wrong[0]}: expected the token embeddings, to which OPT's head is tied, got "
                              "int8. Make the int8 weights anew, and ignore lm_head.")  # fmt: skip
    if empty := [key for key, piece in named.values() if 0 in piece.shape]:
        raise CheckpointError(
            f"{where}: {len(empty)} of its tensors hold no numbers ({some(empty)}): saved in training under ZeRO-3, "
            "which divides them among processes. Put them together first (python zero_to_fp32.py, which lies beside "
            "DeepSpeed's checkpoints), or save with stage3_gather_16bit_weights_on_model_save."
        )
    if "embed_tokens.weight" not in named and heads:
        named["embed_tokens.weight"] = heads.pop()  # tied, written once under the head's name
    tensors = {name: SourceTensor(name, p.shape, p.dtype, (p,)) for name, (_, p) in named.items()}
    tensors = with_scales(tensors, quantization is not None, where)
    config, source = _hf_config(found.folder, override, {name: t.shape for name, t in tensors.items()}, where)
    return Checkpoint(found, config, source, tensors, tuple((head, 0) for _, head in heads))


def _pieces(found: Found) -> dict[str, Slice]:
    """The tensors of all files, by their keys."""
    files = [open_file(path) for path in found.files]
    counts = Counter(key for file in files for key in file.shapes)
    if twice := sorted(key for key, count in counts.items() if count > 1):
        raise CheckpointError(f"{found.folder}: stored in several of its files: {some(twice)}. Fetch the files again.")
    return {key: Slice.whole(file, key) for file in files for key in file.shapes}


def _quantization_of(folder: Path, override: OPTConfig | None) -> object:
    """The ``quantization_config`` of a folder, or of the configuration that takes its place; ``None`` without one."""
    given, path = None if override is None else override.extra.get(int8.CONFIG_KEY), folder / "config.json"
    if given is not None or not path.is_file():
        return given
    try:
        return read_json(path).get(int8.CONFIG_KEY)
    except ValueError as error:
        if override is not None:
            return None
        raise CheckpointError(str(error)) from None


def _hf_config(
    folder: Path, override: OPTConfig | None, shapes: dict[str, tuple[int, ...]], where: Path
) -> tuple[OPTConfig, str]:
    if override is not None:
        return override, "as given"
    if (folder / "config.json").is_file():
        return _read_config(folder / "config.json"), "config.json"
    if (folder / METADATA).is_file() and (folder / "state.json").is_file():
        return _read_config(folder / "state.json", "config"), "state.json"
    return infer_config(facts_of(shapes, where), where), "its tensors"


def _read_config(path: Path, key: str | None = None) -> OPTConfig:
    """A configuration in a JSON file: all that it holds, or what is under a key."""
    try:
        values = read_json(path) if key is None else read_json(path).get(key)
        return OPTConfig.from_dict(values if isinstance(values, dict) else {})
    except ValueError as error:
        if not str(error).startswith(str(path)):
            raise CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(str(error)) from None


def resolve_config(model_config: OPTConfig | str | Path | None) -> OPTConfig | None:
    """A configuration, from itself, the name of a preset ("opt-125m", "facebook/opt-125m", "125m") or a config.json.

    Raises:
        ValueError: if there is no such preset or file, or the file is none.
    """
    if model_config is None or isinstance(model_config, OPTConfig):
        return model_config
    if not isinstance(model_config, str | Path):
        raise ValueError(
            f"model_config: expected an OPTConfig, the name of a size or a config.json, got "
            f"{type(model_config).__name__}. OPTConfig.from_dict makes one of a dict."
        )
    if Path(model_config).exists():
        return OPTConfig.load(model_config)
    name = str(model_config).rpartition("/")[2].lower()
    try:
        return OPTConfig.preset(name if "-" in name else f"opt-{name}")
    except ValueError as error:
        raise ValueError(f"model_config: {model_config}: no such file, and {error}") from None


def _matched(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tensors in the model's order, all there.

    Raises:
        CheckpointError: naming what is missing, unexpected or of the wrong shape, all at once.
    """
    found, config, tensors = checkpoint.found, checkpoint.config, checkpoint.tensors
    where = found.folder if len(found.files) > 1 or found.metaseq is None else found.files[0]
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    if config.num_hidden_layers > len(layers):  # before so many are built
        keys = [key for key in map(_key, tensors.values()) if not is_decoders(key)]
        others = f", beside them {some(keys)}, where an OPT has {to_hf('layers.0.fc1.weight')}" if keys else ""
        raise CheckpointError(
            f"{where}: num_hidden_layers is {config.num_hidden_layers} in {_of(checkpoint)}, the tensors are of "
            f"{len(layers)} layers{others}. Do config and weights belong together?"
        )
    if config.num_hidden_layers > _MOST_LAYERS:
        raise CheckpointError(f"{where}: {config.num_hidden_layers} layers, expected at most {_MOST_LAYERS}.")
    expected = parameter_shapes(config)
    wrong = [f"{n}: expected {list(expected[n])}, got {list(t.shape)}"
             for n, t in tensors.items() if n in expected and t.shape != expected[n]]  # fmt: skip
    wrong += [f"{n}: expected float64, float32, float16 or bfloat16, got {'int8' if t.dtype else 'another kind'}"
              for n, t in tensors.items() if expected.get(n) == t.shape and t.dtype in (None, torch.int8)]  # fmt: skip
    missing = [name for name in expected if name not in tensors]
    unexpected = [_key(tensor) for name, tensor in tensors.items() if name not in expected]
    problems = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", list(map(described, unexpected))),
            ("of the wrong shape or kind", wrong),
        )
        if names
    ]
    if problems:
        hint = "Do config and weights belong together?"
        if unexpected and not any(map(is_decoders, unexpected)):
            hint = left_out(unexpected)
        if missing and {*missing} <= {"final_layer_norm.weight", "final_layer_norm.bias"}:
            hint = (
                "A fine-tune made before transformers 4.20.1 has no final_layer_norm: if this is one, set "
                '"_remove_final_layer_norm": true in its config.json.'
            )
        raise CheckpointError(f"{where}: the tensors are not those of {_of(checkpoint)}: {'; '.join(problems)}. {hint}")
    return Checkpoint(
        found, config, checkpoint.config_source, {name: tensors[name] for name in expected}, checkpoint.heads
    )


def _of(checkpoint: Checkpoint) -> str:
    return "the given configuration" if checkpoint.config_source == "as given" else checkpoint.config_source


def _key(tensor: SourceTensor) -> str:
    return tensor.slices[0].runs[0].key if tensor.slices[0].runs else tensor.name

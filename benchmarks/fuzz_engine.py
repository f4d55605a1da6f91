"""Valid checkpoints of every kind, damaged ones made of them, and whether opening one ended as it must.

Imports the tests' writers of metaseq's files; ``fuzz_checkpoints.py`` runs this many times over.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

import fuzz_mutations as mutations  # noqa: E402

import minopt  # noqa: E402
from tests.checkpoint.legacy_files import save_legacy  # noqa: E402
from tests.checkpoint.metaseq_files import write_metaseq  # noqa: E402

PACKAGE = str(Path(minopt.__file__).parent) + os.sep

Shapes = Mapping[str, tuple[int, ...]]
Opener = Callable[[Path], Any]

SIZE = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32,
        "max_position_embeddings": 16}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    # Without shard_metadata the vocabulary has to be a published one.
    "narrow": {"vocab_size": 50272, "hidden_size": 4, "num_attention_heads": 2, "ffn_dim": 8},
}

# What is written of which models, in words, and how.
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "metaseq, namespace": (("125m", "350m", "galactica"), {}),
    "metaseq, dict": (("350m",), {"config": "dict", "fused": False, "dtype": torch.float16, "mixed_norms": True}),
    "metaseq, class": (("galactica",), {"config": "class", "views": True}),
    "metaseq, omegaconf": (("125m", "350m"), {"config": "omegaconf", "head": "whole"}),
    "metaseq, config.json beside": (("125m",), {"config": "dict", "head": "whole"}),
    "metaseq, legacy": (("125m", "350m", "galactica"), {"legacy": True, "config": "dict"}),
    "metaseq, legacy omegaconf": (("125m",), {"legacy": True, "config": "omegaconf", "head": "slice", "fused": False}),
    "metaseq, parts": (("125m", "350m", "galactica"), {"parts": 2, "head": "slice"}),
    "metaseq, parts, k v q": (("125m",), {"parts": 2, "fused": False, "config": "omegaconf", "dtype": torch.float16}),
    "metaseq, parts, legacy": (("125m",), {"parts": 2, "legacy": True, "config": "class", "metadata": False}),
    "metaseq, shards": (("125m", "350m", "galactica"), {"parts": 2, "shards": 3}),
    "metaseq, shards, one flat": (("125m",), {"shards": 2, "wrap": False, "config": "omegaconf", "shape": list}),
    "metaseq, shards, legacy": (("350m",), {"shards": 2, "legacy": True, "config": "dict", "fused": False}),
    "metaseq, shards, no metadata": (("narrow",), {"shards": 2, "config": "dict", "metadata": False,
                                                   "dtype": torch.float16}),
}  # fmt: skip
HF_LAYOUTS = ("safetensors", "safetensors shards", "safetensors, int8", "bin", "bin, legacy", "bin shards")


@dataclass(frozen=True)
class Kind:
    """A valid checkpoint, from which damaged ones are made.

    Attributes:
        name: in words.
        folder: where it lies.
        files: its files' bytes, by name.
        anatomies: of each file.
        shapes: of the model's parameters, by minopt's names.
        free_rows: nothing but the tensors says how many rows the tables have, so a file may say another number.
    """

    name: str
    folder: Path
    files: dict[str, bytes]
    anatomies: dict[str, mutations.Anatomy]
    shapes: Shapes
    free_rows: bool


@dataclass(frozen=True)
class Limits:
    """What opening may take: seconds of the processor, bytes of memory, seconds until it is taken for hung."""

    seconds: float = 5.0
    memory_bytes: int = 500_000_000
    patience_seconds: float = 20.0


LIMITS = Limits()


@dataclass
class Outcome:
    """What came of an input.

    Attributes:
        number: of the input.
        kind: of checkpoint.
        result: "loaded", "refused" or "finding".
        group: of a finding: what it is, and where in minopt it comes from; findings of one group have one cause.
        detail: of a finding: the message, or what there was instead.
        done: to the checkpoint, in words.
        seconds: of the processor.
        growth_bytes: by how much resident memory exceeded what it was before, at most.
    """

    number: int
    kind: str
    result: str = ""
    group: str = ""
    detail: str = ""
    done: str = ""
    seconds: float = 0.0
    growth_bytes: int = 0


# --- valid checkpoints ---


def build_kinds(folder: Path) -> list[Kind]:
    """Writes a small valid checkpoint of every kind."""
    references = {name: _reference(changes) for name, changes in MODELS.items()}
    kinds = []
    for model in ("125m", "350m", "galactica"):
        for layout in HF_LAYOUTS:
            place = folder / f"{layout} {model}"
            _write_hf(place, references[model], layout)
            kinds.append(_kind(f"{layout}, {model}", place, references[model], free_rows=False))
    for layout, (models, options) in LAYOUTS.items():
        for model in models:
            place = folder / f"{layout} {model}"
            with mock.patch.object(torch, "save", _save):
                write_metaseq(place, references[model], **options)
            if "config.json" in layout:
                references[model].config.save_pretrained(place)
            kinds.append(_kind(f"{layout}, {model}", place, references[model], free_rows=True))
    return kinds


def _reference(changes: dict[str, Any]) -> Any:
    """transformers' OPT, each parameter moved, so that no two tensors hold the same numbers."""
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**(SIZE | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


_torch_save = torch.save


def _save(content: Any, path: Path, _use_new_zipfile_serialization: bool = True) -> None:
    """``torch.save`` whose older container is the same each time: torch's own is full of addresses of memory."""
    if _use_new_zipfile_serialization:
        _torch_save(content, path)
    else:
        save_legacy(content, path)


def _write_hf(folder: Path, reference: Any, layout: str) -> None:
    reference.save_pretrained(folder, **({"max_shard_size": "8KB"} if layout == "safetensors shards" else {}))
    (folder / "generation_config.json").unlink()  # which nothing here reads
    if layout == "safetensors, int8":
        minopt.convert(folder, folder.with_suffix(".int8"), quantize="int8")
        shutil.rmtree(folder)
        folder.with_suffix(".int8").rename(folder)
        (folder / "generation_config.json").unlink()
    if layout.startswith("safetensors"):
        return
    (folder / "model.safetensors").unlink()
    state = {key: tensor.detach().clone() for key, tensor in reference.state_dict().items()}
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    if layout != "bin shards":
        _save(state, folder / "pytorch_model.bin", layout == "bin")
        return
    weight_map: dict[str, str] = {}
    for number in range(3):
        part = dict(list(state.items())[number::3])
        name = f"pytorch_model-{number + 1:05}-of-00003.bin"
        _save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))


def _kind(name: str, folder: Path, reference: Any, free_rows: bool) -> Kind:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    parameters = reference.model.decoder.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in parameters.items()}
    anatomies = {file: mutations.Anatomy.of(file, content) for file, content in files.items()}
    return Kind(name, folder, files, anatomies, shapes, free_rows)


def check_valid(kinds: Sequence[Kind]) -> None:
    """Undamaged, each kind opens: or else the rest would mean nothing.

    Raises:
        RuntimeError: naming one that does not.
    """
    for kind in kinds:
        outcome = verdict(open_model, kind.folder, kind.folder, [kind], Limits(seconds=math.inf))
        if outcome.result != "loaded":
            raise RuntimeError(f"{kind.name}, undamaged: {outcome.group} {outcome.detail}")


# --- damage ---


@dataclass(frozen=True)
class Damaged:
    """An input: files by name (``None`` is a folder), what to open, whose tensors may come of it, and what was done."""

    kind: Kind
    files: dict[str, bytes | None]
    opened: str
    models: tuple[Kind, ...]
    done: str

    def write(self, folder: Path) -> Path:
        """Writes the files; those that are whole are links to the valid ones. Returns the path to open."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            if content is None:
                (folder / name).mkdir()
            elif content is self.kind.files.get(name):
                os.link(self.kind.folder / name, folder / name)
            else:
                (folder / name).write_bytes(content)
        return folder / self.opened


def damage(kinds: Sequence[Kind], seed: int, number: int) -> Damaged:
    """The input of a number: kinds take turns, all else is drawn."""
    rng = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    other = rng.choice(kinds) if rng.random() < 0.3 else kind
    files: dict[str, bytes | None] = dict(kind.files)
    whole, done = set(files), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3))):
        broken = {name: content for name, content in files.items() if content}
        if not broken or rng.random() < 0.13:
            if files:
                done.append(mutations.edit_folder(files, other.files, rng))
                whole = {name for name in whole if files.get(name) is kind.files[name]}
            continue
        name = rng.choice([n for n in sorted(broken) for _ in range(1 if n.endswith(".json") else 3)])
        donor = other.files[rng.choice(sorted(other.files))]
        anatomy = kind.anatomies.get(name) or next(iter(kind.anatomies.values()))
        edit = mutations.edit_structure if name in whole and rng.random() < 0.65 else mutations.edit_bytes
        files[name], how = edit(broken[name], anatomy, rng, donor)
        whole.discard(name)
        done.append(f"{name}: {how}")
    opened = rng.choice(sorted(files)) if files and rng.random() < 0.2 else ""
    return Damaged(kind, files, opened, (kind, other), "; ".join(done))


# --- verdict ---


def open_model(path: Path) -> minopt.OPT:
    """What is tested."""
    return minopt.load_model(path, device="cpu")


def verdict(
    opener: Opener, path: Path, folder: Path, models: Sequence[Kind], limits: Limits, said: Callable[[], str] = str
) -> Outcome:
    """Opens a checkpoint and says whether it ended as it must.

    Args:
        opener: gives a model, or raises.
        path: to open.
        folder: of the checkpoint; it or a file in it is to be named.
        models: whose names and shapes a model may have.
        limits: of time and memory.
        said: what was written to the terminal since it was asked last.
    """
    outcome = Outcome(0, models[0].name)
    error: BaseException | None = None
    trouble: list[tuple[str, str]] = []
    with warnings.catch_warnings(record=True) as warned, _bounded_memory(limits.memory_bytes):
        warnings.simplefilter("always")
        before, began = _reset_peak(), time.process_time()
        try:
            model = opener(path)
            trouble += _trouble_with_model(model, models)
            del model
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as caught:  # a panic of Rust is no Exception
            error = caught
        outcome.seconds = time.process_time() - began
        outcome.growth_bytes = max(0, _memory("VmHWM") - before)
    if error is not None:
        trouble += _trouble_with_error(error, folder)
    if warned:
        trouble.append((f"warning {warned[0].category.__name__}", str(warned[0].message)))
    if output := said():
        trouble.append(("wrote to the terminal", output))
    if outcome.seconds > limits.seconds:
        trouble.append(("took too long", f"{outcome.seconds:.1f} s; {_first(error)}"))
    if outcome.growth_bytes > limits.memory_bytes:
        trouble.append(("took too much memory", f"{outcome.growth_bytes / 1e6:.0f} MB; {_first(error)}"))
    outcome.result = "finding" if trouble else "loaded" if error is None else "refused"
    if trouble:
        outcome.group, outcome.detail = trouble[0][0], "; ".join(detail for _, detail in trouble)[:600]
    return outcome


def _trouble_with_model(model: Any, models: Sequence[Kind]) -> list[tuple[str, str]]:
    """What is wrong with what was loaded. Its numbers are used: pages that are mapped beyond a file's end crash."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if not any(_same_shapes(shapes, kind) for kind in models):
        expected = models[0].shapes
        wrong = [n for n in sorted(shapes.keys() | expected.keys()) if shapes.get(n) != expected.get(n)]
        return [("a model of other names or shapes", ", ".join(f"{n} {shapes.get(n)}" for n in wrong[:5]))]
    if {p.dtype for p in parameters.values()} != {torch.float32}:
        return [("a model of another dtype", str({p.dtype for p in parameters.values()}))]
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters.items())
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            return [("a model whose parameters share memory", f"{name} and {other}")]
    with torch.inference_mode():
        for parameter in parameters.values():
            parameter.sum()
        model(torch.zeros(1, 1, dtype=torch.long))
    return []


def _same_shapes(shapes: Shapes, kind: Kind) -> bool:
    if not kind.free_rows:
        return shapes == kind.shapes
    tables = ("embed_tokens.weight", "embed_positions.weight")

    def without_rows(some: Shapes) -> dict[str, tuple[int, ...]]:
        return {name: shape[1:] if name in tables else shape for name, shape in some.items()}

    return without_rows(shapes) == without_rows(kind.shapes)


def _trouble_with_error(error: BaseException, folder: Path) -> list[tuple[str, str]]:
    """What is wrong with how a checkpoint was refused."""
    place, text = _place(error), str(error)
    if not isinstance(error, minopt.CheckpointError):
        return [(f"{type(error).__name__} at {place}", f"{type(error).__name__}: {text}")]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return [(f"MemoryError behind a CheckpointError at {_place(cause)}", text)]
        cause = cause.__cause__ or cause.__context__
    if str(folder) not in text:
        return [(f"names no file of the checkpoint, at {place}", text)]
    text = text.replace(str(folder), "")
    if len(text.splitlines()) != 1:
        return [(f"more than one line, at {place}", repr(text))]
    if not text.isprintable():
        return [(f"not printable, at {place}", repr(text))]
    if len(text) > 2_000:
        return [(f"a line of more than 2,000 characters, at {place}", f"{len(text):,}: {text[:300]}")]
    return []


def _place(error: BaseException) -> str:
    """The innermost line of minopt that an exception came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "no line of minopt"


def _first(error: BaseException | None) -> str:
    return "loaded" if error is None else str(error)[:300]


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _memory(name: str) -> int:
    """A size of this process, in bytes; 0 where there is no /proc."""
    if not _STATUS.exists():
        return 0
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")), "x: 0 kB")
    return int(line.split()[1]) * 1024


def _reset_peak() -> int:
    """Lets the peak of resident memory begin anew, and returns where it begins."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    return _memory("VmHWM")


@contextlib.contextmanager
def _bounded_memory(allowed: int) -> Iterator[None]:
    """Twice as much address space and no more: what is in between is measured, and a bomb fails before the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = _memory("VmSize")
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_one(
    kinds: Sequence[Kind], seed: int, number: int, folder: Path, opener: Opener = open_model,
    limits: Limits = LIMITS, said: Callable[[], str] = str,
) -> Outcome:  # fmt: skip
    """Makes the input of a number in ``folder``, opens it and judges."""
    damaged = damage(kinds, seed, number)
    outcome = verdict(opener, damaged.write(folder), folder, damaged.models, limits, said)
    outcome.number, outcome.done = number, damaged.done[:600]
    return outcome

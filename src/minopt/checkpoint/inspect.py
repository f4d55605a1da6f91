"""Describes a checkpoint: its kind, files and configuration, and on request its values and their digests."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minopt import int4
from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.errors import AmbiguousPathError, CheckpointError, MissingFileError, some
from minopt.checkpoint.find import Format, find_files, weight_files
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.tensors import SourceTensor
from minopt.config import OPTConfig, read_json
from minopt.memory import CHUNK_NUMBERS
from minopt.progress import bar, size_of
from minopt.tokenizer import Tokenizer

# A shard of 175B that was damaged at its source held weights up to 5e4 (metaseq issue 122); sound ones stay far below.
_LARGEST_WEIGHT = 100.0


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a model.

    Attributes:
        name: minopt's, which is Hugging Face's without "model.decoder.".
        shape, dtype: the whole tensor's, as stored.
        findings: suspicious values, in words; ``None`` without ``check``.
        digest: SHA-256 in hexadecimal; ``None`` without ``digest``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    findings: tuple[str, ...] | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of ``inspect_checkpoint``.

    Attributes:
        path, kind: the checkpoint's place on this machine, and what it is, in words.
        files: the weight files' names and bytes, in order.
        parts, shards: model parallel parts, and FSDP shards or files of each.
        missing: names of weight files that are not there.
        problem: why it cannot be loaded; ``None`` if it can. The fields below are then empty.
        config, config_source: the content of a config.json for it, and its origin.
        preset: the published size of this shape.
        parameters, dtypes: how many numbers it has, and how many of each dtype.
        tokenizer: the folder of its files.
        quantization: what ``convert`` has noted of a calibration: method, windows, perplexities.
        tensors, digest: all tensors in the model's order, and one digest for all.
        sparsity: the share of zeros behind each layer's relu on a text; ``None`` if none was run.
    """

    path: str
    kind: str
    files: dict[str, int]
    parts: int
    shards: int
    missing: tuple[str, ...] = ()
    problem: str | None = None
    config: dict[str, Any] | None = None
    config_source: str | None = None
    preset: str | None = None
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    quantization: dict[str, Any] | None = None
    tensors: tuple[TensorReport, ...] = ()
    digest: str | None = None
    sparsity: tuple[float, ...] | None = None

    @property
    def findings(self) -> list[str]:
        """What ``check`` found, one line a tensor."""
        return [f"{t.name}: {'; '.join(t.findings)}" for t in self.tensors if t.findings]

    @property
    def is_sound(self) -> bool:
        """Whether it can be loaded, and nothing suspicious was found in it."""
        return self.problem is None and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"is_sound": self.is_sound}

    def to_text(self, *, tensors: bool = False) -> str:
        """All of it for a reader; ``tensors`` lists them."""
        lines = [f"{name:<15} {value}".rstrip() for name, value in _rows(self)]
        if tensors and self.tensors:
            width = max(len(t.name) for t in self.tensors)
            lines.append("")
            for t in self.tensors:
                shape = " x ".join(map(str, t.shape))
                lines.append(f"{t.name:<{width}}  {t.dtype:<9} {shape:<16}  {t.digest or ''}".rstrip())
        if any(t.findings is not None for t in self.tensors):
            lines += ["", *(self.findings or ["values: all finite, none beyond 100, no tensor of zeros"])]
        if self.sparsity:
            shares = (f"{index:5} {share:12.1%}" for index, share in enumerate(self.sparsity))
            lines += ["", "layer  zeros in fc2", *shares, f"mean  {sum(self.sparsity) / len(self.sparsity):12.1%}"]
        lines += ["", f"problem: {self.problem}"] if self.problem else []
        return "\n".join(lines)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "path", report.path
    yield "kind", report.kind
    if report.parts > 1 or report.kind.startswith(Format.METASEQ.value):
        yield "parts x shards", f"{report.parts} x {report.shards}"
    names, size = list(report.files), size_of(sum(report.files.values()))
    listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}"
    yield "files", f"{len(names)}, {size} ({listed})" if names else "none that can be read"
    if report.missing:
        yield "missing", f"{len(report.missing)}: {some(report.missing, 8)}"
    if (c := report.config) is not None:
        yield "preset", report.preset or "none of the published sizes"
        yield "config", (f"from {report.config_source}: {c['num_hidden_layers']} layers, hidden_size "
                         f"{c['hidden_size']}, {c['num_attention_heads']} heads, ffn_dim {c['ffn_dim']}")  # fmt: skip
        norm = "pre-norm" if c["do_layer_norm_before"] else "post-norm"
        biases = "" if c["enable_bias"] else ", no biases"
        yield "", (f"vocab_size {c['vocab_size']} x {c['word_embed_proj_dim']}, {c['max_position_embeddings']} "
                   f"positions, {norm}, {c['activation_function']}{biases}")  # fmt: skip
        yield "parameters", f"{report.parameters:,}"
        yield "dtypes", ", ".join(f"{name} ({count:,})" for name, count in report.dtypes.items())
        if (q := report.quantization) is not None:
            ppl, kept = q.get("perplexity", {}), int4.RECORD
            yield (
                "quantized",
                f"by {q.get('method')}, perplexity {ppl.get('before')} before, {ppl.get('after')} after ({kept})",
            )
        yield "tokenizer", report.tokenizer or "none beside the weights or one folder up"
    if report.digest is not None:
        yield "sha256", report.digest


def inspect_checkpoint(
    name_or_path: str | Path,
    *,
    check: bool = False,
    digest: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    show_progress: bool = False,
) -> Report:
    """Describes a checkpoint of any kind, also one that is damaged or incomplete.

    Args:
        name_or_path, revision, local_files_only, model_config, ignore: see ``minopt.load_model``.
        check: read all values and look for numbers that are not finite or beyond 100, and for tensors of zeros.
        digest: read all values and compute SHA-256 digests that do not depend on how the file was saved: of each
            tensor, over its name, dtype and shape as three lines (``layers.0.fc1.weight``, ``float16``, ``3072,768``)
            and then its little-endian bytes in row-major order, those of an int8 or int4 weight followed by its
            scales' as float32; and of the whole, over the lines ``<name> <digest>`` sorted by name. Each line ends with
            a newline.
        show_progress: draw a bar on stderr, if that is a terminal, while values are read.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file, or no weights in it.
        ValueError: if it holds several checkpoints, or ``model_config`` is none.
        OSError: if the hub cannot be reached or refuses.
    """
    path = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    try:
        found = find_files(path)
    except (AmbiguousPathError, MissingFileError):
        raise
    except CheckpointError as error:
        folder = path if path.is_dir() else path.parent
        names = [name for name in weight_files(folder) if path.is_dir() or name == path.name]
        files = {name: (folder / name).stat().st_size for name in names}
        return Report(str(path), "cannot be told", files, 1, len(files), problem=str(error))
    files = {file.name: file.stat().st_size for file in found.files}
    base = Report(str(path), found.kind, files, found.parts, found.shards, found.missing)
    try:
        checkpoint = open_checkpoint(path, model_config, ignore)
    except (CheckpointError, OSError) as error:
        return replace(base, problem=str(error))
    return _describe(base, checkpoint, check, digest, show_progress)


def _describe(base: Report, checkpoint: Checkpoint, check: bool, digest: bool, show_progress: bool) -> Report:
    dtypes: Counter[str] = Counter()
    reports, problems = [], []
    tensors, shown = checkpoint.tensors.values(), show_progress and (check or digest)
    for tensor in bar(len(tensors), " tensors", iterable=tensors, shown=shown, leave=False):
        dtypes[tensor.kind] += tensor.numel
        findings, own = None, None
        try:
            if check:
                tensor.check_copies()
                findings = tuple(_suspicious(tensor))
            own = digest_of(tensor) if digest else None
        except CheckpointError as error:
            problems.append(str(error))
        reports.append(TensorReport(tensor.name, tensor.shape, tensor.kind, findings, own))
    try:
        if check:
            checkpoint.check_head()
    except CheckpointError as error:
        problems.append(str(error))
    tokenizer, record = Tokenizer.find(checkpoint.found.folder), checkpoint.found.folder / int4.RECORD
    return replace(
        base,
        problem=problems[0] if problems else None,
        config=checkpoint.config.to_dict(),
        config_source=checkpoint.config_source,
        preset=checkpoint.config.preset_name,
        parameters=dtypes.total(),
        dtypes=dict(dtypes),
        tokenizer=None if tokenizer is None else str(tokenizer),
        quantization=read_json(record) if record.is_file() else None,
        tensors=tuple(reports),
        digest=digest_of_all({r.name: r.digest for r in reports}) if digest and not problems else None,
    )


def _suspicious(tensor: SourceTensor) -> Iterator[str]:
    """What is suspicious in a tensor's values, in words that name the file and place of the first of each kind."""
    counts: Counter[str] = Counter()
    places: dict[str, str] = {}
    largest = 0.0
    for piece in tensor.beside or (tensor,):
        for begin, numbers in _chunks(piece, torch.float32):
            sizes, finite = numbers.abs(), numbers.isfinite()
            for kind, wrong in (("nan", ~finite), ("large", finite & (sizes > _LARGEST_WEIGHT))):
                if count := int(wrong.sum()):
                    counts[kind] += count
                    at = begin + int(wrong.nonzero()[0])
                    run = next(piece.runs_of(at, at + 1))
                    places.setdefault(kind, f"first at {run.file.path.name}: {run.key}[{run.start}]")
            largest = max(largest, float(sizes.where(finite, 0.0).max()))
    if counts["nan"]:
        yield f"{counts['nan']:,} not finite, {places['nan']}"
    if counts["large"]:
        yield f"{counts['large']:,} beyond {_LARGEST_WEIGHT:g} (up to {largest:.4g}), {places['large']}"
    if not largest and not counts and tensor.numel:
        yield f"all {tensor.numel:,} are zero"


def _chunks(tensor: SourceTensor, dtype: torch.dtype | None) -> Iterator[tuple[int, torch.Tensor]]:
    """All numbers in their order, some at a time, each time with the index of the first."""
    for begin in range(0, tensor.numel, CHUNK_NUMBERS):
        numbers = torch.empty(min(CHUNK_NUMBERS, tensor.numel - begin), dtype=dtype)
        tensor.read_into(numbers, begin)
        yield begin, numbers


def digest_of(tensor: SourceTensor) -> str:
    """SHA-256 of a tensor, as ``inspect_checkpoint`` defines it."""
    stored, shape = tensor.stored, ",".join(map(str, tensor.shape))
    state = hashlib.sha256(f"{tensor.name}\n{tensor.kind}\n{shape}\n".encode())
    stored.check_copies()
    for _, numbers in _chunks(stored, stored.dtype):
        _update(state, numbers)
    if tensor.scale is not None:
        _update(state, tensor.scale.float())
    return state.hexdigest()


def digest_of_all(digests: Mapping[str, str | None]) -> str:
    """SHA-256 of a whole checkpoint, from its tensors'."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of names, dtypes, shapes and a few numbers of each tensor from each file: tells checkpoints apart."""
    state = hashlib.sha256(repr(checkpoint.config).encode())
    for tensor in checkpoint.tensors.values():
        dtype = tensor.stored.dtype
        state.update(f"{tensor.name} {dtype} {tensor.shape}\n".encode())
        for run in (run for piece in (tensor.stored, *tensor.beside, *tensor.copies) for run in piece.runs):
            numbers = torch.empty(min(64, run.stop - run.start), dtype=dtype)
            run.file.read_into(numbers, run.key, run.start)
            _update(state, numbers)
        if tensor.scale is not None:
            _update(state, tensor.scale.float())
    return state.hexdigest()


def check_same_seen(folder: Path, seen: Sequence[str]) -> None:
    """Refuses processes that see other checkpoints in ``folder``: ``seen`` has the ``fingerprint`` of each, by rank."""
    other = next((rank for rank, fingerprint in enumerate(seen) if fingerprint != seen[0]), None)
    if other is not None:
        raise CheckpointError(
            f"{folder}: process {other} sees another checkpoint than process 0. Copy the same files to all machines."
        )


def _update(state: Any, numbers: torch.Tensor) -> None:
    state.update(numbers.view(-1).view(torch.uint8).numpy().data)

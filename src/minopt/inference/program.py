"""Runs the program of an exported model: a ``Decoder`` without the Python model.

Shapes: B rows, T tokens this call, S cached + T.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.find import Format, Found
from minopt.config import OPTConfig, read_json
from minopt.devices import DTYPES
from minopt.load_options import LoadOptions
from minopt.masks import plain_causal_mask
from minopt.memory import in_large_pages
from minopt.model import OPT
from minopt.strangers import MANIFEST, NO_WEIGHTS

PROGRAM = "program.pt2"

FORMAT = 2
"""The version of the folder's format; it grows when an older minopt could not run what a newer one writes. Format 1 has
no milliseconds, and runs too."""

_AGAIN = "Export the model again (minopt export), where it is to run."


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``: what a program needs, and what it was made of.

    Attributes:
        format: ``FORMAT`` of the minopt that wrote it.
        torch: the version that compiled it, the only one that runs it.
        platform: operating system and kind of processor, such as ``"Linux x86_64"``.
        device: ``"cpu"`` or ``"cuda"``.
        instructions: CPU instructions of the machine that compiled it, which the code may use.
        dtype: the weights' and the cache's, such as ``"bfloat16"``.
        quantize: ``"int8"`` or ``None``.
        max_length: tokens of a row, new ones included.
        max_batch: rows; ``None`` where any number is fine.
        milliseconds: of a call of the program and of the model that ``minopt.load`` gives, on the machine that
            compiled it, by the kind of work: ``{"1 row": {"program": 5.1, "model": 5.3}, ...}``. Empty on a GPU.
        program_sha256: of the file.
        weights_sha256: of the weights that it was made of, as ``minopt inspect --hash`` gives it.
    """

    format: int
    torch: str
    platform: str
    device: str
    instructions: tuple[str, ...]
    dtype: str
    quantize: str | None
    max_length: int
    max_batch: int | None
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    program_sha256: str = ""
    weights_sha256: str = ""

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``manifest.json``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a manifest of this format.
        """
        path = folder / MANIFEST
        values = read_json(path)
        if values.get("format") not in (1, FORMAT):
            raise ValueError(f"{path}: expected format 1 or {FORMAT}, got {values.get('format')!r}. {_AGAIN}")
        values = ({"milliseconds": {}} if values["format"] == 1 else {}) | values
        names = cls.__dataclass_fields__.keys()
        if values.keys() != names:
            wrong = sorted(values.keys() ^ names)
            raise ValueError(f"{path}: {', '.join(wrong)} missing or unknown. Fetch the folder again.")
        if values["dtype"] not in [*DTYPES]:
            raise ValueError(f"{path}: expected dtype {' or '.join(DTYPES)}, got {values['dtype']!r}. {_AGAIN}")
        return cls(**{**values, "instructions": tuple(values["instructions"])})


def machine(device_type: str) -> tuple[str, tuple[str, ...]]:
    """Platform and instructions of this machine, as a manifest has them; those of its first GPU for ``"cuda"``."""
    capabilities = torch.cpu.get_capabilities()
    found = [name for name, value in capabilities.items() if value is True]
    if device_type == "cuda":
        found.append("sm_{}{}".format(*torch.cuda.get_device_capability()))
    return f"{platform.system()} {platform.machine()}", tuple(sorted(found))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        state = hashlib.sha256()
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


class ExportedModel:
    """A program that decodes as an ``OPT`` does.

    Args:
        folder: written by ``minopt export``; the caller has checked its files against the manifest.
        manifest: what the folder's manifest says.
        config: the model's; ``max_position_embeddings`` is the program's longest row.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: OPTConfig) -> None:
        self.config, self.manifest, self.max_batch = config, manifest, manifest.max_batch
        self.device, self.dtype = torch.device(manifest.device), DTYPES[manifest.dtype]
        self.in_8_bits = manifest.quantize == "int8"
        self._path = folder / PROGRAM
        if "amx_tile" in manifest.instructions:
            torch.cpu._init_amx()  # Linux gives a process these registers when it asks for them
        try:
            # What torch._inductor.aoti_load_package wraps; that also imports the compiler, for more than a second.
            with in_large_pages() if self.device.type == "cpu" else nullcontext():  # a driver's memory stays as it is
                self._program = torch._C._aoti.AOTIModelPackageLoader(str(self._path), "model", False, 1, -1)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["RuntimeError"])[0]
            raise ValueError(f"{self._path}: cannot be loaded ({reason}). {_AGAIN}") from None

    def __repr__(self) -> str:
        return f"ExportedModel({self._path.parent.name}, {self.dtype}, {self.device})"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__}: has no {name!r}. {NO_WEIGHTS}")

    def as_opt(self) -> OPT:
        """Refuses: a program has no weights."""
        raise ValueError(NO_WEIGHTS)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(f"{type(self).__name__}: cannot be copied or pickled. Load it again, from its folder.")

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See ``Decoder.new_cache``."""
        return KVCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

    def read(
        self, inputs: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See ``Decoder.read``."""
        if inputs.is_floating_point():
            raise ValueError(
                "inputs_embeds: expected ids, for an exported program looks them up itself. Load the model."
            )
        (B, T), past = inputs.shape, cache.length
        S = past + T
        if mask is None:
            mask = plain_causal_mask(past, T, S, self.device)
        if cache.batch_size != B or cache.capacity < S or mask.shape[3] != S:
            raise ValueError(  # the program would write beyond it
                f"cache: made for {cache.batch_size} rows of {cache.capacity} tokens, {cache.length} filled, got ids "
                f"{list(inputs.shape)} and a mask of {mask.shape[3]} tokens. Make it larger, or feed less."
            )
        if wanted is None:
            wanted = torch.arange(B * T, device=self.device)
        tensors = [x.contiguous() for x in (inputs, position_ids, mask.expand(B, -1, -1, -1), wanted)]
        (logits,) = self._program.boxed_run(tensors + cache.keys + cache.values)
        cache.length = S
        return logits

    def agreed(self, decision: Tensor) -> Tensor:
        """See ``Decoder.agreed``."""
        return decision


def check(options: LoadOptions) -> None:
    """Refuses nothing: which options a program takes is known once its folder is (``build``)."""


def open_files(path: Path, model_config: object, ignore: Sequence[str]) -> Checkpoint:
    """A program's folder as a checkpoint without tensors."""
    _refuse(path, model_config=model_config, ignore=ignore or None)
    Manifest.read(path)  # another program's manifest.json is named before the files beside it
    if missing := [name for name in (PROGRAM, "config.json") if not (path / name).is_file()]:
        raise FileNotFoundError(f"{path}: expected {' and '.join(missing)} beside {MANIFEST}. Fetch the folder again.")
    found = Found(Format.PROGRAM, "one file", path, (path / PROGRAM,))
    return Checkpoint(found, OPTConfig.load(path), "config.json", {}, ())


def build(checkpoint: Checkpoint, options: LoadOptions) -> ExportedModel:
    """The program in a folder, for ``minopt.load``. It is machine code, which acts with your rights.

    Raises:
        ValueError: if a file is not the one that the manifest describes, the program does not run here, or options are
            not those that it was exported with.
    """
    folder = checkpoint.found.folder
    _refuse(folder, quantize=options.quantize, mesh=options.mesh, offload=options.offload)
    manifest, program = Manifest.read(folder), folder / PROGRAM
    _check_machine(program, manifest)
    device = manifest.device if options.any_device else options.device.type
    dtype = manifest.dtype if options.dtype is None else str(options.dtype).removeprefix("torch.")
    for name, given, own in (("device", device, manifest.device), ("dtype", dtype, manifest.dtype)):
        if given != own:
            raise ValueError(
                f"{name}: {program} was exported with --{name} {own}, got {given}. Leave it out, or export again with "
                f"--{name} {given}."
            )
    if sha256(program) != manifest.program_sha256:
        raise ValueError(
            f"{program}: is not the file that {MANIFEST} describes (its SHA-256 differs): cut short, damaged, "
            "or of another export. Fetch the folder again."
        )
    return ExportedModel(folder, manifest, checkpoint.config)


def _refuse(folder: Path, **options: object) -> None:
    for name, given in options.items():
        if given is not None:
            raise ValueError(f"{name}: {folder} is an exported program, to which it does not apply. Leave it out.")


def _check_machine(program: Path, manifest: Manifest) -> None:
    if manifest.torch != torch.__version__:
        raise ValueError(f"{program}: was compiled by torch {manifest.torch}, this is {torch.__version__}. {_AGAIN}")
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{program}: was compiled for a GPU, and torch sees none here. {_AGAIN}")
    here, instructions = machine(manifest.device)
    if manifest.platform != here:
        raise ValueError(f"{program}: was compiled for {manifest.platform}, this is {here}. {_AGAIN}")
    if missing := sorted(set(manifest.instructions) - set(instructions)):
        raise ValueError(
            f"{program}: was compiled for a machine with {', '.join(missing)}, which this one lacks. {_AGAIN}"
        )

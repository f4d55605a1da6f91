"""A model as a program that runs without it: one AOTInductor package for prompts, single tokens and beams.

Shapes: B rows, T tokens this call, S cached + T, R capacity of the cache, N tokens whose logits are wanted, H heads,
D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.export import Dim

from minopt.cache import KVCache
from minopt.checkpoint.errors import first_line
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.inspect import digest_of, digest_of_all
from minopt.checkpoint.load import load_checkpoint, resolve_device, resolve_dtype
from minopt.checkpoint.save import generation_config, replacing, write_config, write_json
from minopt.checkpoint.source import Checkpoint, open_checkpoint
from minopt.config import OPTConfig, is_int, read_json
from minopt.generation.decode import generate
from minopt.inference.exported import FORMAT, PROGRAM, ExportedModel, Manifest, machine, sha256
from minopt.model import OPT
from minopt.tokenizer import Tokenizer

# New tokens of each check prompt.
_NEW = 16


class _GivenCache(KVCache):
    """The keys and values that a program is given, of which it attends S tokens and has to write the last T."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], new: int, filled: int) -> None:
        self.keys, self.values, self.filled = keys, values, filled
        self.slots = torch.arange(filled - new, filled, device=keys[0].device)
        self.length = self.slots[0].clone()  # a tensor: an int would fix the length of all calls

    @property
    def capacity(self) -> int:
        return self.filled

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.slots, key)
        self.values[layer].index_copy_(2, self.slots, value)
        return self.keys[layer][:, :, : self.filled], self.values[layer][:, :, : self.filled]


class Program(nn.Module):
    """What is compiled: a model that takes all that varies from call to call as tensors."""

    def __init__(self, model: OPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        wanted: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """Reads tokens into the cache.

        Args:
            input_ids, position_ids: ``[B, T]`` int64.
            mask: boolean ``[B, 1, T, S]``, True = attend; its size says how many tokens of the cache are filled.
            wanted: ``[N]`` int64, tokens whose logits are wanted, counted through all rows: ``0`` to ``B * T - 1``.
            keys, values: of L layers, ``[B, H, R, D]`` each; the new ones are written from slot ``S - T`` on.

        Returns:
            Logits ``[N, V]``.
        """
        cache = _GivenCache(keys, values, input_ids.shape[1], mask.shape[3])
        hidden = self.model.hidden_states(input_ids, mask, position_ids, cache)
        return self.model.head(hidden.flatten(0, 1)[wanted])


def export_model(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    max_length: int | None = None,
    max_batch: int | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Compiles a model into a folder that ``minopt.load`` opens, and that runs without minopt too (docs/export.md).

    The program has decoded a few prompts as the model does, or the folder is not written. It runs with this version
    of torch, on processors that have this one's instructions.

    Args:
        source: as ``name_or_path`` of ``minopt.load_model``.
        destination: a folder that is not there yet.
        dtype: see ``minopt.load_model``.
        max_length: the most tokens of a row, new ones included; ``None`` is the model's number of positions.
        max_batch: refuse more rows than that; ``None`` is any number.
        device: ``"cpu"`` or ``"cuda"``.
        revision, local_files_only, model_config: see ``minopt.load_model``.
        tokenizer: the folder of its files; ``None`` looks beside the weights, then one folder up.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        FileExistsError: if the destination is there.
        ValueError: (``CheckpointError`` where it is the files) if source or options do not fit, or the program decodes
            other tokens than the model.
        OSError: if there is no C++ compiler or it fails, the folder cannot be written, or the hub cannot be reached.
    """
    destination = Path(destination).expanduser()
    target, number_type = resolve_device(device), resolve_dtype(dtype)
    _check_options(destination, max_length, max_batch)
    _check_compiler()
    path = find_model(source, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config)
    limit = checkpoint.config.max_position_embeddings
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length: expected at most the model's {limit} positions, got {max_length}.")
    folder = Tokenizer.find(checkpoint.found.folder) if tokenizer is None else Path(tokenizer).expanduser()
    reader = None if folder is None else Tokenizer.load(folder)
    model = load_checkpoint(checkpoint, target, number_type)
    with replacing(destination, ()) as new:
        _compile(model, new / PROGRAM)
        manifest = _describe(checkpoint, model, new / PROGRAM, max_length or limit, max_batch)
        manifest.write(new)
        config = replace(model.config, max_position_embeddings=manifest.max_length)
        check_tokens(model, ExportedModel(new, manifest, config))
        write_config(new, config, model.dtype)
        generation_file = checkpoint.found.folder / "generation_config.json"
        found = generation_file.is_file()
        write_json(new / "generation_config.json", read_json(generation_file) if found else generation_config(config))
        if reader is not None:
            reader.save(new)


def _check_options(destination: Path, max_length: int | None, max_batch: int | None) -> None:
    if destination.exists():
        raise FileExistsError(f"{destination}: is there already. Name another folder.")
    if max_length is not None and (not is_int(max_length) or max_length < 2):
        raise ValueError(f"max_length: expected 2 or more tokens, got {max_length!r}.")
    if max_batch is not None and (not is_int(max_batch) or max_batch < 1):
        raise ValueError(f"max_batch: expected 1 or more rows, got {max_batch!r}.")


def _check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        searched = ", ".join(name for name in inductor_config.cpp.cxx if name)
        raise OSError(
            f"export: needs a C++ compiler, and found none ({searched}). Install one (apt install g++, dnf install "
            "gcc-c++, conda install gxx), or name yours in the environment variable CXX."
        ) from None


def _describe(checkpoint: Checkpoint, model: OPT, program: Path, max_length: int, max_batch: int | None) -> Manifest:
    platform, instructions = machine(model.device.type)
    return Manifest(
        format=FORMAT,
        torch=torch.__version__,
        platform=platform,
        device=model.device.type,
        instructions=instructions,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=None,
        max_length=max_length,
        max_batch=max_batch,
        program_sha256=sha256(program),
        weights_sha256=digest_of_all({name: digest_of(tensor) for name, tensor in checkpoint.tensors.items()}),
    )


def _compile(model: OPT, path: Path) -> None:
    """Writes the package of a model's program."""
    L, device = model.config.num_hidden_layers, model.device
    # Sizes of 2 and more, all different: one is taken to be fixed, and equal ones (or tensors) to be the same.
    cache = model.new_cache(2, 11)
    ids, positions, wanted = (torch.zeros(size, dtype=torch.long, device=device) for size in ((2, 3), (2, 3), (5,)))
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool, device=device)
    inputs = (ids, positions, mask, wanted, cache.keys, cache.values)
    B, T, S, N, R = map(Dim, ("rows", "tokens", "filled", "wanted", "capacity"))
    layers = [{0: B, 2: R}] * L
    shapes = ({0: B, 1: T}, {0: B, 1: T}, {0: B, 2: T, 3: S}, {0: N}, layers, layers)
    options: dict[str, bool | str] = {
        # Weights packed for the processor. Half the time of a step of 8 rows; at the price of a second head.
        "freezing": True,
        # As many threads as run it, not as compiled it.
        "cpp.dynamic_threads": True,
    }
    if model.dtype != torch.float32:
        # inductor's own products: 19 ms instead of 26 a step of opt-125m in bfloat16; in float32 they gain nothing.
        options |= {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    ways, failures = [options], []
    if model.dtype != torch.float32:  # where inductor has no product of its own for some shape, torch's too
        ways.append(options | {"max_autotune_gemm_backends": "CPP,ATEN"})
    # Compiled in a folder of its own: what lies in inductor's usual one stays there, weights included. And without
    # gradients, or nothing is frozen.
    with torch.no_grad(), fresh_cache(dir=str(path.parent.parent)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, about its own parts
        program = torch.export.export(Program(model), inputs, dynamic_shapes=shapes)
        for way in ways:
            try:
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=way)
                return
            except (CppCompileError, InductorError) as error:  # not let out: fresh_cache writes a warning about errors
                failures.append(first_line(error))
    raise OSError(f"export: compiling failed ({failures[-1]}). Is the disk full, or the C++ compiler too old?")


def check_tokens(model: OPT, program: ExportedModel) -> None:
    """Decodes a few prompts with a model and with its program.

    Raises:
        ValueError: if the program's tokens are others, unless in 16 bits two were so close that rounding decides.
    """
    for name, input_ids, mask in _check_prompts(program):
        new = min(_NEW, program.config.max_position_embeddings - 1)
        expected, found = (
            generate(decoder, input_ids, mask, max_new_tokens=new, eos_token_id=()).sequences.cpu()
            for decoder in (model, program)
        )
        for row, (right, got) in enumerate(zip(expected, found, strict=True)):
            if torch.equal(right, got):
                continue
            at = int((right != got).nonzero()[0])
            padding = 0 if mask is None else int((~mask[row]).sum())
            gap, rounding = _gap(model, right[padding:at], int(right[at]), int(got[at]))
            if not gap <= rounding:
                raise ValueError(
                    f"export: the program's token {at - input_ids.shape[1] + 1} behind the check prompt {name!r} is "
                    f"{got[at]}, the model's is {right[at]}, and their scores are {gap:.3g} apart (rounding explains "
                    f"{rounding:.3g}). Nothing was written; try another dtype, and report it."
                )


@torch.inference_mode()
def _gap(model: OPT, input_ids: Tensor, first: int, second: int) -> tuple[float, float]:
    """By how much a token's score exceeds another's behind ids ``[T]``, and how much of that may be rounding."""
    scores = model(input_ids[None].to(model.device), logits_to_keep=1)[0, -1].float()
    gap = float(scores[first] - scores[second])
    if model.dtype.itemsize > 2:
        return gap, 0.0
    exact = copy.deepcopy(model).float()(input_ids[None].to(model.device), logits_to_keep=1)[0, -1]
    return gap, 2 * float((scores - exact).abs().max())  # either score is off by that much at most


def _check_prompts(program: ExportedModel) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Names, ids and masks: one row, rows padded on the left, and as many tokens as there is room for."""
    limit, most = program.config.max_position_embeddings, program.max_batch or 3
    room = limit - min(_NEW, limit - 1)
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, tokens: int) -> Tensor:
        return torch.randint(program.config.vocab_size, (rows, tokens), generator=generator)

    yield "one row", draw(1, min(9, room)), None
    if most > 1:
        lengths = torch.tensor([min(9, room), min(5, room), 1][:most])
        mask = torch.arange(int(lengths[0])) >= lengths[0] - lengths[:, None]
        yield "rows with padding", draw(len(lengths), int(lengths[0])), mask
    yield "longest row", draw(1, room), None

"""A model as a program that runs without it: one AOTInductor package for prompts, single tokens and beams.

Shapes: B rows, T tokens this call, S cached + T, R capacity of the cache, N tokens whose logits are wanted, H heads,
D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram

from minopt import int8
from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import first_line
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.inspect import digest_of, digest_of_all
from minopt.checkpoint.open import open_checkpoint
from minopt.checkpoint.save import (
    check_apart,
    check_destination,
    generation_config_of,
    replacing_model,
    write_config,
    write_json,
)
from minopt.checkpoint.weights import read_weights
from minopt.config import OPTConfig, is_int
from minopt.devices import resolve_device, resolve_dtype
from minopt.generation.decode import generate
from minopt.inference.linear import OUTLIERS_FROM, by_rows
from minopt.inference.program import FORMAT, PROGRAM, ExportedModel, Manifest, machine, sha256
from minopt.load_options import LoadOptions
from minopt.model import OPT
from minopt.tokenizer import TOKENIZER_FILES, Tokenizer

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


class Int8Linear(nn.Module):
    """A linear layer with weights in int8, a scale an output channel, and inputs in int8, a scale a token.

    The product of integers is exact. Written as inductor knows it: ``_int_mm``, to floats, times both scales.

    Args:
        weight, scale: as of ``int8.quantize``.
        bias: ``[out]``.
        outliers: as of ``inference.products.Int8``: what rounding leaves of a token is a second row of the product.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None
    _levels, _dtype, _zero = 127, torch.int8, 0  # of a token's largest input, of integers, what zero becomes

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, outliers: bool = False) -> None:
        super().__init__()
        shift = None
        if _saturates():  # half the levels, and none below zero: a pair of products then fits into 16 bits
            self._levels, self._dtype, self._zero = 63, torch.uint8, 64
            shift = weight.sum(1).float() * scale.flatten() * self._zero
        buffers = {"weight": weight.t().contiguous(), "scale": scale.flatten(), "bias": bias, "shift": shift}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.outliers, self.rounds_inputs = outliers, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds_inputs:
            return F.linear(x, (self.weight * self.scale).t(), self.bias)
        y, scale = by_rows(x.flatten(0, -2), self._levels, self.outliers, self._product)
        y = y * scale if self.bias is None else y * scale + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, rows: Tensor) -> Tensor:
        rows = rows.round()
        integers = (rows + self._zero if self._zero else rows).to(self._dtype)
        y = torch._int_mm(integers, self.weight).float() * self.scale
        return y if self.shift is None else y - self.shift


@cache
def _saturates() -> bool:
    """Whether products of int8 add in 16 bits, which are too few: oneDNN's do on processors without VNNI."""
    most = torch.full((32, 32), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) != 32 * 127**2).any())


class Int8OPT(OPT):
    """An OPT with the linear layers' weights and the head's in int8; embeddings, norms and projections as they are.

    Args:
        config: shape and options.
        state: weights by name, those of the layers in int8 with scales, as ``read_weights`` gives them.
    """

    def __init__(self, config: OPTConfig, state: dict[str, Tensor]) -> None:
        super().__init__(config, device="meta", dtype=state["embed_tokens.weight"].dtype)
        outliers, rest = config.hidden_size >= OUTLIERS_FROM, dict(state)
        for key in [key for key in state if int8.is_quantized(key)]:
            path = key.removesuffix(".weight")
            parent, _, name = path.rpartition(".")
            tensors = (rest.pop(key), rest.pop(key + int8.SCALE), rest.pop(f"{path}.bias", None))
            setattr(self.get_submodule(parent), name, Int8Linear(*tensors, outliers=outliers))
        self.load_state_dict(rest, assign=True)
        self.head_proj = Int8Linear(*int8.quantize(self.embed_tokens.weight.detach()), None, outliers=outliers)
        self.eval()

    def head(self, h: Tensor) -> Tensor:
        logits: Tensor = self.head_proj(h)
        return logits


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
    quantize: str | None = None,
    max_length: int | None = None,
    max_batch: int | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    force: bool = False,
) -> None:
    """Compiles a model into a folder that ``minopt.load`` opens, and that runs without minopt too (docs/export.md).

    The program has decoded a few prompts as the model does, or the folder is not written. It runs with this version
    of torch, on processors that have this one's instructions.

    Args:
        source: as ``name_or_path`` of ``minopt.load_model``.
        destination: a folder, made if missing.
        dtype: see ``minopt.load_model``.
        quantize: ``"int8"``: weights of linear layers and of the head, and their inputs, in 8 bits; on a CPU. ``None``
            leaves them as the checkpoint has them.
        max_length: the most tokens of a row, new ones included; ``None`` is the model's number of positions.
        max_batch: refuse more rows than that; ``None`` is any number.
        device: ``"cpu"`` or ``"cuda"``.
        revision, local_files_only, model_config, ignore: see ``minopt.load_model``.
        tokenizer: the folder of its files; ``None`` looks beside the weights, then one folder up.
        force: replace a program or model that is there.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        FileExistsError: as ``minopt.convert`` says.
        ValueError: (``CheckpointError`` where it is the files) if source or options do not fit, or the program decodes
            other tokens than the model.
        OSError: if there is no C++ compiler or it fails, the folder cannot be written, or the hub cannot be reached.
    """
    destination = Path(destination).expanduser()
    target, number_type = resolve_device(device), resolve_dtype(dtype)
    check_destination(destination, force)
    _check_options(quantize, target, max_length, max_batch)
    _check_compiler()
    path = find_model(source, revision=revision, local_files_only=local_files_only)
    checkpoint = open_checkpoint(path, model_config, ignore)
    check_apart(checkpoint, destination)
    limit = checkpoint.config.max_position_embeddings
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length: expected at most the model's {limit} positions, got {max_length}.")
    reader = Tokenizer.beside(checkpoint.found.folder, tokenizer)
    with replacing_model(destination, (*TOKENIZER_FILES, "generation_config.json")) as new:
        program = compile_program(checkpoint, new, target, number_type, quantize, max_length or limit, max_batch)
        write_config(new, program.config, program.dtype)
        write_json(new / "generation_config.json", generation_config_of(checkpoint))
        if reader is not None:
            reader.save(new)


def compile_program(
    checkpoint: Checkpoint,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    max_length: int,
    max_batch: int | None = None,
    *,
    is_kept: bool = True,
) -> ExportedModel:
    """Compiles a model into a folder, loads its program, and checks it against the model.

    Args:
        checkpoint, device, dtype, quantize, max_length, max_batch: see ``export_model``.
        folder: is filled; another is beside it meanwhile.
        is_kept: write a manifest, with digests of the program and of all weights; a program used once needs none.

    Raises:
        ValueError, OSError: as ``export_model`` does.
    """
    _check_compiler()
    model = _load(checkpoint, device, dtype, quantize)
    _compile(model, folder / PROGRAM)
    manifest = _describe(checkpoint, model, folder / PROGRAM if is_kept else None, max_length, max_batch)
    if is_kept:
        manifest.write(folder)
    program = ExportedModel(folder, manifest, replace(model.config, max_position_embeddings=max_length))
    check_tokens(model, program)
    return program


def check(options: LoadOptions) -> None:
    """Refuses nothing: all options go with this form."""


def build(checkpoint: Checkpoint, options: LoadOptions) -> ExportedModel:
    """A model as its program, which needs no file once it is loaded; for ``minopt.load``.

    Raises:
        ValueError, OSError: as ``export_model`` does.
    """
    with tempfile.TemporaryDirectory(prefix="minopt-") as place:
        folder = Path(place) / "program"
        folder.mkdir()
        limit = checkpoint.config.max_position_embeddings
        device, dtype, quantize = options.device, options.dtype, options.quantize
        return compile_program(checkpoint, folder, device, dtype, quantize, limit, is_kept=False)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, quantize: str | None) -> OPT:
    state = dict(read_weights(checkpoint, device, dtype, keep_int8=device.type == "cpu", quantize=quantize is not None))
    if any(name.endswith(int8.SCALE) for name in state):
        return Int8OPT(checkpoint.config, state)
    model = OPT(checkpoint.config, device="meta")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_options(quantize: str | None, device: torch.device, max_length: int | None, max_batch: int | None) -> None:
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize: expected int8 or none, got {quantize!r}.")
    if quantize is not None and device.type != "cpu":
        raise ValueError(f"quantize: int8 programs run on a CPU, got {device}. Leave it out, or export for the CPU.")
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


def _describe(
    checkpoint: Checkpoint, model: OPT, program: Path | None, max_length: int, max_batch: int | None
) -> Manifest:
    platform, instructions = machine(model.device.type)
    return Manifest(
        format=FORMAT,
        torch=torch.__version__,
        platform=platform,
        device=model.device.type,
        instructions=instructions,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize="int8" if isinstance(model, Int8OPT) else None,
        max_length=max_length,
        max_batch=max_batch,
        program_sha256="" if program is None else sha256(program),
        weights_sha256=""
        if program is None
        else digest_of_all({name: digest_of(tensor) for name, tensor in checkpoint.tensors.items()}),
    )


def _compile(model: OPT, path: Path) -> None:
    """Writes the package of a model's program."""
    options: dict[str, bool | int | str] = {
        # Weights packed for the processor. Half the time of a step of 8 rows; at the price of a second head.
        "freezing": True,
        # As many threads as run it, not as compiled it.
        "cpp.dynamic_threads": True,
        "autotune_num_choices_displayed": 0,  # on stderr
    }
    ways = [options]
    if model.dtype != torch.float32 or isinstance(model, Int8OPT):
        # inductor's own products read single rows faster than oneDNN's, and take rows in int8 faster than fbgemm's (in
        # float32 they gain nothing). Where a processor has none for some shape, those that are faster.
        ways = [options | {"max_autotune": True, "max_autotune_gemm_backends": b} for b in ("CPP", "CPP,ATEN")]
    with torch.no_grad(), warnings.catch_warnings():  # without gradients, or nothing is frozen
        warnings.simplefilter("ignore")  # of torch's, about its own parts
        program = _trace(model)
        failures = []
        for way in ways:
            if (failure := _package(program, path, way)) is None:
                return
            failures.append(failure)
    raise OSError(f"export: compiling failed ({failures[-1]}). Is the disk full, or the compiler too old?")


def _trace(model: OPT) -> ExportedProgram:
    """The graph of ``Program``, with all sizes left open."""
    L, device = model.config.num_hidden_layers, model.device
    # Sizes of 2 and more, all different: one is taken to be fixed, and equal ones (or tensors) to be the same.
    cache = model.new_cache(2, 11)
    ids, positions, wanted = (torch.zeros(size, dtype=torch.long, device=device) for size in ((2, 3), (2, 3), (5,)))
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool, device=device)
    inputs = (ids, positions, mask, wanted, cache.keys, cache.values)
    B, T, S, N, R = map(Dim, ("rows", "tokens", "filled", "wanted", "capacity"))
    layers = [{0: B, 2: R}] * L
    shapes = ({0: B, 1: T}, {0: B, 1: T}, {0: B, 2: T, 3: S}, {0: N}, layers, layers)
    program = torch.export.export(Program(model), inputs, dynamic_shapes=shapes)
    # A product of int8 is known by who uses it, and these do too.
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)
    return program


def _package(program: ExportedProgram, path: Path, options: Mapping[str, Any]) -> str | None:
    """Compiles a graph. Returns why it failed, if it did."""
    failure = None
    # In a folder of its own: what lies in inductor's usual one stays there, weights included.
    with fresh_cache(dir=str(path.parent.parent)):
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(options))
        except (CppCompileError, InductorError) as error:  # not let out, for fresh_cache would write a warning
            failure = next((line for line in str(error).splitlines() if "error:" in line), first_line(error))[:200]
    return failure


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
    if model.dtype.itemsize > 2 and not isinstance(model, Int8OPT):
        return gap, 0.0
    exact = _unrounded(model)(input_ids[None].to(model.device), logits_to_keep=1)[0, -1]
    return gap, 2 * float((scores - exact).abs().max())  # either score is off by that much at most


def _unrounded(model: OPT) -> OPT:
    """A copy that computes with the same weights in float32, and no inputs in int8."""
    exact = copy.deepcopy(model).float()
    for module in exact.modules():
        if isinstance(module, Int8Linear):
            module.rounds_inputs = False
    return exact


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

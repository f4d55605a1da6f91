"""Compiles a model into a program: one AOTInductor package that is ``Decoder.read``, and runs without the model.

Shapes: B rows, T tokens this call, S cached + T, R capacity of the cache, N tokens whose logits are wanted, H heads,
D head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram
from torch.nn.attention import sdpa_kernel

from minopt import int8
from minopt.attention import WITHOUT_CUDNN
from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.errors import first_line
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.inspect import digest_of, digest_of_all
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
from minopt.inference.fast import FastOPT
from minopt.inference.linear import OUTLIERS_FROM, FullRows, has, join_rows, split_rows
from minopt.inference.program import FORMAT, PROGRAM, ExportedModel, Manifest, machine, sha256
from minopt.inference.timing import beside, slower, worst
from minopt.load_options import LoadOptions
from minopt.model import OPT
from minopt.tokenizer import TOKENIZER_FILES, Tokenizer

logger = logging.getLogger(__name__)

_NEW = 16  # new tokens of each check prompt


class Int8Linear(nn.Module):
    """A linear layer of int8 weights and inputs, as inductor knows it: ``_int_mm``, to floats, times both scales.

    Args:
        weight, scale: as ``int8.quantize`` gives them.
        bias: ``[O]``.
        outliers: see ``split_rows``.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, outliers: bool = False) -> None:
        super().__init__()
        shift = None
        self.levels, self._dtype, self._zero = _inputs()
        if self._zero:
            terms = 1 + 1 / (2 * self.levels) if outliers else 1
            shift = weight.sum(1).float() * scale.flatten() * self._zero * terms
        buffers = {"weight": weight.t().contiguous(), "scale": scale.flatten(), "bias": bias, "shift": shift}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.outliers, self.rounds_inputs = outliers, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds_inputs:
            return F.linear(x, (self.weight * self.scale).t(), self.bias)
        rows, own = split_rows(x.flatten(0, -2), self.levels, self.outliers)
        y = torch._int_mm((rows.round() + self._zero).to(self._dtype), self.weight).float()
        y = (join_rows(y, self.levels) if self.outliers else y) * own * self.scale
        y = y if self.shift is None else y - own * self.shift
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _inputs() -> tuple[int, torch.dtype, int]:
    """The largest integer of an input, the dtype of inputs, and what zero becomes."""
    if _saturates():  # half the levels, and none below zero: a pair of products then fits into 16 bits
        return 63, torch.uint8, 64
    if has("avx512_vnni") and not has("amx_int8"):  # VNNI multiplies unsigned inputs by signed weights
        return 127, torch.uint8, 128
    return 127, torch.int8, 0


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
        for key in filter(int8.is_quantized, state):
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
    """The model that is compiled: it takes all that varies from call to call as tensors."""

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
        """Reads tokens into the cache, as ``Decoder.read`` does.

        Args:
            input_ids, position_ids: ``[B, T]`` int64.
            mask: boolean ``[B, 1, T, S]``, True = attend; its size says how many tokens of the cache are filled.
            wanted: ``[N]`` int64, tokens whose logits are wanted, counted through all rows: ``0`` to ``B * T - 1``.
            keys, values: one a layer, ``[B, H, R, D]`` each; the new ones are written from slot ``S - T`` on.

        Returns:
            Logits ``[N, V]``.
        """
        T, S = input_ids.shape[1], mask.shape[3]
        cache = KVCache.of(keys, values, torch.arange(S - T, S, device=mask.device), window=S)
        return self.model.read(input_ids, position_ids, mask, wanted, cache)


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
        source, dtype, revision, local_files_only, model_config, ignore: see ``minopt.load_model``.
        destination: a folder, made if missing.
        quantize: ``"int8"``: weights of linear layers and of the head, and their inputs, in 8 bits; on a CPU. ``None``
            leaves them as the checkpoint has them.
        max_length: the most tokens of a row, new ones included; ``None`` is the model's number of positions.
        max_batch: refuse more rows than that; ``None`` is any number.
        device: ``"cpu"`` or ``"cuda"``.
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
        config = replace(checkpoint.config, max_position_embeddings=max_length or limit)
        program, _ = _build(checkpoint, new, target, number_type, quantize, config, max_batch)
        weights = digest_of_all({name: digest_of(tensor) for name, tensor in checkpoint.tensors.items()})
        replace(program.manifest, program_sha256=sha256(new / PROGRAM), weights_sha256=weights).write(new)
        write_config(new, config, program.dtype)
        write_json(new / "generation_config.json", generation_config_of(checkpoint))
        if reader is not None:
            reader.save(new)
    if where := slower(program.manifest.milliseconds):
        logger.warning("export: the program is slower than the loaded model: %s. Load the model for such work.", where)


def check(options: LoadOptions) -> None:
    """Refuses nothing: all options go with this form."""


def build(checkpoint: Checkpoint, options: LoadOptions) -> ExportedModel | FastOPT:
    """A model as its program, for ``minopt.load``: it needs no file once it is loaded.

    Where the program is slower than the fast model at any kind of work, this is the fast model.

    Raises:
        ValueError, OSError: as ``export_model`` does.
    """
    _check_compiler()
    with tempfile.TemporaryDirectory(prefix="minopt-") as place:
        folder = Path(place) / "program"
        folder.mkdir()
        limits = checkpoint.config
        program, fast = _build(checkpoint, folder, options.device, options.dtype, options.quantize, limits, None)
    if where := slower(program.manifest.milliseconds):
        logger.warning("optimize: compiled, the model is slower: %s. It runs as it does without compiling.", where)
    return fast if where and fast is not None else program


def _build(
    checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype | None, quantize: str | None,
    limits: OPTConfig, max_batch: int | None,
) -> tuple[ExportedModel, FastOPT | None]:  # fmt: skip
    """Writes a program into a folder, and checks it against its model. On a CPU the fast model comes with it."""
    config = checkpoint.config
    state = dict(read_weights(checkpoint, device, dtype, keep_int8=device.type == "cpu", quantize=quantize))
    is_int8 = any(name.endswith(int8.SCALE) for name in state)
    if is_int8:
        model: OPT = Int8OPT(config, state)
    else:
        model = OPT(config, device="meta")
        model.load_state_dict(state, assign=True)
    platform, instructions = machine(device.type)
    manifest = Manifest(
        format=FORMAT,
        torch=torch.__version__,
        platform=platform,
        device=device.type,
        instructions=instructions,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize="int8" if is_int8 else None,
        max_length=limits.max_position_embeddings,
        max_batch=max_batch,
    )
    fast = FastOPT(config, state.items()) if device.type == "cpu" else None
    program = _fastest(model.eval(), fast, folder, partial(ExportedModel, folder, manifest, limits))
    check_tokens(model, program)
    return program, fast


def _check_options(quantize: str | None, device: torch.device, max_length: int | None, max_batch: int | None) -> None:
    if int8.is_wanted(quantize) and device.type != "cpu":
        raise ValueError(f"quantize: int8 programs run on a CPU, got {device}. Leave it out, or export for the CPU.")
    for name, given, least, what in (("max_length", max_length, 2, "tokens"), ("max_batch", max_batch, 1, "rows")):
        if given is not None and (not is_int(given) or given < least):
            raise ValueError(f"{name}: expected {least} or more {what}, got {given!r}.")


def _check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        searched = ", ".join(name for name in inductor_config.cpp.cxx if name)
        raise OSError(
            f"export: needs a C++ compiler, and found none ({searched}). Install one (apt install g++, dnf install "
            "gcc-c++, conda install gxx), or name yours in the environment variable CXX."
        ) from None


def _ways(model: OPT) -> list[dict[str, bool | int | str]]:
    """Options of inductor, the best first: the next is tried where one fails, or its program is slower than the model.

    inductor's own products ("CPP") gain nothing in float32. In 16 bits they need AMX: without it they take several
    times as long as oneDNN's. In int8 they need AMX or VNNI. For some shapes there may be none.
    """
    options: dict[str, bool | int | str] = {
        "freezing": True,  # weights in the layout of their kernels: half the time of a step of 8 rows
        "cpp.enable_concat_linear": True,  # query, key and value in one product
        "cpp.dynamic_threads": True,  # as many threads as the machine that runs it has, not the one that compiles it
        "autotune_num_choices_displayed": 0,  # on stderr
    }
    own: tuple[str, ...] = ()
    if model.device.type == "cpu" and (model.dtype != torch.float32 or isinstance(model, Int8OPT)):
        own = ("amx_tile", "avx512_vnni") if isinstance(model, Int8OPT) else ("amx_tile",)
    backends = ("CPP", "CPP,ATEN") if any(map(has, own)) else ()
    return [*(options | {"max_autotune": True, "max_autotune_gemm_backends": b} for b in backends), options]


def _fastest(model: OPT, fast: FastOPT | None, folder: Path, load: Callable[[], ExportedModel]) -> ExportedModel:
    """The first program that is nowhere slower than the fast model, or that which is least slower; its file is kept."""
    best: ExportedModel | None = None
    failure, path, kept = OSError(), folder / PROGRAM, folder / f"kept-{PROGRAM}"
    # Without gradients, or nothing is frozen. A trace does not keep the choice of attention's kernels.
    with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(WITHOUT_CUDNN):
        warnings.simplefilter("ignore")  # of torch's, about its own parts
        traced = _trace(model)
        for way in _ways(model):
            if best is not None:
                path.replace(kept)
            try:
                _compile(traced, path, way)
            except OSError as error:
                failure = error
            else:
                program = load()
                times = {} if fast is None else beside(program, fast)
                program.manifest = replace(program.manifest, milliseconds=times)
                if best is None or worst(times) < worst(best.manifest.milliseconds):
                    best = program
                    kept.unlink(missing_ok=True)
            if kept.exists():
                kept.replace(path)
            if best is not None and not slower(best.manifest.milliseconds):
                break
    if best is None:
        raise failure
    return best


def _compile(program: ExportedProgram, path: Path, way: dict[str, bool | int | str]) -> None:
    """Writes the package of a traced model."""
    failure = ""
    with fresh_cache(dir=str(path.parent.parent)):  # what lies in inductor's usual one stays there, weights included
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=way)
        except (CppCompileError, InductorError) as error:  # not let out, for fresh_cache would write a warning
            lines = [line for line in str(error).splitlines() if "error:" in line] or [first_line(error)]
            failure = lines[0][:200]
    if failure:
        raise OSError(f"export: compiling failed ({failure}). Is the disk full, or the compiler too old?")


def _trace(model: OPT) -> ExportedProgram:
    """The graph of ``Program``, with all sizes left open."""
    L, device = model.config.num_hidden_layers, model.device
    # Sizes of 2 and more, all different: one is taken to be fixed, and equal ones (or tensors) to be the same.
    cache = model.new_cache(2, 11)
    ids, positions, wanted = (torch.zeros(size, dtype=torch.long, device=device) for size in ((2, 3), (2, 3), (5,)))
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool, device=device)
    B, T, S, N, R = map(Dim, ("rows", "tokens", "filled", "wanted", "capacity"))
    layers = [{0: B, 2: R}] * L
    with FullRows():
        program = torch.export.export(
            Program(model),
            (ids, positions, mask, wanted, cache.keys, cache.values),
            dynamic_shapes=({0: B, 1: T}, {0: B, 1: T}, {0: B, 2: T, 3: S}, {0: N}, layers, layers),
        )
    # A product of int8 is known by who uses it, and these do too.
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)
    return program


@torch.inference_mode()
def check_tokens(model: OPT, program: ExportedModel) -> None:
    """Decodes a few prompts with a program. Each of its tokens has to be the one that the model finds most probable.

    Raises:
        ValueError: if one is not, unless the two scores are so close that rounding decides.
    """
    exact: OPT | None = None
    for name, input_ids, mask in _check_prompts(program.config, program.max_batch):
        new = min(_NEW, program.config.max_position_embeddings - 1)
        ids = generate(program, input_ids, mask, max_new_tokens=new, eos_token_id=()).sequences
        real = None if mask is None else F.pad(mask, (0, new), value=True).to(model.device)
        scores = model(ids, real, logits_to_keep=new + 1)[:, :-1].double()  # [B, new, V], before each new token
        best, tokens = scores.max(-1), ids[:, -new:]
        gaps = best.values - scores.gather(-1, tokens[..., None])[..., 0]
        if not gaps.any():
            continue
        exact = exact or _unrounded(model)
        errors = (scores - exact(ids, real, logits_to_keep=new + 1)[:, :-1]).abs().amax(-1)
        rounding = 4 * errors  # either score of either is off by that much at most
        if (wrong := ~(gaps <= rounding)).any():
            row, step = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"export: the program's token {step + 1} after the check prompt {name!r} is {tokens[row, step]}, the "
                f"model's is {best.indices[row, step]}, and their scores are {gaps[row, step]:.3g} apart (rounding "
                f"explains {rounding[row, step]:.3g}). Nothing was written; try another dtype, and report it."
            )


def _unrounded(model: OPT) -> OPT:
    """A copy that computes with the same weights in a wider dtype, and no inputs in int8."""
    exact = copy.deepcopy(model).to(torch.float32 if model.dtype.itemsize == 2 else torch.float64)
    for module in exact.modules():
        if isinstance(module, Int8Linear):
            module.rounds_inputs = False
    return exact


def _check_prompts(config: OPTConfig, max_batch: int | None) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Names, ids and masks: one row, rows padded on the left, and as many tokens as there is room for."""
    limit, most = config.max_position_embeddings, max_batch or 3
    room = limit - min(_NEW, limit - 1)
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, tokens: int) -> Tensor:
        return torch.randint(config.vocab_size, (rows, tokens), generator=generator)

    yield "one row", draw(1, min(9, room)), None
    if most > 1:
        lengths = torch.tensor([min(9, room), min(5, room), 1][:most])
        mask = torch.arange(int(lengths[0])) >= lengths[0] - lengths[:, None]
        yield "rows with padding", draw(len(lengths), int(lengths[0])), mask
    yield "longest row", draw(1, room), None

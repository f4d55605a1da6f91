"""From a name to a model that is ready to run: find its files, choose a form, build it.

Not called ``load``: a submodule of that name would hide the function ``minopt.load``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.find import Format
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.weights import load_checkpoint
from minopt.config import OPTConfig
from minopt.devices import resolve_device, resolve_dtype
from minopt.generation.decoder import Decoder, Draft
from minopt.generation.options import read_defaults
from minopt.load_options import LoadOptions
from minopt.memory import keep_activations
from minopt.model import OPT
from minopt.strangers import is_exported
from minopt.text import LanguageModel
from minopt.tokenizer import Tokenizer

if TYPE_CHECKING:  # it takes a quarter of a second to import
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Form:
    """One way to hold a model's weights and to run it.

    Attributes:
        name: the form's name.
        module: is imported once the form is chosen. Its ``check(options)`` refuses options that do not go with this
            form, and its ``build(checkpoint, options)`` gives the ``Decoder``.
        fits: whether options, and a folder if it is known already, ask for it.
        has_own_files: its files are no checkpoint: the module's ``open_files(path, model_config, ignore)`` opens them.
    """

    name: str
    module: str
    fits: Callable[[LoadOptions, Path | None], bool]
    has_own_files: bool = False


# The first row that fits is taken. A form can be deleted: its file, its row here, and its tests.
FORMS: tuple[Form, ...] = (
    Form("program", "minopt.inference.program", lambda _, path: is_exported(path), has_own_files=True),
    Form("tensor_parallel", "minopt.inference.tensor_parallel", lambda o, _: o.mesh is not None),
    Form("offload", "minopt.inference.offload", lambda o, _: o.offload is not None),
    Form("compile", "minopt.inference.compile", lambda o, _: o.optimize == "compile" and o.device.type == "cpu"),
    Form("graphs", "minopt.inference.graphs", lambda o, _: bool(o.optimize) and o.device.type == "cuda"),
    Form("fast", "minopt.inference.fast", lambda o, _: bool(o.optimize)),
    Form("plain", "minopt.checkpoint.weights", lambda o, _: True),
)


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    optimize: bool | Literal["compile"] = True,
    mesh: DeviceMesh | None = None,
    offload: str | None = None,
    draft: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """Loads a model with its tokenizer: ``minopt.load("facebook/opt-125m").generate("Today is")``.

    Args:
        name_or_path: see ``load_model``, as for all options that are not below; also a folder that ``minopt export``
            wrote. Such a program is machine code, which runs with your rights: load only programs that you trust.
        quantize: ``"int8"`` rounds the weights of the layers and of the head to 8 bits, with a scale for each output
            channel; ``"int4"`` those of the layers to 4, with one for each group of 128 inputs, on a CPU.
            ``None`` leaves the weights as the checkpoint has them.
        optimize: ``True`` makes the model fast, for inference only. ``False`` gives the plain model, which can be
            trained, moved and cast. ``save`` writes the plain weights of either. ``"compile"`` takes a minute to load
            and is faster for single tokens: on a CPU it runs the program that ``minopt export`` would write, which has
            no weights to save; on a GPU it compiles the decoding step.
        mesh: the processes that divide the model (tensor parallelism), a mesh of one dim. Each process calls ``load``
            and reads only its share. Then each calls the same methods with the same arguments, and gets the same
            results.
        offload: for a model larger than the device: where a layer waits while others compute. ``"disk"`` is the
            checkpoint's own files; ``"cpu"`` is pinned memory, for a GPU. Each pass reads all layers, so use large
            batches.
        draft: ``"int8"`` keeps a form of the model in 8 bits too, for a CPU. It says how a text may go on, and the
            model reads all of that in one pass: the same tokens in less time, also when sampling.
        tokenizer: the folder of the tokenizer's files; ``None`` looks beside the weights, then one folder up.

    Returns:
        A ``LanguageModel``; its ``tokenizer`` is ``None`` if the checkpoint has no tokenizer files.

    Raises:
        FileNotFoundError, OSError: as ``load_model`` does.
        ValueError: as ``load_model`` does; also if options do not go together, or the model does not fit into memory.
    """
    target = resolve_device(device if device is not None or mesh is None else mesh.device_type)
    options = LoadOptions(target, resolve_dtype(dtype), quantize, optimize, mesh, offload, device is None, draft)
    _choose(options, None)[1].check(options)  # before anything is downloaded
    _check_draft(options)
    path = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    form, module = _choose(options, path)
    if form.has_own_files:
        if adapter is not None:
            raise ValueError(f"adapter: {path} is an exported program, to which it does not apply. Name the model that "
                             "it was exported from.")  # fmt: skip
        checkpoint = module.open_files(path, model_config, ignore)
    else:
        checkpoint = open_checkpoint(path, model_config, ignore, adapter)
    _check_draft(options, checkpoint)
    folder = checkpoint.found.folder
    reader = Tokenizer.beside(folder, tokenizer)
    defaults = read_defaults(folder / "generation_config.json", checkpoint.config.vocab_size)
    decoder = module.build(checkpoint, options)
    keep_activations()
    if reader is not None:
        reader.warn_of_conflicts(decoder.config, folder)
    own = None if draft is None else Draft(_build_draft(checkpoint, options, decoder), shares_cache=True)
    return LanguageModel(decoder, reader, defaults, own)


def _check_draft(options: LoadOptions, checkpoint: Checkpoint | None = None) -> None:
    """Refuses a draft in int8 where there can be none, or where it would save nothing."""
    problem = ""
    if options.draft is None:
        return
    if checkpoint is not None and checkpoint.found.format is Format.PROGRAM:
        problem = f"{checkpoint.found.folder} is an exported program, which has no weights. Name the model that it was "
        problem += "exported from"
    elif options.quantize == "int8" or (
        checkpoint is not None and any(tensor.kind == "int8" for tensor in checkpoint.tensors.values())
    ):
        problem = "the model is int8 itself. Leave draft out, or load the model in float32 or bfloat16"
    elif options.device.type != "cpu":
        problem = f"int8 saves time on a CPU, got {options.device}. Leave it out, or give generate a smaller model"
    if problem:
        raise ValueError(f"draft: {problem}.")


def _build_draft(checkpoint: Checkpoint, options: LoadOptions, model: Decoder) -> Decoder:
    """The checkpoint in int8, with a cache as the model itself has: of its dtype, and divided as it is.

    What is not in int8 (tables, projections, the last norm) is the model's own, if that has weights.
    """
    held: dict[str, Tensor] = {}
    if isinstance(model, OPT):
        for name in (name for name in checkpoint.tensors if not name.startswith("layers.")):
            owner, _, part = name.rpartition(".")
            module = model.get_submodule(owner)
            tensors: dict[str, Tensor] = getattr(module, "tensors", None) or dict(module.named_parameters())
            held[name] = tensors[part].detach()
    draft = replace(options, quantize="int8", offload=None, optimize=True, held=held)
    decoder: Decoder = _choose(draft, None)[1].build(checkpoint, draft)
    return decoder


def _choose(options: LoadOptions, path: Path | None) -> tuple[Form, Any]:
    """The form that fits, and its module."""
    form = next(form for form in FORMS if form.fits(options, path))
    return form, import_module(form.module)


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    model_config: OPTConfig | str | Path | None = None,
    ignore: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> OPT:
    """Loads the plain, trainable model of a checkpoint, in evaluation mode.

    Weights are read straight into place. On a CPU, weights that keep their dtype stay memory-mapped: they take no
    memory until they are used. Do not change the file in place meanwhile; replacing it is fine.

    Args:
        name_or_path: a model's folder, a folder that holds exactly one model's folder, any one file of a checkpoint,
            or a name on the hub such as ``"facebook/opt-125m"``.
        device: ``None`` is the GPU if there is one, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` (or ``"bf16"``, ``"fp16"``, ...) or the torch
            dtype. ``"auto"`` is float32 on a CPU and the file's own elsewhere. Tensors are cast as they are read.
        revision: branch, tag or commit on the hub.
        local_files_only: use only files that are already in the hub's local cache.
        model_config: replaces the checkpoint's own configuration: an ``OPTConfig``, the name of a preset such as
            ``"opt-1.3b"``, or a config.json.
        ignore: tensors to leave out, as patterns of their names in the files: ``"score.*"``, ``"v_head.*"``.
        adapter: the folder of a LoRA as peft writes it, which is merged into the weights while they are read.

    Raises:
        FileNotFoundError: if there is no such folder, repository or file.
        ValueError: (``CheckpointError`` where it is the files) if a tensor is missing, unexpected or of another shape,
            files do not belong together, or device or dtype is unknown.
        OSError: if the hub cannot be reached or refuses.
    """
    target, number_type = resolve_device(device), resolve_dtype(dtype)  # before anything is downloaded
    path = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    return load_checkpoint(open_checkpoint(path, model_config, ignore, adapter), target, number_type)

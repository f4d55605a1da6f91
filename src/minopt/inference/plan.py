"""Computes how much of a device's memory a model needs, from its configuration alone.

Shapes: B rows, T tokens of each (the prompt's and the new ones), V vocabulary, C hidden_size, F ffn_dim, L layers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minopt import int4, int8
from minopt.checkpoint.checkpoint import Checkpoint, open_checkpoint
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.names import parameter_shapes, shard_dim
from minopt.checkpoint.tensors import Share, main_dtype
from minopt.config import PRESETS, OPTConfig
from minopt.devices import DTYPES
from minopt.inference.linear import Plain, kind_on_cpu
from minopt.inference.sparse import copied_bytes
from minopt.load_options import LoadOptions
from minopt.memory import available_memory
from minopt.progress import size_of
from minopt.strangers import is_exported

# Python, torch and its libraries; on a GPU what CUDA and its libraries take of it (not measured).
RUNTIME_BYTES = {"cpu": 370_000_000, "cuda": 700_000_000}

# What a token of a prompt takes, in inner widths of the feed-forward: measured, with what allocators do not reuse.
_INNER, _INNER_INT8 = 4, 8

# What to try where memory is short.
_TO_DISK: dict[str, Any] = {"devices": 1, "offload": "disk", "quantize": None}
_WAYS: dict[str, dict[str, Any]] = {
    "dtype bfloat16": {"dtype": torch.bfloat16},
    "quantize int8": {"quantize": "int8", "offload": None},
    "offload cpu": _TO_DISK | {"offload": "cpu"},
    "offload disk": _TO_DISK,
    "offload disk and dtype bfloat16": _TO_DISK | {"dtype": torch.bfloat16},
}


@dataclass(frozen=True)
class Plan:
    """The most that one device holds while a model generates, in bytes."""

    devices: int  # this and the next two as in `plan_generation`
    offload: str | None
    quantize: str | None
    weights: int  # and all copies in other layouts
    loading: int  # the most that is held beside them while they are read
    cache: int  # keys and values
    activations: int  # the prompt's, and the scores of a step
    runtime: int  # Python, torch and CUDA
    host: int = 0  # layers that wait in the machine's memory for a GPU
    copies: int = 0  # of weights, made once activations are found to be zeros

    @property
    def total(self) -> int:
        return self.weights + max(self.loading, self.copies + self.cache + self.activations) + self.runtime


def plan_generation(
    config: OPTConfig,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    devices: int = 1,
    offload: str | None = None,
    quantize: str | None = None,
    group: int = int4.GROUP,
    batch: int = 1,
    length: int | None = None,
) -> Plan:
    """Plans the memory that ``minopt.load`` with these options, and ``generate``, take.

    ``device`` is ``"cpu"`` or ``"cuda"``; ``devices`` the number of processes, one a device, that divide the model;
    ``group`` the inputs with one scale, for int4; ``batch`` is B, beams count as rows; ``length`` is T, ``None`` the
    model's positions. Raises ``ValueError`` if the model cannot be divided so.
    """
    check_divides("devices", config, devices)
    size = dtype.itemsize
    if offload is not None:
        quantize = None  # such weights are read as what they stand for
    C, F, V, L = config.hidden_size, config.ffn_dim, config.vocab_size, config.num_hidden_layers
    length = length or config.max_position_embeddings
    tokens = batch * length
    shapes = parameter_shapes(config)
    sizes = {name: _bytes_of(name, shape, size, devices, quantize, group) for name, shape in shapes.items()}
    layers = sum(number for name, number in sizes.items() if name.startswith("layers."))
    outside, table, host, copies = sum(sizes.values()) - layers, sizes["embed_tokens.weight"], 0, 0
    if offload is None:
        product = Plain if device == "cuda" else kind_on_cpu(dtype)
        is_rounded = quantize == "int4" or int8.is_wanted(quantize)
        head = table // size if is_rounded else 0 if product is Plain else table
        # Read before it is packed, one at a time (query, key and value are joined first); the head comes last.
        loading = max(2 * head if is_rounded else 0, max(6 * C * C, C * F) * size // devices - head)
        weights, inner = layers + outside + head, _INNER_INT8 if is_rounded else _INNER
        if device == "cpu" and config.activation_function == "relu" and quantize != "int4":
            copies = L * copied_bytes(F // devices, C, torch.int8 if is_rounded else dtype)
    else:
        weights, loading, inner = outside + min(2, L) * layers // L, 0, _INNER
        host = layers if offload == "cpu" else 2 * layers // L if device == "cuda" else 0
    cache = 2 * L * tokens * C * size // devices
    activations = tokens * (4 * C + inner * F // devices) * size + batch * V * (size + 12)
    if batch > 1:  # the mask of a padded batch, as booleans and as the numbers that kernels add
        activations += batch * length * length * (1 + size)
    return Plan(devices, offload, quantize, weights, loading, cache, activations, RUNTIME_BYTES[device], host, copies)


def _bytes_of(name: str, shape: tuple[int, ...], itemsize: int, devices: int, quantize: str | None, group: int) -> int:
    """The bytes of the first process' share of a tensor."""
    dim = shard_dim(name)
    own = [Share(0, devices).of(size)[1] if number == dim else size for number, size in enumerate(shape)]
    if quantize is None or not int8.is_quantized(name):
        return math.prod(own) * itemsize
    if quantize == "int4":  # with scales as the kernel and, in at most four bytes, as files have them
        return math.prod(own) // 2 + own[0] * -(-own[1] // group) * 8
    return math.prod(own) + 4 * own[0]  # with a scale for each row


def device_counts(config: OPTConfig) -> list[int]:
    """Among how many processes a model can be divided: with as many heads for each, and at least one of all else."""
    heads, rest = config.num_attention_heads, (config.ffn_dim, config.vocab_size)
    fits = (n for n in range(1, heads + 1) if heads % n == 0)
    return [n for n in fits if all(start < stop for start, stop in (Share(n - 1, n).of(size) for size in rest))]


def check_divides(option: str, config: OPTConfig, count: int) -> None:
    """Refuses a number of processes among which a model cannot be divided, and names those that can."""
    if count not in (fitting := device_counts(config)):
        raise ValueError(
            f"{option}: a model of {config.num_attention_heads} heads, {config.ffn_dim} inner units and a vocabulary "
            f"of {config.vocab_size} cannot be divided among {count} processes. Take one of "
            f"{', '.join(map(str, fitting))}."
        )


def rows_that_fit(config: OPTConfig, memory: int, **options: Any) -> int:
    """The largest batch of which the plan takes at most so many bytes; options are those of ``plan_generation``."""
    one, two, three = (plan_generation(config, batch=batch, **options).total for batch in (1, 2, 3))
    if two > memory:
        return int(one <= memory)
    return 2 + (memory - two) // (three - two)


def check_fits(checkpoint: Checkpoint, options: LoadOptions, devices: int = 1, group: int | None = None) -> None:
    """Refuses a checkpoint that, divided among so many devices, does not fit into the memory that is free.

    ``group``: the inputs with one scale, where its weights are int4 in memory.
    """
    device, where = options.device, checkpoint.found.folder
    free, host = available_memory(device), available_memory(torch.device("cpu"))
    if free is None:
        return
    free += sum(tensor.nbytes for tensor in options.held.values())  # the plan counts these too
    dtype = options.dtype or checkpoint.dtype_on(device)
    is_int8 = any(tensor.kind == "int8" for tensor in checkpoint.tensors.values())
    quantize = "int4" if group is not None else "int8" if is_int8 else options.quantize
    asked: dict[str, Any] = {"dtype": dtype, "devices": devices, "offload": options.offload, "quantize": quantize}
    asked |= {} if group is None else {"group": group}

    def plan(changes: dict[str, Any]) -> Plan:
        return plan_generation(checkpoint.config, device=device.type, length=1, **(asked | changes))

    def needed(changes: dict[str, Any]) -> int:
        found = plan(changes)
        on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        return (found.weights + found.loading) * (on_one_machine if found.devices > 1 else 1)

    waiting = plan({}).host if options.offload == "cpu" else 0
    if host is not None and waiting > host:
        raise ValueError(
            f"memory: the layers of {where} take {size_of(waiting)} of the machine's memory, and "
            f"{size_of(host)} are free. What fits: offload disk."
        )
    if needed({}) <= free:
        return
    fitting = [
        f"{name} (without torchrun)" if devices > 1 and "devices" in changes else name
        for name, changes in _WAYS.items()
        if needed(changes) <= free and not (device.type == "cpu" and changes.get("offload") == "cpu")
    ]
    raise ValueError(
        f"memory: {where} takes {size_of(needed({}))} as {quantize or str(dtype).removeprefix('torch.')}"
        f"{f', divided among {devices}' if devices > 1 else ''}, and {size_of(free)} are free on this "
        f"{'GPU' if device.type == 'cuda' else 'machine'}. "
        + (f"What fits: {'; '.join(fitting)}." if fitting else "See minopt plan.")
    )


def published(model: str) -> str | None:
    """The published size that a name means: ``opt-6.7b``, or ``facebook/opt-6.7b``."""
    name = model.lower().removeprefix("facebook/")
    return name if name in PRESETS else None


def find_config(model: str) -> tuple[OPTConfig, torch.dtype]:
    """The configuration of a model, and the dtype of its files; nothing is downloaded but a config.json.

    ``model`` is a folder or file of a checkpoint, a config.json, a published size, or a name on the hub. Errors are
    those of ``minopt.load_model``.
    """
    if not Path(model).exists() and (name := published(model)) is not None:
        return OPTConfig.preset(name), torch.float16
    path = Path(model) if Path(model).name == "config.json" else find_model(model, config_only=True)
    if is_exported(path):
        raise ValueError(f"{path}: is an exported program, which is not planned. Name the model that it was made from.")
    if (path / "config.json").is_file() or path.name == "config.json":
        config = OPTConfig.load(path)
        named = config.extra.get("torch_dtype", config.extra.get("dtype"))
        return config, DTYPES.get(named, torch.float16) if isinstance(named, str) else torch.float16
    checkpoint = open_checkpoint(path)
    return checkpoint.config, main_dtype(checkpoint.tensors.values())

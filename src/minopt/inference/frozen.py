"""A model for inference: its weights are read and never changed. What would change them raises ``ValueError``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minopt import int4, int8
from minopt.checkpoint.names import parameter_shapes
from minopt.config import OPTConfig
from minopt.inference.linear import Plain
from minopt.model import OPT

# Calls of Python's interface that need a weight's numbers, or their address, without an operator being run.
_ADDRESSES = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage)
_ARRAYS = (Tensor.numpy, Tensor.__array__)
_READS = (*_ARRAYS, Tensor.tolist, Tensor.__repr__, Tensor.__reduce_ex__, Tensor.__deepcopy__, *_ADDRESSES)
# These write, or let others write, to a weight without an operator being run.
_WRITES = (Tensor.data.__set__, Tensor.apply_, Tensor.__dlpack__)  # type: ignore[attr-defined]
_SET_GRADIENTS = (Tensor.requires_grad.__set__, Tensor.requires_grad_, Tensor.grad.__set__)  # type: ignore[attr-defined, union-attr]
_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]  # optimizers ask for it


def refuse(what: str) -> NoReturn:
    """Raises ``ValueError``: a model for inference cannot be changed so."""
    raise ValueError(f"model: made for inference, {what}. Load the plain model: minopt.load(..., optimize=False).")


class Weight(Tensor):
    """A weight of a model for inference, which may be in another layout: ``read`` gives it when numbers are needed.

    ``like`` has its shape and dtype.
    """

    _is_param = True  # isinstance(weight, nn.Parameter)
    read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, read: Callable[[], Tensor], like: Tensor, device: torch.device | None = None) -> Weight:
        weight: Weight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device or like.device
        )
        weight.read = read
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls of Python's interface."""
        if func == _IS_LEAF or (
            func in _SET_GRADIENTS and not any(v is None or v is False for v in (*args[1:], *(kwargs or {}).values()))
        ):
            refuse("its weights cannot be trained")
        if func in _WRITES:
            refuse("its weights cannot be changed")
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS:
                whole = args[0].read().contiguous()
                if func in _ADDRESSES:  # an address has to hold as long as the weight does
                    args[0].read = lambda: whole
                if func == Tensor.__deepcopy__:  # whose memo is by addresses, which are reused here
                    return whole.clone()
                if func == Tensor.__reduce_ex__:  # torch.save writes all memory that a view is of
                    whole = whole.clone()
                args = (whole, *args[1:])
            result = func(*args, **(kwargs or {}))
            if func in _ARRAYS:
                result.flags.writeable = False
            return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Operators: none may write to a weight, and views of a weight are weights too."""
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if any(isinstance(leaf, Weight) for leaf in tree_leaves(written)):
            refuse("its weights cannot be changed")
        if func is torch.ops.aten.detach.default:
            return Weight(args[0].read, args[0])
        args, kwargs = tree_map_only(Weight, lambda weight: weight.read(), (args, kwargs or {}))
        result = func(*args, **kwargs)
        views = (r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if any(views) or "unsafe" in func.__name__:  # unsafe_split gives views, and does not say so
            return tree_map_only(Tensor, lambda view: Weight(lambda: view, view), result)
        return result


class Frozen(nn.Module):
    """A module of a model for inference. It refuses what would change its weights, its parts, its dtype or place."""

    _like: Tensor | None = None  # of the model's dtype and place; set once the model is built

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``half``, ``cuda``, ``share_memory`` and others call: fine where they change nothing."""
        assert self._like is not None
        probe = self._like.clone()
        at = probe.data_ptr()
        try:
            moved = fn(probe) is not probe or probe.data_ptr() != at  # another tensor, or shared memory
        except (RuntimeError, AssertionError):  # no such device, say
            moved = True
        if moved:
            refuse("it cannot be moved or cast; device and dtype are options of load")
        return self

    def train(self, mode: bool = True) -> Any:
        """Refuses training mode; ``eval()`` changes nothing."""
        return refuse("it cannot be trained") if mode else self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuses gradients; ``False`` changes nothing."""
        return self.train(requires_grad)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        refuse("its weights cannot be replaced")

    def _replicate_for_data_parallel(self) -> Any:
        refuse("it cannot be copied to several GPUs")

    def __setattr__(self, name: str, value: Any) -> None:
        now = getattr(self, name, None) if value is None else value
        if self._like is not None and isinstance(now, (Tensor, nn.Module)):
            refuse(f"its {name!r} cannot be set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if isinstance(getattr(self, name, None), (Tensor, nn.Module)):
            refuse(f"its {name!r} cannot be removed")
        super().__delattr__(name)

    # Pruning and parametrisations call these.
    add_module = register_parameter = register_buffer = __setattr__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__}: made for inference, has no {name!r}. The plain model has all modules of an "
                "OPT: minopt.load(..., optimize=False)."
            ) from None

    def get_submodule(self, target: str) -> nn.Module:
        """See ``nn.Module.get_submodule``."""
        module: nn.Module = reduce(getattr, target.split(".") if target else (), self)
        return module


class Part(Frozen):
    """A part of a model outside of its layers: what it computes, and its weights by name."""

    def __init__(self, run: Callable[[Tensor], Tensor], **weights: Tensor | None) -> None:
        super().__init__()
        self.run, self.tensors = run, {name: tensor for name, tensor in weights.items() if tensor is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors.items())

    def __getattr__(self, name: str) -> Any:
        tensor = self.__dict__.get("tensors", {}).get(name)
        return super().__getattr__(name) if tensor is None else Weight(lambda: tensor, tensor)


def norm(config: OPTConfig, weight: Tensor | None, bias: Tensor | None) -> partial[Tensor]:
    """``nn.LayerNorm`` of fixed weights as one call."""
    return partial(torch.layer_norm, normalized_shape=[config.hidden_size], weight=weight, bias=bias)


class InferenceOPT(Frozen, OPT):
    """An OPT whose weights are read and never changed: it cannot be trained, moved or cast.

    Args:
        config: shape and options.
        weights: all but the layers', by name.
        layers: modules that are called as ``DecoderLayer`` is.
        head: maps hidden states to logits.
        lookup: gives the embeddings of ids; ``None`` looks into the table.
        in_int8: whether the layers' weights are in int8, and have scales.
        in_int4: or else their groups of inputs and their scales' dtype, if they are in int4.
    """

    def __init__(
        self,
        config: OPTConfig,
        weights: Mapping[str, Tensor],
        layers: Sequence[nn.Module],
        head: Callable[[Tensor], Tensor],
        lookup: Callable[[Tensor], Tensor] | None = None,
        in_int8: bool = False,
        in_int4: tuple[int, torch.dtype] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self._head, self.in_int8, self.in_int4 = config, head, in_int8, in_int4
        self.in_8_bits = in_int8 or in_int4 is not None
        of = {name: tensor.detach() for name, tensor in weights.items()}
        table, positions = of["embed_tokens.weight"], of["embed_positions.weight"]
        last = {part: of.get(f"final_layer_norm.{part}") for part in ("weight", "bias")}
        parts: dict[str, nn.Module | None] = {
            "embed_tokens": Part(lookup or partial(F.embedding, weight=table), weight=table),
            "embed_positions": Part(partial(F.embedding, weight=positions), weight=positions),
            "layers": nn.ModuleList(layers),
            "final_layer_norm": Part(norm(config, **last), **last) if config.has_final_layer_norm else None,
        }
        for name in ("project_in", "project_out"):
            weight = of.get(f"{name}.weight")
            parts[name] = None if weight is None else Part(Plain(weight, None), weight=weight)
        for name, part in parts.items():
            setattr(self, name, part)
        self._dtype, self._device = table.dtype, table.device
        for module in self.modules():
            module.training = False
            if isinstance(module, Frozen):
                module.__dict__["_like"] = table.new_empty(1)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def head(self, h: Tensor) -> Tensor:
        """See ``OPT.head``."""
        return self._head(h)

    def read_weight(self, name: str) -> Tensor:
        """A weight by its name in an OPT, or the scale of one; perhaps the model's own memory."""
        module, _, part = name.rpartition(".")
        return getattr(self, module).tensors[part]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of an ``OPT``, int8 and int4 ones as in files. Each is read when its numbers are asked for."""
        for name, shape in parameter_shapes(self.config).items():
            found = {name: torch.empty(shape, dtype=self.dtype, device="meta")}
            if self.in_int8 and int8.is_quantized(name):
                scale = torch.empty(shape[0], 1, dtype=torch.float32, device="meta")
                found = {name: found[name].to(torch.int8), name + int8.SCALE: scale}
            if self.in_int4 is not None and int8.is_quantized(name):
                found = {name + end: part for end, part in int4.parts((shape[0], shape[1]), *self.in_int4).items()}
            for key, like in found.items():
                weight: Any = Weight(partial(self.read_weight, key), like, self.device)
                yield f"{prefix}.{key}" if prefix else key, weight

    def get_parameter(self, target: str) -> nn.Parameter:
        """See ``nn.Module.get_parameter``."""
        return dict(self.named_parameters())[target]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self.named_parameters()})

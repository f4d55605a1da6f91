"""What makes a model one for inference: its weights are read and never changed, and what would change them says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minopt import int8
from minopt.config import OPTConfig
from minopt.inference.linear import Plain
from minopt.model import OPT

# Of Python's interface: what reaches the numbers by their address, what needs them, and what would change a tensor.
_ADDRESSES = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage)
_READS = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.contiguous, Tensor.__repr__, Tensor.__reduce_ex__,
          Tensor.__deepcopy__, *_ADDRESSES)  # fmt: skip
_SET_DATA, _SET_GRADIENTS = Tensor.data.__set__, (Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]
_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]  # optimizers ask for it, and hardly anybody else


def refuse(what: str) -> NoReturn:
    """Raises ``ValueError``: a model for inference cannot be changed so."""
    raise ValueError(f"model: made for inference, {what}. Load the plain model: minopt.load(..., optimize=False).")


class Weight(Tensor):
    """A weight of a model for inference, which may have it in another layout: read when its numbers are asked for.

    Args:
        read: gives the tensor.
        like: has its shape and dtype; its numbers are not looked at.
        device: of the tensor; ``None`` is that of ``like``.
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
        kwargs = kwargs or {}
        if func == _IS_LEAF or (func in _SET_GRADIENTS and all([*args[1:], *kwargs.values()])):
            refuse("its weights cannot be trained")
        if func == _SET_DATA:
            refuse("its weights cannot be changed")
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS:
                whole = args[0].read()
                if func in _ADDRESSES:  # which have to hold as long as the weight does
                    args[0].read = lambda: whole
                args = (whole, *args[1:])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """All operators: none may write to a weight, and views of one are weights too."""
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            if is_write and any(isinstance(leaf, Weight) for leaf in tree_leaves(value)):
                refuse("its weights cannot be changed")
        if func is torch.ops.aten.detach.default:
            return Weight(args[0].read, args[0])
        args, kwargs = tree_map_only(Weight, lambda weight: weight.read(), (args, kwargs))
        result = func(*args, **kwargs)
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return tree_map_only(Tensor, lambda view: Weight(lambda: view, view), result)
        return result


class Frozen(nn.Module):
    """A module of a model for inference. What would change its weights or its parts raises ``ValueError`` first."""

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
        """Refuses to be trained; ``eval()`` changes nothing."""
        if mode:
            refuse("it cannot be trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuses gradients; ``False`` changes nothing."""
        if requires_grad:
            refuse("it cannot be trained")
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        refuse("its weights cannot be replaced")

    def add_module(self, name: str, value: Any) -> None:
        """Refuses, once the model is built: what is not called would be set in vain."""
        self.__setattr__(name, value)

    register_parameter = register_buffer = add_module  # type: ignore[assignment]  # pruning and parametrisations do

    def _replicate_for_data_parallel(self) -> Any:
        refuse("it cannot be copied to several GPUs")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._like is not None and isinstance(value, (Tensor, nn.Module)):
            refuse(f"its {name!r} cannot be set")
        super().__setattr__(name, value)

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


class Lookup:
    """Rows of a table."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._table)


class Norm:
    """``nn.LayerNorm`` of fixed weights as one call."""

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None) -> None:
        self._shape, self.weight, self.bias = [size], weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self._shape, self.weight, self.bias)


class Part(Frozen):
    """A part of a model outside of its layers: what it computes, and the weights that it shows.

    Args:
        run: maps the input to the output.
        weights: by their names in the module that this stands for.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], **weights: Tensor | None) -> None:
        super().__init__()
        self._run, self.tensors = run, {name: tensor for name, tensor in weights.items() if tensor is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors.items())

    def __getattr__(self, name: str) -> Any:
        tensor = self.__dict__.get("tensors", {}).get(name)
        return super().__getattr__(name) if tensor is None else Weight(lambda: tensor, tensor)


class InferenceOPT(Frozen, OPT):
    """An OPT whose weights are read and never changed: it cannot be trained, moved or cast.

    Args:
        config: shape and options.
        dtype, device: of its weights.

    Attributes:
        in_int8: whether the layers' weights are in int8, and have scales.
    """

    in_int8 = False
    _head: Callable[[Tensor], Tensor]

    def __init__(self, config: OPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, device="meta", dtype=dtype)
        self._dtype, self._device, self._shown = dtype, device, dict(OPT.state_dict(self))  # on the meta device

    def finish(self, weights: Mapping[str, Tensor], lookup: Callable[[Tensor], Tensor] | None = None) -> None:
        """Ends building, behind which nothing changes.

        Args:
            weights: all but the layers'.
            lookup: of tokens; ``None`` looks into the table.
        """
        tensors = {name: tensor.detach() for name, tensor in weights.items()}
        table, positions = tensors["embed_tokens.weight"], tensors["embed_positions.weight"]
        parts = {
            "embed_tokens": Part(lookup or Lookup(table), weight=table),
            "embed_positions": Part(Lookup(positions), weight=positions),
        }
        for name in ("project_in", "project_out"):
            if getattr(self, name) is not None:
                weight = tensors[f"{name}.weight"]
                parts[name] = Part(Plain(weight, None), weight=weight)
        if self.final_layer_norm is not None:
            norm = Norm(self.config.hidden_size, *(tensors.get(f"final_layer_norm.{p}") for p in ("weight", "bias")))
            parts["final_layer_norm"] = Part(norm, weight=norm.weight, bias=norm.bias)
        for name, part in parts.items():
            setattr(self, name, part)
        like = torch.empty(1, dtype=self._dtype, device=self._device)
        for module in self.modules():
            module.training = False
            if isinstance(module, Frozen):
                module.__dict__["_like"] = like

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def head(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., E]``."""
        return self._head(h)

    def read(self, name: str) -> Tensor:
        """A weight by its name in an OPT, or the scale of one; perhaps the model's own memory."""
        module, _, part = name.rpartition(".")
        return getattr(self, module).tensors[part]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of an ``OPT``, int8 ones with their scales. Each is read when its numbers are asked for."""
        for name, like in self._shown.items():
            found = {name: like}
            if self.in_int8 and int8.is_quantized(name):
                found = {name: like.to(torch.int8), name + int8.SCALE: like.new_empty(len(like), 1).float()}
            for key, shown in found.items():
                weight: Any = Weight(partial(self.read, key), shown, self._device)
                yield f"{prefix}.{key}" if prefix else key, weight

    def get_parameter(self, target: str) -> nn.Parameter:
        """See ``nn.Module.get_parameter``."""
        return dict(self.named_parameters())[target]

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Copies of the weights of an ``OPT``, int8 ones with their scales: as much memory as a second model.

        ``named_parameters`` gives them one by one.
        """
        state: dict[str, Any] = {} if destination is None else destination
        for name, weight in self.named_parameters():
            state[prefix + name] = weight.clone()
        return state

"""Reads a pickle as data: nothing that it names is imported, looked up or called.

A pickle is a program for a small stack machine. This is such a machine, over the opcodes of the standard library's
``pickletools``, that differs from ``pickle`` in what a name means: the few names by which torch writes tensors make
descriptions of tensors, and all others make ``Placeholder``, which does nothing. So a checkpoint opens whose classes
are not installed, and one that wants to run code has nothing to run it with.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from minopt.config import is_int

# Bounds on what a file may ask for. The largest OPT has 2e11 parameters, and a checkpoint's pickle some 1e5 operations.
_MOST_NUMBERS = 2**48
_MOST_OPERATIONS = 1_000_000
_MOST_DIMS = 8

# How a key ends that stands for one that is not text.
NOT_TEXT = " as a key)"

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class UnpickleError(ValueError):
    """A pickle that is damaged, or asks for what no checkpoint asks for."""


class OtherNumbersError(UnpickleError):
    """A file whose tensors hold numbers that no OPT has: complex, quantised, of 8 bits."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: its key there, their dtype and how many."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it; it lies within its storage. Offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One more than the last number of the storage that it holds."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset + last + 1 if self.numel else self.offset

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie one after another in row-major order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


@dataclass(frozen=True)
class Global:
    """A name that a pickle mentions, ``module.name``; never looked up."""

    name: str


@dataclass(eq=False, repr=False)
class Placeholder:
    """What stands for an object of any other class: its class's name and what the file says it holds."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def read_pickle(
    file: BinaryIO, storages: list[Storage] | None = None, pairs: list[tuple[Placeholder, Any]] | None = None
) -> Any:
    """Reads one pickle from where the file stands, and leaves it behind the pickle's last byte.

    Args:
        file: open for reading bytes.
        storages: gets each storage that the pickle names, each once.
        pairs: gets the items of dicts whose keys are placeholders.

    Returns:
        None, booleans, numbers, strings, bytes, tuples, lists, sets (as lists), dicts, and ``StoredTensor``,
        ``Storage``, ``Global`` and ``Placeholder``. Of keys that are not text, only their kind is kept.

    Raises:
        UnpickleError: if it is damaged, or describes a tensor that does not lie within its storage.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of texts of protocol 0 with unknown escapes
            machine.run(file)
        if storages is not None:
            storages += machine.storages.values()
        if pairs is not None:
            pairs += machine.pairs
        return machine.stack.pop()
    except UnpickleError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever way its bytes happen to spell
        raise UnpickleError(f"damaged pickle, {_said(error)}") from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__} {str(error)[:100]}".strip().splitlines()[0]


class _Machine:
    """A stack, the places marked in it, and what was remembered under a number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.pairs: list[tuple[Placeholder, Any]] = []

    def run(self, file: BinaryIO) -> None:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS:
                raise UnpickleError(f"more than {_MOST_OPERATIONS:,} operations, no checkpoint needs that many")
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name not in _OPERATIONS:
                raise UnpickleError(f"unknown operation {opcode.name}")
            else:
                _OPERATIONS[opcode.name](self, argument)

    def pop(self, count: int) -> list[Any]:
        """The top ``count`` values, the deepest first."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise UnpickleError("damaged pickle, the stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def remember(self, index: int) -> None:
        if not 0 <= index < 2**32:  # what the binary operations can say; larger ones can be chosen to collide
            raise UnpickleError("damaged pickle, a number to remember by that is out of range")
        self.memo[index] = self.stack[-1]

    def call(self, function: Any, arguments: Any) -> None:
        self.stack.append(_call(function, arguments))

    def instance(self, function: Any, arguments: list[Any]) -> None:
        self.call(function, tuple(arguments))

    def storage(self, identifier: Any) -> None:
        storage = _storage(identifier)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise UnpickleError(f"the storage {storage.key[:40]!r} is described in two ways")
        self.stack.append(storage)

    def build(self) -> None:
        target, state = self.pop(2)
        if isinstance(target, Placeholder):
            target.state = state
        self.stack.append(target)  # a dict's or a tensor's attributes mean nothing here

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.items if isinstance(target, Placeholder) else target
        if not isinstance(entries, dict):
            raise UnpickleError(f"damaged pickle, items set on a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only text: numbers can be chosen so that they collide in a dict, which then takes quadratic time.
            if isinstance(key, Placeholder):
                self.pairs.append((key, value))
            entries[key if isinstance(key, str) else f"({type(key).__name__}{NOT_TEXT}"] = value

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Placeholder):
            raise UnpickleError(f"damaged pickle, values appended to a {type(target).__name__}")


def _dict(pairs: list[Any], machine: _Machine) -> None:
    machine.stack.append({})
    machine.set_items(pairs)


def _name(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnpickleError("damaged pickle, a name that is no text")
    return Global(f"{module}.{name}")


def _call(function: Any, arguments: Any) -> Any:
    """What a call in the pickle gives: a tensor, a shape, a dict, else a placeholder."""
    name = function.name if isinstance(function, Global) else type(function).__name__
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if not isinstance(function, Global):
        return Placeholder(name, arguments)
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4 and isinstance(arguments[2], tuple):
        inner, arguments = arguments[0], arguments[2]  # a tensor with attributes of its own
        name = inner.name if isinstance(inner, Global) else ""
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor") and len(arguments) >= 4:
        return _tensor(*arguments[:4])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
        return arguments[0]
    if name == "collections.OrderedDict" and not arguments:
        return {}
    return Placeholder(name, arguments)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise UnpickleError(f"a tensor of something that is no storage ({type(storage).__name__})")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= _MOST_DIMS):
        raise UnpickleError("a tensor whose shape and strides do not belong together")
    if not all(is_int(n) and 0 <= n <= _MOST_NUMBERS for n in (offset, *shape, *stride)):
        raise UnpickleError(f"a tensor of shape {_shown(shape)}, strides {_shown(stride)} and offset {_shown(offset)}")
    tensor = StoredTensor(storage, offset, shape, stride)
    if tensor.numel > storage.numel or tensor.end > storage.numel:
        raise UnpickleError(
            f"a tensor of shape {_shown(shape)}, strides {_shown(stride)} and offset {offset} does not fit into its "
            f"storage of {storage.numel} numbers"
        )
    return tensor


def _storage(identifier: Any) -> Storage:
    """The storage that a persistent id names: ``("storage", type, key, device, numel)``, and a view in old files."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise UnpickleError("a persistent id that is not a storage's")
    _, kind, key, _, numel, *view = identifier
    dtype = _DTYPES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Global) else None
    if dtype is None:
        name = kind.name[:60] if isinstance(kind, Global) else ""
        error = OtherNumbersError if name.startswith("torch.") and name.endswith("Storage") else UnpickleError
        raise error(f"a storage of an unknown type {name!r}")
    if not isinstance(key, str) or not is_int(numel) or not 0 <= numel <= _MOST_NUMBERS or view not in ([], [None]):
        raise UnpickleError(f"a storage with key {_shown(key)} of {_shown(numel)} numbers")
    return Storage(key, dtype, numel)


def _shown(value: Any) -> str:
    """A number, text or tuple of a file in an error message; never a structure that could be endless."""
    if isinstance(value, tuple):
        return "(" + ", ".join("..." if isinstance(v, tuple) else _shown(v) for v in value[:_MOST_DIMS]) + ")"
    if is_int(value):
        return str(value) if abs(value) < 10**20 else "a huge number"
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


# Operations whose argument is what they push.
_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip

_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.pop(3))),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "FROZENSET": lambda m, _: m.stack.append(m.pop_to_mark()),
    "DICT": lambda m, _: _dict(m.pop_to_mark(), m),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "PUT": lambda m, index: m.remember(index),
    "BINPUT": lambda m, index: m.remember(index),
    "LONG_BINPUT": lambda m, index: m.remember(index),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, name: m.stack.append(Global(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack.append(_name(*m.pop(2))),
    "EXT1": lambda m, code: m.stack.append(Global(f"extension.{code}")),
    "EXT2": lambda m, code: m.stack.append(Global(f"extension.{code}")),
    "EXT4": lambda m, code: m.stack.append(Global(f"extension.{code}")),
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ_EX": lambda m, _: m.call(*m.pop(3)[:2]),
    "INST": lambda m, name: m.instance(Global(name.replace(" ", ".", 1)), m.pop_to_mark()),
    "OBJ": lambda m, _: (lambda values: m.instance(values[0], values[1:]))(m.pop_to_mark()),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, name: m.storage(name),
    "BINPERSID": lambda m, _: m.storage(*m.pop(1)),
}

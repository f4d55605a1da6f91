"""Reads the files of ``torch.save`` as data: nothing that they name is imported, looked up or called.

A pickle is a program for a small stack machine. This is such a machine, over the operations that the standard library's
``pickletools`` reads. The few names by which torch writes tensors make descriptions of tensors; every other name makes
a ``Placeholder``, which does nothing. docs/checkpoints.md says why torch.load does not do this.
"""

from __future__ import annotations

import math
import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from minopt.checkpoint.errors import first_line, some
from minopt.config import is_int

# What a file may ask for. The largest OPT has 2e11 parameters, and a checkpoint's pickle some 1e5 operations.
_MOST_NUMBERS = 2**48
_MOST_OPERATIONS = 1_000_000
_MOST_PICKLE_BYTES = 256_000_000  # the numbers of tensors are beside it
_MOST_DIRECTORY_BYTES = 5_000_000  # of an archive: some 70 bytes a tensor; zipfile takes ten times as much memory
_MOST_DIMS = 8

# What begins a file from before torch 1.6: torch.serialization's magic number, and the only version that there was.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# torch.save names dtypes by classes of storages.
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class UnpickleError(ValueError):
    """A file that is damaged, or asks for what no checkpoint asks for."""


class OtherDtypeError(UnpickleError):
    """A file of numbers that no OPT has: complex, quantized, of 8 bits."""


@dataclass
class Storage:
    """A run of ``numel`` numbers, called ``key`` in its file. Its first byte is known once the pickle has been read."""

    key: str
    dtype: torch.dtype
    numel: int
    begin: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it, within its storage. Offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        storage, shape, stride = self.storage, self.shape, self.stride
        if not isinstance(storage, Storage):
            raise UnpickleError(f"a tensor without a storage, with a {type(storage).__name__} in its place")
        is_form = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= _MOST_DIMS
        if not is_form or not all(is_int(n) and 0 <= n <= _MOST_NUMBERS for n in (self.offset, *shape, *stride)):
            raise UnpickleError("a tensor whose shape, strides or offset are not numbers in range")
        if max(self.span + self.offset, math.prod(shape)) > storage.numel:
            raise UnpickleError(f"a tensor of shape {list(shape)}, strides {list(stride)} and offset {self.offset} "
                                f"does not fit into its storage of {storage.numel} numbers")  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def begin(self) -> int:
        """Its first byte in the file."""
        return self.storage.begin + self.offset * self.dtype.itemsize

    @property
    def span(self) -> int:
        """How many numbers it spans, from its first to its last."""
        steps = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else steps + 1

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie one after another in row-major order."""
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()


@dataclass(eq=False, repr=False)
class Placeholder:
    """What stands for a name, ``module.name``, and for what a call of it gives, with all that the file says of it."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def read_pickle(file: BinaryIO | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
    """What one pickle holds, which begins where the file stands, and the storages that it names, by their keys.

    A set becomes a list. A key of a dict that is no text becomes a ``Placeholder``.
    """
    machine, bounded, start = _Machine(), _Bounded(file, _MOST_PICKLE_BYTES, "pickle"), file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):  # type: ignore[arg-type]
            if count > _MOST_OPERATIONS:
                raise UnpickleError(f"more than {_MOST_OPERATIONS:,} operations, no checkpoint needs that many")
            bounded.check(file.tell() - start)
            if opcode.name not in _OPERATIONS:
                raise UnpickleError(f"the operation {opcode.name}, which torch.save does not write")
            _OPERATIONS[opcode.name](machine, argument)
        return machine.stack.pop(), machine.storages
    except UnpickleError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever way its bytes happen to spell
        raise UnpickleError(f"damaged pickle, {type(error).__name__} {first_line(error)[:100]}") from None


class _Machine:
    """A stack, the stacks that lie under its marks, and what was remembered under a number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def pop(self, count: int) -> list[Any]:
        """The top ``count`` values, the deepest first."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], Placeholder):
            self.stack[-1].extend(values)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.items if isinstance(target, Placeholder) else target
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # A file can choose numbers that collide in a dict, and tuples so deep that hashing them ends the process.
            entries[key if isinstance(key, str | Placeholder) else Placeholder(type(key).__name__)] = value

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Placeholder):
            target.state = state
        self.stack.append(target)  # a dict's or a tensor's attributes mean nothing here

    def find_storage(self, identifier: Any) -> None:
        """Names a storage: ``("storage", type, key, device, numel)``, and a view in old files."""
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
            raise UnpickleError("a persistent id that is not a storage's")
        _, kind, key, _, numel, *view = identifier
        name = kind.name[:60] if isinstance(kind, Placeholder) else ""
        dtype = _DTYPES.get(name.rpartition(".")[2])
        if dtype is None:
            error = OtherDtypeError if name.startswith("torch.") and name.endswith("Storage") else UnpickleError
            raise error(f"a storage of an unknown type {name!r}")
        if not isinstance(key, str) or not is_int(numel) or not 0 <= numel <= _MOST_NUMBERS or view not in ([], [None]):
            raise UnpickleError("a storage whose key or size is none")
        storage = self.storages.setdefault(key, Storage(key, dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise UnpickleError(f"the storage {key[:40]!r} is described in two ways")
        self.stack.append(storage)


# By names of operations, and called with the machine and the operation's argument. The operations are those of
# protocols 1 to 5; those of protocol 0 are lines of text.
_TABLE: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO FRAME STOP": lambda m, _: None,
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT": lambda m, value: m.push(value),
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING": lambda m, value: m.push(value),
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8": lambda m, value: m.push(value),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "FROZENSET": lambda m, _: m.push(m.pop_to_mark()),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "BINPUT LONG_BINPUT": lambda m, index: m.memo.update({index: m.stack[-1]}),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "BINGET LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "GLOBAL": lambda m, name: m.push(Placeholder(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(Placeholder(".".join(m.pop(2)))),
    "REDUCE NEWOBJ": lambda m, _: m.push(_called(*m.pop(2))),
    "NEWOBJ_EX": lambda m, _: m.push(_called(*m.pop(3)[:2])),
    "BUILD": lambda m, _: m.build(*m.pop(2)),
    "BINPERSID": lambda m, _: m.find_storage(*m.pop(1)),
}
_OPERATIONS = {name: operation for names, operation in _TABLE.items() for name in names.split()}


def _called(function: Any, arguments: Any) -> Any:
    """What a call in the pickle gives: a tensor, a shape, a dict, else a placeholder."""
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    name = function.name if isinstance(function, Placeholder) else type(function).__name__
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:  # a tensor with attributes of its own
        return _called(arguments[0], arguments[2])
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor") and len(arguments) >= 4:
        return StoredTensor(*arguments[:4])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name == "torch.Size" and len(arguments) == 1:
        return arguments[0]
    if name == "collections.OrderedDict" and not arguments:
        return {}
    return Placeholder(name, arguments)


class _Bounded:
    """A file that gives at most ``most`` bytes of its ``part`` at once: a single value, or an archive's directory."""

    def __init__(self, file: Any, most: int, part: str) -> None:
        self.seek, self.tell, self.readline, self._read = file.seek, file.tell, file.readline, file.read
        self._most, self._part = most, part

    def read(self, count: int = -1) -> bytes:
        self.check(count)
        return self._read(count)

    def check(self, count: int) -> None:
        if count > self._most:
            raise UnpickleError(f"its {self._part} asks for {count:,} bytes, at most {self._most:,} are expected")


def read_torch(path: Path, start: int = 0, length: int = 0) -> Any:
    """What a file by ``torch.save`` holds, or an archive of ``length`` bytes that begins at a byte of a file."""
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise UnpickleError("the file is empty")
        mapped = mmap.mmap(file.fileno(), length and start - page + length, access=mmap.ACCESS_READ, offset=page)
    with mapped:  # an archive may begin after other bytes: zipfile looks for its end
        is_zip = mapped[start - page : start - page + 4] == b"PK\3\4"
        content, storages = _read_zip(mapped) if is_zip else _read_legacy(mapped)
    for storage in storages:
        storage.begin += page
    return content


def _read_zip(archive: mmap.mmap) -> tuple[Any, Iterable[Storage]]:
    """What an archive holds, and its storages."""
    try:
        directory = _Bounded(archive, _MOST_DIRECTORY_BYTES, "directory")
        records = {entry.filename: entry for entry in zipfile.ZipFile(directory).infolist()}
    except Exception as error:  # a damaged archive fails in several ways
        raise UnpickleError(f"damaged zip archive, {first_line(error)[:100]}") from None
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = some([name[:40] for name in records], 2) or "nothing"
        raise UnpickleError(f"a zip archive of {names}, a checkpoint has one data.pkl: if it is packed, unpack it")
    folder = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{folder}byteorder")
    if order is not None and archive[(at := _begin(archive, order)) : at + 6] != b"little":
        raise UnpickleError("its numbers are big-endian")
    archive.seek(_begin(archive, records[pickles[0]]))
    content, storages = read_pickle(archive)
    for key, storage in storages.items():
        record = records.get(f"{folder}data/{key}")
        if record is None or record.file_size < storage.numel * storage.dtype.itemsize:
            raise UnpickleError(f"the storage {key[:40]!r} is not there in full")
        storage.begin = _begin(archive, record)
    return content, storages.values()


def _begin(archive: mmap.mmap, record: zipfile.ZipInfo) -> int:
    """The first byte of a file in an archive, which must be stored as it is and lie within the archive."""
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise UnpickleError(f"{record.filename[:40]!r} in it is compressed, torch stores plainly: unpack an archive")
    header = archive[record.header_offset : record.header_offset + 30]
    begin = record.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[:4] != b"PK\3\4" or begin + record.file_size > len(archive):
        raise UnpickleError(f"{record.filename[:40]!r} in it is not where the archive's index says")
    return begin


def _read_legacy(file: mmap.mmap) -> tuple[Any, Iterable[Storage]]:
    """What a file from before torch 1.6 holds: pickles, and the storages after them."""
    if read_pickle(file)[0] != _LEGACY_MAGIC or read_pickle(file)[0] != _LEGACY_VERSION:
        raise UnpickleError("not a file of torch.save")
    system = read_pickle(file)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnpickleError("its numbers are big-endian")
    content, storages = read_pickle(file)
    keys = read_pickle(file)[0]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise UnpickleError("its list of storages is not that of its tensors")
    position = file.tell()
    for storage in (storages[key] for key in keys):
        if file[position : position + 8] != storage.numel.to_bytes(8, "little"):
            raise UnpickleError(f"the storage {storage.key[:40]!r} is not as long as described")
        storage.begin = position + 8
        position = storage.begin + storage.numel * storage.dtype.itemsize
    if position > len(file):
        raise UnpickleError(f"cut short, {position:,} bytes are described and {len(file):,} there")
    return content, storages.values()

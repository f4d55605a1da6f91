"""Files of ``torch.save``, put together operation by operation, so that they can say what ``torch.save`` never would.

Each function returns the operations that leave one object on the stack of a pickle's reader.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

NONE, FALSE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, MARK, POP = b"N", b"\x89", b")", b"]", b"}", b"(", b"0"


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(encoded)) + encoded


def group(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def sizes(*values: int) -> bytes:
    return group(*map(integer, values))


def listing(*items: bytes) -> bytes:
    return EMPTY_LIST + MARK + b"".join(items) + b"e"


def mapping(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in items) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    """The same name by STACK_GLOBAL, which follows dots."""
    return b"\x80\x04" + text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def remember(number: int) -> bytes:
    return b"r" + struct.pack("<I", number)


def recall(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def program(thing: bytes) -> bytes:
    """A whole pickle of one object."""
    return b"\x80\x02" + thing + b"."


@dataclass(frozen=True)
class Weights:
    """A model's tensors, all float32 and contiguous, ready to be written in either format of ``torch.save``."""

    tensors: Mapping[str, Tensor]
    is_legacy: bool = False

    def storage(self, of: str, **changes: bytes) -> bytes:
        """The storage of a tensor; what is given takes the place of the right part."""
        tensor = self.tensors[of]
        parts = {
            "word": text("storage"),
            "kind": name("torch", "FloatStorage"),
            "key": text(str(list(self.tensors).index(of))),
            "location": text("cpu"),
            "numel": integer(tensor.numel()),
            "view": NONE if self.is_legacy else b"",
        }
        return group(*(parts | changes).values()) + b"Q"

    def tensor(self, key: str, **changes: bytes) -> bytes:
        """A tensor; what is given takes the place of the right part."""
        tensor = self.tensors[key]
        parts = {
            "storage": self.storage(key),
            "offset": integer(0),
            "shape": sizes(*tensor.shape),
            "stride": sizes(*tensor.stride()),
            "requires_grad": FALSE,
            "hooks": call(name("collections", "OrderedDict")),
        }
        function = changes.pop("function", name("torch._utils", "_rebuild_tensor_v2"))
        return call(function, *(parts | changes).values())

    def state_dict(self, changed: Mapping[str, bytes] | None = None, more: bytes = b"") -> bytes:
        """The dict of all tensors, some of them replaced; ``more`` are keys and values after them."""
        items = [(text(key), (changed or {}).get(key, self.tensor(key))) for key in self.tensors]
        return mapping([*items, (more, b"")])

    def file(self, thing: bytes) -> bytes:
        """A whole file, given the object that it holds."""
        return self.legacy_file(program(thing)) if self.is_legacy else zip_file(self.records(program(thing)))

    def records(self, data: bytes) -> dict[str, bytes]:
        """The files of an archive."""
        numbers = {f"archive/data/{i}": tensor.numpy().tobytes() for i, tensor in enumerate(self.tensors.values())}
        return {"archive/data.pkl": data, "archive/byteorder": b"little", **numbers, "archive/version": b"3\n"}

    def legacy_file(self, data: bytes, *, counts: Mapping[int, int] | None = None, **parts: bytes) -> bytes:
        """Five pickles and the storages; what is given takes the place of the right part, or of a storage's size."""
        keys = [text(str(i)) for i in range(len(self.tensors))]
        right = {
            "magic": program(integer(0x1950A86A20F9469CFC6C)),
            "version": program(integer(1001)),
            "system": pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2),
            "data": data,
            "keys": program(listing(*keys)),
        }
        storages = [
            struct.pack("<q", (counts or {}).get(i, tensor.numel())) + tensor.numpy().tobytes()
            for i, tensor in enumerate(self.tensors.values())
        ]
        return b"".join([*(right | parts).values(), *storages])


def zip_file(records: Mapping[str, bytes], compressed: str = "", comment: bytes = b"") -> bytes:
    """An archive whose files are stored as they are, but one."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for file, content in records.items():
            archive.writestr(file, content, zipfile.ZIP_DEFLATED if file == compressed else zipfile.ZIP_STORED)
        archive.comment = comment
    return out.getvalue()


def patched(archive: bytes, at: int, *values: int) -> bytes:
    """An archive whose directory says something else of data/0 (at byte 20: its sizes, 42: its place)."""
    entry = archive.rindex(b"PK\1\2", 0, archive.rindex(b"data/0")) + at
    return archive[:entry] + struct.pack(f"<{len(values)}I", *values) + archive[entry + 4 * len(values) :]


# Objects that create a file as they are read by ``pickle``, given that file.

SYSTEM = name("os", "system")


def touch(marker: Path) -> bytes:
    return text(f"touch '{marker}'")


def python(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w').close()")


def attribute(thing: bytes, key: str) -> bytes:
    return call(name("builtins", "getattr"), thing, text(key))


def partial(marker: Path) -> bytes:
    """A function whose state says what it calls."""
    thing = name("functools", "partial") + group(name("builtins", "dict")) + b"\x81"
    return call(thing + group(SYSTEM, group(touch(marker)), EMPTY_DICT, NONE) + b"b")


def lazily(marker: Path) -> bytes:
    """An iterator that runs a command when it is asked for an item."""
    return call(name("builtins", "map"), SYSTEM, listing(touch(marker)))


def through_globals(marker: Path) -> bytes:
    """``eval``, found behind a name that every file of tensors has."""
    builtins = call(stack_name("torch._utils", "_rebuild_tensor_v2.__globals__.get"), text("__builtins__"))
    return call(call(call(name("operator", "itemgetter"), text("eval")), builtins), python(marker))


RUNS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: call(SYSTEM, touch(m)),
    "eval": lambda m: call(name("builtins", "eval"), python(m)),
    "exec of Python 2": lambda m: call(name("__builtin__", "exec"), python(m)),
    "getattr": lambda m: call(attribute(call(name("builtins", "__import__"), text("os")), "system"), touch(m)),
    "pickle.loads": lambda m: call(name("pickle", "loads"), data(program(call(SYSTEM, touch(m))))),
    "state of a partial": partial,
    "INST": lambda m: MARK + touch(m) + b"ios\nsystem\n",
    "OBJ": lambda m: MARK + SYSTEM + touch(m) + b"o",
    "NEWOBJ": lambda m: name("builtins", "bytes") + group(lazily(m)) + b"\x81",
    "STACK_GLOBAL": lambda m: call(stack_name("torch", "serialization.os.system"), touch(m)),
    "globals of _rebuild_tensor_v2": through_globals,
}

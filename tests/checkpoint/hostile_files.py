"""Hostile checkpoint files, as bytes: pickles put together opcode by opcode, torch's two containers, safetensors.

Nothing here is pickled by ``pickle``: each function returns the opcodes that leave one object on the reader's stack, so
that a file can say what no pickler would.
"""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# --- one object each ---

NONE, TRUE, FALSE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT = b"N", b"\x88", b"\x89", b")", b"]", b"}"
POP, MARK, DUP = b"0", b"(", b"2"


def text(value: str) -> bytes:
    """A str; lone surrogates go through."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def data(value: bytes) -> bytes:
    """A bytes object."""
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    """An int of any size."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(encoded) < 256:
        return b"\x8a" + bytes([len(encoded)]) + encoded
    return b"\x8b" + struct.pack("<i", len(encoded)) + encoded


def real(value: float) -> bytes:
    """A float."""
    return b"G" + struct.pack(">d", value)


def group(*items: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(items) + b"t"


def listing(*items: bytes) -> bytes:
    """A list."""
    return EMPTY_LIST + MARK + b"".join(items) + b"e"


def mapping(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A dict."""
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in items) + b"u"


def name(module: str, attribute: str) -> bytes:
    """Whatever a module has under a name."""
    return f"c{module}\n{attribute}\n".encode("utf-8", "surrogatepass")


def stack_name(module: str, attribute: str) -> bytes:
    """The same through STACK_GLOBAL, which follows dots."""
    return b"\x80\x04" + text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    """What a callable gives back."""
    return function + group(*arguments) + b"R"


def rebuilt(function: str, *arguments: bytes) -> bytes:
    """What one of torch's functions gives back by which tensors are written."""
    return call(name("torch._utils", function), *arguments)


def build(thing: bytes, state: bytes) -> bytes:
    """An object after ``__setstate__`` or an update of its attributes."""
    return thing + state + b"b"


def slots(**attributes: bytes) -> bytes:
    """A state that sets attributes one by one."""
    return group(NONE, mapping((text(key), value) for key, value in attributes.items()))


def sizes(values: Iterable[int]) -> bytes:
    """A tuple of ints."""
    return group(*map(integer, values))


def program(thing: bytes) -> bytes:
    """A whole pickle of one object."""
    return b"\x80\x02" + thing + b"."


def pickled(thing: object) -> bytes:
    """The opcodes of an object as ``pickle`` writes it."""
    return pickle.dumps(thing, protocol=2)[2:-1]


ORDERED_DICT = name("collections", "OrderedDict")


# --- objects that grow ---


def remember(number: int) -> bytes:
    """Puts the last object into the memo."""
    return b"r" + struct.pack("<I", number)


def recall(number: int) -> bytes:
    """An object of the memo."""
    return b"j" + struct.pack("<I", number)


def tower(levels: int) -> bytes:
    """A tuple of one thing twice, that of another twice: a few bytes, 2 ** levels leaves."""
    return NONE + (DUP + b"\x86") * levels


def list_tower(levels: int) -> bytes:
    """The same of lists."""
    parts = [NONE + remember(0)]
    for level in range(levels):
        below = recall(level)
        parts.append(POP + listing(below, below) + remember(level + 1))
    return b"".join(parts)


def dict_tower(levels: int) -> bytes:
    """The same of dicts."""
    parts = [NONE + remember(0)]
    for level in range(levels):
        below = recall(level)
        parts.append(POP + mapping([(text("model"), below), (text("b"), below)]) + remember(level + 1))
    return b"".join(parts)


def deep_tuple(levels: int) -> bytes:
    """A tuple in a tuple, so many times."""
    return EMPTY_TUPLE + b"\x85" * levels


def deep_list(levels: int) -> bytes:
    """A list in a list, so many times."""
    return EMPTY_LIST * levels + b"a" * (levels - 1)


def deep_dict(levels: int) -> bytes:
    """A dict in a dict, so many times."""
    return (EMPTY_DICT + text("model")) * levels + EMPTY_DICT + b"s" * levels


def deep_calls(levels: int) -> bytes:
    """An object made of an object, so many times."""
    return (name("some", "thing") + MARK) * levels + b"tR" * levels


def deep_states(levels: int) -> bytes:
    """An object whose state is an object, so many times."""
    return (name("some", "thing") + EMPTY_TUPLE + b"R") * levels + NONE + b"b" * levels


# --- files ---


@dataclass(frozen=True)
class Record:
    """A file in a zip archive.

    Attributes:
        name: in the central directory.
        content: as it lies in the archive.
        method: 0 is stored, 8 deflated.
        flags: of both headers; torch writes 0x808 (sizes follow the data, names are UTF-8).
        size, packed_size, crc: what the headers say instead of the truth.
        at: the offset that the central directory gives instead of the truth.
        local_name: in the local header, where that differs.
        pads: whether the content begins at a multiple of 64 bytes, as torch has it.
        extra: the central directory's extra field.
        signature: of the local header.
    """

    name: bytes
    content: bytes
    method: int = 0
    flags: int = 0x808
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    at: int | None = None
    local_name: bytes | None = None
    pads: bool = True
    extra: bytes = b""
    signature: bytes = b"PK\x03\x04"

    def central(self) -> tuple[int, int, int]:
        """Checksum, packed size and size as the central directory gives them."""
        packed = len(self.content) if self.packed_size is None else self.packed_size
        crc = zlib.crc32(self.content) if self.crc is None else self.crc
        return crc, packed, packed if self.size is None else self.size


def deflated(record: Record) -> Record:
    """A record compressed."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    content = packer.compress(record.content) + packer.flush()
    return replace(
        record, content=content, method=8, size=len(record.content), crc=zlib.crc32(record.content), packed_size=None
    )


def zip_file(
    records: Sequence[Record],
    *,
    before: bytes = b"",
    after: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
    directory_at: int | None = None,
    directory_size: int | None = None,
    disk: int = 0,
    before_end: bytes = b"",
) -> bytes:
    """An archive; what is given takes the place of the truth in its last record, ``before_end`` lies in front of it."""
    out, directory = bytearray(before), bytearray()
    for record in records:
        crc, packed, size = record.central()
        at = len(out) if record.at is None else record.at
        local_name = record.name if record.local_name is None else record.local_name
        pad = -(len(out) + 30 + len(local_name) + 4) % 64 if record.pads else 0
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad if record.pads else b""
        out += record.signature + struct.pack("<HHHHHIIIHH", 0, record.flags, record.method, 0, 0, 0, 0, 0,
                                              len(local_name), len(extra))  # fmt: skip
        out += local_name + extra + record.content
        out += b"PK\x07\x08" + struct.pack("<III", crc, packed & 0xFFFFFFFF, size & 0xFFFFFFFF)
        lengths = len(record.name), len(record.extra)
        directory += b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 0, 0, record.flags, record.method, 0, 0,
                                                 crc, packed, size, *lengths, 0, 0, 0, 0, at)  # fmt: skip
        directory += record.name + record.extra
    start = len(out) if directory_at is None else directory_at
    length = len(directory) if directory_size is None else directory_size
    entries = min(len(records), 0xFFFF) if count is None else count
    out += directory + before_end + b"PK\x05\x06"
    out += struct.pack("<HHHHIIH", disk, disk, entries, entries, length, start, len(comment))
    return bytes(out) + comment + after


LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Weights:
    """A model's tensors, ready to be written into either container.

    Attributes:
        tensors: by the file's keys, all float32 and contiguous; storage ``i`` holds the i-th.
        legacy: whether for the container from before torch 1.6.
    """

    tensors: Mapping[str, Tensor]
    legacy: bool = False

    def number(self, key: str) -> int:
        """Which storage a tensor lies in."""
        return list(self.tensors).index(key)

    def storage_id(
        self,
        number: int,
        *,
        word: bytes | None = None,
        kind: bytes | None = None,
        key: bytes | None = None,
        location: bytes | None = None,
        numel: bytes | None = None,
        more: tuple[bytes, ...] | None = None,
    ) -> bytes:
        """The tuple that stands for a storage; what is given takes the place of the right part."""
        tensor = list(self.tensors.values())[number]
        return group(
            text("storage") if word is None else word,
            name("torch", "FloatStorage") if kind is None else kind,
            text(str(number)) if key is None else key,
            text("cpu") if location is None else location,
            integer(tensor.numel()) if numel is None else numel,
            *(((NONE,) if self.legacy else ()) if more is None else more),
        )

    def storage(self, number: int, **changes: bytes) -> bytes:
        """A storage."""
        return self.storage_id(number, **changes) + b"Q"  # type: ignore[arg-type]

    def tensor(
        self,
        key: str,
        *,
        function: bytes | None = None,
        storage: bytes | None = None,
        offset: bytes | None = None,
        size: bytes | None = None,
        stride: bytes | None = None,
        requires_grad: bytes = FALSE,
        hooks: bytes | None = None,
    ) -> bytes:
        """A tensor; what is given takes the place of the right argument."""
        tensor = self.tensors[key]
        return call(
            name("torch._utils", "_rebuild_tensor_v2") if function is None else function,
            self.storage(self.number(key)) if storage is None else storage,
            integer(0) if offset is None else offset,
            sizes(tensor.shape) if size is None else size,
            sizes(tensor.stride()) if stride is None else stride,
            requires_grad,
            call(ORDERED_DICT) if hooks is None else hooks,
        )

    def items(self, changed: Mapping[str, bytes] | None = None) -> list[tuple[bytes, bytes]]:
        """Keys and tensors, some of them replaced."""
        changed = changed or {}
        return [(text(key), changed[key] if key in changed else self.tensor(key)) for key in self.tensors]

    def state_dict(self, changed: Mapping[str, bytes] | None = None) -> bytes:
        """The dict of all tensors, some of them replaced."""
        return mapping(self.items(changed))

    def beside(self, thing: bytes, key: bytes | None = None) -> bytes:
        """The state dict with one more entry."""
        return mapping([*self.items(), (text("extra") if key is None else key, thing)])

    def records(self, pickle_program: bytes) -> list[Record]:
        """The archive's files, in torch's order."""
        files = {
            "data.pkl": pickle_program,
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": b"little",
            **{f"data/{i}": tensor.numpy().tobytes() for i, tensor in enumerate(self.tensors.values())},
            "version": b"3\n",
            ".data/serialization_id": b"0" * 40,
        }
        return [Record(f"archive/{file}".encode(), content) for file, content in files.items()]

    def streams(self) -> list[tuple[str, int, bytes]]:
        """Key, number of elements and bytes of each storage."""
        return [(str(i), t.numel(), t.numpy().tobytes()) for i, t in enumerate(self.tensors.values())]

    def legacy_file(
        self,
        pickle_program: bytes,
        *,
        magic: bytes | None = None,
        protocol: bytes | None = None,
        system: bytes | None = None,
        keys: bytes | None = None,
        streams: Sequence[tuple[str, int, bytes]] | None = None,
        after: bytes = b"",
    ) -> bytes:
        """Five pickles and the storages; what is given takes the place of the right part."""
        sizes_of_types = {"short": 2, "int": 4, "long": 4}
        system_info = {"protocol_version": LEGACY_PROTOCOL, "little_endian": True, "type_sizes": sizes_of_types}
        streams = self.streams() if streams is None else streams
        parts = [
            program(integer(LEGACY_MAGIC)) if magic is None else magic,
            program(integer(LEGACY_PROTOCOL)) if protocol is None else protocol,
            program(pickled(system_info)) if system is None else system,
            pickle_program,
            program(listing(*(text(key) for key, _, _ in streams))) if keys is None else keys,
            *(struct.pack("<q", count) + content for _, count, content in streams),
        ]
        return b"".join(parts) + after

    def file(self, thing: bytes) -> bytes:
        """A whole weight file, given the object that it holds."""
        return self.file_of(program(thing))

    def file_of(self, pickle_program: bytes) -> bytes:
        """A whole weight file, given its pickle."""
        return self.legacy_file(pickle_program) if self.legacy else zip_file(self.records(pickle_program))


def as_metaseq(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face file as metaseq names and fuses them."""
    ours = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    out: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        if ".k_proj." in key:
            parts = [ours[key.replace(".k_proj.", f".{letter}_proj.")] for letter in "kvq"]
            out[key.replace(".k_proj.", ".qkv_proj.")] = torch.cat(parts)
        elif ".q_proj." not in key and ".v_proj." not in key:
            out[key.replace("decoder.final_layer_norm", "decoder.layer_norm")] = tensor
    return out


def metaseq_object(weights: Weights, extra_state: bytes = NONE, task: bytes = NONE, field: bytes = NONE) -> bytes:
    """What a metaseq training run leaves: weights, and much beside them that is no concern of a reader's.

    Args:
        weights: under metaseq's names.
        extra_state, task: objects that mean nothing to a reader; the latter lies in the configuration.
        field: one more of the model's settings.
    """
    settings = {"decoder_attention_heads": integer(4), "activation_fn": text("relu"), "dropout": real(0.1),
                "attention_dropout": real(0.1), "another": field}  # fmt: skip
    cfg = mapping([(text("task"), task), (text("model"), mapping((text(key), x) for key, x in settings.items()))])
    return mapping([(text("cfg"), cfg), (text("model"), weights.state_dict()), (text("extra_state"), extra_state)])


def metaseq_file(weights: Weights, **things: bytes) -> bytes:
    """A whole file of it; see ``metaseq_object``."""
    return weights.file(metaseq_object(weights, **things))


# --- objects that run something, given the file that proves it ---

CANARY = "minopt_hostile_canary"  # a module that lies in the reader's path and that nobody imports

OS_SYSTEM = name("os", "system")


def touch(marker: Path) -> bytes:
    """A shell's command that creates the marker."""
    return text(f"touch '{marker}'")


def python(marker: Path) -> bytes:
    """An expression and statement that creates the marker."""
    return text(f"open({str(marker)!r}, 'w').close()")


def attribute(thing: bytes, key: str) -> bytes:
    """What an object has under a name."""
    return call(name("builtins", "getattr"), thing, text(key))


def lazy_system(marker: Path) -> bytes:
    """An iterator that runs a command when asked for an item."""
    return call(name("builtins", "map"), OS_SYSTEM, listing(touch(marker)))


def extension(code: int, module: str, attribute: str, opcode: bytes, marker: Path) -> bytes:
    """A function called by a number of the extension registry, once that is filled."""
    register = call(name("copyreg", "add_extension"), text(module), text(attribute), integer(code))
    return register + POP + call(opcode, touch(marker))


def nested_file(marker: Path) -> bytes:
    """A whole .pt file that runs something."""
    return Weights({}).file(call(OS_SYSTEM, touch(marker)))


def loads_a_file_beside(marker: Path) -> bytes:
    """torch.load of another file, its guard switched off by a state."""
    inner = marker.with_suffix(".inner")
    inner.write_bytes(nested_file(marker))
    state = group(name("torch", "load"), group(text(str(inner))), mapping([(text("weights_only"), FALSE)]), NONE)
    return call(build(name("functools", "partial") + group(name("builtins", "dict")) + b"\x81", state))


def appends(marker: Path) -> bytes:
    """An object whose ``append`` is a function that runs commands."""
    thing = name("types", "SimpleNamespace") + EMPTY_TUPLE + b"\x81"
    return build(thing, mapping([(text("append"), OS_SYSTEM)])) + MARK + touch(marker) + b"e"


def through_globals(marker: Path) -> bytes:
    """``eval``, found behind the name that every file of tensors has."""
    builtins = call(stack_name("torch._utils", "_rebuild_tensor_v2.__globals__.get"), text("__builtins__"))
    return call(call(call(name("operator", "itemgetter"), text("eval")), builtins), python(marker))


RUNS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: call(OS_SYSTEM, touch(m)),
    "posix.system": lambda m: call(name("posix", "system"), touch(m)),
    "os.popen": lambda m: call(attribute(call(name("os", "popen"), touch(m)), "read")),
    "subprocess.Popen": lambda m: call(
        attribute(call(name("subprocess", "Popen"), listing(text("touch"), text(str(m)))), "wait")
    ),
    "subprocess.call": lambda m: call(name("subprocess", "call"), listing(text("touch"), text(str(m)))),
    "subprocess.getoutput": lambda m: call(name("subprocess", "getoutput"), touch(m)),
    "eval": lambda m: call(name("builtins", "eval"), python(m)),
    "eval of Python 2": lambda m: call(name("__builtin__", "eval"), python(m)),
    "exec": lambda m: call(name("builtins", "exec"), python(m)),
    "open": lambda m: call(name("builtins", "open"), text(str(m)), text("w")),
    "timeit": lambda m: call(name("timeit", "timeit"), python(m), text("pass"), name("time", "time"), integer(1)),
    "__import__": lambda m: call(name("builtins", "__import__"), text(CANARY)),
    "importlib": lambda m: call(name("importlib", "import_module"), text(CANARY)),
    "name of a module": lambda m: name(CANARY, "anything"),
    "name of a module on the stack": lambda m: stack_name(CANARY, "anything"),
    "name of a storage in a module": lambda m: stack_name(CANARY, "RareStorage"),
    "new object of a module": lambda m: name(CANARY, "Anything") + EMPTY_TUPLE + b"\x81",
    "torch.utils.collect_env.run": lambda m: call(name("torch.utils.collect_env", "run"), touch(m)),
    "execWrapper of torch.jit": lambda m: call(
        name("torch.jit.unsupported_tensor_ops", "execWrapper"), python(m), EMPTY_DICT, EMPTY_DICT
    ),
    "getattr": lambda m: call(attribute(call(name("builtins", "__import__"), text("os")), "system"), touch(m)),
    "getattr of torch.serialization": lambda m: call(attribute(name("torch.serialization", "os"), "system"), touch(m)),
    "operator.attrgetter": lambda m: call(
        call(call(name("operator", "attrgetter"), text("os.system")), name("torch", "serialization")), touch(m)
    ),
    "operator.methodcaller": lambda m: call(
        call(name("operator", "methodcaller"), text("system"), touch(m)), name("torch", "os")
    ),
    "functools.partial": lambda m: call(call(name("functools", "partial"), OS_SYSTEM, touch(m))),
    "functools.reduce": lambda m: call(
        name("functools", "reduce"), name("builtins", "getattr"),
        listing(name("torch", "serialization"), text("os"), text("system"))
    ) + group(touch(m)) + b"R",
    "map in a list": lambda m: call(name("builtins", "list"), lazy_system(m)),
    "pickle.loads": lambda m: call(name("pickle", "loads"), data(program(call(OS_SYSTEM, touch(m))))),
    "_load_from_bytes": lambda m: call(name("torch.storage", "_load_from_bytes"), data(nested_file(m))),
    "torch.load": loads_a_file_beside,
    "state of a partial": lambda m: call(
        build(
            name("functools", "partial") + group(name("builtins", "dict")) + b"\x81",
            group(OS_SYSTEM, group(touch(m)), EMPTY_DICT, NONE),
        )
    ),
    "append of an object": appends,
    "copyreg._reconstructor": lambda m: call(
        name("copyreg", "_reconstructor"), name("builtins", "bytes"), name("builtins", "bytes"), lazy_system(m)
    ),
    "EXT1": lambda m: extension(201, "os", "system", b"\x82\xc9", m),
    "EXT2": lambda m: extension(20_001, "posix", "system", b"\x83" + struct.pack("<H", 20_001), m),
    "EXT4": lambda m: extension(2_000_001, "subprocess", "getoutput", b"\x84" + struct.pack("<i", 2_000_001), m),
    "INST": lambda m: MARK + touch(m) + b"ios\nsystem\n",
    "OBJ": lambda m: MARK + OS_SYSTEM + touch(m) + b"o",
    "NEWOBJ": lambda m: name("builtins", "bytes") + group(lazy_system(m)) + b"\x81",
    "NEWOBJ_EX": lambda m: name("builtins", "bytes") + group(lazy_system(m)) + EMPTY_DICT + b"\x92",
    "STACK_GLOBAL": lambda m: call(stack_name("os", "system"), touch(m)),
    "STACK_GLOBAL of the memo": lambda m: call(
        b"\x80\x04" + text("system") + b"\x94" + POP + text("os") + b"h\x00" + b"\x93", touch(m)
    ),
    "dots behind torch": lambda m: call(stack_name("torch", "serialization.os.system"), touch(m)),
    "dots behind collections": lambda m: call(
        attribute(call(stack_name("collections", "_sys.modules.get"), text("os")), "system"), touch(m)
    ),
    "globals of _rebuild_tensor_v2": through_globals,
    "a default factory": lambda m: call(
        stack_name("collections", "defaultdict.__missing__"),
        call(name("collections", "defaultdict"), call(name("functools", "partial"), OS_SYSTEM, touch(m))), text("key")
    ),
}  # fmt: skip

# What one file can leave behind in the process for the next.
LEFT_BEHIND = "minopt_hostile_mark"

POLLUTES: dict[str, bytes] = {
    "slots of a function": build(name("torch._utils", "_rebuild_tensor_v2"), slots(**{LEFT_BEHIND: TRUE})),
    "state of a function": build(name("torch._utils", "_rebuild_tensor_v2"), mapping([(text(LEFT_BEHIND), TRUE)])),
    "slots of a class": build(name("torch._utils", "ExceptionWrapper"), slots(**{LEFT_BEHIND: TRUE})),
    "state of a module": build(name("torch", "_utils"), mapping([(text(LEFT_BEHIND), TRUE)])),
    "item of os.environ": name("os", "environ") + text(LEFT_BEHIND) + text("1") + b"s",
    "item of sys.modules": name("sys", "modules") + text(LEFT_BEHIND) + NONE + b"s",
    "the extension registry": call(name("copyreg", "add_extension"), text(LEFT_BEHIND), text("x"), integer(300)),
    "setattr": call(name("builtins", "setattr"), name("torch", "_utils"), text(LEFT_BEHIND), TRUE),
}


# --- safetensors ---


def safetensors_file(header: bytes | Mapping[str, object], content: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file, whose header may be anything."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + content

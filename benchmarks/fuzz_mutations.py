"""Damages valid checkpoints where it matters: in headers, pickles and archives' indexes, and among files of a folder.

Most bytes of a checkpoint are numbers, of which any is as good as another, so positions are drawn from the places that
a reader has to understand (``Anatomy``). Everything follows from the random generator that is handed in.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]
Edit = tuple[bytes, str]  # new bytes, and what became of the old ones, in words

# Sizes that readers get wrong: near the ends of what 8 to 64 bits hold and of what a reader may allow, or below zero.
INTS = (0, 1, 2, 3, 7, 16, 48, 255, 256, 65535, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**47, 2**48, 2**48 + 1,
        2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1 << 1900, -1, -2, -16, -(2**31), -(2**63),
        -(10**30))  # fmt: skip

# Texts for names of tensors, files and classes.
TEXTS = ("", "\n", "two\nlines", "\x1b[2J", "\u2028", "\udcff", "\0", "\u0663", "x" * 20_000, "0", "1", ".", "..", "/",
         "../x", "/etc/passwd", "model", "cfg", "args", "shard_metadata", "config.json", "model.safetensors", "F32",
         "I64", "F16", "decoder.version", "decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight",
         "decoder.layers.7.fc1.weight", "decoder.layers.99999999999999999999.fc1.weight", "lm_head.weight",
         "decoder.layers.0.self_attn.qkv_proj.weight", "decoder.output_projection.weight", "flat_param_0",
         "model.decoder.layers.1.fc2.bias", "decoder.layers.0.flat_param_0", "flat_param_1",
         "transformer.h.0.attn.c_attn.weight")  # fmt: skip

_GLOBALS = ("torch\nHalfStorage", "torch\nDoubleStorage", "torch\nLongStorage", "torch\nBFloat16Storage",
            "torch\nComplexFloatStorage", "torch\nUntypedStorage", "torch._utils\n_rebuild_tensor_v2", "torch\nSize",
            "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_sparse_tensor", "collections\nOrderedDict",
            "torch._utils\n_rebuild_qtensor", "torch._tensor\n_rebuild_from_type_v2", "os\nsystem", "builtins\neval",
            "argparse\nNamespace", "omegaconf.dictconfig\nDictConfig", "x\ny z", "\n", "\x1b[2J\n\xe9")  # fmt: skip

# Values in a pickle that are short to write and endless to walk: shared without end, in themselves, or very deep.
_KEEP, _AGAIN = b"r\xff\xff\xff\x7f0", b"j\xff\xff\xff\x7f"
BOMBS = (
    b")" + b"2\x86" * 60,
    b"]" + (_KEEP + b"(" + 2 * _AGAIN + b"l") * 60,
    b"}" + (_KEEP + b"(X\x01\0\0\0a" + _AGAIN + b"X\x01\0\0\0b" + _AGAIN + b"d") * 60,
    b")" + (_KEEP + b"cx\ny\n" + 2 * _AGAIN + b"\x86R") * 60,
    b"]2a",
    b"}2X\x01\0\0\0a2s",
    b")" + b"\x85" * 50_000,
    b"]" + (_KEEP + b"]" + _AGAIN + b"a") * 3_000,
    b"\x8a\xff" + b"\xff" * 254 + b"\x7f",
    b"\x8b\xb8\x0b\0\0" + b"\x7f" * 3_000,
    b"I" + b"9" * 4_000 + b"\n",
    b"X\xa0\x86\x01\0" + b"\\" * 100_000,
)

# Other pieces of pickle programs: lengths that are not there, marks and memos that are none, odd operations.
SNIPPETS = (
    b"(" * 20_000, b"N0" * 100_000, b"\x8b\xff\xff\xff\x7f", b"\x8b\0\0\0\x80", b"\x8d" + b"\xff" * 8, b"\x92", b"0",
    b"\x8e\0\0\0\0\0\x01\0\0", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x95" + b"\xff" * 8, b"\x93", b"K\x01",
    b"I" + b"9" * 5_000 + b"\n", b"L" + b"9" * 5_000 + b"L\n", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"\x97",
    b"p-1\n", b"g0\n", b"F1e999\n", b"S'a\\\n", b"S'\\q'\n", b"V\\ud800\n", b"P1\n", b"Q", b"\x82\x01", b"N",
    b"(cos\nsystem\no", b"(ios\nsystem\n", b"R", b"b", b"u", b".", b"\x98", b"\x96\x01\0\0\0\0\0\0\0a", b"\x80\x05",
    b"\x80\xff", b"\x94", b"t", b"2", b"(", b"}", b"]", b")", b"a", b"s", b"e",
)  # fmt: skip

_NAMES = ("optimizer.pt", "reshard.pt", "x.pt", "consolidated.pt", "model.safetensors", "pytorch_model.bin",
          "config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "reshard-model_part-0.pt",
          "model-00001-of-00002.safetensors", "reshard-model_part-2.pt", "reshard-model_part-999999999.pt",
          "x-model_part-1.pt", "checkpoint_last-model_part-0-shard0.pt", "checkpoint_last-model_part-00-shard0.pt",
          "a-shard77777777.pt", "checkpoint_last-model_part-0-shard123456789.pt", "reshard-model_part-\u0663.pt",
          "two\nlines.pt", ".pt")  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """The places in a valid file that its reader has to understand.

    Attributes:
        form: "json", "safetensors", "zip" or "legacy" (torch's two containers).
        places: spans of bytes by what they are; each kind of place is as likely as any other.
        programs: for each pickle, where it begins and ends, and its operations: begin, end, name, argument.
    """

    form: str
    places: dict[str, list[Span]]
    programs: list[tuple[Span, list[tuple[int, int, str, Any]]]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, data: bytes) -> Anatomy:
        """Takes a valid file apart."""
        if name.endswith(".json"):
            return cls("json", {"text": [(0, len(data))]})
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            return cls("safetensors", {"length": [(0, 8)], "header": [(8, end)], "rest of header": [(8, end)]})
        return cls._of_zip(data) if data[:4] == b"PK\x03\x04" else cls._of_legacy(data)

    @classmethod
    def _of_zip(cls, data: bytes) -> Anatomy:
        places: dict[str, list[Span]] = {"local headers": [], "small files": []}
        programs = []
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                at = entry.header_offset
                begin = at + 30 + sum(struct.unpack("<HH", data[at + 26 : at + 30]))
                places["local headers"].append((at, begin))
                if entry.filename.endswith("data.pkl"):
                    programs.append(_program(data, begin))
                elif "/data/" not in entry.filename:
                    places["small files"].append((begin, begin + entry.file_size))
            places |= {"pickle": [programs[0][0]], "more of the pickle": [programs[0][0]]}
            index = archive.start_dir
        end = data.rindex(b"PK\x05\x06")
        end = min(end, data.find(b"PK\x06\x06", index) if b"PK\x06\x06" in data[index:] else end)
        return cls("zip", places | {"index": [(index, end)], "end": [(end, len(data))]}, programs)

    @classmethod
    def _of_legacy(cls, data: bytes) -> Anatomy:
        programs, at = [], 0
        for _ in range(5):  # a number, a version, the system, the content, the storages' keys
            programs.append(_program(data, at))
            at = programs[-1][0][1]
        spans = [span for span, _ in programs]
        places = {"small pickles": spans[:3], "pickle": spans[3:4], "more of the pickle": spans[3:4], "keys": spans[4:]}
        return cls("legacy", places | {"first count": [(at, at + 8)]}, programs)

    def spot(self, rng: random.Random, size: int) -> int:
        """A position in a file of ``size`` bytes, now and then among the numbers."""
        spans = rng.choice(list(self.places.values()))
        begin, end = rng.choice(spans) if spans and rng.random() < 0.92 else (0, size)
        return min(rng.randrange(begin, max(begin + 1, end)), max(0, size - 1))


def _program(data: bytes, at: int) -> tuple[Span, list[tuple[int, int, str, Any]]]:
    stream = io.BytesIO(data)
    stream.seek(at)
    operations = [(position, op.name, argument) for op, argument, position in pickletools.genops(stream)]
    ends = [position for position, _, _ in operations[1:]] + [stream.tell()]
    return (at, stream.tell()), [(p, end, name, arg) for (p, name, arg), end in zip(operations, ends, strict=True)]


# --- bytes of any file ---


def edit_bytes(data: bytes, anatomy: Anatomy, rng: random.Random, donor: bytes) -> Edit:
    """One change to bytes, wherever the anatomy points.

    Args:
        data: of the file; need not be valid any more.
        anatomy: of the valid file.
        rng: draws the change.
        donor: another valid file's bytes.
    """
    at = anatomy.spot(rng, len(data))
    how = rng.choice(list(_BYTE_EDITS))
    return _BYTE_EDITS[how](data, at, rng, donor), f"{how} at {at}"


def _length(rng: random.Random) -> int:
    return int(2 ** rng.uniform(0, 10))


def _flip(data: bytes, at: int, rng: random.Random, donor: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[min(len(changed) - 1, at + rng.randrange(16))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(data: bytes, at: int, rng: random.Random, donor: bytes) -> bytes:
    value = rng.choice((0, 0xFF, 0x0A, 0x7F, 0x80, rng.randrange(256), data[at] + 1 if data else 0))
    return data[:at] + bytes([value & 0xFF]) + data[at + 1 :]


def _integer(data: bytes, at: int, rng: random.Random, donor: bytes) -> bytes:
    width = rng.choice((2, 4, 8))
    value = (rng.choice(INTS) + rng.choice((0, 0, 1, -1))) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, rng.choice(("little", "little", "big"))) + data[at + width :]


def _garbage(rng: random.Random, donor: bytes) -> bytes:
    size = rng.choice((1, 7, 64, 1000, 70_000))
    text = rng.choice(("PK\x05\x06", "PK\x01\x02", "{}", "[[", "\n", "\x80\x02")).encode("latin-1")
    return rng.choice((bytes(size), rng.randbytes(size), text * 3, donor[-size:], donor))


_BYTE_EDITS: dict[str, Callable[[bytes, int, random.Random, bytes], bytes]] = {
    "flip bits": _flip,
    "flip a bit or more": _flip,
    "set a byte": _byte,
    "set a byte to another": _byte,
    "set an integer": _integer,
    "set some integer": _integer,
    "cut": lambda data, at, rng, donor: data[:at],
    "cut the end": lambda data, at, rng, donor: data[: max(0, len(data) - _length(rng))],
    "cut the beginning": lambda data, at, rng, donor: data[_length(rng) :],
    "delete": lambda data, at, rng, donor: data[:at] + data[at + _length(rng) :],
    "repeat": lambda data, at, rng, donor: data[: at + _length(rng)] + data[at:],
    "insert": lambda data, at, rng, donor: data[:at] + rng.randbytes(_length(rng)) + data[at:],
    "zero": lambda data, at, rng, donor: (lambda n: data[:at] + bytes(n) + data[at + n :])(_length(rng)),
    "copy here from elsewhere": lambda data, at, rng, donor: (
        lambda n, start: data[:at] + data[start : start + n] + data[at + n :]
    )(_length(rng), rng.randrange(len(data) or 1)),
    "begin as another file": lambda data, at, rng, donor: donor[:at] + data[at:],
    "end as another file": lambda data, at, rng, donor: data[:at] + donor[at:],
    "append": lambda data, at, rng, donor: data + _garbage(rng, donor),
    "prepend": lambda data, at, rng, donor: _garbage(rng, donor) + data,
}


# --- the structure of a valid file ---


def edit_structure(data: bytes, anatomy: Anatomy, rng: random.Random, donor: bytes) -> Edit:
    """One change after which the file's outer form still holds, so that what lies deeper is reached."""
    if anatomy.form == "json":
        return edit_json(data.decode(), rng)
    if anatomy.form == "safetensors":
        length = int.from_bytes(data[:8], "little")
        header, how = edit_json(data[8 : 8 + length].decode(), rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :], how
    if anatomy.form == "zip":
        if rng.random() < 0.25:
            return _edit_archive(data, rng, donor)
        changed, how = _edit_program(data, *anatomy.programs[0], rng)
        return _rewrite_zip(data, changed), how
    (begin, end), operations = rng.choice(anatomy.programs[3:] if rng.random() < 0.9 else anatomy.programs)
    changed, how = _edit_program(data, (begin, end), operations, rng)
    return data[:begin] + changed + data[end:], how


def encode_int(value: int) -> bytes:
    """The operation that pushes an integer."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def encode_text(value: str) -> bytes:
    """The operation that pushes a text."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


# What is changed in a pickle; twice or more is more often. What keeps the program whole gets further into a reader.
_PROGRAM_EDITS = ("integer",) * 4 + ("text",) * 4 + ("entry",) * 4 + ("name",) * 2 + ("bomb",) * 3 + (
    "snippet", "drop", "repeat", "swap", "replace", "drop range", "move range", "memo")  # fmt: skip


def _edit_program(
    data: bytes, span: Span, operations: list[tuple[int, int, str, Any]], rng: random.Random
) -> tuple[bytes, str]:
    """One to three changes to the operations of a pickle."""
    pieces = [data[begin:end] for begin, end, _, _ in operations]
    integers = [i for i, op in enumerate(operations) if op[2] in ("BININT", "BININT1", "BININT2", "LONG1")]
    texts = [i for i, op in enumerate(operations) if op[2] == "BINUNICODE"]
    names = [i for i, op in enumerate(operations) if op[2] == "GLOBAL"]
    entries = [i for i in texts if "." in operations[i][3]]  # keys of tensors: from one to the next is an entry
    log = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        how, size = rng.choice(_PROGRAM_EDITS), _length(rng) % 40
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        if how == "integer" and integers:
            at, other = rng.choice(integers), rng.choice(integers)
            old = operations[at][3]
            new = rng.choice((old + 1, old - 1, 2 * old, old // 2, -old, operations[other][3], *rng.sample(INTS, 4)))
            pieces[at] = encode_int(new)
        elif how == "text" and texts:
            at, other = rng.choice(texts), rng.choice(texts)
            old = operations[at][3]
            new = rng.choice((old + rng.choice("0.x"), old[:-1], operations[other][3], rng.choice(TEXTS)))
            pieces[at] = encode_text(new)
        elif how == "entry" and len(entries) > 1:
            number = rng.randrange(len(entries) - 1)
            at, after, other = entries[number], entries[number + 1], rng.choice(entries)
            entry = b"".join(pieces[at:after])
            if rng.random() < 0.7:
                pieces[at:after] = [b""] * (after - at)
            if rng.random() < 0.5:
                pieces[other] = entry + pieces[other]
        elif how == "name" and names:
            at = rng.choice(names)
            pieces[at] = b"c" + (rng.choice(_GLOBALS) + "\n").encode()
        elif how == "bomb":
            at = rng.choice(integers + texts) if integers + texts and rng.random() < 0.8 else at
            pieces[at] = rng.choice((b"", b"", pieces[at])) + rng.choice(BOMBS)
        elif how == "memo":
            pieces[at] = rng.choice((b"h", b"q")) + bytes([rng.randrange(256)])
        elif how == "drop range":
            pieces[at : at + size] = [b""] * len(pieces[at : at + size])
        elif how == "move range":
            pieces[other] += b"".join(pieces[at : at + size])
        else:
            pieces[at] = {
                "drop": b"", "repeat": pieces[at] * 2, "swap": pieces[other], "replace": bytes([rng.randrange(256)]),
                "snippet": pieces[at] + rng.choice(SNIPPETS) + rng.choice((b"", b"0")),
            }.get(how, pieces[at][:1])  # fmt: skip
        log.append(f"{how} at operation {at}")
    return b"".join(pieces), "pickle: " + ", ".join(log)


def _records(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _write_zip(records: list[tuple[str, bytes]], squeezed: int | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two records of one name
        for number, (name, content) in enumerate(records):
            entry = zipfile.ZipInfo(name)
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED if number == squeezed else zipfile.ZIP_STORED)
    return stream.getvalue()


def _rewrite_zip(data: bytes, program: bytes) -> bytes:
    return _write_zip([(n, program if n.endswith("/data.pkl") else content) for n, content in _records(data)])


def _edit_archive(data: bytes, rng: random.Random, donor: bytes) -> Edit:
    records = _records(data)
    folder = records[0][0].partition("/")[0]
    at, other = rng.randrange(len(records)), rng.randrange(len(records))
    if rng.random() < 0.3:
        at = next(i for i, (name, _) in enumerate(records) if name.endswith("/data.pkl"))
    name, content = records[at]
    how = rng.choice(("drop", "repeat", "rename", "swap", "deflate", "resize", "add", "shuffle", "move"))
    squeezed = None
    if how == "drop":
        del records[at]
    elif how == "repeat":
        records.append((name, records[other][1]))
    elif how == "rename":
        names = (
            records[other][0],
            name.upper(),
            f"{name}/",
            f"{folder}/data/../{name}",
            "/" + name,
            "x/data.pkl",
            name[1:],
        )
        records[at] = (rng.choice(names), content)
    elif how == "swap":
        records[at], records[other] = (name, records[other][1]), (records[other][0], content)
    elif how == "deflate":
        squeezed = at
    elif how == "resize":
        longer = content + bytes(_length(rng))
        records[at] = (name, rng.choice((b"", content[:-1], longer, content[: len(content) // 2], bytes(3_000_000))))
    elif how == "add":
        extra = ("constants.pkl", "byteorder", "data.pkl", "data/x", "data/0", "version", ".format_version", "a\nb")
        records.append((f"{folder}/{rng.choice(extra)}", rng.choice((b"", b"big", b"little", content, donor))))
    elif how == "shuffle":
        rng.shuffle(records)
    else:
        records = [(n.replace(f"{folder}/", rng.choice(("", "a/b/", "../", f"{folder}//")), 1), c) for n, c in records]
    return _write_zip(records, squeezed), f"archive: {how} {name!r}"


# What json.dumps would not write; each stands for a text that replaces it.
_RAW = {"@digits": "9" * 5_000, "@huge": "9" * 400, "@overflow": "1e999", "@nan": "NaN", "@minus": "-0",
        "@deep": "[" * 3_000 + "]" * 3_000, "@too deep": "[" * 200_000, "@half": "1.0", "@surrogate": '"\\ud800"',
        "@line": '"a\\nb"'}  # fmt: skip


def edit_json(text: str, rng: random.Random) -> Edit:
    """One to three changes to what a JSON text says, or one to the text itself."""
    value = json.loads(text)
    if rng.random() < 0.04:
        whole = rng.choice(("[]", "{}", "null", "", "\ufeff" + text, text + text, text.replace('"', "'"), "0", '"x"'))
        return whole.encode(rng.choice(("utf-8", "utf-16"))), "another text"
    log = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places:
            break
        numbers = [(holder, key) for holder, key in places if isinstance(holder[key], (int, float))]
        holder, key = rng.choice(numbers if numbers and rng.random() < 0.4 else places)
        other, elsewhere = rng.choice(places)
        how = rng.choice(("replace", "replace", "replace", "change", "drop", "rename", "swap", "copy"))
        if how == "replace":
            holder[key] = _json_value(rng)
        elif how == "change" and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, not holder[key]))
        elif how == "drop":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[rng.choice((str(key) + "x", str(key)[:-1], rng.choice(TEXTS)))] = holder.pop(key)
        elif how == "swap":
            holder[key], other[elsewhere] = other[elsewhere], holder[key]
            if _is_endless(value):
                holder[key], other[elsewhere] = other[elsewhere], holder[key]
        else:
            holder[key] = json.loads(json.dumps(other[elsewhere]))
        log.append(f"{how} {str(key)[:60]!r}")
    written = json.dumps(value)
    for mark, raw in _RAW.items():
        written = written.replace(f'"{mark}"', raw)
    if isinstance(value, dict) and value and rng.random() < 0.1:
        key = rng.choice(list(value))
        written = f"{{{json.dumps(key)}: {json.dumps(_json_value(rng))}, {written[1:]}"
        log.append(f"{key!r} twice")
    return written.encode("utf-8", "replace"), "json: " + ", ".join(log)


def _json_value(rng: random.Random) -> Any:
    plain = rng.choice((None, True, False, 0.5, -1.5, [], {}, [1], {"a": 1}, [2**64, -1], ["x"], [[]]))
    return rng.choice((rng.choice(INTS), rng.choice(INTS), "@huge", rng.choice(TEXTS), rng.choice(list(_RAW)), plain))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container and key of a JSON value under which something lies."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        holder = todo.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, inner in items:
            found.append((holder, key))
            todo.append(inner)
    return found


def _is_endless(value: Any) -> bool:
    """Whether something was put into itself."""
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


# --- the files of a folder ---


def edit_folder(files: dict[str, bytes | None], others: dict[str, bytes], rng: random.Random) -> str:
    """One change to which files there are; ``None`` as content stands for a folder.

    Args:
        files: by name; changed in place.
        others: of another checkpoint.
        rng: draws the change.

    Returns:
        What was done, in words.
    """
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    theirs = rng.choice(sorted(others))
    how = rng.choice(("drop", "swap", "copy over", "rename", "rename", "replace", "replace all", "empty", "as a folder",
                      "add theirs", "add a copy", "add junk"))  # fmt: skip
    if how == "drop":
        del files[name]
    elif how == "swap":
        files[name], files[other] = files[other], files[name]
    elif how == "copy over":
        files[name] = files[other]
    elif how == "rename":
        other = _renamed(name, rng)
        files[other] = files.pop(name)
    elif how == "replace":
        files[name] = others.get(name, others[theirs])
    elif how == "replace all":
        files |= {shared: content for shared, content in others.items() if shared in files and rng.random() < 0.8}
    elif how in ("empty", "as a folder"):
        files[name] = b"" if how == "empty" else None
    else:
        other = rng.choice((theirs, _renamed(name, rng), *_NAMES))
        files[other] = (
            others[theirs] if how == "add theirs" else files[name] if how == "add a copy" else pickle.dumps([1])
        )
    return f"folder: {how} {name!r}, {other!r}, {theirs!r}"


def _renamed(name: str, rng: random.Random) -> str:
    """A name near another: a number or the suffix of it changed."""
    digits = [i for i, letter in enumerate(name) if letter.isdigit()]
    if digits and rng.random() < 0.7:
        at = rng.choice(digits)
        return name[:at] + rng.choice((*"0123579", "10", "00", "999999999", "\u0663", "-1", "")) + name[at + 1 :]
    stem, dot, suffix = name.rpartition(".")
    suffixes = ("pt", "bin", "safetensors", "json", "index.json", "tmp", "PT", "pt.pt", "ckpt", "")
    return rng.choice((f"{stem}{dot}{rng.choice(suffixes)}", *_NAMES, f"{name}{suffix}", f"copy of {name}"))

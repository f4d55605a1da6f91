"""Pickles that no pickler writes, under the promises of test_hostile_files.py: towers, circles, senseless opcodes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import chain, repeat

import pytest

from tests.checkpoint.conftest import (
    BIAS,
    BIN,
    CONTAINERS,
    EMBEDDINGS,
    FC1,
    LOADED,
    METASEQ,
    REFUSED,
    WHOLE,
    Keep,
    Place,
    shown,
)
from tests.checkpoint.hostile_files import (
    CANARY,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    MARK,
    NONE,
    ORDERED_DICT,
    OS_SYSTEM,
    POP,
    TRUE,
    Weights,
    build,
    call,
    data,
    deep_calls,
    deep_dict,
    deep_list,
    deep_states,
    deep_tuple,
    dict_tower,
    group,
    integer,
    list_tower,
    listing,
    mapping,
    metaseq_object,
    name,
    program,
    real,
    rebuilt,
    recall,
    remember,
    sizes,
    slots,
    text,
    tower,
)

MANY = 6_000_000  # bytes of one opcode: a hundred times what a checkpoint has, and seconds to walk

# Enough for what follows links by recursion in C to crash: hashing such a tuple does.
DEEP = 200_000

# Nested, shared, and in a circle: given as an object.
SHAPES: dict[str, Callable[[], bytes]] = {
    "tuples 200,000 deep": lambda: deep_tuple(DEEP),
    "lists 20,000 deep": lambda: deep_list(DEEP // 10),
    "dicts 10,000 deep": lambda: deep_dict(DEEP // 20),
    "calls 5,000 deep": lambda: deep_calls(DEEP // 40),
    "states 5,000 deep": lambda: deep_states(DEEP // 40),
    "tuple with 2**64 leaves": lambda: tower(64),
    "tuple with 2**20,000 leaves": lambda: tower(20_000),
    "list with 2**64 leaves": lambda: list_tower(64),
    "dict with 2**64 leaves": lambda: dict_tower(64),
    "called with 2**64 leaves": lambda: name("some", "thing") + tower(64) + b"R",
    "list that holds itself": lambda: b"]q\x00h\x00a",
    "tuple that holds itself": lambda: b"]q\x00h\x00\x85a",
    "dict that holds itself": lambda: b"}q\x00" + text("model") + b"h\x00s",
    "dict that holds itself in a list": lambda: b"}q\x00" + text("model") + listing(b"h\x00") + b"s",
    "dict that is its own state": lambda: b"}q\x00h\x00b",
    "object that is its own state": lambda: name("some", "thing") + b")Rq\x00h\x00b",
    "ordered dict that is its own state": lambda: call(ORDERED_DICT) + b"q\x00h\x00b",
    "ordered dict that holds itself": lambda: call(ORDERED_DICT) + b"q\x00" + text("model") + b"h\x00s",
    "number of 10 million digits": lambda: b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000,
    "number of 3 million letters": lambda: b"L" + b"9" * 3_000_000 + b"L\n",
    "text of 3 MB": lambda: text("x" * 3_000_000),
    "text of surrogates": lambda: text("\ud800\udfff\ud800"),
    "text of escapes": lambda: text("\x1b[31m\r\n\t\x00\u202e"),
    "list of 50,000": lambda: EMPTY_LIST + MARK + NONE * 50_000 + b"e",
    "dict of 10,000": lambda: mapping((text(f"{i}"), NONE) for i in range(10_000)),
    "dict of 40,000 numbers that collide": lambda: mapping((integer(i * (2**61 - 1)), NONE) for i in range(40_000)),
    "dict of numbers": lambda: mapping((integer(i), NONE) for i in range(10)),
    "dict of tensors' names": lambda: mapping([(OS_SYSTEM, NONE), (name("torch", "FloatStorage"), NONE)]),
    "dict of dicts": lambda: EMPTY_DICT + EMPTY_DICT + NONE + b"s",
    "dict of lists": lambda: EMPTY_DICT + EMPTY_LIST + NONE + b"s",
    "dict of nan": lambda: mapping([(real(float("nan")), NONE)] * 3),
    "dict of bytes": lambda: mapping([(data(b"x"), NONE)]),
}


# Where a shape leaves nothing to be loaded.
SPOILS: dict[str, Callable[[Place, bytes], bytes]] = {
    "beside the weights": lambda p, x: (w := p.weights()).file(w.beside(x)),
    "for a weight": lambda p, x: (w := p.weights()).file(w.state_dict({FC1: x})),
    "for all": lambda p, x: p.weights().file(x),
    "for all under model": lambda p, x: p.weights().file(mapping([(text("model"), x)])),
    "as a name": lambda p, x: (w := p.weights()).file(w.beside(b"\x80\x04" + x + text("x") + b"\x93")),
    "as a size": lambda p, x: (w := p.weights()).file(w.state_dict({FC1: w.tensor(FC1, size=x)})),
    "as an offset": lambda p, x: (w := p.weights()).file(w.state_dict({FC1: w.tensor(FC1, offset=x)})),
    "as a storage": lambda p, x: (w := p.weights()).file(w.state_dict({FC1: w.tensor(FC1, storage=x)})),
    "as a persistent id": lambda p, x: (w := p.weights()).file(w.state_dict({FC1: x + b"Q"})),
    "as a storage's key": lambda p, x: (w := p.weights()).file(
        w.state_dict({FC1: w.tensor(FC1, storage=w.storage(0, key=x))})
    ),
    "as a storage's kind": lambda p, x: (w := p.weights()).file(
        w.state_dict({FC1: w.tensor(FC1, storage=w.storage(0, kind=x))})
    ),
}


def everywhere_else(weights: Weights, thing: bytes) -> bytes:
    """A metaseq file that has a thing wherever it leaves the weights alone; its opcodes are there once."""
    again, some = recall(1_000_000), name("some", "thing")
    dropped = (
        again, call(some, again), some + again + b"R", build(call(some), again), build(EMPTY_DICT, again),
        b"\x80\x04" + MARK + again + b"\x91", listing(again, again), mapping([(text("x"), again)]),
        rebuilt("_rebuild_parameter", again, FALSE, again), call(ORDERED_DICT, again),
        call(name("torch", "Size"), again), mapping([(again, NONE)]), some + EMPTY_TUPLE + again + b"\x92",
        MARK + some + again + b"o",
    )  # fmt: skip
    model = metaseq_object(weights, extra_state=again, task=again, field=again)
    return weights.file(thing + remember(1_000_000) + POP + b"".join(x + POP for x in dropped) + build(model, again))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_object_exhausts_the_reader(shape: str, place: Place, keep: Keep) -> None:
    """From wherever it stands, as an argument of a call and as a persistent id too."""
    wrong = {}
    for seat, write in SPOILS.items():
        if broken := keep.broken(write(place, SHAPES[shape]()), REFUSED):
            wrong[seat] = broken
    (place.folder / BIN).unlink()
    for container in ("zip", "legacy"):
        if broken := keep.broken(everywhere_else(place.metaseq(container), SHAPES[shape]()), WHOLE, METASEQ):
            wrong[f"everywhere else, {container}"] = broken
    assert not wrong, shown(wrong)


def cut_length(opcode: bytes, form: str, length: int) -> bytes:
    """An opcode that announces more than there is."""
    return opcode + struct.pack(form, length) + b"abc"


# What stands in front of a good state dict and takes long to walk, or much to keep.
HEAVY: dict[str, Callable[[], bytes]] = {
    "60,000 PUT that collide": lambda: NONE + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(60_000)) + POP,
    "a million MEMOIZE": lambda: b"\x80\x04N" + b"\x94" * 1_000_000 + POP,
    "a million FRAME": lambda: (b"\x95" + struct.pack("<Q", 0)) * 1_000_000,
    "6 million EMPTY_DICT": lambda: EMPTY_DICT * MANY,
    "6 million EMPTY_LIST": lambda: EMPTY_LIST * MANY,
    "6 million MARK": lambda: MARK * MANY,
    "6 million NONE in a list": lambda: MARK + NONE * MANY + b"l0",
    "3 million EMPTY_TUPLE and TUPLE1": lambda: b")\x85" * (MANY // 2),
    "a million names": lambda: (name("a", "b") + POP) * 1_000_000,
    "a size of 100,000 dims, 10,000 times": lambda: (
        sizes([1] * 100_000) + remember(7) + POP
        + (name("torch._utils", "_rebuild_tensor_v2") + MARK + NONE + NONE + recall(7) * 2 + NONE + NONE + b"tR0")
        * 10_000
    ),
}  # fmt: skip


@pytest.mark.parametrize("prefix", HEAVY)
def test_no_number_of_opcodes_exhausts_the_reader(prefix: str, place: Place, keep: Keep) -> None:
    weights = place.weights("legacy" if len(prefix) % 2 else "zip")  # either in turn: one reads both
    keep(weights.file(HEAVY[prefix]() + weights.state_dict()), WHOLE)


# What stands in front of a good state dict: opcodes, and what may come of the file.
PREFIXES: dict[str, tuple[set[str], bytes]] = {
    "LONG_BINPUT of 2**31": (WHOLE, NONE + remember(2**31) + POP),
    "LONG_BINPUT of 2**32 - 1": (WHOLE, NONE + remember(2**32 - 1) + POP),
    "PUT of 2**31": (WHOLE, b"Np2147483648\n0"),
    "PUT of 2**200": (WHOLE, b"Np%d\n0" % 2**200),
    "PUT of -1": (WHOLE, b"Np-1\n0"),
    "PUT of a word": (REFUSED, b"Npx\n0"),
    "PUT of 5000 digits": (WHOLE, b"Np" + b"9" * 5000 + b"\n0"),
    "PUT of 3 million digits": (WHOLE, b"Np" + b"9" * 3_000_000 + b"\n0"),
    "GET of nothing": (REFUSED, b"h\x070"),
    "LONG_BINGET of nothing": (REFUSED, recall(2**31) + POP),
    "GET line of nothing": (REFUSED, b"g7\n0"),
    "GET of a word": (REFUSED, b"gx\n0"),
    "BINPUT of nothing": (REFUSED, b"q\x00"),
    "MEMOIZE of nothing": (REFUSED, b"\x94"),
    "BINBYTES8 of 2**60": (REFUSED, cut_length(b"\x8e", "<Q", 2**60)),
    "BINBYTES8 of 2**64 - 1": (REFUSED, cut_length(b"\x8e", "<Q", 2**64 - 1)),
    "BINBYTES of 2**32 - 1": (REFUSED, cut_length(b"B", "<I", 2**32 - 1)),
    "BINUNICODE8 of 2**60": (REFUSED, cut_length(b"\x8d", "<Q", 2**60)),
    "BINUNICODE of 2**32 - 1": (REFUSED, cut_length(b"X", "<I", 2**32 - 1)),
    "BYTEARRAY8 of 2**60": (REFUSED, cut_length(b"\x96", "<Q", 2**60)),
    "BINSTRING of 2**31 - 1": (REFUSED, cut_length(b"T", "<i", 2**31 - 1)),
    "BINSTRING of -1": (REFUSED, cut_length(b"T", "<i", -1)),
    "LONG4 of 2**31 - 1": (REFUSED, cut_length(b"\x8b", "<i", 2**31 - 1)),
    "LONG4 of -1": (REFUSED, cut_length(b"\x8b", "<i", -1)),
    "FRAME of 2**60": (WHOLE, b"\x80\x04\x95" + struct.pack("<Q", 2**60)),
    "FRAME of 1": (WHOLE, b"\x80\x04\x95" + struct.pack("<Q", 1)),
    "protocol 255": (WHOLE, b"\x80\xff"),
    "POP of nothing": (REFUSED, POP),
    "POP of a MARK": (WHOLE, MARK + POP),
    "MARK left over": (WHOLE, MARK),
    "objects left over": (WHOLE, NONE * 3),
    "PERSID of a line": (REFUSED, b"P0\n0"),
    "opcode 0": (REFUSED, b"\x00"),
    "opcode 255": (REFUSED, b"\xff"),
    "opcode of letters": (REFUSED, b"hello"),
    "INT of a word": (REFUSED, b"Ix\n0"),
    "INT of 5 million digits": (WHOLE, b"I" + b"1" * 5_000_000 + b"\n0"),
    "LONG of a word": (REFUSED, b"LxL\n0"),
    "FLOAT of a word": (REFUSED, b"Fx\n0"),
    "FLOAT of infinity": (WHOLE, b"Finf\n0"),
    "STRING without quotes": (REFUSED, b"Sx\n0"),
    "STRING of a bad escape": (WHOLE, b"S'\\x'\n0"),
    "UNICODE of a bad escape": (REFUSED, b"V\\u12\n0"),
    "UNICODE of surrogates": (WHOLE, b"V\\ud800\n0"),
    "BINUNICODE not UTF-8": (REFUSED, b"X\x02\x00\x00\x00\xff\xfe0"),
    "BINSTRING not ASCII": (WHOLE, b"T\x02\x00\x00\x00\xff\xfe0"),
    "GLOBAL not UTF-8": (WHOLE, b"c\xff\xfe\nx\n0"),
    "GLOBAL without an end": (REFUSED, b"c" + b"x" * 1000),
    "GLOBAL of one line": (REFUSED, b"cos\n."),
    "GLOBAL with spaces": (WHOLE, b"ctorch _utils\n_rebuild tensor\n0"),
    "STACK_GLOBAL of numbers": (REFUSED, b"\x80\x04" + integer(1) + integer(2) + b"\x93" + POP),
    "EXT1 of nothing": (WHOLE, b"\x82\x07" + POP),
    "EXT1 of 0": (WHOLE, b"\x82\x00" + POP),
    "EXT4 below 0": (WHOLE, b"\x84\xff\xff\xff\xff" + POP),
    "SETITEM of a tuple": (WHOLE, EMPTY_TUPLE + NONE + NONE + b"s0"),
    "SETITEM of a name": (WHOLE, OS_SYSTEM + NONE + NONE + b"s0"),
    "SETITEMS of an odd number": (WHOLE, EMPTY_DICT + MARK + NONE + b"u0"),
    "SETITEMS of a list": (WHOLE, EMPTY_LIST + MARK + NONE + NONE + b"u0"),
    "DICT of an odd number": (REFUSED, MARK + NONE + b"d0"),
    "APPENDS to a dict": (WHOLE, EMPTY_DICT + MARK + NONE + b"e0"),
    "APPEND to a text": (WHOLE, text("x") + NONE + b"a0"),
    "ADDITEMS to a list": (WHOLE, b"\x80\x04" + EMPTY_LIST + MARK + NONE + b"\x900"),
    "FROZENSET of lists": (WHOLE, b"\x80\x04" + MARK + EMPTY_LIST + b"\x910"),
    "BUILD of nothing": (WHOLE, NONE + NONE + b"b0"),
    "BUILD of a number": (WHOLE, integer(3) + EMPTY_DICT + b"b0"),
    "REDUCE of a number": (WHOLE, integer(3) + EMPTY_TUPLE + b"R0"),
    "REDUCE without a tuple": (WHOLE, OS_SYSTEM + NONE + b"R0"),
    "NEWOBJ of a text": (WHOLE, text("os") + EMPTY_TUPLE + b"\x810"),
    "NEWOBJ_EX without a dict": (WHOLE, OS_SYSTEM + EMPTY_TUPLE + NONE + b"\x920"),
    "OBJ of nothing": (REFUSED, MARK + b"o0"),
    "INST without a MARK": (REFUSED, b"ios\nsystem\n0"),
    **{f"underflow of {opcode!r}": (REFUSED, opcode + NONE) for opcode in
       (b"a", b"s", b"e", b"u", b"t", b"l", b"d", b"R", b"b", b"\x81", b"\x92", b"\x93", b"Q", b"2", b"1", b"\x85",
        b"\x86", b"\x87", b"\x90", b"\x91", b"o", b"\x94", b"\x98")},
    **{f"MARK for an operand of {opcode!r}": (WHOLE, NONE + MARK + opcode) for opcode in
       (b"a", b"s", b"R", b"b", b"\x81", b"\x92", b"\x93", b"Q", b"2", b"\x85", b"\x86", b"\x87", b"q\x00", b"\x94")},
}  # fmt: skip


@CONTAINERS
@pytest.mark.parametrize("prefix", PREFIXES)
def test_odd_opcodes_spoil_at_most_their_own_file(prefix: str, container: str, place: Place, keep: Keep) -> None:
    allowed, opcodes = PREFIXES[prefix]
    weights = place.weights(container)
    keep(weights.file(opcodes + weights.state_dict()), allowed)
    if container == "zip":
        keep(weights.file_of(b"\x80\x02" + opcodes + b"."), REFUSED)


PROGRAMS: dict[str, tuple[set[str], Callable[[Weights], bytes]]] = {
    "nothing": (REFUSED, lambda w: b""),
    "STOP alone": (REFUSED, lambda w: b"."),
    "MARK and STOP": (REFUSED, lambda w: b"\x80\x02(."),
    "zeros": (REFUSED, lambda w: bytes(1000)),
    "text": (REFUSED, lambda w: b"<!DOCTYPE html>\n<html>Not found</html>"),
    "no STOP": (REFUSED, lambda w: program(w.state_dict())[:-1]),
    "cut short in the middle": (REFUSED, lambda w: program(w.state_dict())[:500]),
    "no protocol": (WHOLE, lambda w: w.state_dict() + b"."),
    "a MARK under the result": (WHOLE, lambda w: program(MARK + w.state_dict())),
    "an empty dict": (REFUSED, lambda w: program(EMPTY_DICT)),
    "a tensor": (REFUSED, lambda w: program(w.tensor(FC1))),
    "a storage": (REFUSED, lambda w: program(w.storage(0))),
    "a list of pairs": (REFUSED, lambda w: program(listing(*(group(*item) for item in w.items())))),
    "an ordered dict": (LOADED, lambda w: program(
        call(ORDERED_DICT) + MARK + b"".join(chain.from_iterable(w.items())) + b"u")),
    "an ordered dict with metadata": (LOADED, lambda w: program(build(
        call(ORDERED_DICT) + MARK + b"".join(chain.from_iterable(w.items())) + b"u",
        mapping([(text("_metadata"), call(ORDERED_DICT))])))),
    "an ordered dict made of pairs": (WHOLE, lambda w: program(
        call(ORDERED_DICT, listing(*(group(*item) for item in w.items()))))),
    "parameters": (LOADED, lambda w: program(w.state_dict({key: rebuilt(
        "_rebuild_parameter", w.tensor(key), TRUE, call(ORDERED_DICT)) for key in w.tensors}))),
    "a parameter of a text": (REFUSED, lambda w: program(w.state_dict({FC1: rebuilt(
        "_rebuild_parameter", text("x"), TRUE, NONE)}))),
    "a parameter of a parameter": (WHOLE, lambda w: program(w.state_dict({FC1: rebuilt("_rebuild_parameter", rebuilt(
        "_rebuild_parameter", w.tensor(FC1), TRUE, NONE), TRUE, NONE)}))),
    "a parameter with a state": (WHOLE, lambda w: program(w.state_dict({FC1: rebuilt(
        "_rebuild_parameter_with_state", w.tensor(FC1), TRUE, NONE, mapping([(text("data"), OS_SYSTEM)]))}))),
    "a tensor with a state": (WHOLE, lambda w: program(w.state_dict({FC1: build(
        w.tensor(FC1), slots(data=w.tensor(BIAS)))}))),
    "a tensor with a dict for a state": (WHOLE, lambda w: program(w.state_dict({FC1: build(
        w.tensor(FC1), mapping([(text("shape"), sizes([1])), (text("offset"), integer(2**60))]))}))),
    "the first version's tensors": (WHOLE, lambda w: program(w.state_dict({FC1: rebuilt(
        "_rebuild_tensor", w.storage(w.number(FC1)), integer(0), sizes([32, 16]), sizes([16, 1]))}))),
    "a default dict": (WHOLE, lambda w: program(
        call(name("collections", "defaultdict"), OS_SYSTEM) + MARK + b"".join(chain.from_iterable(w.items())) + b"u")),
    "a dict of its own class": (WHOLE, lambda w: program(
        call(name(CANARY, "Anything")) + MARK + b"".join(chain.from_iterable(w.items())) + b"u")),
    "a key twice": (WHOLE, lambda w: program(mapping([(text(FC1), w.tensor(FC1)), *w.items()]))),
    "a key twice, first a payload": (WHOLE, lambda w: program(mapping(
        [(text(FC1), call(OS_SYSTEM, text("true"))), *w.items()]))),
    "a key twice, at last another tensor": (REFUSED, lambda w: program(mapping(
        [*w.items(), (text(FC1), w.tensor(BIAS))]))),
    "itself under model": (REFUSED, lambda w: program(b"}q\x00" + text("model") + b"h\x00s")),
    "weights under model, twice deep": (WHOLE, lambda w: program(mapping(
        [(text("model"), mapping([(text("model"), w.state_dict())]))]))),
    "a key of 10 MB": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=text("x" * 10_000_000)))),
    "a key of 10 MB of a layer": (REFUSED, lambda w: program(
        w.beside(w.tensor(BIAS), key=text("model.decoder.layers." + "9" * 10_000_000)))),
    "a key of a surrogate": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=text("\ud800")))),
    "a key of lines": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=text("a\nb\r\x1b[2J\u202e\u2028")))),
    "an empty key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=text("")))),
    "a key of dots": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=text("decoder.")))),
    "a key of a layer far off": (REFUSED, lambda w: program(
        w.beside(w.tensor(BIAS), key=text("model.decoder.layers.99999999999999999999.fc2.bias")))),
    "a number for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=integer(0)))),
    "nothing for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=NONE))),
    "bytes for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=data(b"extra")))),
    "a tuple for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=group(text("x"))))),
    "a tensor for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=w.tensor(FC1)))),
    "a storage for a key": (REFUSED, lambda w: program(w.beside(w.tensor(BIAS), key=w.storage(0)))),
    "8,000 views of one storage": (REFUSED, lambda w: program(mapping(chain(w.items(), (
        (text(f"v{i}"), w.tensor(EMBEDDINGS, size=sizes([1, 1]), offset=integer(i % 640))) for i in range(8_000)))))),
    "8,000 names of one tensor": (REFUSED, lambda w: program(w.tensor(FC1) + remember(9) + POP + mapping(chain(
        w.items(), zip((text(f"v{i}") for i in range(8_000)), repeat(recall(9))))))),
    "8,000 storages that are not there": (REFUSED, lambda w: program(mapping(chain(w.items(), (
        (text(f"v{i}"), w.tensor(FC1, storage=w.storage(0, key=text(f"no{i}")))) for i in range(8_000)))))),
    "data after the end": (WHOLE, lambda w: program(w.state_dict()) + program(call(OS_SYSTEM, text("true")))),
    "20 MB after the end": (WHOLE, lambda w: program(w.state_dict()) + bytes(20_000_000)),
}  # fmt: skip


@CONTAINERS
@pytest.mark.parametrize("what", PROGRAMS)
def test_other_pickles_than_a_dict_of_tensors(what: str, container: str, place: Place, keep: Keep) -> None:
    allowed, write = PROGRAMS[what]
    weights = place.weights(container)
    keep(weights.file_of(write(weights)), allowed)

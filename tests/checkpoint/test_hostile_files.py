"""Files that want to run something, to eat the machine or to pass for others: refused by name, or read right.

What is promised of each: loading gives the right weights or a ``CheckpointError`` that names the file in one printable
line, and in either case runs, imports, writes and leaves behind nothing, in little time and memory. Each load happens
in a process that watches for that; a second such process, which reads by ``torch.load`` without its guard, shows that
the files do what they are said to and that the watch sees it.

This file is about what a pickle names and describes, test_hostile_programs.py about its opcodes, and
test_hostile_containers.py about what it lies in, test_hostile_metaseq.py about what lies beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoint.conftest import (
    ANY,
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
    broken_promises,
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
    POLLUTES,
    POP,
    RUNS,
    TRUE,
    Weights,
    build,
    call,
    data,
    group,
    integer,
    listing,
    mapping,
    metaseq_file,
    metaseq_object,
    name,
    pickled,
    real,
    rebuilt,
    recall,
    remember,
    sizes,
    slots,
    text,
)
from tests.checkpoint.watched_loads import MOST_BYTES, MOST_SECONDS, Report, WatchedLoads


@CONTAINERS
def test_files_built_here_are_real(container: str, place: Place, keep: Keep, unguarded: WatchedLoads) -> None:
    """Unaltered, they load, in torch as here."""
    weights = place.weights(container)
    keep(weights.file(weights.state_dict()), LOADED)
    loaded = torch.load(place.folder / BIN, weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in place.tensors.items())
    assert unguarded.load(place.folder).digest == place.expected()
    (place.folder / BIN).unlink()
    keep(metaseq_file(place.metaseq(container)), LOADED, METASEQ)


# --- objects that run something ---


@CONTAINERS
@pytest.mark.parametrize("what", RUNS)
def test_each_payload_runs_where_nothing_guards(
    what: str, container: str, place: Place, unguarded: WatchedLoads
) -> None:
    """The control: the payload is one, and the watch sees it."""
    weights = place.weights(container)
    (place.folder / BIN).write_bytes(weights.file(weights.beside(RUNS[what](place.marker))))
    report = unguarded.load(place.folder)
    assert report.outcome == "refused"  # torch.load ran it, then minopt refused the same file
    proof = any(CANARY in act for act in report.acts) or place.marker.exists()
    assert proof, report
    assert broken_promises(report, REFUSED, place, BIN)


@CONTAINERS
@pytest.mark.parametrize("what", POLLUTES)
def test_each_pollution_lasts_where_nothing_guards(
    what: str, container: str, place: Place, unguarded: WatchedLoads
) -> None:
    """The control of those that run nothing and change the process."""
    weights = place.weights(container)
    (place.folder / BIN).write_bytes(weights.file(weights.beside(POLLUTES[what])))
    assert any(act.startswith(("left its mark", "registered")) for act in unguarded.load(place.folder).acts)


def test_the_watch_sees_what_else_may_go_wrong(place: Place) -> None:
    """Each promise can be broken."""
    good = Report("loaded", digest=place.expected())
    assert broken_promises(good, LOADED, place, BIN) == []
    for bad in (
        replace(good, digest="other"),
        replace(good, outcome="died"),
        replace(good, outcome="refused", message="nothing"),
        replace(good, outcome="refused", message=f"{BIN}:\n"),
        replace(good, outcome="refused", message=f"{BIN}: {'x' * 5000}"),
        replace(good, seconds=MOST_SECONDS + 1),
        replace(good, growth_bytes=MOST_BYTES + 1),
        replace(good, acts=("os.system",)),
    ):
        assert len(broken_promises(bad, WHOLE, place, BIN)) == 1
    place.marker.touch()
    assert len(broken_promises(good, LOADED, place, BIN)) == 1


# Where an object stands in a file: its name, what becomes of the file.
SEATS: dict[str, tuple[str, set[str], Callable[[Place, str, bytes], bytes]]] = {
    "beside the weights": (BIN, REFUSED, lambda p, c, x: (w := p.weights(c)).file(w.beside(x))),
    "for a weight": (BIN, REFUSED, lambda p, c, x: (w := p.weights(c)).file(w.state_dict({FC1: x}))),
    "for all": (BIN, REFUSED, lambda p, c, x: p.weights(c).file(x)),
    "as a key": (BIN, WHOLE, lambda p, c, x: (w := p.weights(c)).file(w.beside(NONE, key=x))),
    "dropped": (BIN, WHOLE, lambda p, c, x: (w := p.weights(c)).file(x + POP + w.state_dict())),
    "as a tensor's hooks": (
        BIN, WHOLE, lambda p, c, x: (w := p.weights(c)).file(w.state_dict({FC1: w.tensor(FC1, hooks=x)}))
    ),
    "as a tensor's function": (
        BIN, WHOLE, lambda p, c, x: (w := p.weights(c)).file(w.state_dict({FC1: w.tensor(FC1, function=x)}))
    ),
    "as a tensor's storage": (
        BIN, REFUSED, lambda p, c, x: (w := p.weights(c)).file(w.state_dict({FC1: w.tensor(FC1, storage=x)}))
    ),
    "as a storage's kind": (
        BIN, REFUSED,
        lambda p, c, x: (w := p.weights(c)).file(w.state_dict({FC1: w.tensor(FC1, storage=w.storage(0, kind=x))})),
    ),
    "as a storage's place": (
        BIN, WHOLE,
        lambda p, c, x: (w := p.weights(c)).file(
            w.state_dict({FC1: w.tensor(FC1, storage=w.storage(w.number(FC1), location=x))})
        ),
    ),
    "as the state of all": (BIN, WHOLE, lambda p, c, x: (w := p.weights(c)).file(build(w.state_dict(), x))),
    "extra_state": (METASEQ, WHOLE, lambda p, c, x: metaseq_file(p.metaseq(c), extra_state=x)),
    "in a configuration": (METASEQ, WHOLE, lambda p, c, x: metaseq_file(p.metaseq(c), task=x)),
    "as a setting": (METASEQ, WHOLE, lambda p, c, x: metaseq_file(p.metaseq(c), field=x)),
}  # fmt: skip


# One reader reads the pickles of both containers, so the older one stands in some seats only.
EACH_SEAT = [(seat, "zip") for seat in SEATS] + [(seat, "legacy") for seat in ("beside the weights", "extra_state")]


@pytest.mark.parametrize(("seat", "container"), EACH_SEAT)
def test_nothing_runs_from_wherever_it_stands(seat: str, container: str, place: Place, keep: Keep) -> None:
    """Every payload in one seat after another."""
    file, allowed, write = SEATS[seat]
    wrong = {}
    for what, payload in chain(RUNS.items(), ((what, lambda _, x=x: x) for what, x in POLLUTES.items())):
        if broken := keep.broken(write(place, container, payload(place.marker)), allowed, file):
            wrong[what] = broken
    assert not wrong, shown(wrong)


# --- objects that are not tensors, or no ordinary ones ---


def imitation(module: str, attribute: str) -> bytes:
    """A name that reads like one that tensors need."""
    return b"\x80\x04" + name(module, attribute)


IMITATIONS = {
    "a space behind": ("torch._utils", "_rebuild_tensor_v2 "),
    "a space before": (" torch._utils", "_rebuild_tensor_v2"),
    "a look-alike": ("torch._utils", "_r\u0435build_tensor_v2"),
    "wide letters": ("\uff54orch._utils", "_rebuild_tensor_v2"),
    "a NUL": ("torch._utils\x00", "_rebuild_tensor_v2"),
    "a NUL in the name": ("torch._utils", "_rebuild_tensor_v2\x00"),
    "a carriage return": ("torch._utils\r", "_rebuild_tensor_v2"),
    "capitals": ("TORCH._UTILS", "_REBUILD_TENSOR_V2"),
    "nothing before": ("", "_rebuild_tensor_v2"),
    "nothing behind": ("torch._utils", ""),
    "dots behind": ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "its call": ("torch._utils", "_rebuild_tensor_v2.__call__"),
    "its own dict": ("torch._utils", "_rebuild_tensor_v2.__dict__.clear"),
    "another module": ("os._utils", "_rebuild_tensor_v2"),
    "a longer name": ("torch._utils", "_rebuild_tensor_v2x"),
    "a storage class": ("torch", "FloatStorage"),
    "a storage's method": ("torch", "FloatStorage.from_file"),
    "a lone surrogate": ("torch._utils", "_rebuild_tensor_v2\ud800"),
    "of 1 MB": ("torch._utils", "_rebuild_tensor_v2" + "x" * 1_000_000),
    "control characters": ("torch._utils", "\x1b[2J\x07\u202e"),
}


@CONTAINERS
@pytest.mark.parametrize("imitated", IMITATIONS)
def test_a_name_that_is_like_an_allowed_one_is_not_it(imitated: str, container: str, place: Place, keep: Keep) -> None:
    weights = place.weights(container)
    function = imitation(*IMITATIONS[imitated])
    keep(weights.file(weights.state_dict({FC1: weights.tensor(FC1, function=function)})), REFUSED)
    keep(weights.file(weights.beside(function)), REFUSED)
    keep(weights.file(weights.beside(call(function, text("x")))), REFUSED)
    keep(weights.file(weights.beside(build(function, slots(x=TRUE)))), REFUSED)


@CONTAINERS
def test_a_storage_kind_of_any_other_name_is_refused(container: str, place: Place, keep: Keep) -> None:
    weights = place.weights(container)
    for module, kind in (("torch", "EvilStorage"), ("torch", "FloatStorage "), ("os", "system"), ("torch", "Storage"),
                         ("torch", "FloatStorage.x"), ("torch.FloatStorage", ""), ("torch", "LongStorage"),
                         ("torch", "QInt8Storage"), ("torch", "DoubleStorage"), ("torch", "ByteStorage")):  # fmt: skip
        storage = weights.storage(weights.number(FC1), kind=name(module, kind))
        keep(weights.file(weights.state_dict({FC1: weights.tensor(FC1, storage=storage)})), REFUSED)
    for module in ("torch.cuda", "os", CANARY):  # torch's own loader looks at the last part alone
        storage = weights.storage(weights.number(FC1), kind=name(module, "FloatStorage"))
        keep(weights.file(weights.state_dict({FC1: weights.tensor(FC1, storage=storage)})), WHOLE)


# Objects that a file of a training run may hold, and some that none does.
THINGS: dict[str, bytes] = {
    "array": pickled(np.arange(5.0)),
    "array of objects": pickled(np.array([{}, None], dtype=object)),
    "scalar of numpy": pickled(np.float64(0.5)),
    "dtype of numpy": pickled(np.dtype("f4")),
    "namespace": build(name("argparse", "Namespace") + EMPTY_TUPLE + b"\x81", mapping([(text("lr"), real(0.1))])),
    "dotted config": build(
        name("omegaconf.dictconfig", "DictConfig") + EMPTY_TUPLE + b"\x81", mapping([(text("_content"), EMPTY_DICT)])
    ),
    "path": pickled(Path("/etc/passwd")),
    "set": pickled({1, 2}),
    "set of protocol 4": b"\x80\x04\x8f" + MARK + integer(1) + b"\x90",
    "frozenset of protocol 4": b"\x80\x04" + MARK + integer(1) + b"\x91",
    "complex": pickled(1j),
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 3) + b"abc",
    "buffer out of band": b"\x80\x05\x97",
    "read-only buffer": b"\x80\x05\x97\x98",
    "nan": real(float("nan")),
    "slice": call(name("builtins", "slice"), integer(1)),
    "class of torch": name("torch.nn.modules.linear", "Linear"),
    "module of torch": build(name("torch.nn.modules.linear", "Linear") + EMPTY_TUPLE + b"\x81", EMPTY_DICT),
    "dtype of torch": name("torch", "float32"),
    "device": call(name("torch", "device"), text("cuda")),
    "size": call(name("torch", "Size"), listing(integer(2))),
    "generator": call(name("torch", "Generator")),
    "sparse": rebuilt("_rebuild_sparse_tensor", name("torch", "sparse_coo"), group(NONE, NONE, sizes([2, 2]))),
    "quantized": rebuilt("_rebuild_qtensor", NONE, integer(0), sizes([2]), sizes([1]), NONE, FALSE, NONE),
    "meta": rebuilt("_rebuild_meta_tensor_no_storage", name("torch", "float32"), sizes([2**40]), sizes([1]), FALSE),
    "nested": rebuilt("_rebuild_nested_tensor", NONE, NONE, NONE, NONE),
    "of a device": rebuilt("_rebuild_device_tensor_from_numpy", NONE, name("torch", "float32"), text("xla"), FALSE),
    "subclass": rebuilt("_rebuild_wrapper_subclass", OS_SYSTEM, NONE, sizes([2]), sizes([1]), integer(0), NONE, NONE),
    "parameter of nothing": rebuilt("_rebuild_parameter", NONE, FALSE, NONE),
    "parameter of itself": NONE + remember(9) + POP + rebuilt("_rebuild_parameter", recall(9), FALSE, NONE),
    "tensor of a type": call(name("torch._tensor", "_rebuild_from_type_v2"), OS_SYSTEM, OS_SYSTEM, EMPTY_TUPLE, NONE),
    "ordered dict of a map": call(ORDERED_DICT, call(name("builtins", "map"), OS_SYSTEM, EMPTY_LIST)),
    "ordered dict with a state": build(call(ORDERED_DICT), mapping([(text("update"), OS_SYSTEM)])),
    "ordered dict with slots": build(call(ORDERED_DICT), slots(items=OS_SYSTEM)),
    "ordered dict with a state of lies": build(call(ORDERED_DICT), integer(3)),
    "class OrderedDict with slots": build(ORDERED_DICT, slots(items=OS_SYSTEM)),
    "default dict": call(name("collections", "defaultdict"), call(name("functools", "partial"), OS_SYSTEM, text("x"))),
    "counter": call(name("collections", "Counter"), text("ab")),
    "list with a state": build(EMPTY_LIST, EMPTY_DICT),
    "text": text("x"),
    "bytes": data(b"x"),
}  # fmt: skip


@pytest.mark.parametrize("seat", SEATS)
def test_no_object_passes_for_a_tensor(seat: str, place: Place, keep: Keep) -> None:
    """Nor spoils a file where it does not matter."""
    file, allowed, write = SEATS[seat]
    wrong = {}
    for what, thing in THINGS.items():
        if broken := keep.broken(write(place, "zip", thing), allowed, file):
            wrong[what] = broken
    assert not wrong, shown(wrong)


SPECIAL: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "integers": lambda: torch.ones(3, dtype=torch.int64),
    "unsigned integers": lambda: torch.ones(3, dtype=torch.uint16),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@CONTAINERS
@pytest.mark.parametrize("special", SPECIAL)
def test_tensors_of_other_kinds_are_refused(special: str, container: str, place: Place, keep: Keep) -> None:
    legacy = container == "legacy"
    tensor = SPECIAL[special]()
    for key in ("extra", BIAS):
        out = BytesIO()
        try:
            torch.save({**place.tensors, key: tensor}, out, _use_new_zipfile_serialization=not legacy)
        except (RuntimeError, NotImplementedError, AttributeError):
            assert legacy  # torch does not write all of them so
            return
        keep(out.getvalue(), REFUSED)


# --- tensors that are none ---

ANYTHING: dict[str, bytes] = {
    "text": text("0"),
    "none": NONE,
    "float": real(0.0),
    "nan": real(float("nan")),
    "bytes": data(b"\0"),
    "dict": EMPTY_DICT,
    "list": EMPTY_LIST,
    "list of text": listing(text("32"), text("16")),
    "tuple of floats": group(real(32.0), real(16.0)),
    "tuple of nothing": group(NONE, NONE),
    "tuple of tuples": group(sizes([32]), sizes([16])),
    "tuple of names": group(OS_SYSTEM, OS_SYSTEM),
    "empty tuple": EMPTY_TUPLE,
    "name": OS_SYSTEM,
    "called name": call(OS_SYSTEM, text("true")),
    "negative": integer(-1),
    "negatives": sizes([-32, -16]),
    "one negative": sizes([-1, 16]),
    "2**31": integer(2**31),
    "2**63": integer(2**63),
    "2**64": integer(2**64),
    "huge": integer(10**5000),
    "tuple of huge": sizes([10**5000, 16]),
    "wraps to none": sizes([2**32, 2**32]),
    "wraps to right": sizes([2**63 + 32, 2**63 + 16]),
    "2**62 and 4": sizes([2**62, 4]),
    "20,000 dims": sizes([1] * 20_000),
    "65 dims": sizes([32, 16, *[1] * 63]),
    "three dims": sizes([32, 16, 1]),
    "one dim": sizes([512]),
    "itself": EMPTY_LIST + remember(9) + recall(9) + b"a",
}


@pytest.mark.parametrize(
    ("argument", "container"),
    [("storage", "zip"), ("storage", "legacy"), ("offset", "zip"), ("size", "legacy"), ("stride", "zip")],
)
def test_a_tensor_of_senseless_arguments_is_refused(argument: str, container: str, place: Place, keep: Keep) -> None:
    """In a weight's place, and where it does not matter, it harms nothing."""
    weights, metaseq = place.weights(container), place.metaseq(container)
    fc1 = FC1.removeprefix("model.")
    values = ANYTHING | {
        "tensor": weights.tensor(FC1),
        "called tensor": call(weights.tensor(FC1), text("x")),
        "storage's id alone": weights.storage_id(0),
    }
    if argument != "storage":
        values["storage"] = weights.storage(0)
    wrong = {}
    for what, value in values.items():
        changed = {argument: value}
        spoiled = keep.broken(weights.file(weights.state_dict({FC1: weights.tensor(FC1, **changed)})), REFUSED)
        spoiled += keep.broken(weights.file(weights.beside(weights.tensor(FC1, **changed))), REFUSED)
        (place.folder / BIN).unlink()
        spoiled += keep.broken(metaseq_file(metaseq, extra_state=metaseq.tensor(fc1, **changed)), WHOLE, METASEQ)
        (place.folder / METASEQ).unlink()
        if spoiled:
            wrong[what] = spoiled
    assert not wrong, shown(wrong)


@CONTAINERS
def test_a_tensor_of_too_few_arguments_is_refused(container: str, place: Place, keep: Keep) -> None:
    weights = place.weights(container)
    shape = place.tensors[FC1].shape
    arguments = [weights.storage(weights.number(FC1)), integer(0), sizes(shape), sizes([shape[1], 1]), FALSE,
                 call(ORDERED_DICT), NONE, NONE, NONE]  # fmt: skip
    for function in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"):
        for count in range(10):  # with all that says where the numbers lie, what follows may be odd
            allowed = REFUSED if count < 4 or function == "_rebuild_parameter" else WHOLE
            keep(weights.file(weights.state_dict({FC1: rebuilt(function, *arguments[:count])})), allowed)
    function = name("torch._utils", "_rebuild_tensor_v2")
    for not_a_tuple in (NONE, text("abcdef"), integer(6), listing(*arguments[:6]), mapping([(text("storage"), NONE)])):
        keep(weights.file(weights.state_dict({FC1: function + not_a_tuple + b"R"})), REFUSED)
    for opcode in (b"\x81", EMPTY_DICT + b"\x92", mapping([(text("storage"), NONE)]) + b"\x92"):
        keep(weights.file(weights.state_dict({FC1: function + group(*arguments[:6]) + opcode})), WHOLE)
    keep(weights.file(weights.state_dict({FC1: MARK + function + b"".join(arguments[:6]) + b"o"})), WHOLE)
    instance = MARK + b"".join(arguments[:6]) + b"itorch._utils\n_rebuild_tensor_v2\n"
    keep(weights.file(weights.state_dict({FC1: instance})), WHOLE)


GEOMETRY: dict[str, tuple[set[str], Callable[[Weights], dict[str, bytes]]]] = {
    "one past the end": (REFUSED, lambda w: {"offset": integer(1)}),
    "at the end": (REFUSED, lambda w: {"offset": integer(512)}),
    "far past the end": (REFUSED, lambda w: {"offset": integer(2**62)}),
    "past all ends": (REFUSED, lambda w: {"offset": integer(10**30)}),
    "a wrap to the beginning": (REFUSED, lambda w: {"offset": integer(2**62 * 4)}),
    "a wrap in bytes": (REFUSED, lambda w: {"offset": integer(2**62)}),
    "before the beginning": (REFUSED, lambda w: {"offset": integer(-1)}),
    "backwards": (REFUSED, lambda w: {"stride": sizes([-16, -1]), "offset": integer(511)}),
    "wide strides": (REFUSED, lambda w: {"stride": sizes([17, 1])}),
    "strides that wrap": (REFUSED, lambda w: {"stride": sizes([2**62, 1])}),
    "strides that wrap to right": (REFUSED, lambda w: {"stride": sizes([2**64 + 16, 1])}),
    "strides too few": (REFUSED, lambda w: {"stride": sizes([1])}),
    "strides too many": (REFUSED, lambda w: {"stride": sizes([16, 1, 1])}),
    "a number repeated": (ANY, lambda w: {"stride": sizes([0, 0])}),
    "rows that overlap": (ANY, lambda w: {"stride": sizes([1, 1])}),
    "turned": (ANY, lambda w: {"stride": sizes([1, 32])}),
    "a repeated number, 2**60 times": (REFUSED, lambda w: {"size": sizes([2**60]), "stride": sizes([0])}),
    "a repeated number, 2**34 times": (REFUSED, lambda w: {"size": sizes([2**17, 2**17]), "stride": sizes([0, 0])}),
    "nothing, 2**62 times": (REFUSED, lambda w: {"size": sizes([0, 2**62]), "stride": sizes([1, 1])}),
    "nothing, far away": (REFUSED, lambda w: {"size": sizes([0, 16]), "offset": integer(2**62)}),
    "truths for numbers": (REFUSED, lambda w: {"size": group(TRUE, TRUE), "stride": group(TRUE, TRUE)}),
    "a list for a tuple": (WHOLE, lambda w: {"size": listing(integer(32), integer(16))}),
    "a storage of fewer numbers": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), numel=integer(511))}),
    "a storage of more numbers than there are": (
        REFUSED, lambda w: {"storage": w.storage(w.number(FC1), numel=integer(513))}
    ),
    "a storage of 2**60 numbers": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), numel=integer(2**60))}),
    "a storage of 2**64 numbers more": (
        REFUSED, lambda w: {"storage": w.storage(w.number(FC1), numel=integer(2**64 + 512))}
    ),
    "a storage of fewer than none": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), numel=integer(-512))}),
    "another's storage": (REFUSED, lambda w: {"storage": w.storage(w.number(BIAS))}),
    "no such storage": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), key=text("999"))}),
    "a storage elsewhere": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), key=text("../../../etc/passwd"))}),
    "a storage at the root": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), key=text("/etc/passwd"))}),
    "a storage by another way": (
        WHOLE, lambda w: {"storage": w.storage(w.number(FC1), key=text(f"../data/{w.number(FC1)}"))}
    ),
    "a storage with a NUL": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), key=text("0\x00"))}),
    "a storage that is the pickle": (REFUSED, lambda w: {"storage": w.storage(w.number(FC1), key=text("../data.pkl"))}),
    "on a device": (WHOLE, lambda w: {"storage": w.storage(w.number(FC1), location=text("cuda:99"))}),
    "in no place": (WHOLE, lambda w: {"storage": w.storage(w.number(FC1), location=text("nowhere\n\x1b"))}),
    "nowhere at all": (WHOLE, lambda w: {"storage": w.storage(w.number(FC1), location=text("meta"))}),
}  # fmt: skip


@CONTAINERS
@pytest.mark.parametrize("what", GEOMETRY)
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(
    what: str, container: str, place: Place, keep: Keep
) -> None:
    allowed, changes = GEOMETRY[what]
    weights, metaseq = place.weights(container), place.metaseq(container)
    keep(weights.file(weights.state_dict({FC1: weights.tensor(FC1, **changes(weights))})), allowed)
    keep(weights.file(weights.beside(weights.tensor(FC1, **changes(weights)))), REFUSED)
    (place.folder / BIN).unlink()
    with_both = replace(metaseq, tensors=metaseq.tensors | {FC1: place.tensors[FC1], BIAS: place.tensors[BIAS]})
    extra = with_both.tensor(FC1, **changes(with_both))
    keep(with_both.file(metaseq_object(metaseq, extra_state=extra)), WHOLE, METASEQ)


IDS: dict[str, tuple[set[str], Callable[[Weights], bytes]]] = {
    "text": (REFUSED, lambda w: text("0") + b"Q"),
    "a line of text": (REFUSED, lambda w: b"P0\n"),
    "number": (REFUSED, lambda w: integer(0) + b"Q"),
    "nothing": (REFUSED, lambda w: NONE + b"Q"),
    "empty tuple": (REFUSED, lambda w: EMPTY_TUPLE + b"Q"),
    "list": (REFUSED, lambda w: listing(text("storage"), name("torch", "FloatStorage")) + b"Q"),
    "short tuple": (REFUSED, lambda w: group(text("storage"), name("torch", "FloatStorage"), text("0")) + b"Q"),
    "long tuple": (REFUSED, lambda w: w.storage(0, more=(NONE, NONE, NONE))),
    "another word": (REFUSED, lambda w: w.storage(0, word=text("module"))),
    "a module's source": (
        REFUSED,
        lambda w: group(text("module"), name("torch.nn", "Linear"), text("/etc/passwd"), text("x")) + b"Q",
    ),
    "the word in bytes": (ANY, lambda w: w.storage(0, word=data(b"storage"))),
    "the key in bytes": (ANY, lambda w: w.storage(0, key=data(b"0"))),
    "the key a number": (ANY, lambda w: w.storage(0, key=integer(0))),
    "the key nothing": (REFUSED, lambda w: w.storage(0, key=NONE)),
    "the key a list": (REFUSED, lambda w: w.storage(0, key=EMPTY_LIST)),
    "the key a name": (REFUSED, lambda w: w.storage(0, key=OS_SYSTEM)),
    "the key a storage": (REFUSED, lambda w: w.storage(0, key=w.storage(0))),
    "kind a text": (REFUSED, lambda w: w.storage(0, kind=text("FloatStorage"))),
    "kind nothing": (REFUSED, lambda w: w.storage(0, kind=NONE)),
    "kind a called name": (REFUSED, lambda w: w.storage(0, kind=call(name("torch", "FloatStorage")))),
    "numbers a text": (REFUSED, lambda w: w.storage(0, numel=text("640"))),
    "numbers a float": (REFUSED, lambda w: w.storage(0, numel=real(640.0))),
    "numbers nothing": (REFUSED, lambda w: w.storage(0, numel=NONE)),
    "numbers a truth": (REFUSED, lambda w: w.storage(0, numel=TRUE)),
    "numbers a list": (REFUSED, lambda w: w.storage(0, numel=listing(integer(640)))),
    "numbers of 5000 digits": (REFUSED, lambda w: w.storage(0, numel=integer(10**5000))),
    "a view of more than there is": (
        REFUSED,
        lambda w: w.storage(0, more=(group(text("v"), integer(600), integer(600)),)),
    ),
    "a view of a lie": (REFUSED, lambda w: w.storage(0, more=(text("v"),))),
}


@CONTAINERS
@pytest.mark.parametrize("what", IDS)
def test_a_persistent_id_of_another_form_is_refused(what: str, container: str, place: Place, keep: Keep) -> None:
    allowed, write = IDS[what]
    weights = place.weights(container)
    assert weights.number(EMBEDDINGS) == 0
    keep(weights.file(weights.state_dict({EMBEDDINGS: weights.tensor(EMBEDDINGS, storage=write(weights))})), allowed)
    keep(weights.file(write(weights) + POP + weights.state_dict()), WHOLE)


@CONTAINERS
def test_a_storage_has_one_kind_and_one_length(container: str, place: Place, keep: Keep) -> None:
    weights = place.weights(container)
    for changes in (
        {"kind": name("torch", "HalfStorage")},
        {"kind": name("torch", "BFloat16Storage")},
        {"kind": name("torch", "DoubleStorage"), "numel": integer(256)},
        {"numel": integer(16)},
    ):
        storage = weights.storage(weights.number(FC1), **changes)
        thing = weights.tensor(FC1, storage=storage, size=sizes([16]), stride=sizes([1]))
        keep(weights.file(weights.state_dict({BIAS: thing})), REFUSED)
        keep(weights.file(thing + POP + weights.state_dict()), WHOLE)

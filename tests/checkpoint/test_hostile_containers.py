"""What a pickle lies in, under the promises of test_hostile_files.py: archives, streams, folders; and safetensors."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from minopt.checkpoint.names import HF_HEAD
from tests.checkpoint.conftest import (
    ANY,
    BIN,
    CONTAINERS,
    EMBEDDINGS,
    FC1,
    FC2,
    LOADED,
    METASEQ,
    REFUSED,
    SAFE,
    WHOLE,
    Keep,
    Place,
    Sample,
    broken_promises,
)
from tests.checkpoint.hostile_files import (
    EMPTY_DICT,
    EMPTY_LIST,
    FALSE,
    LEGACY_MAGIC,
    MARK,
    NONE,
    OS_SYSTEM,
    RUNS,
    TRUE,
    Record,
    Weights,
    call,
    deflated,
    group,
    integer,
    listing,
    mapping,
    metaseq_file,
    program,
    safetensors_file,
    text,
    touch,
    tower,
    zip_file,
)
from tests.checkpoint.watched_loads import WatchedLoads


def archive(weights: Weights, **changes: Callable[[Record], Record]) -> bytes:
    """The weights' archive, some records altered; ``data_pkl`` stands for ``data.pkl``, ``data_0`` for ``data/0``."""
    wanted = {key.replace("_pkl", ".pkl").replace("data_", "data/"): change for key, change in changes.items()}
    records = []
    for record in weights.records(program(weights.state_dict())):
        short = record.name.removeprefix(b"archive/").decode()
        records.append(wanted.pop(short)(record) if short in wanted else record)
    assert not wanted
    return zip_file(records)


def altered(**changes: Any) -> Callable[[Record], Record]:
    """A record with some fields replaced."""
    return lambda record: replace(record, **changes)


def with_records(weights: Weights, *more: Record, drop: str = "", **ends: Any) -> bytes:
    """The weights' archive with more records, without one of them, or with another end."""
    records = weights.records(program(weights.state_dict()))
    return zip_file([*(r for r in records if r.name != f"archive/{drop}".encode()), *more], **ends)


def renamed(weights: Weights, folder: str) -> bytes:
    records = weights.records(program(weights.state_dict()))
    return zip_file([replace(r, name=folder.encode() + r.name.removeprefix(b"archive/")) for r in records])


@cache
def zeros() -> Record:
    """300 MB of zeros, compressed."""
    return deflated(Record(b"", bytes(300_000_000)))


def bomb(record: Record) -> Record:
    """A record that holds them."""
    return replace(zeros(), name=record.name)


def directory_at(weights: Weights, at: int) -> bytes:
    return with_records(weights, directory_at=at)


ZIP64_END = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**40, 2**40, 2**60, 2**60)
ZIP64_LOCATOR = b"PK\x06\x07" + struct.pack("<IQI", 0, 2**62, 1)
ELSEWHERE = 2**32 - 1  # in place of a number that stands in 64 bits in another place
ZIP64_EXTRA = struct.pack("<HHQQQ", 1, 24, 2**63, 2**63, 2**63)

ZIPS: dict[str, tuple[set[str], Callable[[Weights], bytes]]] = {
    "a comment": (WHOLE, lambda w: with_records(w, comment=b"PK\x05\x06" * 20)),
    "something before": (WHOLE, lambda w: with_records(w, before=b"#!/bin/sh\n" * 10)),
    "something after": (WHOLE, lambda w: with_records(w, after=b"x" * 100)),
    "70 kB after": (WHOLE, lambda w: with_records(w, after=b"x" * 70_000)),
    "two archives": (REFUSED, lambda w: with_records(w) + zip_file([Record(b"archive/data.pkl", program(EMPTY_DICT))])),
    "a deflated pickle": (WHOLE, lambda w: archive(w, data_pkl=deflated)),
    "a deflated storage": (WHOLE, lambda w: archive(w, data_0=deflated)),
    "a deflated byteorder": (WHOLE, lambda w: archive(w, byteorder=deflated)),
    "a bomb for a pickle": (REFUSED, lambda w: archive(w, data_pkl=bomb)),
    "a bomb for a storage": (REFUSED, lambda w: archive(w, data_0=bomb)),
    "a bomb for the byteorder": (REFUSED, lambda w: archive(w, byteorder=bomb)),
    "a bomb for the version": (WHOLE, lambda w: archive(w, version=bomb)),
    "a bomb beside": (WHOLE, lambda w: with_records(w, bomb(Record(b"archive/other", b"")))),
    "an unknown method": (REFUSED, lambda w: archive(w, data_pkl=altered(method=99))),
    "an unknown method of a storage": (REFUSED, lambda w: archive(w, data_0=altered(method=14))),
    "a patched storage": (WHOLE, lambda w: archive(w, data_0=altered(flags=0x828))),
    "stored, of two sizes": (REFUSED, lambda w: archive(w, data_0=altered(size=10**6))),
    "stored, smaller than packed": (REFUSED, lambda w: archive(w, data_0=altered(size=16))),
    "a pickle of 4 GB": (REFUSED, lambda w: archive(w, data_pkl=altered(packed_size=2**32 - 2))),
    "a pickle of more than the file": (REFUSED, lambda w: archive(w, data_pkl=altered(packed_size=10**6))),
    "a pickle that reaches into the next": (WHOLE, lambda w: archive(w, data_pkl=altered(packed_size=4000))),
    "a storage of 4 GB": (REFUSED, lambda w: archive(w, data_0=altered(packed_size=2**32 - 2))),
    "a storage cut": (REFUSED, lambda w: archive(w, data_0=altered(content=b"abc"))),
    "a storage of 3 bytes more": (WHOLE, lambda w: archive(w, data_0=lambda r: replace(r, content=r.content + b"abc"))),
    "a storage of nothing": (REFUSED, lambda w: archive(w, data_0=altered(content=b""))),
    "a wrong checksum of the pickle": (WHOLE, lambda w: archive(w, data_pkl=altered(crc=1))),
    "a wrong checksum of a storage": (WHOLE, lambda w: archive(w, data_0=altered(crc=1))),
    "no pickle": (REFUSED, lambda w: with_records(w, drop="data.pkl")),
    "a pickle of another name": (REFUSED, lambda w: archive(w, data_pkl=altered(name=b"archive/data.PKL"))),
    "a storage missing": (REFUSED, lambda w: with_records(w, drop="data/0")),
    "no byteorder": (LOADED, lambda w: with_records(w, drop="byteorder")),
    "no version": (WHOLE, lambda w: with_records(w, drop="version")),
    "another version": (WHOLE, lambda w: archive(w, version=altered(content=b"99999999999999999999"))),
    "a version of junk": (WHOLE, lambda w: archive(w, version=altered(content=b"\xff" * 10_000))),
    "big-endian": (REFUSED, lambda w: archive(w, byteorder=altered(content=b"big"))),
    "middle-endian": (REFUSED, lambda w: archive(w, byteorder=altered(content=b"middle"))),
    "byteorder of junk": (REFUSED, lambda w: archive(w, byteorder=altered(content=b"\xff\n\x1b" * 1000))),
    "byteorder of 50 MB": (REFUSED, lambda w: archive(w, byteorder=altered(content=b"x" * 50_000_000))),
    "a storage twice": (REFUSED, lambda w: with_records(w, Record(b"archive/data/0", bytes(2560)))),
    "the pickle twice": (REFUSED, lambda w: with_records(w, Record(b"archive/data.pkl", program(EMPTY_DICT)))),
    "the byteorder twice": (WHOLE, lambda w: with_records(w, Record(b"archive/byteorder", b"big"))),
    "two pickles": (REFUSED, lambda w: with_records(w, Record(b"other/data.pkl", program(EMPTY_DICT)))),
    "two pickles, the other first": (
        REFUSED, lambda w: zip_file([Record(b"a/data.pkl", program(EMPTY_DICT)), *w.records(program(w.state_dict()))])
    ),
    "a pickle deeper down": (WHOLE, lambda w: with_records(w, Record(b"archive/x/data.pkl", program(EMPTY_DICT)))),
    "a program of TorchScript": (WHOLE, lambda w: with_records(w, Record(b"archive/constants.pkl", b"\x80\x02)."))),
    "no folder": (WHOLE, lambda w: renamed(w, "")),
    "a folder deeper down": (WHOLE, lambda w: renamed(w, "a/b/c/")),
    "a folder at the root": (WHOLE, lambda w: renamed(w, "/")),
    "a folder above": (WHOLE, lambda w: renamed(w, "../../")),
    "a folder of spaces": (WHOLE, lambda w: renamed(w, " \n")),
    "back slashes": (WHOLE, lambda w: renamed(w, "archive\\")),
    "a folder with a NUL": (WHOLE, lambda w: renamed(w, "archive\x00/")),
    "a folder of 60 kB": (WHOLE, lambda w: renamed(w, "x" * 60_000 + "/")),
    "names not UTF-8": (WHOLE, lambda w: with_records(w, Record(b"archive/\xff\xfe", b"x"))),
    "a name of nothing": (WHOLE, lambda w: with_records(w, Record(b"", b"x"))),
    "another local name": (WHOLE, lambda w: archive(w, data_pkl=altered(local_name=b"archive/DATA.pkl"))),
    "another local name of a storage": (WHOLE, lambda w: archive(w, data_0=altered(local_name=b"archive/data/1"))),
    "a long local name": (WHOLE, lambda w: archive(w, data_0=altered(local_name=b"x" * 60_000))),
    "no local header": (REFUSED, lambda w: archive(w, data_0=altered(signature=b"XXXX"))),
    "a storage at an odd place": (WHOLE, lambda w: archive(w, data_0=altered(pads=False))),
    "a storage beyond the file": (REFUSED, lambda w: archive(w, data_0=altered(at=10**8))),
    "a storage at 4 GB": (REFUSED, lambda w: archive(w, data_0=altered(at=2**32 - 2))),
    "a storage whose place is elsewhere": (REFUSED, lambda w: archive(w, data_0=altered(at=ELSEWHERE))),
    "a storage in the middle": (REFUSED, lambda w: archive(w, data_0=altered(at=1234))),
    "a pickle beyond the file": (REFUSED, lambda w: archive(w, data_pkl=altered(at=10**8))),
    "64-bit sizes beyond all": (
        REFUSED,
        lambda w: archive(w, data_0=altered(size=ELSEWHERE, packed_size=ELSEWHERE, at=ELSEWHERE, extra=ZIP64_EXTRA)),
    ),
    "64-bit sizes cut short": (
        REFUSED,
        lambda w: archive(w, data_0=altered(size=ELSEWHERE, packed_size=ELSEWHERE, extra=ZIP64_EXTRA[:7])),
    ),
    "extra fields of junk": (WHOLE, lambda w: archive(w, data_0=altered(extra=b"\xff" * 999))),
    "a directory beyond the file": (REFUSED, lambda w: directory_at(w, 10**8)),
    "a directory at 4 GB": (REFUSED, lambda w: directory_at(w, 2**32 - 1)),
    "a directory at the start": (REFUSED, lambda w: directory_at(w, 0)),
    "a directory of 4 GB": (REFUSED, lambda w: with_records(w, directory_size=2**32 - 2)),
    "a directory of nothing": (REFUSED, lambda w: with_records(w, directory_size=0)),
    "more entries than there are": (WHOLE, lambda w: with_records(w, count=60_000)),
    "fewer entries than there are": (WHOLE, lambda w: with_records(w, count=3)),
    "no entries": (WHOLE, lambda w: with_records(w, count=0)),
    "another disk": (WHOLE, lambda w: with_records(w, disk=7)),
    "a 64-bit end that lies": (WHOLE, lambda w: with_records(w, before_end=ZIP64_END + ZIP64_LOCATOR, count=0xFFFF)),
    "a 64-bit end that is not there": (WHOLE, lambda w: with_records(w, before_end=ZIP64_LOCATOR)),
    "an empty archive": (REFUSED, lambda w: zip_file([])),
    "an end alone": (REFUSED, lambda w: b"PK\x05\x06"),
    "a start alone": (REFUSED, lambda w: b"PK\x03\x04"),
}  # fmt: skip


@pytest.mark.parametrize("what", ZIPS)
def test_archives_that_are_put_together_wrong(what: str, place: Place, keep: Keep) -> None:
    allowed, write = ZIPS[what]
    keep(write(place.weights()), allowed)


def stream(weights: Weights, number: int, count: int | None = None, content: bytes | None = None) -> bytes:
    """A legacy file of which one storage has another length, or other bytes."""
    streams = weights.streams()
    key, right, kept = streams[number]
    streams[number] = (key, right if count is None else count, kept if content is None else content)
    return weights.legacy_file(program(weights.state_dict()), streams=streams)


def legacy(weights: Weights, **changes: Any) -> bytes:
    return weights.legacy_file(program(weights.state_dict()), **changes)


def keys_of(weights: Weights) -> list[bytes]:
    return [text(key) for key, _, _ in weights.streams()]


def in_tar(weights: Weights) -> bytes:
    """torch's first container, with members that lead out of the folder."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as tar:
        for member in ("storages", "tensors", "pickle", "../outside", "/tmp/outside"):
            content = program(integer(0)) if member != "pickle" else program(weights.state_dict())
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return out.getvalue()


LEGACY: dict[str, tuple[set[str], Callable[[Weights], bytes]]] = {
    "another magic number": (REFUSED, lambda w: legacy(w, magic=program(integer(0x1950A86A20F9469CFC6D)))),
    "a magic word": (REFUSED, lambda w: legacy(w, magic=program(text("magic")))),
    "a magic truth": (REFUSED, lambda w: legacy(w, magic=program(TRUE))),
    "a magic tower": (REFUSED, lambda w: legacy(w, magic=program(tower(100)))),
    "a magic name": (REFUSED, lambda w: legacy(w, magic=program(OS_SYSTEM))),
    "another protocol": (REFUSED, lambda w: legacy(w, protocol=program(integer(1002)))),
    "a protocol of text": (REFUSED, lambda w: legacy(w, protocol=program(text("1001")))),
    "a big-endian system": (WHOLE, lambda w: legacy(w, system=program(mapping([(text("little_endian"), FALSE)])))),
    "no system": (WHOLE, lambda w: legacy(w, system=program(NONE))),
    "a system of payloads": (WHOLE, lambda w: legacy(w, system=program(call(OS_SYSTEM, text("true"))))),
    "a system of a tower": (WHOLE, lambda w: legacy(w, system=program(tower(100)))),
    "a system with a storage": (WHOLE, lambda w: legacy(w, system=program(w.storage(0)))),
    "a system cut short": (REFUSED, lambda w: legacy(w, system=b"\x80\x02}")),
    "6 million bytes of a system": (WHOLE, lambda w: legacy(w, system=program(EMPTY_DICT * 6_000_000))),
    "keys in another order": (LOADED, lambda w: legacy(w, streams=w.streams()[::-1])),
    "a key that is not there": (REFUSED, lambda w: legacy(w, keys=program(listing(text("other"), *keys_of(w)[1:])))),
    "a key too many": (REFUSED, lambda w: legacy(w, keys=program(listing(*keys_of(w), text("other"))))),
    "a key twice": (REFUSED, lambda w: legacy(w, keys=program(listing(*keys_of(w)[:1] * 2, *keys_of(w)[2:])))),
    "a key too few": (REFUSED, lambda w: legacy(w, keys=program(listing(*keys_of(w)[:-1])))),
    "no keys": (REFUSED, lambda w: legacy(w, keys=program(EMPTY_LIST))),
    "keys in a tuple": (WHOLE, lambda w: legacy(w, keys=program(group(*keys_of(w))))),
    "keys in a text": (REFUSED, lambda w: legacy(w, keys=program(text("0123456789")))),
    "keys in a dict": (WHOLE, lambda w: legacy(w, keys=program(mapping((key, NONE) for key in keys_of(w))))),
    "keys in a payload": (REFUSED, lambda w: legacy(w, keys=program(call(OS_SYSTEM, text("true"))))),
    "keys for nothing": (REFUSED, lambda w: legacy(w, keys=program(NONE))),
    "keys that are numbers": (REFUSED, lambda w: legacy(w, keys=program(listing(integer(0), *keys_of(w)[1:])))),
    "keys that are names": (REFUSED, lambda w: legacy(w, keys=program(listing(OS_SYSTEM)))),
    "keys that are a tower": (REFUSED, lambda w: legacy(w, keys=program(listing(tower(64))))),
    "keys that are themselves": (REFUSED, lambda w: legacy(w, keys=program(b"]q\x00h\x00a"))),
    "100,000 keys": (REFUSED, lambda w: legacy(w, keys=program(EMPTY_LIST + MARK + text("0") * 100_000 + b"e"))),
    "a number fewer": (REFUSED, lambda w: stream(w, 0, count=639)),
    "a number more": (REFUSED, lambda w: stream(w, 0, count=641)),
    "no numbers": (REFUSED, lambda w: stream(w, 0, count=0)),
    "numbers below none": (REFUSED, lambda w: stream(w, 0, count=-640)),
    "2**60 numbers": (REFUSED, lambda w: stream(w, 0, count=2**60)),
    "2**62 numbers more": (REFUSED, lambda w: stream(w, 0, count=2**62 + 640)),
    "2**63 - 1 numbers": (REFUSED, lambda w: stream(w, 0, count=2**63 - 1)),
    "2**60 numbers of the last": (REFUSED, lambda w: stream(w, len(w.tensors) - 1, count=2**60)),
    "2**60 numbers, in the pickle too": (
        REFUSED,
        lambda w: w.legacy_file(
            program(w.state_dict({EMBEDDINGS: w.tensor(EMBEDDINGS, storage=w.storage(0, numel=integer(2**60)))})),
            streams=[("0", 2**60, w.streams()[0][2]), *w.streams()[1:]],
        ),
    ),
    "too few bytes": (REFUSED, lambda w: stream(w, 0, content=b"abc")),
    "too few bytes of the last": (REFUSED, lambda w: stream(w, len(w.tensors) - 1, content=b"abc")),
    "something after": (WHOLE, lambda w: legacy(w, after=b"x" * 1000)),
    "20 MB after": (WHOLE, lambda w: legacy(w, after=bytes(20_000_000))),
    "a tar": (REFUSED, in_tar),
    "a pickle alone": (REFUSED, lambda w: program(w.state_dict())),
    "a pickle alone that runs": (REFUSED, lambda w: program(call(OS_SYSTEM, text("true")))),
    "nothing": (REFUSED, lambda w: b""),
    "the magic number alone": (REFUSED, lambda w: program(integer(LEGACY_MAGIC))),
    "magic numbers for ever": (REFUSED, lambda w: program(integer(LEGACY_MAGIC)) * 100_000),
    "a whole view": (WHOLE, lambda w: w.legacy_file(program(w.state_dict({EMBEDDINGS: w.tensor(
        EMBEDDINGS, storage=w.storage(0, more=(group(text("view"), integer(0), integer(640)),)))})))),
    "a view past the end": (REFUSED, lambda w: w.legacy_file(program(w.state_dict({EMBEDDINGS: w.tensor(
        EMBEDDINGS, storage=w.storage(0, more=(group(text("view"), integer(1), integer(640)),)))})))),
    "a view far off": (REFUSED, lambda w: w.legacy_file(program(w.state_dict({EMBEDDINGS: w.tensor(
        EMBEDDINGS, storage=w.storage(0, more=(group(text("view"), integer(2**62), integer(2**62)),)))})))),
}  # fmt: skip


@pytest.mark.parametrize("what", LEGACY)
def test_legacy_files_that_are_put_together_wrong(what: str, place: Place, keep: Keep) -> None:
    allowed, write = LEGACY[what]
    keep(write(place.weights("legacy")), allowed)


@pytest.mark.parametrize("part", ["magic", "protocol", "system", "keys"])
def test_nothing_runs_from_the_small_pickles_of_a_legacy_file(part: str, place: Place, keep: Keep) -> None:
    weights = place.weights("legacy")
    for payload in RUNS.values():
        keep(legacy(weights, **{part: program(payload(place.marker))}), WHOLE if part == "system" else REFUSED)


@pytest.mark.parametrize("file", ["zip", "legacy", "metaseq", "safetensors"])
def test_a_file_cut_short_anywhere_is_refused(file: str, place: Place, keep: Keep, sample: Sample) -> None:
    whole = (sample.folder / SAFE).read_bytes()
    if file == "metaseq":
        whole = metaseq_file(place.metaseq())
    elif file != "safetensors":
        whole = (weights := place.weights(file)).file(weights.state_dict())
    file = {"metaseq": METASEQ, "safetensors": SAFE}.get(file, BIN)
    places = {*range(0, len(whole), len(whole) // 60), *range(12), *(len(whole) - i for i in range(1, 30))}
    for length in sorted(places):
        keep(whole[:length], REFUSED, file)


@CONTAINERS
def test_a_flipped_byte_anywhere_harms_nothing(container: str, place: Place, keep: Keep) -> None:
    """In the program, in a header or in the directory."""
    weights = place.weights(container)
    whole = weights.file(weights.state_dict())
    for turn, position in enumerate(range(0, len(whole), len(whole) // 200)):
        damaged = bytearray(whole)
        damaged[position] ^= (0x01, 0x80, 0xFF)[turn % 3]
        keep(bytes(damaged), ANY)


# --- safetensors ---


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A right header of some tensors."""
    header: dict[str, Any] = {}
    at = 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    return header


def with_entry(**changes: Any) -> Callable[[Place], bytes]:
    """A file whose header says something else of one tensor."""

    def write(place: Place) -> bytes:
        header = header_of(place.tensors)
        header[FC1] = header[FC1] | changes
        return safetensors_file(header, contents(place))

    return write


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], bytes]:
    """A file whose header is another."""

    def write(place: Place) -> bytes:
        header = change(header_of(place.tensors))
        assert isinstance(header, (dict, bytes))
        return safetensors_file(header, contents(place))

    return write


def contents(place: Place) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in place.tensors.values())


def twice(header: dict[str, Any]) -> bytes:
    """A header with a key a second time, for the memory of another tensor."""
    other = json.dumps({FC1: header[FC2] | {"shape": [32, 16]}})
    return (json.dumps(header)[:-1] + ", " + other[1:]).encode()


def shifted(by: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header in which one tensor reaches into another."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        begin, end = header[FC1]["data_offsets"]
        header[FC1]["data_offsets"] = [begin + by, end + by]
        return header

    return change


SAFETENSORS: dict[str, tuple[set[str], Callable[[Place], bytes]]] = {
    "right": (LOADED, with_header(lambda h: h)),
    "nothing": (REFUSED, lambda p: b""),
    "a length alone": (REFUSED, lambda p: bytes(8)),
    "a header of 2**60": (REFUSED, lambda p: safetensors_file(header_of(p.tensors), contents(p), length=2**60)),
    "a header of 2**64 - 1": (REFUSED, lambda p: safetensors_file(header_of(p.tensors), contents(p), length=2**64 - 1)),
    "a header of 99 MB": (REFUSED, lambda p: safetensors_file(header_of(p.tensors), contents(p), length=99_000_000)),
    "a header of 400,000 tensors": (REFUSED, lambda p: safetensors_file(
        header_of(p.tensors) | {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(400_000)},  # noqa: E501
        contents(p))),
    "a header that is the file": (REFUSED, lambda p: safetensors_file(h := json.dumps(header_of(p.tensors)).encode(),
                                                                      contents(p), length=len(h) + len(contents(p)))),
    "an empty header": (REFUSED, with_header(lambda h: b"")),
    "no tensors": (REFUSED, with_header(lambda h: {})),
    "metadata alone": (REFUSED, with_header(lambda h: {"__metadata__": {"format": "pt"}})),
    "metadata of numbers": (WHOLE, with_header(lambda h: h | {"__metadata__": {"format": 3}})),
    "metadata of 20 MB": (WHOLE, with_header(lambda h: h | {"__metadata__": {"x": "y" * 20_000_000}})),
    "a list": (REFUSED, with_header(lambda h: b"[]")),
    "not JSON": (REFUSED, with_header(lambda h: b"{'a': 1}")),
    "not UTF-8": (REFUSED, with_header(lambda h: b"\xff" + json.dumps(h).encode())),
    "a key not UTF-8": (REFUSED, with_header(lambda h: json.dumps(h).encode().replace(b"fc1", b"f\xff1"))),
    "a lone surrogate": (REFUSED, with_header(lambda h: json.dumps(h).encode().replace(b"fc1", b"\\ud800"))),
    "nested 200,000 deep": (REFUSED, with_header(lambda h: b'{"a":' * 200_000)),
    "lists 200,000 deep": (REFUSED, with_header(lambda h: b'{"a":' + b"[" * 200_000)),
    "spaces behind": (WHOLE, with_header(lambda h: json.dumps(h).encode() + b" " * 1000)),
    "spaces before": (WHOLE, with_header(lambda h: b" " * 8 + json.dumps(h).encode())),
    "a key twice": (REFUSED, with_header(twice)),
    "a key of 5 MB": (REFUSED, with_header(lambda h: {k.replace(FC1, "x" * 5_000_000): v for k, v in h.items()})),
    "a key of 5 MB, beyond the file": (
        REFUSED, with_header(lambda h: {"x" * 5_000_000: h[FC1] | {"data_offsets": [9, 2]}})
    ),
    "a key of lines": (REFUSED, with_header(lambda h: {k.replace("fc1", "a\nb\x1b[2J"): v for k, v in h.items()})),
    "20,000 empty tensors": (REFUSED, with_header(lambda h: h | {
        f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})),
    "one number further": (REFUSED, with_header(shifted(4))),
    "one byte back": (REFUSED, with_header(shifted(-1))),
    "all in one place": (REFUSED, with_header(lambda h: h | {FC1: h[FC2] | {"shape": [32, 16]}})),
    "below the beginning": (REFUSED, with_entry(data_offsets=[-2048, 0])),
    "backwards": (REFUSED, with_entry(data_offsets=[4096, 2048])),
    "beyond the file": (REFUSED, with_entry(data_offsets=[10**9, 10**9 + 2048])),
    "beyond 2**64": (REFUSED, with_entry(data_offsets=[2**64, 2**64 + 2048])),
    "at the end of 2**64": (REFUSED, with_entry(data_offsets=[2**64 - 2048, 2**64 - 1])),
    "half numbers": (REFUSED, with_entry(data_offsets=[0.5, 2048.5])),
    "text for numbers": (REFUSED, with_entry(data_offsets=["0", "2048"])),
    "one offset": (REFUSED, with_entry(data_offsets=[0])),
    "a shape below none": (REFUSED, with_entry(shape=[-32, -16])),
    "a shape that wraps": (REFUSED, with_entry(shape=[2**32, 2**32])),
    "a shape that wraps to right": (REFUSED, with_entry(shape=[2**63 + 32, 2**63 + 16])),
    "a shape of 2**70": (REFUSED, with_entry(shape=[2**70])),
    "a shape of a million": (REFUSED, with_entry(shape=[1] * 1_000_000)),
    "a shape of nothing": (REFUSED, with_entry(shape=[])),
    "a shape of text": (REFUSED, with_entry(shape="32, 16")),
    "a larger shape": (REFUSED, with_entry(shape=[32, 17])),
    "another shape": (REFUSED, with_entry(shape=[16, 32])),
    "an unknown kind": (REFUSED, with_entry(dtype="F33")),
    "a wider kind": (REFUSED, with_entry(dtype="F64")),
    "a kind of integers": (REFUSED, with_entry(dtype="I32")),
    "a kind of 4 bits": (REFUSED, with_entry(dtype="F4")),
    "kind nothing": (REFUSED, with_entry(dtype=None)),
    "another field": (WHOLE, with_entry(more=1)),
    "something after": (WHOLE, lambda p: safetensors_file(header_of(p.tensors), contents(p) + b"x" * 100)),
    "a byte too few": (REFUSED, lambda p: safetensors_file(header_of(p.tensors), contents(p)[:-1])),
    "a gap": (WHOLE, lambda p: safetensors_file(
        {k: v | {"data_offsets": [v["data_offsets"][0] + 64, v["data_offsets"][1] + 64]}
         for k, v in header_of(p.tensors).items()}, bytes(64) + contents(p))),
    "a pickle": (REFUSED, lambda p: (w := p.weights()).file(w.beside(call(OS_SYSTEM, touch(p.marker))))),
}  # fmt: skip


@pytest.mark.parametrize("what", SAFETENSORS)
def test_safetensors_that_lie(what: str, place: Place, keep: Keep) -> None:
    allowed, write = SAFETENSORS[what]
    keep(write(place), allowed, SAFE)


# --- folders ---

INDEX = f"{SAFE}.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(place: Place, folder: Path | None = None) -> dict[str, str]:
    """Two shards and their index, whose map it gives back."""
    tensors = {key: t.clone() for key, t in place.tensors.items() if key != HF_HEAD}
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        part = dict(list(tensors.items())[number::2])
        save_file(part, (folder or place.folder) / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(place, weight_map)
    return weight_map


def write_index(place: Place, weight_map: object) -> None:
    (place.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def outside(place: Place) -> Path:
    """A shard beside the folder."""
    path = place.folder.parent / "outside.safetensors"
    path.write_bytes((place.folder / SHARDS[1]).read_bytes())
    return path


@pytest.mark.parametrize(
    "named",
    ["../outside.safetensors", "/outside", "", ".", "..", "../model/model-00002-of-00002.safetensors", "./", "a/../b",
     "\x00", "x\x00.safetensors", "\ud800", "x" * 5000, "\n\x1b[2J", "config.json", "C:\\x", "..\\x", "~/x", "$HOME",
     "x\n.safetensors", None, 3, 1.5, True, [], ["x"], {}, {"a": "b"}],
    ids=lambda named: ascii(named)[:30],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(named: object, place: Place, keep: Keep) -> None:
    weight_map: dict[str, object] = dict(write_shards(place))
    keep.folder(LOADED, INDEX)
    path = outside(place)
    named = str(path) if named == "/outside" else named
    write_index(place, {key: named if shard == SHARDS[1] else shard for key, shard in weight_map.items()})
    keep.folder(REFUSED, "")
    write_index(place, named)
    keep.folder(REFUSED, "")


def test_an_index_of_thousands_of_files(place: Place, keep: Keep) -> None:
    write_index(place, {f"key {i}": f"model-{i}.safetensors" for i in range(20_000)})
    keep.folder(REFUSED, INDEX)
    (place.folder / INDEX).write_text('{"weight_map": ' + "[" * 200_000)
    keep.folder(REFUSED, INDEX)


def test_an_index_and_shards_that_disagree(place: Place, keep: Keep) -> None:
    weight_map = write_shards(place)
    (place.folder / SHARDS[1]).write_bytes((place.folder / SHARDS[0]).read_bytes())
    keep.folder(REFUSED, place.folder.name)
    write_index(place, weight_map)


def link(place: Place, target: str | Path, shard: str = SHARDS[1]) -> None:
    (place.folder / shard).unlink(missing_ok=True)
    (place.folder / shard).symlink_to(target)


def test_a_shard_may_be_a_link_to_any_file(place: Place, keep: Keep, tmp_path: Path) -> None:
    """Whoever made the folder made the link; what an index names is another matter."""
    write_shards(place)
    path = outside(place)
    link(place, path)
    keep.folder(LOADED, SHARDS[1])
    link(place, "../outside.safetensors")
    keep.folder(LOADED, SHARDS[1])
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "second.safetensors").write_bytes(path.read_bytes())
    (place.folder / "inner").symlink_to("../beside")
    link(place, "inner/second.safetensors")  # by way of a link to a folder
    keep.folder(LOADED, SHARDS[1])
    (place.folder / "middle").symlink_to("../outside.safetensors")
    link(place, "middle")  # by way of a link to a link
    keep.folder(LOADED, SHARDS[1])


@pytest.mark.parametrize("target", ["itself", "nothing", "folder", "/dev/zero", "/dev/stdin", "/proc/self/mem", "fifo"])
@pytest.mark.parametrize("file", [SHARDS[1], BIN, METASEQ, SAFE])
def test_a_weight_file_that_is_no_file(file: str, target: str, place: Place, keep: Keep) -> None:
    """Nothing waits for what never comes."""
    if file == SHARDS[1]:
        write_shards(place)
    if target == "fifo":
        (place.folder / file).unlink(missing_ok=True)
        os.mkfifo(place.folder / file)
    else:
        link(place, {"itself": file, "nothing": "gone", "folder": "."}.get(target, target), file)
    keep.folder(REFUSED, "")


def test_a_link_within_the_folder_is_fine(place: Place, keep: Keep) -> None:
    write_shards(place)
    (place.folder / SHARDS[1]).rename(place.folder / "stored")
    link(place, "stored")
    keep.folder(LOADED, INDEX)


@pytest.mark.parametrize("file", [BIN, SAFE, METASEQ, "shards"])
def test_links_as_the_hubs_cache_has_them_are_fine(
    file: str, place: Place, watched: WatchedLoads, sample: Sample, tmp_path: Path
) -> None:
    weights = place.weights()
    if file == "shards":
        write_shards(place)
    elif file == SAFE:
        (place.folder / file).write_bytes((sample.folder / SAFE).read_bytes())
    else:
        content = weights.file(weights.state_dict()) if file == BIN else metaseq_file(place.metaseq())
        (place.folder / file).write_bytes(content)
    repository = tmp_path / "hub" / "models--someone--opt"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(place.folder.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert broken_promises(watched.load(snapshot), LOADED, place, file) == []

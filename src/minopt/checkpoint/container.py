"""The two containers of ``torch.save``: a zip archive, and before torch 1.6 pickles with storages behind them.

Either is opened to what its pickle says and where in the file each storage lies. Sizes are checked against the file
before anything is read or reserved.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any

from minopt.checkpoint.errors import first_line
from minopt.checkpoint.unpickle import Storage, UnpickleError, read_pickle

# What begins the older container: torch.serialization's number and the only version that there was.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# Of the objects beside the tensors; a 175B checkpoint's take a tenth of a megabyte.
_MOST_PICKLE_BYTES = 256_000_000

# A record a storage, each of about 100 bytes.
_MOST_DIRECTORY_BYTES = 10_000_000

_LOCAL_HEADER = b"PK\x03\x04"
_ENCRYPTED = 0x1


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count


def open_piece(path: Path, start: int, length: int) -> tuple[Any, dict[str, int]]:
    """``open_container`` of what ``torch.save`` wrote into the middle of a file; the storages' bytes are the file's."""
    with path.open("rb") as file:
        content, begin = _open_zip(_Window(file, start, length))
    return content, {key: start + position for key, position in begin.items()}


def open_container(path: Path) -> tuple[Any, dict[str, int]]:
    """Reads what a file of ``torch.save`` describes, without its numbers.

    Returns:
        The object, as ``read_pickle`` gives it, and the byte of the file at which each storage begins, by its key.

    Raises:
        UnpickleError: if the file is damaged, or holds less than it describes.
        OSError: if it cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(4) == _LOCAL_HEADER:
            return _open_zip(file)
        if file.seek(0, io.SEEK_END) == 0:
            raise UnpickleError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _open_legacy(mapped)


def _open_zip(file: Any) -> tuple[Any, dict[str, int]]:
    try:
        _check_directory(file)
        records = _records(file, zipfile.ZipFile(file).infolist())
    except UnpickleError:
        raise
    except Exception as error:  # a damaged archive fails in several ways
        raise UnpickleError(f"damaged zip archive, {first_line(error)[:100]}") from None
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = f"{next(iter(records))[:40]!r} and other files" if not pickles else f"{len(pickles)} files data.pkl"
        raise UnpickleError(f"a zip archive of {names}, a checkpoint has one data.pkl: if it is packed, unpack it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        raise UnpickleError("a TorchScript program, not a state dict")
    if f"{folder}byteorder" in records and _content(file, records[f"{folder}byteorder"], 16) != b"little":
        raise UnpickleError("its numbers are big-endian")
    storages: list[Storage] = []
    content = read_pickle(io.BytesIO(_content(file, records[pickles[0]], _MOST_PICKLE_BYTES)), storages)
    begin = {}
    for storage in storages:
        position, size = records.get(f"{folder}data/{storage.key}", (0, -1))
        if size < storage.numel * storage.dtype.itemsize:
            raise UnpickleError(f"the storage {storage.key[:40]!r} is not there in full")
        begin[storage.key] = position
    return content, begin


def _check_directory(file: Any) -> None:
    """Bounds what zipfile reads at once: the archive's directory, whose size its last record tells."""
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - 70_000))  # the record, and a comment of up to 65,535 bytes
    tail = file.read()
    for mark, position, size in ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)):
        found = tail.rfind(mark)
        count = int.from_bytes(tail[found + position : found + position + size], "little") if found >= 0 else 0
        if count > _MOST_DIRECTORY_BYTES and not (size == 4 and count == 2**32 - 1):
            raise UnpickleError(f"a zip directory of {count:,} bytes, no checkpoint has so many files in it")


def _records(file: Any, entries: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Where each file of an archive begins, and its bytes. They are stored as they are, and do not overlap."""
    if not entries:
        raise UnpickleError("an empty zip archive")
    records: dict[str, tuple[int, int]] = {}
    for entry in entries:
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UnpickleError(f"{name[:40]!r} in it is compressed, torch stores plainly: unpack an archive")
        if entry.flag_bits & _ENCRYPTED or name in records:
            raise UnpickleError(f"{name[:40]!r} in it is encrypted or there twice")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != _LOCAL_HEADER:
            raise UnpickleError(f"{name[:40]!r} in it is not where the archive's index says")
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        records[name] = (entry.header_offset + 30 + name_bytes + extra_bytes, entry.file_size)
    length = file.seek(0, io.SEEK_END)
    ordered = sorted(records.values())
    ends = [position + size for position, size in ordered]
    if any(end > begin for end, (begin, _) in zip(ends, [*ordered[1:], (length, 0)], strict=True)):
        raise UnpickleError("files in it overlap, or go beyond its end")
    return records


def _content(file: Any, record: tuple[int, int], most_bytes: int) -> bytes:
    position, size = record
    if size > most_bytes:
        raise UnpickleError(f"{size:,} bytes of objects beside the tensors, at most {most_bytes:,} are read")
    file.seek(position)
    return file.read(size)


def _open_legacy(mapped: mmap.mmap) -> tuple[Any, dict[str, int]]:
    file: Any = mapped
    if read_pickle(file) != _LEGACY_MAGIC:
        raise UnpickleError("not a file of torch.save")
    if read_pickle(file) != _LEGACY_VERSION:
        raise UnpickleError("an unknown version of torch's format")
    system = read_pickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnpickleError("its numbers are big-endian")
    storages: list[Storage] = []
    content = read_pickle(file, storages)
    keys = read_pickle(file)
    by_key = {storage.key: storage for storage in storages}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(by_key):
        raise UnpickleError("its list of storages is not that of its tensors")
    begin, position = {}, mapped.tell()
    for key in keys:
        storage = by_key[key]
        if mapped[position : position + 8] != storage.numel.to_bytes(8, "little"):
            raise UnpickleError(f"the storage {key[:40]!r} is not as long as described")
        begin[key] = position + 8
        position += 8 + storage.numel * storage.dtype.itemsize
    if position > len(mapped):
        raise UnpickleError(f"cut short, {position:,} bytes are described and {len(mapped):,} there")
    return content, begin

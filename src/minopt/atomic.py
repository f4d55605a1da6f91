"""Files and folders that appear whole or not at all: all that the package writes is written here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path at which nothing is yet; the file or folder made there takes the place of ``path``.

    This happens when the block ends well and the data are on the disk. If anything fails, ``path`` is as it was. A
    process that is killed may leave a hidden folder ``.NAME.*.saving`` beside ``path``; between the two renames that
    replace a folder, the old one is in it, as ``old``.

    Args:
        path: in a folder that exists. A link stays a link: what it leads to is replaced.

    Raises:
        OSError: if it cannot be written.
    """
    path = path.resolve()
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".saving", dir=path.parent))
    new, old = beside / "new", beside / "old"
    try:
        yield new
        for file in (new, *(new.iterdir() if new.is_dir() else ())):
            flush(file)
        if path.is_dir():
            path.rename(old)
        new.replace(path)
        with suppress(OSError):  # some file systems have no such call for folders
            flush(path.parent)
    finally:
        # Not in an except around the renames: an interrupt may come as soon as the first one is done.
        if old.is_dir() and not path.exists():
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, which is whole, the old one or the new one, whatever happens meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    if path.exists() and not path.is_file():  # /dev/stdout is not a file that can be replaced
        path.write_text(text, encoding="utf-8")
        return
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}). Is the disk full?") from None


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

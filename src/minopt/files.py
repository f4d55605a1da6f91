"""What a file is that is not what its name says, to judge by its first bytes."""

from __future__ import annotations

from pathlib import Path

_FETCH = "Fetch the file again."
_PACKED = "a packed archive. Unpack it, and name what was in it."
_SOURCE = "which other programs open. Take the model that it was made from."

# Beginning: what it is, and what to do.
_KNOWN = {
    b"version https://git-lfs": f"a Git LFS pointer, which git lfs pull replaces by the file. {_FETCH}",
    b"<!doctype": f"a web page. {_FETCH}",
    b"<html": f"a web page. {_FETCH}",
    b"<?xml": f"an XML text, as servers answer with. {_FETCH}",
    b"gguf": f"a GGUF file, {_SOURCE}",
    b"\x89hdf": f"an HDF5 file, {_SOURCE}",
    b"\x1f\x8b": _PACKED,
    b"bzh": _PACKED,
    b"\xfd7zxz": _PACKED,
    b"7z\xbc\xaf": _PACKED,
    b"rar!": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    bytes(64): f"zeros, as of a download that did not finish. {_FETCH}",
}


def what_it_is(path: Path) -> str | None:
    """What a file that cannot be read as what its name says is, and what to do; ``None`` if that cannot be told."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return f"an empty file. {_FETCH}"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower() if head.strip() else head
    known = next((what for mark, what in _KNOWN.items() if start.startswith(mark)), None)
    if known is not None or head[257:262] == b"ustar":
        return known or _PACKED
    is_pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04"))
    if is_pickled and path.suffix == ".safetensors":
        return "a zip archive or a pickle. If torch.save wrote it, rename it to pytorch_model.bin."
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8 and path.suffix != ".safetensors":
        return "a safetensors file. Rename it to model.safetensors."
    text = head.decode("ascii", errors="replace").strip()
    line = next(iter(text.splitlines()), "\0")
    is_odd = path.suffix not in (".json", ".txt") or line[0] not in "{[#" or line.startswith('{"error"')
    if text.isascii() and b"\0" not in head and line.isprintable() and is_odd:
        return f'a text that begins "{line[:80]}". {_FETCH}'
    return None

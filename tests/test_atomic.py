"""Files and folders appear whole or not at all: errors, interrupts and kills leave what was there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minopt import atomic
from minopt.atomic import replacing, write_text


def write(path: Path, is_folder: bool, text: str, act: Callable[[], object] = lambda: None) -> None:
    with replacing(path) as new:
        if is_folder:
            new.mkdir()
            (new / "inner").write_text(text)
        else:
            new.write_text(text)
        act()


def content(path: Path) -> str:
    """What ``write`` has written; nothing else is beside it."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return (path / "inner" if path.is_dir() else path).read_text()


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def is_folder(request: pytest.FixtureRequest) -> bool:
    return request.param


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", ["block", "flush", "replace"])
@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (full, OSError, "No space left on device"),
        (interrupted, KeyboardInterrupt, "^$"),
    ],
)
def test_what_fails_leaves_the_old_one(
    at: str, act: Callable[..., None], error: type[BaseException], message: str, is_folder: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "saved"
    write(path, is_folder, "old")
    with monkeypatch.context() as patched:
        if at == "flush":
            patched.setattr(atomic, "flush", act)
        elif at == "replace":
            patched.setattr(Path, "replace", act)
        with pytest.raises(error, match=message.format(path=path)):
            write(path, is_folder, "new", act if at == "block" else lambda: None)
    assert content(path) == "old"
    write(path, is_folder, "new")
    assert content(path) == "new"


@pytest.mark.parametrize("after", ["rename", "replace"])
def test_an_interrupt_between_the_renames_of_a_folder_keeps_one_of_the_two(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "saved", True, "old")
    original = getattr(Path, after)

    def and_interrupted(self: Path, target: Path) -> None:
        original(self, target)
        if self.name != "old":
            interrupted()

    with monkeypatch.context() as patched:
        patched.setattr(Path, after, and_interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "saved", True, "new")
    assert content(tmp_path / "saved") == ("old" if after == "rename" else "new")


KILLED = """
import os, signal, sys
from pathlib import Path
from minopt.atomic import replacing
with replacing(Path(sys.argv[1])) as new:
    new.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_the_old_file_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    write_text(path, "old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".saving"]


def test_a_link_stays_one_and_files_are_readable_for_whom_the_umask_says(is_folder: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "saved")
    for text in ("old", "new"):
        write(tmp_path / "link", is_folder, text)
    assert (tmp_path / "link").is_symlink()
    path = tmp_path / "elsewhere" / "saved"
    assert content(path) == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == (0o777 if is_folder else 0o666) & ~umask


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    """/dev/stdout, say."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    write_text(tmp_path / "pipe", "a line\n")
    assert reader.communicate(timeout=60)[0] == "a line\n"
    with pytest.raises(OSError, match=r"nowhere/file: cannot be written \(No such file or directory\)"):
        write_text(tmp_path / "nowhere" / "file", "text")

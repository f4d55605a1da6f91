"""Loads in a process of their own, under watch: what came of each, what it cost, and what it did besides loading.

A file that crashes the reader, hangs it or eats the memory ends that process and not the tests'.
"""

from __future__ import annotations

import codecs
import contextlib
import copyreg
import faulthandler
import gc
import hashlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import minopt
from tests.checkpoint.hostile_files import CANARY, LEFT_BEHIND

ROOT = Path(__file__).resolve().parents[2]
STATUS = Path("/proc/self/status")

# What a load may take at most: machines are shared, so the time is the processor's.
MOST_SECONDS, MOST_BYTES = 4.0, 200_000_000
_PATIENCE_SECONDS = 30.0  # until a load is taken for hung

# What no load does, as the interpreter reports it (https://docs.python.org/3/library/audit_events.html).
_ACTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.putenv", "os.remove", "os.rename",
         "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "subprocess.", "pty.", "shutil.", "socket.",
         "ctypes.", "exec", "compile", "import", "pickle.find_class", "marshal.", "code.__new__", "function.__new__",
         "webbrowser.", "urllib.", "tempfile.", "builtins.input", "sys.settrace", "sys.setprofile")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Report:
    """What came of a load.

    Attributes:
        outcome: "loaded", "refused" (by CheckpointError), "failed" (by any other exception), "died" or "hung".
        message: of the exception.
        trace: where it came from.
        digest: of the weights.
        seconds: of the processor.
        growth_bytes: by how much resident memory exceeded what it was before, at the most.
        acts: files written, programs started, modules imported and other things that loading does not need.
    """

    outcome: str
    message: str = ""
    trace: str = ""
    digest: str = ""
    seconds: float = 0.0
    growth_bytes: int = 0
    acts: tuple[str, ...] = ()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum of named tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


class WatchedLoads:
    """A process that loads folders and reports on each; a new one takes its place where a load ended it.

    Args:
        search_path: a folder of modules that files may name.
        warm_up: folders to load before any that counts: what a first load imports is no act of a file's.
        unsafe: whether to read by ``torch.load`` with its guard off, which is what the promises are broken by.
    """

    def __init__(self, search_path: Path, warm_up: Sequence[Path], *, unsafe: bool = False) -> None:
        self._command = [sys.executable, "-m", "tests.checkpoint.watched_loads", "unsafe" if unsafe else "minopt"]
        paths = [str(ROOT / "src"), str(search_path), os.environ.get("PYTHONPATH", "")]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._warm_up = warm_up
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object)

    def load(self, folder: Path) -> Report:
        """Loads one folder."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors,
            )  # fmt: skip
            for known in self._warm_up:
                self._ask(known)
        return self._ask(folder)

    def _ask(self, folder: Path) -> Report:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(str(folder)).encode() + b"\n")
        self._process.stdin.flush()
        line, timed_out = self._answer()
        if line.endswith(b"\n"):
            report = json.loads(line)
            return Report(**(report | {"acts": tuple(report["acts"])}))
        self.close()
        self._errors.seek(0)
        trace = self._errors.read().decode(errors="replace")[-4000:]
        self._errors.truncate(0)
        return Report("hung" if timed_out else "died", trace=trace)

    def _answer(self) -> tuple[bytes, bool]:
        """A line, or what there was of one, and whether the wait for it was too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        out, line, end = self._process.stdout.fileno(), b"", time.monotonic() + _PATIENCE_SECONDS
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                return line, True
            part = os.read(out, 1 << 20)
            if not part:
                return line, False
            line += part
        return line, False

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# --- inside of the process ---


def _serve(unsafe: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a file prints is no answer
    faulthandler.enable()
    torch.set_num_threads(1)
    for encoding in ("cp437", "raw_unicode_escape", "unicode_escape", "latin-1", "ascii"):
        codecs.lookup(encoding)  # the interpreter's own, imported when first used
    acts: list[str] = []
    _limit()
    watching = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and (event.startswith(_ACTS) or (event == "open" and _writes(arguments))):
            acts.append(f"{event} {str(arguments[:1])[:200]}")

    sys.addaudithook(hook)
    for line in sys.stdin:
        folder = Path(json.loads(line))
        gc.collect()
        gc.freeze()
        before, cost = set(sys.modules), _Cost()
        watching = True
        outcome = _outcome(folder, unsafe)
        watching = False
        seconds, growth = cost.since()
        found = [*acts, *(f"imported {name}" for name in sys.modules.keys() - before), *_left_behind()]
        acts.clear()
        _clean()
        report = replace(_report(outcome), seconds=seconds, growth_bytes=growth, acts=tuple(found))
        answers.write(json.dumps(asdict(report)) + "\n")
        answers.flush()


def _outcome(folder: Path, unsafe: bool) -> torch.nn.Module | BaseException:
    try:
        if unsafe:
            _load_without_guard(folder)
        return minopt.load_model(folder, device="cpu")
    except BaseException as error:
        return error


def _report(outcome: torch.nn.Module | BaseException) -> Report:
    if isinstance(outcome, torch.nn.Module):
        return Report("loaded", digest=digest(outcome.named_parameters()))
    if isinstance(outcome, minopt.CheckpointError):
        return Report("refused", str(outcome))
    trace = "".join(traceback.format_exception(outcome, limit=-12))
    return Report("failed", f"{type(outcome).__name__}: {str(outcome)[:2000]}", trace[-4000:])


def _load_without_guard(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".bin", ".pt"):
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=False)


def _writes(arguments: tuple[object, ...]) -> bool:
    """Whether the arguments of the event "open" are those of a file to be written."""
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & _WRITES)


def _left_behind() -> list[str]:
    places = {
        "torch._utils": vars(torch._utils),
        "_rebuild_tensor_v2": vars(torch._utils._rebuild_tensor_v2),
        "ExceptionWrapper": vars(torch._utils.ExceptionWrapper),
        "os.environ": os.environ,
        "sys.modules": sys.modules,
    }
    found = [f"left its mark in {place}" for place, content in places.items() if LEFT_BEHIND in content]
    registered = copyreg._extension_registry  # type: ignore[attr-defined]
    return found + [f"registered {module}.{name}" for module, name in registered]


def _clean() -> None:
    """Undoes what an unsafe load left behind, so that the next report is of its own load alone."""
    for name in (CANARY, LEFT_BEHIND):
        sys.modules.pop(name, None)
    for thing in (torch._utils, torch._utils._rebuild_tensor_v2, torch._utils.ExceptionWrapper):
        if LEFT_BEHIND in vars(thing):
            delattr(thing, LEFT_BEHIND)
    os.environ.pop(LEFT_BEHIND, None)
    for (module, name), code in list(copyreg._extension_registry.items()):  # type: ignore[attr-defined]
        copyreg.remove_extension(module, name, code)


class _Cost:
    """Time and memory from here on."""

    def __init__(self) -> None:
        self._resident = 0
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: man 5 proc
            self._resident = _status("VmHWM")
        self._seconds = time.process_time()

    def since(self) -> tuple[float, int]:
        """Seconds of the processor, and bytes above what was resident."""
        seconds = time.process_time() - self._seconds
        return seconds, _status("VmHWM") - self._resident if STATUS.exists() else 0


def _status(field: str) -> int:
    """One of the kernel's counts of this process's memory, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _limit() -> None:
    """Stops what eats all memory before the machine does, and writes no core of what crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if STATUS.exists():
        most = _status("VmSize") + 4_000_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve(sys.argv[1] == "unsafe")

"""What a load takes and does, whatever its file says, as the interpreter and the kernel report it."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.hostile_files import EMPTY_DICT, EMPTY_TUPLE, RUNS, Weights, call, name, sizes, text, zip_file
from tests.checkpoint.test_files import (
    BIN,
    FC1,
    METASEQ,
    REFERENCE,
    SAFE,
    TENSORS,
    archive,
    as_metaseq,
    legacy,
    metaseq_object,
    safetensors,
)

MOST_SECONDS, MOST_BYTES = 5, 100_000_000  # of the processor, and beyond what was resident

WATCH = r"""
import gc, json, os, sys, time
from pathlib import Path
import torch
from minopt import CheckpointError, load_model

# https://docs.python.org/3/library/audit_events.html
ACTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.putenv", "os.remove", "os.rename",
        "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "subprocess.", "pty.", "shutil.", "socket.",
        "ctypes.", "exec", "compile", "import", "pickle.find_class", "marshal.", "code.__new__", "function.__new__",
        "webbrowser.", "urllib.", "tempfile.", "builtins.input", "sys.settrace", "sys.setprofile")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
torch.set_num_threads(1)
acts, watching = [], False

def hook(event, given):
    if watching and (event.startswith(ACTS) or (event == "open" and (given[2] or 0) & WRITES)):
        acts.append(f"{event} {str(given[:1])[:100]}")

def most_bytes():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

sys.addaudithook(hook)
for folder, is_guarded in json.loads(sys.stdin.read()):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: man 5 proc
    acts.clear()
    before, modules, begin, said = most_bytes(), set(sys.modules), time.process_time(), "loaded"
    watching = True
    try:
        if is_guarded:
            load_model(folder, device="cpu")
        else:
            torch.load(f"{folder}/pytorch_model.bin", weights_only=False)
    except CheckpointError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}\n"
    watching = False
    seconds, growth = time.process_time() - begin, most_bytes() - before
    print(json.dumps([said, seconds, growth, [*acts, *(set(sys.modules) - modules)]]))
"""


def directory_of(count: int) -> bytes:
    """An archive whose directory has many files more, all empty and in one place."""
    whole = zip_file({"archive/data.pkl": b"N."})
    end = whole.rindex(b"PK\5\6")
    start = int.from_bytes(whole[end + 16 : end + 20], "little")
    entry = b"PK\1\2" + struct.pack("<6H3I5H2I", 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    directory = whole[start:end] + b"".join(entry + b"%08d" % i for i in range(count))
    return whole[:start] + directory + whole[end : end + 12] + struct.pack("<2IH", len(directory), start, 0)


def big(**entry: bytes) -> bytes:
    weights = Weights(TENSORS)
    return weights.file(weights.state_dict({FC1: weights.tensor(FC1, **entry)}))


def beside(thing: bytes) -> bytes:
    weights = Weights(TENSORS)
    return weights.file(weights.state_dict(more=text("extra") + thing))


def positions_without_numbers() -> bytes:
    weights, key = as_metaseq(), "decoder.embed_positions.weight"
    state = weights.state_dict({key: weights.tensor(key, shape=sizes(2**48, 0), stride=sizes(1, 1))})
    return weights.file(metaseq_object(weights, text("model") + state))


SOUND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zip": (BIN, archive),
    "legacy": (BIN, legacy),
    "safetensors": (SAFE, safetensors),
    "metaseq": (METASEQ, lambda: as_metaseq().file(metaseq_object(as_metaseq()))),
}
HOSTILE: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "a tensor of 4 TB": (SAFE, "cut short", lambda: safetensors(shape=[2**40], data_offsets=[0, 2**42])),
    "a header of 1 TB": (SAFE, "cut short", lambda: struct.pack("<Q", 2**40) + b"{}"),
    "a header of 30 MB": (SAFE, "header has 30,000,000", lambda: struct.pack("<Q", 30_000_000) + b" " * 30_000_001),
    "a number repeated 2**34 times": (BIN, "fit into", lambda: big(shape=sizes(2**17, 2**17), stride=sizes(0, 0))),
    "a storage of 4 GB": (BIN, "fit into", lambda: big(shape=sizes(2**15, 2**15), stride=sizes(2**15, 1))),
    "2**48 positions of no numbers": (METASEQ, "", positions_without_numbers),
    "a directory of a million files": (BIN, "its directory asks for 54,000,0", lambda: directory_of(1_000_000)),
    "a directory of 90,000 files": (BIN, "a list|expected a dict", lambda: directory_of(90_000)),
    "tuples 200,000 deep": (BIN, "extra: tuple", lambda: beside(EMPTY_TUPLE + b"\x85" * 200_000)),
    "6 million dicts": (BIN, "more than 1,000,000 operations", lambda: beside(EMPTY_DICT * 6_000_001)),
    "a module that nobody has imported": (BIN, "extra: colorsys", lambda: beside(call(name("colorsys", "x")))),
    **{what: (BIN, "extra: |INST|OBJ", lambda run=run: beside(run(Path("ran")))) for what, run in RUNS.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int, list[str]]]:
    """What came of each load: what was said, seconds, bytes, and what else happened."""
    top = tmp_path_factory.mktemp("loads")
    files = {what: (file, content()) for what, (file, content) in SOUND.items()}
    files |= {what: (file, content()) for what, (file, _, content) in HOSTILE.items()}
    for what, (file, content) in files.items():
        REFERENCE.config.save_pretrained(top / what)
        (top / what / file).write_bytes(content)
    warm_up = [*SOUND, "a tensor of 4 TB", "eval"]  # what a first load imports is no act of a file's
    loads = [(str(top / what), True) for what in [*warm_up, *files]] + [(str(top / "os.system"), False)]
    result = subprocess.run([sys.executable, "-c", WATCH], input=json.dumps(loads), cwd=top, check=True,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines()][len(warm_up) :]
    return dict(zip([*files, "unguarded"], lines, strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize("what", [*SOUND, *HOSTILE])
def test_a_load_takes_little_and_starts_and_imports_nothing(
    what: str, reports: dict[str, tuple[str, float, int, list[str]]]
) -> None:
    said, seconds, growth, acts = reports[what]
    assert re.search("^loaded$" if what in SOUND else HOSTILE[what][1], said)
    assert said.isprintable()
    assert said == "loaded" or what in said
    assert seconds < MOST_SECONDS
    assert growth < MOST_BYTES
    assert acts == []
    assert any(act.startswith("os.system") for act in reports["unguarded"][3])  # the control

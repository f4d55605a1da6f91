"""A model whose layers pass through memory says what it says when all of it is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minopt
from minopt import OPT, CheckpointError
from minopt.cli import main
from minopt.inference import offload
from minopt.inference.offload import StreamedOPT
from tests.checkpoint.sources import KINDS_AND_SOURCES, write_source
from tests.conftest import build_ours, build_reference, copy_of
from tests.inference.ways import IDS, MASK, results


def logits_of(model: OPT) -> Tensor:
    """Behind a padded batch of prompts, and behind one more token of each."""
    with torch.inference_mode():
        cache = model.new_cache(2, 9)
        prompt = model(IDS, MASK, cache=cache)
        step = model(IDS[:, :1], torch.nn.functional.pad(MASK, (0, 1), value=1), cache=cache)
        return torch.cat([prompt, step], 1)


@pytest.fixture
def folder(write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(num_hidden_layers=5)


def streamed_and_expected(folder: Path) -> tuple[OPT, Tensor]:
    """An offloaded model, and the logits of the plain one."""
    streamed = minopt.load(folder, device="cpu", offload="disk").model
    return streamed, logits_of(minopt.load_model(folder, device="cpu"))


@pytest.mark.parametrize(("kind", "source"), [*KINDS_AND_SOURCES, ("125m", "int8")])
def test_from_every_kind_of_file_logits_are_the_plain_models_to_the_bit(kind: str, source: str, tmp_path: Path) -> None:
    folder = write_source("safetensors" if source == "int8" else source, tmp_path / "model", kind)
    if source == "int8":
        minopt.convert(folder, tmp_path / "int8", quantize="int8")
        folder = tmp_path / "int8"
    for dtype in ("float32", "bfloat16"):
        streamed = minopt.load(folder, device="cpu", dtype=dtype, offload="disk").model
        assert isinstance(streamed, StreamedOPT)
        expected = logits_of(minopt.load_model(folder, device="cpu", dtype=dtype))
        for _ in range(2):  # a second pass finds the layers in other places
            assert torch.equal(logits_of(streamed), expected)


def test_every_way_to_generate(kind: str, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(kind, num_hidden_layers=5)
    found, expected = (results(minopt.load(folder, device="cpu", offload=o)) for o in ("disk", None))
    assert (found.pop("logits") - expected.pop("logits")).abs().max() < 1e-4
    assert all(torch.equal(found[name], sequences) for name, sequences in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_on_a_gpu(offload: str, kind: str, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(kind, num_hidden_layers=6)
    for dtype in ("float32", "float16"):
        streamed = minopt.load(folder, device="cuda", dtype=dtype, offload=offload)
        plain = minopt.load(folder, device="cuda", dtype=dtype, optimize=False)
        ids = IDS.cuda()
        for _ in range(3):
            assert torch.equal(streamed.model(ids), plain.model(ids))
        options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "eos_token_id": ()}
        found, expected = (minopt.generate(lm.decoder, ids, MASK.cuda(), **options) for lm in (streamed, plain))
        assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_two_layers_at_most_are_in_memory(
    layers: int, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Any] = []
    build = offload._Place.__init__
    monkeypatch.setattr(offload._Place, "__init__", lambda self, *a, **o: places.append(self) or build(self, *a, **o))
    folder = write_checkpoint(num_hidden_layers=layers)
    streamed, expected = streamed_and_expected(folder)
    assert torch.equal(logits_of(streamed), expected)
    assert len(places) == min(2, layers)
    kept = sum(tensor.numel() for part in streamed.children() for tensor in getattr(part, "tensors", {}).values())
    plain = minopt.load_model(folder, device="cpu")
    in_layers = sum(p.numel() for name, p in plain.named_parameters() if name.startswith("layers."))
    assert kept == sum(p.numel() for p in plain.parameters()) - in_layers
    assert sum(t.numel() for place in places for t in place.tensors.values()) == in_layers * len(places) // layers


def test_a_pass_that_is_broken_off_does_not_disturb_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, expected = streamed_and_expected(folder)
    for broken in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(streamed.layers[broken], "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits_of(streamed)
        assert torch.equal(logits_of(streamed), expected)


def test_an_interrupt_while_a_layer_is_read_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, then the same cell again: nothing may be filled twice at a time."""
    streamed, expected = streamed_and_expected(folder)
    read, wait = offload._Stream._read, offload._Fetch.wait

    def slowly(*arguments: Any) -> None:
        read(*arguments)
        time.sleep(0.1)
        read(*arguments)

    monkeypatch.setattr(offload._Stream, "_read", slowly)
    for interrupted in range(1, 5):
        waits = 0

        def interrupt(fetch: Any, at: int = interrupted) -> None:
            nonlocal waits
            waits += 1
            if waits == at:
                raise KeyboardInterrupt
            wait(fetch)

        with monkeypatch.context() as patch:
            patch.setattr(offload._Fetch, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits_of(streamed)
        assert torch.equal(logits_of(streamed), expected)


def test_threads_take_turns(folder: Path) -> None:
    streamed, expected = streamed_and_expected(folder)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: logits_of(streamed), range(40)))


AFTER_THE_END = """
import atexit, os, sys, threading, time, torch, minopt
from minopt.inference import offload
torch.set_num_threads(1)
# Runs last: a thread that is in torch's code when the interpreter is gone ends the process.
atexit.register(lambda: print("left", sum(t.name == "minopt-layers" for t in threading.enumerate()), flush=True))
read = offload._Stream._read
offload._Stream._read = lambda *arguments: (time.sleep(0.1), read(*arguments))
lm = minopt.load(sys.argv[1], device="cpu", offload="disk")
ids = torch.tensor([[2, 8, 9]])
expected = lm.model(ids)

def same():
    return "same" if torch.equal(lm.model(ids), expected) else "other"

child = os.fork()
if child == 0:
    print("fork", same(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
atexit.register(lambda: print("end", same(), flush=True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_fork_and_when_the_program_ends(folder: Path) -> None:
    command = [sys.executable, "-c", AFTER_THE_END, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "fork same\nend same\nleft 0\n"), result.stderr


def replace_files(folder: Path) -> None:
    minopt.save_model(build_ours(build_reference("125m", seed=1, num_hidden_layers=5)), folder, force=True)


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_files, r"^\S+: was replaced since it was opened\. Load"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"^\S+: is gone since it was opened\. Load"),
        (shorten, r"^\S+: ends in the middle of its tensors\. Fetch the file"),
    ],
)
def test_files_that_change_are_not_mixed_and_the_current_folder_may_change(
    change: Callable[[Path], Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    streamed, expected = streamed_and_expected(Path(folder.name))
    monkeypatch.chdir(tmp_path.parent)
    assert torch.equal(logits_of(streamed), expected)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        logits_of(streamed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"offload": "tape"}, 'offload: expected "disk" or "cpu", got \'tape\'.'),
        ({"offload": "cpu"}, 'offload: expected "disk", got "cpu": the device is the CPU itself. Offload to disk.'),
        ({"offload": "disk", "optimize": False},
         "optimize: expected True for an offloaded model, got False. Leave it out."),
        ({"offload": "disk", "quantize": "int8"},
         "quantize: an offloaded model reads the checkpoint's weights as they are. Write an int8 folder first (minopt "
         "convert --quantize int8), and load that without quantize."),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        minopt.load(minopt.DEMO, device="cpu", **options)
    assert str(error.value) == expected


def test_a_streamed_model_is_saved_over_its_own_files(tmp_path: Path) -> None:
    copy_of(minopt.DEMO, tmp_path / "model")
    minopt.load(tmp_path / "model", device="cpu", offload="disk").save(tmp_path / "model", force=True)
    saved, expected = (minopt.load_model(folder, device="cpu") for folder in (tmp_path / "model", minopt.DEMO))
    assert all(torch.equal(p, dict(expected.named_parameters())[name]) for name, p in saved.named_parameters())


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in ([], ["--offload", "disk"]):
        assert main(["generate", "--device", "cpu", *options, "The ship"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"

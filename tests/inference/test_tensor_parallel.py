"""A model divided among processes says what it says in one; each process reads its share."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import minopt
from minopt import LanguageModel
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.names import shard_dim
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.generation.decoder import Draft
from minopt.inference import plan, tensor_parallel
from tests.checkpoint.sources import SOURCES, write_source
from tests.conftest import build_ours, build_reference
from tests.inference.ways import IDS, MASK, results

KINDS = ("125m", "350m", "galactica")


def unseeded(decoder: Any, rank: int) -> Any:
    """What depends on each process' own random numbers and clock."""
    torch.manual_seed(rank)
    drawn = minopt.generate(decoder, IDS, MASK, max_new_tokens=12, eos_token_id=(), do_sample=True).sequences
    torch.manual_seed(rank)
    beams = minopt.generate(decoder, IDS, MASK, max_new_tokens=12, eos_token_id=(), do_sample=True, num_beams=2)
    limit = {"max_time": 1e-9 if rank == 0 else 1e9}
    timed = minopt.generate(decoder, IDS, MASK, max_new_tokens=12, eos_token_id=(), **limit)
    return drawn, beams.sequences, timed.sequences, timed.stop_reasons


def work(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    for kind in KINDS:
        found = results(minopt.load(folder / kind, mesh=mesh))
        torch.save(found, folder / f"{kind}-{size}-{rank}.pt")
    divided = minopt.load(folder / "125m", mesh=mesh)
    torch.save(unseeded(divided.decoder, rank), folder / f"unseeded-{size}-{rank}.pt")
    found = {
        "int8": results(minopt.load(folder / "125m", mesh=mesh, quantize="int8")),
        "bfloat16": results(minopt.load(folder / "125m", mesh=mesh, dtype="bfloat16")),
        "int4": results(minopt.load(folder / "int4", mesh=mesh)),
        "demo": texts(minopt.load(minopt.DEMO, mesh=mesh)),
        "draft": drafted(folder, mesh=mesh),
        "errors": [message(partial(run, mesh, folder)) for run, _ in REFUSED.values()],
    }
    with mock.patch.object(tensor_parallel, "_ADDED_ONCE", ("nothing",)):
        found["biases of all"] = results(minopt.load(folder / "125m", mesh=mesh))
    torch.save(found, folder / f"others-{size}-{rank}.pt")
    dist.destroy_process_group()


def drafted(folder: Path, **options: Any) -> Any:
    """What is written with a draft of the model's own weights, and how often it was right."""
    lm = minopt.load(folder / "125m", device="cpu", draft="int8", **options)
    with mock.patch.object(Draft, "cost_for", return_value=0.2):  # small models have no use for drafts
        found = minopt.generate(lm.decoder, IDS, MASK, max_new_tokens=12, eos_token_id=(), draft=lm.draft)
    return found.sequences, found.accepted_tokens


def texts(lm: LanguageModel) -> Any:
    """What is written, and how probable given texts are."""
    prompts = ["The ship", "It was a dark and stormy night when", ""]
    return lm.generate(prompts, max_new_tokens=12), list(lm.stream("The ship", max_new_tokens=5)), lm.score(prompts[:2])


def _no_memory(mesh: DeviceMesh, folder: Path) -> None:
    with mock.patch.object(plan, "available_memory", return_value=10_000 if dist.get_rank() == 1 else 10**12):
        minopt.load(folder / "125m", mesh=mesh)


REFUSED: dict[str, tuple[Callable[[DeviceMesh, Path], Any], str]] = {
    "other files": (
        lambda mesh, folder: minopt.load(folder / ("retrained" if dist.get_rank() else "125m"), mesh=mesh),
        r"^[^\n]*: process 1 sees another checkpoint than process 0\. Copy the same files to all machines\.$",
    ),
    "heads": (
        lambda mesh, folder: minopt.load(folder / "three heads", mesh=mesh),
        r"^tensor_parallel: a model of 3 heads, 64 inner [^\n]* cannot be divided among \d processes\. .* 1, 3\.$",
    ),
    "no rows": (
        lambda mesh, folder: minopt.load(folder / f"{mesh.size()}, no rows", mesh=mesh),
        r"^tensor_parallel: a model of 4 heads, [13] inner units [^\n]* among [24] processes\. .* of 1(, 2)?\.$",
    ),
    "saving": (
        lambda mesh, folder: minopt.load(folder / "125m", mesh=mesh).save(folder / "saved"),
        r"^model: is divided among \d processes, none of which has all weights\. Load it in one to",
    ),
    "compiling": (
        lambda mesh, folder: minopt.load(folder / "125m", mesh=mesh, optimize="compile"),
        r"^optimize: expected True for a divided model, got 'compile'\. Leave it out\.$",
    ),
    "no memory": (
        _no_memory,
        r"^memory: [^\n]*125m takes [\d.]+ kB as float32, divided among \d, and 10\.0 kB are free on this",
    ),
    "two dims": (
        lambda mesh, folder: minopt.load(folder / "125m", mesh=init_device_mesh("cpu", (mesh.size(), 1))),
        r"^mesh: expected one dim, got 2\. Take one of them",
    ),
}


def message(run: Callable[[], None]) -> str:
    """What is said to be wrong."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run()
    return str(error.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the three kinds, and what 2 and 4 processes say of them."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        minopt.save_model(build_ours(build_reference(kind)), folder / kind)
    retrained = build_ours(build_reference("125m"))
    with torch.no_grad():
        retrained.layers[1].fc1.bias[3] += 1
    minopt.save_model(retrained, folder / "retrained")
    three = build_reference("125m", num_attention_heads=3, hidden_size=48)
    minopt.save_model(build_ours(three), folder / "three heads")
    for size, ffn_dim in ((2, 1), (4, 3)):  # the last process would have none
        minopt.save_model(build_ours(build_reference("125m", ffn_dim=ffn_dim)), folder / f"{size}, no rows")
    minopt.convert(folder / "125m", folder / "int4", quantize="int4")
    for size in (2, 4):
        mp.spawn(work, (size, folder), nprocs=size)
    return folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_say_what_one_says(models: Path, kind: str, size: int) -> None:
    expected = results(minopt.load(models / kind, device="cpu"))
    found = [torch.load(models / f"{kind}-{size}-{rank}.pt") for rank in range(size)]
    largest = expected["logits"].abs().max()
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in expected)
    assert (found[0].pop("logits") - expected.pop("logits")).abs().max() < 1e-5 * largest
    for name, sequences in expected.items():
        assert torch.equal(found[0][name], sequences), name


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_drawn_and_the_clock_are_the_first_processs(models: Path, size: int) -> None:
    found = [torch.load(models / f"unseeded-{size}-{rank}.pt") for rank in range(size)]
    expected = unseeded(minopt.load(models / "125m", device="cpu").decoder, 0)
    for drawn, beams, timed, reasons in found:
        assert torch.equal(drawn, expected[0])
        assert torch.equal(beams, expected[1])
        assert torch.equal(timed, expected[2])
        assert reasons == expected[3] == ("time", "time")


@pytest.mark.parametrize("size", [2, 4])
def test_other_precisions_and_texts(models: Path, size: int) -> None:
    found = [torch.load(models / f"others-{size}-{rank}.pt", weights_only=False) for rank in range(size)]
    expected = {
        "int8": results(minopt.load(models / "125m", device="cpu", quantize="int8")),
        "bfloat16": results(minopt.load(models / "125m", device="cpu", dtype="bfloat16")),
    }
    for precision, one in expected.items():
        exact = results(minopt.load(models / "125m", device="cpu"))["logits"]
        rounding = (one["logits"] - exact).norm()
        assert 0 < (found[0][precision]["logits"] - exact).norm() < 1.5 * rounding
        assert all(torch.equal(found[0][precision]["greedy"], other[precision]["greedy"]) for other in found)
    from_int4 = results(minopt.load(models / "int4", device="cpu"))["logits"]
    assert (found[0]["int4"]["logits"] - from_int4).abs().max() < 1e-5 * from_int4.abs().max()
    assert (exact - from_int4).norm() > 0.01 * exact.norm()
    sequences, accepted = drafted(models)
    assert torch.equal(sequences, results(minopt.load(models / "125m", device="cpu"))["greedy"])
    assert max(accepted) > 0
    for other in found:
        assert torch.equal(other["draft"][0], sequences)
        assert other["draft"][1] == found[0]["draft"][1]
        assert max(other["draft"][1]) > 0
    written, streamed, scored = texts(minopt.load(minopt.DEMO, device="cpu"))
    for other in found:
        assert other["demo"][:2] == (written, streamed)
        for one, same in zip(other["demo"][2], scored, strict=True):
            assert one.logprobs[1:] == pytest.approx(same.logprobs[1:], abs=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_a_bias_that_all_add_is_seen(models: Path, size: int) -> None:
    """A negative control of the comparison of logits."""
    expected = results(minopt.load(models / "125m", device="cpu"))["logits"]
    found = torch.load(models / f"others-{size}-0.pt", weights_only=False)["biases of all"]["logits"]
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("size", [2, 4])
def test_what_does_not_fit_is_one_line_in_all_processes(models: Path, size: int) -> None:
    for rank in range(size):
        errors = torch.load(models / f"others-{size}-{rank}.pt", weights_only=False)["errors"]
        for error, (_, expected) in zip(errors, REFUSED.values(), strict=True):
            assert re.search(expected, error), error
    assert not (models / "saved").exists()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_shares_together_are_the_checkpoint(source: str, count: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_source(source, tmp_path / "model"))

    def read(**options: Any) -> dict[str, torch.Tensor]:
        return dict(read_weights(checkpoint, torch.device("cpu"), None, **options))

    whole, quantized = read(), read(quantize="int8")
    shares = [read(share=Share(k, count)) for k in range(count)]
    quantized_shares = [read(share=Share(k, count), quantize="int8") for k in range(count)]
    for state, parts in ((whole, shares), (quantized, quantized_shares)):
        for name, tensor in state.items():
            scale_of = name.removesuffix("_scale")
            dim = shard_dim(scale_of)
            if dim is None or (name != scale_of and dim == 1):
                assert all(torch.equal(part[name], tensor) for part in parts)
            else:
                assert torch.equal(torch.cat([part[name] for part in parts], dim), tensor)
                assert all(part[name].shape[dim] <= -(-tensor.shape[dim] // count) for part in parts)


@pytest.mark.parametrize("source", SOURCES)
def test_a_share_is_all_that_is_read(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is divided by columns, whose rows pass through memory."""
    checkpoint = open_checkpoint(write_source(source, tmp_path / "model"))
    read, read_into = [0], TensorFile.read_into

    def counted(file: TensorFile, out: torch.Tensor, *place: Any) -> None:
        read[0] += out.numel()
        read_into(file, out, *place)

    monkeypatch.setattr(TensorFile, "read_into", counted)
    with mock.patch.object(type(checkpoint), "check_head"):  # which reads a head of its own
        list(read_weights(checkpoint, torch.device("cpu"), torch.bfloat16, share=Share(1, 2)))
    expected = copies = 0
    for name, tensor in checkpoint.tensors.items():
        halved = shard_dim(name) == 0 or tensor.beside
        expected += tensor.numel // 2 if halved else tensor.numel
        copies += 2 * tensor.numel * len(tensor.copies)  # compared in pairs
    assert expected <= read[0] <= expected + copies


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ON_ONE_MACHINE = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]


def test_a_process_that_is_killed_ends_all_and_is_named(tmp_path: Path) -> None:
    """In the middle of generation, within 30 seconds."""
    (tmp_path / "prompts.txt").write_text("The ship\n" * 2000)
    flags = ["generate", "--input", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.jsonl"),
             "--max-new-tokens", "200", "--eos-token-id", "1", "--batch-size", "1"]  # fmt: skip
    with subprocess.Popen([*ON_ONE_MACHINE, "-m", "minopt", *flags], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        if not (tmp_path / "out.jsonl").exists():
            process.terminate()  # it ends those that it has started
            pytest.fail("nothing was generated")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = (pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(victim), signal.SIGKILL)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode != 0
    assert re.search(r"Root Cause.*rank\s*: 1 .*SIGKILL", errors, re.S)
    assert "minopt/cli" not in errors, errors  # no traceback but torchrun's own


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    """With the small model, on CPUs."""
    docs = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    example = docs.partition("```python\n# under torchrun")[2].partition("```")[0]
    example = example.replace('"facebook/opt-6.7b"', "minopt.DEMO").replace('"cuda"', '"cpu"')
    # one write a process: torchrun's processes do not buffer, and `print` writes its newline by itself
    ending = 'os.write(1, f"{text}\\n".encode())\n'
    (tmp_path / "example.py").write_text(f"#{example}{ending}")
    command = [*ON_ONE_MACHINE, str(tmp_path / "example.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = minopt.load(minopt.DEMO, device="cpu").generate("Today is")
    assert result.stdout.split(expected) == ["", "\n", "\n"], result.stderr


def test_the_command_on_two_machines_writes_once_what_one_process_writes(tmp_path: Path) -> None:
    """As two agents on one machine: the first process of the first writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "prompts.txt").write_text("The ship\nIt was a dark night\n")
    flags = ["-m", "minopt", "generate", "--input", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8"]
    agents = [
        subprocess.Popen([*TORCHRUN, "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1",
                          "--master-addr", "127.0.0.1", "--master-port", port, *flags, "--device", "cpu"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    alone = subprocess.run([sys.executable, *flags, "--device", "cpu"], capture_output=True, text=True, check=True)
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert [written for written, _ in outputs] == [alone.stdout, ""] != ["", ""]

"""Under FSDP each process reads its share, and what is saved is gathered tensor by tensor: nobody holds the whole."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minopt import OPT, CheckpointError, convert, load_model
from minopt.checkpoint import save
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.files import TensorFile
from minopt.checkpoint.tensors import Share, SourceTensor
from minopt.distributed import World
from minopt.training import weights
from minopt.training.config import TrainingConfig
from minopt.training.fsdp import apply_fsdp
from minopt.training.loss import ModelWithLoss
from minopt.training.trainer import train
from tests.checkpoint.sources import SOURCES, write_source
from tests.conftest import KINDS, build_reference
from tests.training.runs import Runs
from tests.training.small import EOS, VOCAB, examples, losses, settings, tokenizer

READ = ("float16", "350m", "galactica", "int8", "narrow", *SOURCES)
FILE_BYTES = 30_000  # small models in several files


def write_models(folder: Path) -> None:
    """What the processes read: weights in every kind of file, and models with a tokenizer to be trained."""
    for source in SOURCES:
        write_source(source, folder / source)
    write_source("bin", folder / "float16", dtype=torch.float16)
    convert(folder / "4 parts", folder / "int8", quantize="int8")
    for kind in KINDS:
        model = build_reference(kind, vocab_size=VOCAB, eos_token_id=EOS)
        model.save_pretrained(folder / kind)
        tokenizer().save(folder / kind)
    # Of 4 rows in shares of 2, the third process has none.
    build_reference(hidden_size=4, num_attention_heads=2, ffn_dim=4, kind="125m").save_pretrained(folder / "narrow")
    model.save_pretrained(folder / "no tokenizer")
    build_reference(seed=1, kind="125m", vocab_size=VOCAB, eos_token_id=EOS).save_pretrained(folder / "other")
    tokenizer().save(folder / "other")
    write_source("safetensors", folder / "untied")
    tensors = load_file(folder / "untied" / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, folder / "untied" / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(folder / "untied")


# What each process does


@dataclass
class Read:
    """What one process has of a model: its shares, the whole when gathered; and how many numbers it read of files."""

    local: dict[str, Tensor]
    gathered: dict[str, Tensor]
    numbers: int


def read(folder: Path, world: World, saved: str = "{} of {}") -> Read:
    """Fills a sharded model from a checkpoint, and saves it."""
    checkpoint = open_checkpoint(folder)
    model = OPT(checkpoint.config, device="meta")
    apply_fsdp(ModelWithLoss(model), model, None, world.device)
    with counted() as numbers:
        weights.fill(model, checkpoint, world)
    weights.save(model, folder.parent / saved.format(folder.name, world.size), tokenizer(), world)
    named = dict(model.named_parameters())
    with torch.no_grad():
        local = {name: p.to_local().clone() for name, p in named.items()}  # type: ignore[operator]
        return Read(local, {name: p.full_tensor() for name, p in named.items()}, numbers[0])  # type: ignore[operator]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the numbers that are read of files."""
    numbers, read_into = [0], TensorFile.read_into

    def watch(file: TensorFile, out: Tensor, *place: Any) -> None:
        numbers[0] += out.numel()
        read_into(file, out, *place)

    with mock.patch.object(TensorFile, "read_into", watch):
        yield numbers


WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp", "bf16": True, "recompute": True, "dropout": 0.1},
    "fsdp, evaluated": {"parallel": "fsdp", "do_train": True, "do_eval": True},
    "ddp": {},
}
RUNS = [(kind, way) for kind in KINDS for way in WAYS if kind == "125m" or way == "fsdp"]


def fine_tune(folder: Path, kind: str, way: str, *, by_name: bool) -> None:
    """A short run, whose folder tells whether the model was named, or loaded whole."""
    config = settings(folder / f"{kind}, {way}, {by_name}", per_device_train_batch_size=2, **WAYS[way])
    data, model = examples(9), folder / kind
    eval_data = data[:3] if config.do_eval else None
    if by_name:
        train(model, data, config, eval_data=eval_data)
    else:
        loaded = load_model(model, device="cpu", dtype="float32")
        train(loaded, data, config, tokenizer=tokenizer(), eval_data=eval_data)


def short(folder: Path) -> TrainingConfig:
    return settings(folder / "refused", parallel="fsdp", max_steps=1)


def others(folder: Path, world: World) -> None:
    train(folder / ("125m" if world.is_first else "other"), examples(4), short(folder))


def untied(folder: Path, world: World) -> None:
    train(folder / "untied", examples(4), short(folder))


def without_tokenizer(folder: Path, world: World) -> None:
    train(folder / "no tokenizer", examples(4), short(folder))


def cut_short(folder: Path, world: World) -> None:
    """In the last process, in the middle of its share."""
    fill, left = SourceTensor.fill, [7]

    def broken(source: SourceTensor, out: Tensor) -> None:
        left[0] -= 1
        if not left[0]:
            raise CheckpointError("a file: ends in the middle of its tensors. Fetch the file again.")
        fill(source, out)

    with mock.patch.object(SourceTensor, "fill", broken if world.rank == world.size - 1 else fill):
        train(folder / "125m", examples(4), short(folder))


def full_disk(folder: Path, world: World) -> None:
    """In the first process, at the second of several files."""
    written: list[Path] = []

    def broken(path: Path, *args: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_file(path, *args)

    write_file = save._write_file
    with mock.patch.object(save, "_write_file", broken):
        train(folder / "125m", examples(4), short(folder))


REFUSED: dict[Callable[[Path, World], None], str] = {
    others: "{folder}/125m: process 1 sees another checkpoint than process 0. Copy the same files to all machines.",
    untied: "{folder}/untied: lm_head.weight differs from the token embeddings; OPT's head is tied to them, and an "
    "untied one cannot be kept. Was the model trained with tie_word_embeddings false?",
    without_tokenizer: "--model_name_or_path: expected a model with a tokenizer, {folder}/no tokenizer has none. Add "
    "its files.",
    cut_short: "a file: ends in the middle of its tensors. Fetch the file again.",
    full_disk: "{folder}/refused/.model.saving: cannot be written (No space left on device). Is the disk full?",
}


def message(run: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        run()
    return str(error.value)


def work(rank: int, size: int, folder: Path) -> None:
    """All that a process does; what it finds goes to a file."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MINOPT_HOME": folder / f"home-{size}"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    world, found = World(rank, size, torch.device("cpu")), dict[str, Any]()
    try:
        found |= {name: read(folder / name, world) for name in READ}
        mirrored = mock.patch.object(weights, "Share", lambda index, count: Share(count - 1 - index, count))
        if size == 2:
            with mirrored:
                found["mirrored"] = read(folder / "safetensors", world, "mirrored")
            with mock.patch.object(weights, "FILE_BYTES", FILE_BYTES):
                for kind, way in RUNS:
                    for by_name in (True, False):
                        fine_tune(folder, kind, way, by_name=by_name)
                found["errors"] = [message(partial(run, folder, world)) for run in REFUSED]
    except BaseException:  # of which the test has to tell
        found["error"] = traceback.format_exc()
    torch.save(found, folder / f"{size}-{rank}.pt")
    os._exit(0)  # the others may hang by now, and destroying the group would wait for them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    write_models(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What processes found, two of them and three, by their rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = [context.Process(target=work, args=(k, size, folder)) for size in (2, 3) for k in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    reports = {
        size: [torch.load(folder / f"{size}-{k}.pt", weights_only=False) for k in range(size)] for size in (2, 3)
    }
    for report in (*reports[2], *reports[3]):
        assert "error" not in report, report["error"]
    return reports


def same(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return expected.keys() == tensors.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", READ)
def test_shares_together_are_the_model_to_the_bit(
    name: str, size: int, folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    expected = load_model(folder / name, device="cpu", dtype="float32").state_dict()
    reads: list[Read] = [report[name] for report in found[size]]
    assert same(expected, {key: torch.cat([read.local[key] for read in reads]) for key in expected})
    assert all(same(expected, read.gathered) for read in reads)
    saved = load_model(folder / f"{name} of {size}", device="cpu", dtype="auto")
    assert saved.dtype == torch.float32
    assert same(expected, saved.state_dict())
    for key, tensor in expected.items():
        assert max(len(read.local[key]) for read in reads) == -(-len(tensor) // size), key


def test_a_process_without_rows_of_a_tensor_takes_part(found: dict[int, list[dict[str, Any]]]) -> None:
    assert [len(report["narrow"].local["layers.0.fc2.bias"]) for report in found[3]] == [2, 2, 0]


def test_a_wrong_share_is_seen(folder: Path, found: dict[int, list[dict[str, Any]]]) -> None:
    """A negative control."""
    expected = load_model(folder / "safetensors", device="cpu", dtype="float32").state_dict()
    for report in found[2]:
        assert report["mirrored"].gathered.keys() == expected.keys()
        assert not any(torch.equal(report["mirrored"].gathered[key], expected[key]) for key in expected)


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_reads_its_share_and_nothing_else(
    size: int, folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    for report in found[size]:
        local = report["safetensors"].local
        assert report["safetensors"].numbers == sum(tensor.numel() for tensor in local.values())


@pytest.mark.parametrize(("kind", "way"), RUNS)
def test_a_model_by_its_name_is_trained_and_saved_as_one_that_was_loaded_whole(
    kind: str, way: str, folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    named, loaded = (folder / f"{kind}, {way}, {by_name}" for by_name in (True, False))
    assert losses(named) == losses(loaded)
    assert len(set(losses(named))) == 4
    files = sorted(path.name for path in named.glob("*.safetensors"))
    assert files == sorted(path.name for path in loaded.glob("*.safetensors"))
    assert len(files) > 3
    for name in files:
        assert (named / name).read_bytes() == (loaded / name).read_bytes()
    reference = transformers.OPTForCausalLM.from_pretrained(named, dtype="auto").model.decoder
    model = load_model(named, device="cpu", dtype="auto")
    before = load_model(folder / kind, device="cpu").state_dict()
    assert reference.dtype == model.dtype == torch.float32
    assert same(model.state_dict(), dict(reference.state_dict()))
    assert not any(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items() if "fc" in key)


def test_in_one_process_too(folder: Path, tmp_path: Path) -> None:
    data, model = examples(9), load_model(folder / "125m", device="cpu")
    train(model, data, settings(tmp_path / "loaded"), tokenizer=tokenizer())
    train(str(folder / "125m"), data, settings(tmp_path / "named"))
    assert (tmp_path / "named" / "model.safetensors").read_bytes() == (
        tmp_path / "loaded" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(ValueError, match=r"^tokenizer: expected the model's, got None\. Pass it, or a name instead of"):
        train(model, data, settings(tmp_path / "none"))


def test_what_goes_wrong_in_one_process_is_one_line_in_all(
    folder: Path, found: dict[int, list[dict[str, Any]]]
) -> None:
    expected = [text.format(folder=folder) for text in REFUSED.values()]
    first, second = (report["errors"] for report in found[2])
    assert first == expected
    assert second == expected
    assert not list((folder / "refused").rglob("*.safetensors"))


def fill_the_disk() -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    save._write_file = broken


def test_a_disk_that_is_full_at_the_end_ends_the_command_with_one_line(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    ended = runs("full", fill_the_disk, size=2, parallel="fsdp", max_steps=2)
    assert ended.codes == [2, 2]
    assert ended.last_line == (
        f"minopt: error: {tmp_path}/full/.model.saving: cannot be written (No space left on device). Is the disk full?"
    )
    assert "Traceback" not in "".join(ended.said)
    assert runs("full", size=2, parallel="fsdp", max_steps=2).codes == [0, 0]  # goes on from the last checkpoint
    assert load_model(tmp_path / "full", device="cpu")

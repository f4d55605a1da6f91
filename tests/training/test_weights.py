"""Under FSDP each process reads its share, and what is saved is gathered tensor by tensor: nobody holds the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
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
from minopt.training.loss import ModelWithLoss
from minopt.training.trainer import train
from tests.checkpoint.sources import SOURCES, write_source
from tests.conftest import KINDS, build_reference
from tests.training.runs import Runs
from tests.training.small import EOS, VOCAB, examples, losses, settings, together, tokenizer

READ = ("float16", "350m", "galactica", "int8", "int4", "narrow", *SOURCES)
FILE_BYTES = 30_000  # small models in several files


def write_models(folder: Path) -> None:
    """What the processes read: weights in every kind of file, and models with a tokenizer to be trained."""
    for source in SOURCES:
        write_source(source, folder / source)
    write_source("bin", folder / "float16", dtype=torch.float16)
    convert(folder / "4 parts", folder / "int8", quantize="int8")
    convert(folder / "4 parts", folder / "int4", quantize="int4")
    for name, kind, seed in (*((kind, kind, 0) for kind in KINDS), ("other", "125m", 1)):
        model = build_reference(kind, seed, vocab_size=VOCAB, eos_token_id=EOS)
        model.save_pretrained(folder / name)
        tokenizer().save(folder / name)
    # Of 4 rows in shares of 2, the third process has none.
    build_reference(hidden_size=4, num_attention_heads=2, ffn_dim=4, kind="125m").save_pretrained(folder / "narrow")
    model.save_pretrained(folder / "no tokenizer")
    write_source("safetensors", folder / "untied")
    tensors = load_file(folder / "untied" / "model.safetensors")
    head = tensors["model.decoder.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, folder / "untied" / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(folder / "untied")


# What each process does


def read(folder: Path, world: World, saved: str = "{} of {}") -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Fills a sharded model from a checkpoint, and saves it.

    Returns the shares of this process, the whole when gathered, and how many numbers it has read of files.
    """
    checkpoint, numbers, read_into = open_checkpoint(folder), list[int](), TensorFile.read_into
    model = OPT(checkpoint.config, device="meta")
    weights.apply_fsdp(ModelWithLoss(model), model, None, world.device)

    def watch(file: TensorFile, out: Tensor, *place: Any) -> None:
        numbers.append(out.numel())
        read_into(file, out, *place)

    with mock.patch.object(TensorFile, "read_into", watch):
        weights.fill(model, checkpoint, world)
    weights.save(model, folder.parent / saved.format(folder.name, world.size), tokenizer(), world)
    named: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad():
        local = {name: p.to_local().clone() for name, p in named.items()}
        return local, {name: p.full_tensor() for name, p in named.items()}, sum(numbers)


WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp", "bf16": True, "recompute": True, "dropout": 0.1},
    "fsdp, evaluated": {"parallel": "fsdp", "do_train": True, "do_eval": True},
    "ddp": {},
}
RUNS = [(kind, way) for kind in KINDS for way in WAYS if kind == "125m" or way == "fsdp"]


def fine_tune(folder: Path, kind: str, way: str, *, by_name: bool) -> None:
    """A short run, whose folder tells whether the model was named, or loaded whole."""
    config = settings(folder / f"{kind}, {way}, {by_name}", per_device_train_batch_size=2, **WAYS[way])
    model: Any = folder / kind if by_name else load_model(folder / kind, device="cpu", dtype="float32")
    eval_data = examples(3) if config.do_eval else None
    train(model, examples(9), config, tokenizer=None if by_name else tokenizer(), eval_data=eval_data)


def short(folder: Path, name: str) -> None:
    train(folder / name, examples(4), settings(folder / "refused", parallel="fsdp", max_steps=1))


def others(folder: Path, world: World) -> None:
    short(folder, "125m" if world.is_first else "other")


def untied(folder: Path, world: World) -> None:
    short(folder, "untied")


def without_tokenizer(folder: Path, world: World) -> None:
    short(folder, "no tokenizer")


def cut_short(folder: Path, world: World) -> None:
    """In the last process, in the middle of its share."""
    fill, left = SourceTensor.fill, [7]

    def broken(source: SourceTensor, out: Tensor) -> None:
        left[0] -= 1
        if not left[0]:
            raise CheckpointError("a file: ends in the middle of its tensors. Fetch the file again.")
        fill(source, out)

    with mock.patch.object(SourceTensor, "fill", broken if world.rank == world.size - 1 else fill):
        short(folder, "125m")


def full_disk(folder: Path, world: World) -> None:
    """In the first process, at the second of several files."""
    written, write_file = list[Path](), save._write_file

    def broken(path: Path, *args: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_file(path, *args)

    with mock.patch.object(save, "_write_file", broken):
        short(folder, "125m")


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


def work(folder: Path, world: World) -> dict[str, Any]:
    """All that a process does, and what it finds."""
    found: dict[str, Any] = {name: read(folder / name, world) for name in READ}
    if world.size == 2:
        mirrored = mock.patch.object(weights, "Share", lambda index, count: Share(count - 1 - index, count))
        with mirrored:
            found["mirrored"] = read(folder / "safetensors", world, "mirrored")
        with mock.patch.object(weights, "FILE_BYTES", FILE_BYTES):
            for kind, way in RUNS:
                for by_name in (True, False):
                    fine_tune(folder, kind, way, by_name=by_name)
            found["errors"] = [message(partial(run, folder, world)) for run in REFUSED]
    return found


Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    write_models(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What processes found, two of them and three, by their rank."""
    return {size: together(size, folder, partial(work, folder)) for size in (2, 3)}


def same(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return expected.keys() == tensors.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", READ)
def test_shares_together_are_the_model_to_the_bit_and_each_process_reads_its_own(
    name: str, size: int, folder: Path, found: Found
) -> None:
    expected = load_model(folder / name, device="cpu", dtype="float32").state_dict()
    shares, gathered, numbers = zip(*(report[name] for report in found[size]), strict=True)
    assert same(expected, {key: torch.cat([local[key] for local in shares]) for key in expected})
    assert all(same(expected, whole) for whole in gathered)
    saved = load_model(folder / f"{name} of {size}", device="cpu", dtype="auto")
    assert saved.dtype == torch.float32
    assert same(expected, saved.state_dict())
    for key, tensor in expected.items():
        assert max(len(local[key]) for local in shares) == -(-len(tensor) // size), key
    if name == "safetensors":
        assert list(numbers) == [sum(tensor.numel() for tensor in local.values()) for local in shares]
    if (name, size) == ("narrow", 3):  # a process without rows of a tensor takes part
        assert [len(local["layers.0.fc2.bias"]) for local in shares] == [2, 2, 0]


def test_a_wrong_share_is_seen(folder: Path, found: Found) -> None:
    """A negative control."""
    expected = load_model(folder / "safetensors", device="cpu", dtype="float32").state_dict()
    for report in found[2]:
        gathered = report["mirrored"][1]
        assert gathered.keys() == expected.keys()
        assert not any(torch.equal(gathered[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("kind", "way"), RUNS)
def test_a_model_by_its_name_is_trained_and_saved_as_one_that_was_loaded_whole(
    kind: str, way: str, folder: Path, found: Found
) -> None:
    named, loaded = (folder / f"{kind}, {way}, {by_name}" for by_name in (True, False))
    assert losses(named) == losses(loaded)
    assert len(set(losses(named))) == 4
    files, others = ({p.name: p.read_bytes() for p in place.glob("*.safetensors")} for place in (named, loaded))
    assert files == others
    assert len(files) > 3
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
    named, loaded = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "loaded"))
    assert named == loaded


def test_what_goes_wrong_in_one_process_is_one_line_in_all(folder: Path, found: Found) -> None:
    expected = [text.format(folder=folder) for text in REFUSED.values()]
    assert [report["errors"] for report in found[2]] == [expected, expected]
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

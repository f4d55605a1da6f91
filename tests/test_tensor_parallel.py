"""A model divided among processes says what it says in one; each process reads its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import minopt
from minopt import LanguageModel
from tests.conftest import build_ours, build_reference

KINDS = ("125m", "350m", "galactica")
IDS = torch.tensor([[0, 0, 0, 9, 30, 41, 7], [2, 8, 8, 50, 60, 4, 11]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "sampling": {"do_sample": True, "seed": 3},
    "sampling beams": {"do_sample": True, "num_beams": 2, "seed": 3},
}


def results(lm: LanguageModel) -> dict[str, Any]:
    """What a model, whole or divided, says."""
    decoder = lm.decoder
    with torch.inference_mode():
        cache = decoder.new_cache(2, 9)
        logits = [decoder.prefill(IDS, MASK.bool(), cache)]
        logits.append(decoder.decode_step(IDS[:, :1], torch.nn.functional.pad(MASK, (0, 1), value=1).bool(), cache))
    found: dict[str, Any] = {"logits": torch.stack(logits)}
    for name, options in WAYS.items():
        ids, mask = (IDS[1:], None) if "prompt_lookup_num_tokens" in options else (IDS, MASK)
        found[name] = minopt.generate(decoder, ids, mask, max_new_tokens=12, eos_token_id=(), **options).sequences
    return found


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
    torch.save(results(minopt.load(folder / "125m", mesh=mesh, quantize="int8")), folder / f"int8-{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the three kinds, and what 2 and 4 processes say of them."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        minopt.save_model(build_ours(build_reference(kind)), folder / kind)
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

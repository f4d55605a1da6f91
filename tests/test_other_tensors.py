"""Models whose parameters are other programs' tensors, copies of all that a user holds, and what notebooks show."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import minopt
from minopt import OPT, LanguageModel
from tests.conftest import build_ours, build_reference

IDS = torch.tensor([[2, 5, 60, 7], [2, 9, 8, 4]])
COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]
WAYS: dict[str, Callable[[OPT], Any]] = {
    "embeddings alone": lambda m: fully_shard(m.embed_tokens),
    "each part and all": lambda m: [fully_shard(part) for part in (m.embed_tokens, *m.layers, m)],
}


def _step(model: OPT, ids: torch.Tensor, divisor: int = 1) -> torch.Tensor:
    """The logits behind one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (model(ids).logsumexp(-1).sum() / divisor).backward()
    optimizer.step()
    with torch.no_grad():
        return model(ids)


def _shard(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for way, shard in WAYS.items():
        plain = build_ours(build_reference("125m"))
        model = copy.deepcopy(plain)
        shard(model)
        if way == "each part and all":  # gradients are means over ranks, and each rank has half of the batch
            mine = IDS[rank : rank + 1]
            torch.testing.assert_close(_step(model, mine), _step(plain, IDS, 2)[rank : rank + 1], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), plain(IDS))
        if way == "each part and all":
            for run in (lambda m: minopt.generate(m, IDS, max_new_tokens=2), lambda m: m.embed_positions.forward(IDS)):
                model.reshard()  # type: ignore[operator]
                with pytest.raises(ValueError, match=r"^model: expected whole weights, got FSDP's shards outside of"):
                    run(model)
            with pytest.raises(
                ValueError, match=r"got DTensor \(model\.decoder\..*\)\. Gather them .*get_model_state_dict"
            ):
                minopt.save_model(model, folder / f"never{rank}")
            whole = OPT(model.config)
            whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
            minopt.save_model(whole, folder / f"saved{rank}")
            torch.testing.assert_close(
                minopt.load_model(folder / f"saved{rank}", device="cpu")(IDS), plain(IDS), rtol=1e-4, atol=1e-4
            )
    dist.destroy_process_group()


def test_shards_of_fsdp_give_the_same_logits_and_steps_or_are_refused(tmp_path: Path) -> None:
    mp.spawn(_shard, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]


def test_tensors_that_torchao_quantized_run_and_are_not_saved(tmp_path: Path) -> None:
    from torchao import quantization as torchao

    model = build_ours(build_reference("125m"))
    expected = model(IDS)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    torch.testing.assert_close(model(IDS), expected, rtol=0.1, atol=0.5)
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))
    for save in (minopt.save_model, lambda m, folder: LanguageModel(m, None).save(folder)):
        with pytest.raises(ValueError, match=r"^model: expected plain tensors, got \w+ \(.*weight\)\. Save .* before"):
            save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", COPIES)
def test_copies_are_the_same(again: Callable[[Any], Any]) -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    assert torch.equal(again(lm).model(IDS), lm.model(IDS))
    assert again(lm.tokenizer).encode("The ship") == lm.tokenizer.encode("The ship")  # type: ignore[union-attr]
    options = minopt.GenerationConfig(max_new_tokens=3, stop_strings=["x"])
    assert again(options) == options
    for form in (lm, minopt.load(minopt.DEMO, device="cpu")):
        classifier = minopt.SequenceClassifier(form, ["a", "b"]).eval()
        assert again(classifier).classify(["The ship"]) == classifier.classify(["The ship"])


@pytest.mark.parametrize("again", [*COPIES, copy.copy])
def test_copies_of_a_cache_go_on_from_it_without_its_gradients(again: Callable[[Any], Any]) -> None:
    model = build_ours(build_reference("125m"))
    model(IDS, cache=(cache := model.new_cache(2, 9)))
    assert cache.keys[0].requires_grad
    other = again(cache)
    assert not other.keys[0].requires_grad
    with torch.no_grad():
        assert torch.equal(model(IDS, cache=other), model(IDS, cache=cache))


def test_notebooks_show_a_table() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu")
    html = lm._repr_html_()
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    for name, value in {"form": "FastOPT", "layers": "4", "hidden size": "256", "vocabulary": "2,048",
                        "parameters": f"{count:,}", "dtype": "float32", "device": "cpu"}.items():  # fmt: skip
        assert f"<tr><th>{name}</th><td>{value}</td></tr>" in html
    assert "style" not in html

    class Strange:
        def __repr__(self) -> str:
            return "<script>&"

    lm.tokenizer = Strange()  # type: ignore[assignment]
    assert "<td>&lt;script&gt;&amp;</td>" in lm._repr_html_()

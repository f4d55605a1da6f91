"""LoRA by peft: against a loop of transformers and peft, in all layouts, and folders that peft opens."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import minopt
from minopt.cli import main
from minopt.distributed import World
from minopt.training import method
from minopt.training.batches import microbatches
from minopt.training.config import TrainingConfig
from minopt.training.trainer import train
from tests.conftest import error
from tests.training.small import (
    distance,
    examples,
    lines,
    losses,
    model_of,
    reference_of,
    rows_of,
    settings,
    together,
    tokenizer,
)

LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 12.0, "lora_target_modules": "q_proj,v_proj,fc1"}
IDS = torch.tensor([[2, 9, 30, 41, 7], [2, 8, 8, 50, 60]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def lora(folder: Path, **changes: Any) -> TrainingConfig:
    return settings(folder, **(LORA | {"learning_rate": 1e-2, "weight_decay": 0.1} | changes))


def opened(kind: str, folder: Path) -> Any:
    """peft's model over transformers' OPT with a folder's adapters."""
    return peft.PeftModel.from_pretrained(reference_of(kind), folder).eval()


def test_losses_and_adapters_are_those_of_a_loop_with_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    config, data = lora(tmp_path / "run", max_steps=6), examples(23)
    first = lora(tmp_path / "first", max_steps=1, learning_rate=0.0)
    train(model_of(kind), data, first, tokenizer=tokenizer())
    train(model_of(kind), data, config, tokenizer=tokenizer())
    theirs = opened(kind, tmp_path / "first")  # with the same A
    theirs = peft.PeftModel.from_pretrained(reference_of(kind, dropout=0.0), tmp_path / "first", is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == 3 * 3 * 2
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.1)
    rows, expected = rows_of(data), []
    for step, (indices,) in enumerate(islice(microbatches([len(ids) for ids, _ in rows], 4, 1, 42, grouped=False), 6)):
        total, count = torch.zeros(()), sum(len(rows[i][0]) - rows[i][1] for i in indices)
        for ids, start in (rows[i] for i in indices):
            logits = theirs(torch.tensor([ids])).logits[0, start - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / 6)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        expected.append((total / count).item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 6
    ours = load_file(tmp_path / "run" / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(theirs)
    assert ours.keys() == wanted.keys()
    assert distance([ours[key] for key in wanted], [*wanted.values()]) < 1e-4


def test_a_folder_opens_in_peft_with_the_logits_of_the_trained_model(kind: str, tmp_path: Path) -> None:
    targets = "k_proj,q_proj,v_proj,out_proj,fc1,fc2" + (",project_in,project_out" if kind == "350m" else "")
    model = model_of(kind)
    before = model(IDS, MASK)
    config = lora(tmp_path / "run", lora_target_modules=targets, do_eval=True, model_name_or_path="facebook/opt-x")
    result = train(model, examples(8), config, tokenizer=tokenizer(), eval_data=examples(4))
    theirs = opened(kind, tmp_path / "run")
    with torch.no_grad():
        apart, real = theirs(IDS, attention_mask=MASK).logits, MASK.bool()
        wanted = theirs.merge_and_unload()(IDS, attention_mask=MASK).logits  # as the trained model is now
        assert error(model(IDS, MASK)[real], wanted[real]) < 1e-6
        assert error(model(IDS, MASK)[real], apart[real]) < 1e-5
        assert error(before[real], wanted[real]) > 1e-2
    assert all(type(m).__module__.split(".")[0] != "peft" for m in model.modules())
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == ("facebook/opt-x", 4, 12.0)
    assert sorted(written["target_modules"]) == sorted(targets.split(","))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "run.json", "metrics.jsonl", "predictions.json", "best",
        "checkpoints", ".lock", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    # The evaluation is of the merged model, and its adapters lie in best.
    merged = train(model, examples(8), settings(tmp_path / "merged", max_steps=1, learning_rate=0.0, do_eval=True),
                   tokenizer=tokenizer(), eval_data=examples(4))  # fmt: skip
    assert merged.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-6)
    assert merged.predictions == result.predictions
    best = tmp_path / "run" / "best" / "adapter_model.safetensors"
    assert best.read_bytes() == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"base_dtype": "bfloat16"}, {"recompute": True}], ids=str)
def test_a_run_from_a_name_in_each_way_merges_to_a_model_and_leaves_its_weights(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    minopt.save_model(model_of(), tmp_path / "model", tokenizer())
    for name, merge in (("adapters", False), ("merged", True)):
        config = lora(tmp_path / name, merge=merge, lora_dropout=0.2, **changes)
        train(str(tmp_path / "model"), examples(12), config, tokenizer=tokenizer())
    assert losses(tmp_path / "adapters") == losses(tmp_path / "merged")
    assert losses(tmp_path / "adapters")[-1] < losses(tmp_path / "adapters")[0]
    base = reference_of().to(torch.bfloat16 if "base_dtype" in changes else torch.float32).float()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").merge_and_unload().state_dict()
    found = minopt.load_model(tmp_path / "merged").state_dict()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, theirs[f"model.decoder.{key}"], rtol=0, atol=1e-6)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_resumed_run_ends_with_the_same_bits_and_its_checkpoints_hold_the_adapters_alone(tmp_path: Path) -> None:
    minopt.save_model(model_of(), tmp_path / "model", tokenizer())
    for name, steps in (("whole", (6,)), ("resumed", (3, 6))):
        for step in steps:
            config = lora(tmp_path / name, max_steps=6, save_steps=1, keep_last=6, lora_dropout=0.2)
            with pytest.MonkeyPatch.context() as patch:
                if step == 3:
                    patch.setattr(method.Method, "move", ends_at(3))
                    with pytest.raises(ZeroDivisionError):
                        train(tmp_path / "model", examples(12), config, tokenizer=tokenizer())
                else:
                    train(tmp_path / "model", examples(12), config, tokenizer=tokenizer())
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    held = FileSystemReader(tmp_path / "whole" / "checkpoints" / "step-00000006").read_metadata().state_dict_metadata
    assert {key for key in held if ".lora_" not in key and "param_groups" not in key} == set()
    assert len([key for key in held if key.startswith("model.")]) == 18
    with pytest.raises(ValueError, match="lora_rank is 4 there and 5 here"):
        train(tmp_path / "model", examples(12), lora(tmp_path / "whole", lora_rank=5), tokenizer=tokenizer())


def test_the_command_writes_a_folder_that_load_merges_to_the_bits_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minopt.save_model(model_of(), tmp_path / "model", tokenizer())
    data = [{"prompt": e.prompt, "completion": e.completion} for e in examples(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
    command = (
        f"finetune --model {tmp_path}/model --train-file {tmp_path}/data.jsonl --output-dir {tmp_path}/run "
        "--lora-rank 8 --lora-alpha 16 --lora-target-modules q_proj,v_proj --max-steps 2 --src-length 40"
        " --tgt-length 16 --device cpu"
    )
    assert main(command.split()) == 0
    lm = minopt.load(tmp_path / "model", adapter=tmp_path / "run", device="cpu", optimize=False)
    theirs = opened("125m", tmp_path / "run").merge_and_unload().state_dict()
    assert all(torch.equal(t, theirs[f"model.decoder.{name}"]) for name, t in lm.model.state_dict().items())
    assert not torch.equal(lm.model.layers[0].self_attn.q_proj.weight, model_of().layers[0].self_attn.q_proj.weight)
    with pytest.raises(ValueError, match=r"step-00000002.*They are an adapter's"):
        minopt.load(tmp_path / "run" / "checkpoints" / "step-00000002")


def test_adapters_begin_as_pefts_do_by_the_seed_and_their_inputs_are_dropped(tmp_path: Path) -> None:
    found = {}
    for name, changes in (("one", {}), ("two", {"seed": 1}), ("dropped", {"lora_dropout": 0.5})):
        config = lora(tmp_path / name, max_steps=1, learning_rate=0.0, **changes)
        train(model_of(), examples(4), config, tokenizer=tokenizer())
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for key, tensor in found["one"].items():
        if "lora_B" in key:
            assert not tensor.any()
            continue
        assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1  # uniform, as of torch's linear layers
        assert not torch.equal(tensor, found["two"][key])
        assert torch.equal(tensor, found["dropped"][key])
    grad_norms = [lines(tmp_path / name)[0]["grad_norm"] for name in ("one", "dropped")]
    assert grad_norms[0] != grad_norms[1]


def ends_at(step: int) -> Any:
    move = method.Method.move

    def wrapped(run: Any, *args: Any) -> Any:
        if run.progress.step == step:
            raise ZeroDivisionError
        return move(run, *args)

    return wrapped


def in_processes(world: Any, folder: Path) -> list[float]:
    """Runs of each layout, from a name."""
    for parallel, merges in (("ddp", (False,)), ("fsdp", (False, True))):
        for merge in merges:
            config = lora(folder / f"{parallel}-{merge}-{world.size}", max_steps=3, parallel=parallel, merge=merge,
                          per_device_train_batch_size=4 // world.size, do_eval=merge, lora_dropout=0.0)  # fmt: skip
            options = {"eval_data": examples(4)} if merge else {}
            train(folder / "model", examples(12), config, tokenizer=tokenizer(), **options)
    return []


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    minopt.save_model(model_of("350m"), tmp_path / "model", tokenizer())
    in_processes(World(0, 1, torch.device("cpu")), tmp_path)
    together(2, tmp_path, partial(in_processes, folder=tmp_path))
    for name, file in (("ddp-False", "adapter_model"), ("fsdp-False", "adapter_model"), ("fsdp-True", "model")):
        one, two = (load_file(tmp_path / f"{name}-{size}" / f"{file}.safetensors") for size in (1, 2))
        assert one.keys() == two.keys()
        assert distance([two[key] for key in one], [*one.values()]) < 1e-4
        assert losses(tmp_path / f"{name}-2") == pytest.approx(losses(tmp_path / f"{name}-1"), rel=1e-5)
    predictions = [json.loads((tmp_path / f"fsdp-True-{size}" / "predictions.json").read_text()) for size in (1, 2)]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0, "merge": True}, "--lora_alpha and --lora_target_modules and --merge: expected --lora_rank"),
        ({"lora_target_modules": "q_proj,query,key"},
         "--lora_target_modules: expected some of k_proj, v_proj, q_proj, out_proj, fc1, fc2, got query, key. Name"),
        ({"lora_target_modules": ","}, "fc2, got none. Name linear modules of the model."),
        ({"lora_rank": 0, "lora_alpha": 16.0, "lora_target_modules": "q_proj,v_proj", "base_dtype": "float16"},
         "--base_dtype: expected --lora_rank or --optimizer mezo as well, got none. Add it, or leave that out"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(model_of(), examples(4), lora(tmp_path / "run", **changes), tokenizer=tokenizer())
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_without_peft_the_line_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "minopt.interop.lora", raising=False)
    with pytest.raises(
        ValueError, match=re.escape("peft: expected to find it, it is not installed. pip install 'minopt[peft]'")
    ):
        train(model_of(), examples(4), lora(tmp_path / "run"), tokenizer=tokenizer())
    assert not (tmp_path / "run").exists()

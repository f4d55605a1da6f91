"""The view for other programs: transformers' class with our parameters, on which they run as on transformers' model."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import minopt
from minopt import OPT
from minopt.inference.fast import FastOPT
from minopt.interop import as_hf
from minopt.methods.heads import SequenceClassifier
from tests.conftest import KINDS, build_ours, build_reference

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 9, 4, 60]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
Pair = tuple[Any, OPT, Any]


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """transformers' model, ours with its weights, and the view of ours."""
    reference = build_reference(request.param)
    ours = build_ours(reference)
    return reference, ours, as_hf(ours)


def test_the_view_is_transformers_class_with_our_parameters(pair: Pair) -> None:
    reference, ours, view = pair
    assert type(view) is transformers.OPTForCausalLM
    assert list(view.state_dict()) == list(reference.state_dict())
    assert {id(p) for p in view.parameters()} == {id(p) for p in ours.parameters()}
    assert view.lm_head.weight is ours.embed_tokens.weight
    theirs = {**reference.config.to_dict(), "architectures": ["OPTForCausalLM"], "dtype": "float32"}
    assert view.config.to_dict() == theirs
    with torch.no_grad():
        expected, found = (
            m(IDS, attention_mask=MASK, labels=IDS, output_hidden_states=True) for m in (reference, view)
        )
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        ours.layers[1].fc1.weight.mul_(2)  # seen through the view
        assert not torch.equal(view(IDS).logits, reference(IDS).logits)
        torch.testing.assert_close(view(IDS).logits, ours(IDS))
    view.config.use_cache = False
    tokens = view.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, eos_token_id=None)
    mine = minopt.generate(ours, IDS, MASK, max_new_tokens=4, eos_token_id=())
    assert tokens.tolist() == mine.sequences.tolist()


def test_classifiers_have_a_view_too() -> None:
    ours = SequenceClassifier(build_ours(build_reference("350m")), ["no", "yes", "perhaps"])
    view = minopt.interop.as_hf(ours)
    assert type(view) is transformers.OPTForSequenceClassification
    assert view.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    with torch.no_grad():
        torch.testing.assert_close(view(IDS, attention_mask=MASK).logits, ours(IDS, MASK))
    adapted = peft.get_peft_model(view, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    loss = adapted(IDS, attention_mask=MASK, labels=torch.tensor([2, 0])).loss
    loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora" in name)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_transformers_trainer_trains_our_parameters(pair: Pair, tmp_path: Path) -> None:
    reference, ours, view = pair
    losses = []
    for name, model in (("theirs", reference), ("ours", view)):
        settings = transformers.TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=Rows())
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
    assert losses[1][0] != losses[1][2]
    for name, tensor in build_ours(reference).state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("config", [
    peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "fc2"]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
], ids=["lora", "prompt", "prefix"])  # fmt: skip
def test_peft_adapts_the_view_as_transformers_model(config: Any) -> None:
    models = []
    for model in (build_reference("125m"), as_hf(build_ours(build_reference("125m")))):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        loss = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        models.append((adapted, loss, [p.grad for p in adapted.parameters() if p.requires_grad]))
    (theirs, loss, gradients), (ours, our_loss, our_gradients) = models
    assert torch.equal(loss, our_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, our_gradients, strict=True))
    if isinstance(config, peft.LoraConfig):
        merged = ours.merge_and_unload()
        opt = build_ours(theirs.merge_and_unload())
        assert torch.equal(merged.model.decoder.layers[0].fc2.weight, opt.layers[0].fc2.weight)


def test_peft_prompts_are_embeddings_that_minopt_reads() -> None:
    ours = build_ours(build_reference("350m"))
    adapted = peft.get_peft_model(
        as_hf(ours), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=16)
    ).eval()
    soft = adapted.get_prompt(1)[0]
    embeds = torch.cat([soft, ours.embed_tokens(IDS[0])])[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs_embeds=embeds)[:, 3:], adapted(input_ids=IDS[:1]).logits[:, -5:])


def test_trl_trains_our_parameters(tmp_path: Path) -> None:
    """In a process of its own: the package patches others when it is imported."""
    lines = """
import sys, torch, datasets, trl, minopt
from minopt.interop import as_hf
lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
from transformers import AutoTokenizer
before = lm.model.layers[0].fc1.weight.clone()
data = datasets.Dataset.from_list([{"text": "When I opened the door, I saw the sea."}, {"text": "The ship sailed."}])
settings = trl.SFTConfig(sys.argv[1], max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                         bf16=False, save_strategy="no", logging_steps=1, max_length=32, learning_rate=1e-3)
tokenizer = AutoTokenizer.from_pretrained(minopt.DEMO)
trainer = trl.SFTTrainer(as_hf(lm), settings, train_dataset=data, processing_class=tokenizer)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
assert losses[1] < losses[0], losses
assert not torch.equal(before, lm.model.layers[0].fc1.weight)
"""
    done = subprocess.run([sys.executable, "-c", lines, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_layers_that_accelerate_keeps_elsewhere_give_the_same_logits(pair: Pair, way: str, tmp_path: Path) -> None:
    ours = pair[1]
    with torch.no_grad():
        expected = ours(IDS, MASK)
        more = {"offload_dir": str(tmp_path)} if way == "disk_offload" else {}
        getattr(accelerate, way)(ours, execution_device=torch.device("cpu"), **more)
        assert ours.device.type == "meta"
        assert torch.equal(ours(IDS, MASK), expected)
    with pytest.raises(ValueError, match=r"^model: expected weights with numbers, got some on the meta device"):
        minopt.generate(ours, IDS, MASK)


def test_a_model_made_for_inference_has_no_view() -> None:
    plain = build_ours(build_reference("125m"))
    fast = FastOPT(plain.config, plain.state_dict().items())
    with pytest.raises(
        ValueError, match=r"^model: made for inference, and other programs change .*optimize=False\)\.$"
    ):
        as_hf(fast)


def test_what_prunes_by_exact_type_finds_the_layers() -> None:
    ours = build_ours(build_reference("125m"))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(ours), {nn.Linear}, dtype=torch.qint8)
    assert sum(type(module).__name__ == "Linear" for module in quantized.modules()) == 18
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    torch.testing.assert_close(quantized(IDS), ours(IDS), rtol=0.2, atol=2.0)

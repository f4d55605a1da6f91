"""What people do with a module, done to a model for inference: it works, or one line says why not."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.utils import prune

import minopt
from minopt import OPT, LanguageModel, int8
from minopt.inference.fast import FastOPT

IDS = torch.tensor([[2, 5, 600, 7]])
FORMS: dict[str, dict[str, Any]] = {
    "fast": {}, "float16": {"dtype": "float16"}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"},
    "offloaded": {"offload": "disk"},
}  # fmt: skip


@pytest.fixture(params=list(FORMS), scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return minopt.load(minopt.DEMO, device="cpu", **FORMS[request.param])


@pytest.fixture
def model(lm: LanguageModel) -> OPT:
    return lm.model


def each(change: Callable[[Tensor], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: [change(parameter) for parameter in model.parameters()]


REFUSED: dict[str, Callable[[Any], Any]] = {
    "to another dtype": lambda m: m.to(torch.float32 if m.dtype == torch.float16 else torch.float16),
    "to meta": lambda m: m.to("meta"),
    "double": lambda m: m.double(),
    "cuda": lambda m: m.cuda(7),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "a layer's double": lambda m: m.layers[0].double(),
    "train": lambda m: m.train(),
    "a layer's train": lambda m: m.layers[0].train(),
    "requires_grad_": lambda m: m.requires_grad_(),
    "an optimizer": lambda m: torch.optim.AdamW(m.parameters()),
    "gradients of parameters": each(lambda p: p.requires_grad_()),
    "requires_grad": each(lambda p: setattr(p, "requires_grad", True)),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "a wrapper's load_state_dict": lambda m: nn.Sequential(m).load_state_dict(nn.Sequential(m).state_dict()),
    "reset_parameters": lambda m: m.reset_parameters(),
    "apply": lambda m: m.apply(lambda part: nn.init.normal_(part.weight) if hasattr(part, "weight") else None),
    "data.mul_": each(lambda p: p.data.mul_(0.5)),
    "copy_": each(lambda p: p.copy_(torch.zeros_like(p))),
    "data =": each(lambda p: setattr(p, "data", torch.zeros(3))),
    "a row": each(lambda p: p.__setitem__(0, 0)),
    "a view": each(lambda p: p.T.flatten()[3:].zero_() if p.ndim == 1 else p.T[0, 1:].zero_()),
    "out=": each(lambda p: torch.zeros(p.shape, dtype=p.dtype, out=p)),
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
    "a part's weight": lambda m: m.embed_tokens.weight.data.zero_(),
    "pruning of a part": lambda m: prune.l1_unstructured(m.final_layer_norm, "weight", 0.5),
    "another module": lambda m: setattr(m, "embed_tokens", nn.Embedding(9, 9)),
    "add_module": lambda m: m.add_module("embed_tokens", nn.Embedding(9, 9)),
    "another layer": lambda m: setattr(m.layers[0], "fc1", nn.Linear(9, 9)),
    "made contiguous": each(lambda p: p.contiguous().mul_(0)),
    "unsafe_split": each(lambda p: torch.unsafe_split(p, 1)[0].zero_()),
    "apply_": each(lambda p: p.apply_(lambda x: 0)),
    "DLPack": each(torch.from_dlpack),
    "grad =": each(lambda p: setattr(p, "grad", torch.ones_like(p))),
    "a perturbation": lambda m: [p.data.add_(torch.randn(p.shape)) for _, p in m.named_parameters()],
    "add_ without gradients": torch.no_grad()(each(lambda p: p.add_(1))),
    "foreach add": lambda m: torch._foreach_add_(list(m.parameters()), 1),
    "the state dict": lambda m: [t.copy_(torch.zeros_like(t)) for t in m.state_dict().values()],
    "a wrapper's state dict": lambda m: [t.mul_(0.5) for t in nn.Sequential(m).state_dict().values()],
    "one vector": lambda m: nn.utils.vector_to_parameters(torch.zeros(10**7), m.parameters()),
    "no weight": lambda m: setattr(m.embed_tokens, "weight", None),
    "no module": lambda m: setattr(m, "embed_tokens", None),
    "del": lambda m: delattr(m, "embed_tokens"),
    "del of a weight": lambda m: delattr(m.embed_tokens, "weight"),
    "pruning everywhere": lambda m: prune.global_unstructured(
        [(m.embed_tokens, "weight"), (m.embed_positions, "weight")], prune.L1Unstructured, amount=0.5
    ),
    "copies on GPUs": lambda m: m._replicate_for_data_parallel(),
}
HAS_NOT: dict[str, Callable[[Any], Any]] = {
    "a linear layer": lambda m: m.layers[0].fc1,
    "attention": lambda m: m.layers[0].self_attn.q_proj,
    "a submodule": lambda m: m.get_submodule("layers.0.fc1"),
    "pruning of a layer": lambda m: prune.l1_unstructured(m.layers[0].fc1, "weight", 0.5),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "to its device": lambda m: m.to("cpu"),
    "to its dtype": lambda m: m.to(m.dtype),
    "cpu": lambda m: m.cpu(),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "eval": lambda m: m.eval().train(False),
    "no gradients": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "apply": lambda m: m.apply(lambda part: None),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda *_: None).remove(),
    "a parameter": lambda m: (p := m.get_parameter("layers.0.fc1.weight")) @ torch.ones(256).to(p.dtype),
    "numpy": lambda m: [p.detach().float().cpu().numpy() for p in m.parameters()],
    "one vector": lambda m: nn.utils.parameters_to_vector(p.float() for p in m.parameters()),
    "torch.save of weights": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "safetensors": lambda m: to_safetensors({name: p.contiguous() for name, p in m.named_parameters()}),
    "DataParallel": lambda m: nn.DataParallel(m)(IDS),
    "repr": repr,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_it_is_refused_in_one_line(what: str, model: OPT) -> None:
    before, logits = copy.deepcopy(model.state_dict()), model(IDS)
    with pytest.raises(ValueError, match=r"^model: made for inference, .*minopt\.load\(\.\.\., optimize=False\)\.$"):
        REFUSED[what](model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS), logits)
    assert not model.training


@pytest.mark.parametrize("array", [np.asarray, lambda p: p.numpy(), lambda p: p.detach().cpu().numpy()])
def test_arrays_of_weights_are_read_only(array: Callable[[Tensor], Any]) -> None:
    for weight in minopt.load(minopt.DEMO, device="cpu").model.parameters():
        with pytest.raises(ValueError, match="read-only"):
            array(weight)[...] = 0


def test_a_saved_state_dict_holds_each_weight_alone(model: OPT) -> None:
    torch.save(state := model.state_dict(), file := io.BytesIO())
    assert file.tell() < 1.1 * sum(tensor.nbytes for tensor in state.values())
    file.seek(0)
    again = torch.load(file)
    assert all(type(again[name]) is Tensor and torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("what", HAS_NOT)
def test_a_module_that_it_has_not_is_named(what: str, model: OPT) -> None:
    message = r"^\w+: made for inference, has no '(fc1|self_attn)'\. The plain model .*optimize=False\)\.$"
    with pytest.raises(AttributeError, match=message):
        HAS_NOT[what](model)


@pytest.mark.parametrize("what", HARMLESS)
def test_what_changes_nothing_works(what: str, model: OPT) -> None:
    logits = model(IDS)
    HARMLESS[what](model)
    assert torch.equal(model(IDS), logits)


def test_torch_compile_takes_it_as_it_is() -> None:
    model = minopt.load(minopt.DEMO, device="cpu").model
    assert torch.equal(torch.compile(model)(IDS), model(IDS))


def saved(thing: Any) -> Any:
    torch.save(thing, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), saved])
def test_copies_say_the_same(again: Callable[[Any], Any], lm: LanguageModel) -> None:
    if not isinstance(lm.model, FastOPT):
        with pytest.raises(ValueError, match=r"^model: made for inference, its layers are in their files"):
            again(lm)
        return
    fresh = again(lm)
    assert torch.equal(fresh.model(IDS), lm.model(IDS))
    assert fresh.generate("The ship", max_new_tokens=4) == lm.generate("The ship", max_new_tokens=4)
    assert all(torch.equal(p, dict(lm.model.named_parameters())[n]) for n, p in fresh.model.named_parameters())
    with pytest.raises(ValueError, match="cannot be trained"):
        fresh.model.train()


def test_weights_are_those_of_the_plain_model_and_saved_as_such(lm: LanguageModel, tmp_path: Path) -> None:
    plain = minopt.load_model(minopt.DEMO, device="cpu", dtype=lm.model.dtype)
    expected, found = dict(plain.named_parameters()), dict(lm.model.named_parameters())
    assert [name for name in found if not name.endswith(int8.SCALE)] == list(expected)
    for name, parameter in expected.items():
        assert isinstance(found[name], nn.Parameter)
        is_int8 = name + int8.SCALE in found
        assert torch.equal(found[name].clone(), int8.quantize(parameter)[0] if is_int8 else parameter)
    if len(found) == len(expected):
        again = OPT(plain.config, dtype=plain.dtype)
        again.load_state_dict(lm.model.state_dict())
        lm.save(tmp_path / "saved")
        for same in (again, minopt.load_model(tmp_path / "saved", device="cpu", dtype=plain.dtype)):
            assert all(torch.equal(p, expected[name]) for name, p in same.named_parameters())


def test_counting_and_looking_reads_no_weight(model: OPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "read_weight", lambda self, name: pytest.fail(f"{name} was read"))
    scales = sum(p.shape[0] for name, p in model.named_parameters() if name.endswith(int8.SCALE))
    plain = OPT(model.config, device="meta")
    assert sum(p.numel() for p in model.parameters()) - scales == sum(p.numel() for p in plain.parameters())
    assert next(model.parameters()).dtype == model.dtype
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0
    assert len(repr(model)) < 2000
    model.eval().to("cpu").zero_grad()


MEASURE = """
import sys
from pathlib import Path
import torch, minopt
from minopt import OPT, OPTConfig
from minopt.inference.fast import FastOPT

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])

config = OPTConfig(vocab_size=4000, hidden_size=768, num_hidden_layers=8, num_attention_heads=12, ffn_dim=3072)
torch.manual_seed(0)
model = FastOPT(config, OPT(config).state_dict().items())
minopt.save_model(minopt.load_model(minopt.DEMO, device="cpu"), Path(sys.argv[1]) / "warm")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: man 5 proc
before = kilobytes("VmRSS")
for name, parameter in model.named_parameters():
    parameter.sum()
minopt.save_model(model, Path(sys.argv[1]) / "saved")
print(1024 * (kilobytes("VmHWM") - before), sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_reading_all_parameters_and_saving_take_the_memory_of_a_tensor_or_two(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    more, total = map(int, result.stdout.split())
    assert total > 200_000_000
    assert more < 60_000_000  # the largest tensor has 12 MB, three joined 7 MB
    assert minopt.load_model(tmp_path / "saved", device="cpu").config.num_hidden_layers == 8

"""Models as people hold them are taken where that is harmless, and named in one line where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minopt
from minopt import OPT, LanguageModel
from minopt.generation.scoring import token_logprobs
from tests.conftest import build_ours, build_reference, read_next

IDS = torch.tensor([[2, 5, 60, 7]])


class Adapted(nn.Module):
    """What peft's ``PeftModel`` is to others: all that it lacks is looked up in the model inside."""

    def __init__(self, model: OPT, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=is_prompt_learning)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


@pytest.fixture
def model() -> OPT:
    return build_ours(build_reference("125m"))


USES: dict[str, Callable[[Any, Path], Any]] = {
    "generate": lambda m, _: minopt.generate(m, IDS, max_new_tokens=3).sequences,
    "score": lambda m, _: token_logprobs(m, [[2, 3, 4]], [1])[0],
    "LanguageModel": lambda m, _: read_next(LanguageModel(m, None).decoder, IDS, None, m.new_cache(1, 4)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Adapted, lambda m: LanguageModel(m, None)])
def test_what_wraps_an_opt_unchanged_is_looked_through(wrap: Any, use: str, model: OPT, tmp_path: Path) -> None:
    wrapped = wrap(model)
    if use == "LanguageModel":
        assert LanguageModel(wrapped, None).decoder is model
    else:
        assert torch.equal(USES[use](wrapped, tmp_path), USES[use](model, tmp_path))
    minopt.save_model(wrapped, tmp_path / "saved")
    assert torch.equal(minopt.load_model(tmp_path / "saved", device="cpu")(IDS), model(IDS))


OTHERS: dict[str, Callable[[OPT], Any]] = {
    "OPTForCausalLM": lambda _: build_reference("125m"),
    "Adapted": lambda model: Adapted(model, is_prompt_learning=True),
    "str": lambda _: "facebook/opt-125m",
    "NoneType": lambda _: None,
    "OPT": lambda _: OPT,
    "Sequential": nn.Sequential,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_opt_is_named(name: str, model: OPT, tmp_path: Path) -> None:
    given = OTHERS[name](model)
    for use in (*USES.values(), lambda m, path: minopt.save_model(m, path / "saved")):
        with pytest.raises(ValueError, match=rf"^model: expected a minopt\.OPT or an exported program, got {name}\. "):
            use(given, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", [minopt.load, minopt.load_model])
def test_a_model_where_its_name_is_wanted_is_named(use: Any, model: OPT) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a folder or a name on the hub, got OPT\. Save a model"):
        use(model)


def test_weights_without_numbers_are_told(model: OPT, tmp_path: Path) -> None:
    meta = OPT(model.config, device="meta")
    for use in USES.values():
        with pytest.raises(ValueError, match=r"^model: expected weights with numbers, got some on the meta device"):
            use(meta, tmp_path)
    for run, inputs in ((meta, IDS), (meta.head, torch.ones(1, 1, 32))):
        with pytest.raises(ValueError, match=r"^model: expected weights with numbers, got some on the meta device"):
            run(inputs)


def offload(model: nn.Module) -> None:
    """As accelerate's ``cpu_offload``: a module's own weights are there while its ``forward`` runs, and only then."""
    for module in model.modules():
        kept = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

        def run(*args: Any, module: Any = module, kept: dict[str, Tensor] = kept, forward: Any = module.forward) -> Any:
            for name, tensor in kept.items():
                setattr(module, name, nn.Parameter(tensor))
            result = forward(*args)
            for name, tensor in kept.items():
                setattr(module, name, nn.Parameter(tensor.to("meta")))
            return result

        if kept:
            module.forward = run  # type: ignore[method-assign]
            for name, tensor in kept.items():
                setattr(module, name, nn.Parameter(tensor.to("meta")))


def test_weights_that_come_for_each_modules_forward_give_the_same_logits(kind: str) -> None:
    model = build_ours(build_reference(kind))
    expected = model(IDS)
    offload(model)
    assert model.device.type == "meta"
    assert torch.equal(model(IDS), expected)


def test_hooks_on_the_embeddings_see_embeddings_alone(model: OPT) -> None:
    seen: list[Tensor] = []
    model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDS)
    assert [tuple(output.shape) for output in seen] == [(1, 4, 32)]

"""What a trace shows are transformers' hidden states and eager attentions; a patch changes what follows it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import minopt
from minopt import OPT, trace
from minopt.inference.fast import FastOPT
from tests.conftest import KINDS, build_ours, build_reference, pad_left

IDS, MASK = pad_left([torch.tensor([5, 20, 33, 47, 60]), torch.tensor([2, 9, 71])])
Pair = tuple[Any, OPT]


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Pair:
    reference = build_reference(request.param, dtype=torch.float64)
    return reference, build_ours(reference)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_stream_and_the_attention_weights_are_transformers(pair: Pair) -> None:
    reference, ours = pair
    real = MASK.bool()
    expected = reference(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    eager = copy.deepcopy(reference)
    eager.set_attn_implementation("eager")  # the one that gives weights; it computes them in float32
    weights = eager(IDS, output_attentions=True).attentions  # with padding on the left they are NaN in float64
    first = eager(IDS, attention_mask=MASK, output_attentions=True).attentions[0].transpose(1, 2)[real]
    whole = trace(ours, IDS, names=["*.weights"])
    seen = trace(ours, IDS, MASK)
    assert torch.equal(seen.logits, ours(IDS, MASK))
    for i in range(3):
        close(seen.residual[i][real], expected[i][real])
        assert seen.attention[i].shape == (2, 4, 5, 5)
        torch.testing.assert_close(whole.attention[i], weights[i], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen.attention[0].transpose(1, 2)[real], first, rtol=1e-6, atol=1e-6)
    module = reference.model.decoder.layers[1].fc1
    inputs: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    reference(IDS, attention_mask=MASK)
    close(seen["layers.1.fc1.input"].flatten(0, 1)[real.flatten()], inputs[0].flatten(0, -2)[real.flatten()])
    assert torch.equal(seen["layers.1.fc1.output"], ours.layers[1].fc1(seen["layers.1.fc1.input"]))
    assert torch.equal(seen["layers.0.output"], seen["layers.1.input"])
    assert repr(seen) == f"Trace({len(seen.values)} values of 3 layers, logits [2, 5, 96])"


def test_a_model_is_as_before_after_a_trace(pair: Pair) -> None:
    ours = pair[1]
    trace(ours, IDS, names=["*.weights"])
    with pytest.raises(RuntimeError, match="mine"):
        trace(ours, IDS, patch={"layers.1.output": lambda _: (_ for _ in ()).throw(RuntimeError("mine"))})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())


@torch.no_grad()
def test_patches_change_what_follows_and_nothing_before(pair: Pair) -> None:
    ours = pair[1]
    plain = trace(ours, IDS, MASK)
    same = trace(ours, IDS, MASK, patch={f"layers.{i}.self_attn.weights": lambda w: w for i in range(3)})
    close(same.logits[MASK.bool()], plain.logits[MASK.bool()])

    def without_head_2(heads: Tensor) -> Tensor:
        heads[..., 2 * 8 : 3 * 8] = 0
        return heads

    def head_2_looks_nowhere(weights: Tensor) -> Tensor:
        weights[:, 2] = 0
        return weights

    cut = trace(ours, IDS, MASK, patch={"layers.1.self_attn.out_proj.input": without_head_2})
    blind = trace(ours, IDS, MASK, patch={"layers.1.self_attn.weights": head_2_looks_nowhere})
    close(cut.logits[MASK.bool()], blind.logits[MASK.bool()])
    assert torch.equal(blind["layers.1.self_attn.out_proj.input"][..., 16:24], torch.zeros(2, 5, 8).double())
    assert torch.equal(cut.residual[1], plain.residual[1])
    assert not torch.allclose(cut.residual[2], plain.residual[2])
    column = ours.layers[1].self_attn.out_proj.weight.clone()
    try:
        ours.layers[1].self_attn.out_proj.weight[:, 16:24] = 0
        close(ours(IDS, MASK)[MASK.bool()], cut.logits[MASK.bool()])
    finally:
        ours.layers[1].self_attn.out_proj.weight.copy_(column)
    # Activation patching: with all of a stream from another text, what follows is that text's.
    other = torch.flip(IDS, [0])
    moved = trace(ours, other, MASK, patch={"layers.2.input": plain["layers.2.input"]}, names=[])
    close(moved.logits[MASK.bool()], plain.logits[MASK.bool()])
    assert moved.values == {}


def test_names_choose_and_a_callback_sees_each_value_once(pair: Pair) -> None:
    ours, seen = pair[1], dict[str, Tensor]()
    kept = trace(ours, IDS, names=["layers.*.output"])
    assert set(kept.values) >= {f"layers.{i}.output" for i in range(3)}
    assert not any(".input" in name or "weights" in name for name in kept.values)
    trace(ours, inputs_embeds=ours.embed_tokens(IDS), names=["*.weights"], callback=seen.__setitem__)
    assert list(seen) == [f"layers.{i}.self_attn.weights" for i in range(3)]
    torch.testing.assert_close(seen["layers.0.self_attn.weights"].sum(-1), torch.ones(2, 4, 5).double())


def test_wrong_traces_are_told() -> None:
    ours = build_ours(build_reference("125m"))
    fast: Any = FastOPT(ours.config, ours.state_dict().items())
    for run, message in (
        (lambda: trace(fast, IDS), r"^model: made for inference, and its layers are joined.*optimize=False"),
        (lambda: trace(ours), r"^trace: expected input_ids or inputs_embeds, and a mask"),
        (lambda: trace(ours, IDS, names=["layers.9.*"]), r"^trace: expected names such as .*, got 'layers\.9\.\*'"),
        (lambda: trace(ours, IDS, patch={"fc1": torch.ones(1)}), r"^trace: expected names such as .*, got 'fc1'"),
        (lambda: trace(ours, IDS, patch={"layers.*.output": torch.zeros_like}), r"^trace: .* got 'layers\.\*\.output'"),
        (lambda: trace(ours, IDS[0]), r"^input_ids: expected \[batch, tokens\]"),
        (lambda: trace(ours, IDS, torch.ones(2, 9)), r"^attention_mask: expected \[2, 5\]"),
        (lambda: trace(ours, IDS, patch={"layers.0.output": torch.ones(2)}), r"^patch: expected \[2, 5, 32\] for"),
        (lambda: trace(ours, IDS, patch={"layers.0.output": lambda _: None}), r"^patch: expected .* got NoneType"),  # type: ignore[arg-type, return-value]
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(KeyError, match=r"layers\.0\.fc1\.input: not traced"):
        trace(ours, IDS, names="*.output")["layers.0.fc1.input"]


def test_a_language_model_is_traced_too() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    assert lm.tokenizer is not None
    ids, mask = lm.tokenizer.encode_batch(["The ship sailed", "The"])
    assert len(trace(lm, ids, mask).residual) == lm.decoder.config.num_hidden_layers + 1

"""The fast model is the plain one: the same logits, tokens and weights, whatever kernels the machine has."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import minopt
from minopt import OPT, int8
from minopt.evaluation.perplexity import window_perplexity
from minopt.inference import fast, linear
from minopt.inference.fast import FastOPT
from minopt.inference.linear import OUTLIERS_FROM
from minopt.model import ACTIVATIONS
from minopt.training import method
from minopt.training.trainer import TrainingStopped, train
from tests.conftest import build_ours, build_reference, lively, quantized_state
from tests.training import small

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def fast_of(model: OPT, *, quantize: bool = False) -> FastOPT:
    return FastOPT(model.config, (quantized_state(model) if quantize else model.state_dict()).items())


def ids_of(model: OPT, *shape: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest expected value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.fixture(params=["onednn", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the operators that this machine has, and without."""
    if request.param == "plain":
        monkeypatch.setattr(linear, "_works", lambda kind, dtype: False)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_logits_are_those_of_transformers(kind: str, kernels: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = build_reference(kind)
    plain = build_ours(reference)
    fast = fast_of(plain.to(dtype))
    ids = ids_of(plain, 2, 7)
    with torch.no_grad():
        expected = reference(ids, attention_mask=PADDED).logits[PADDED.bool()]
        assert difference(fast(ids, PADDED)[PADDED.bool()], expected) < tolerance
        assert difference(fast(ids), reference(ids).logits) < tolerance


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers(activation: str, kernels: str) -> None:
    reference = build_reference("125m", activation_function=activation)
    plain = build_ours(reference)
    ids = ids_of(plain, 2, 7)
    with torch.no_grad():
        expected = reference(ids).logits
        assert difference(plain(ids), expected) < 1e-6
        assert difference(fast_of(plain)(ids), expected) < 1e-5
        assert difference(fast_of(plain, quantize=True)(ids), expected) < 0.2
        assert difference(fast_of(plain.to(torch.bfloat16))(ids), expected) < 5e-2
        other = "tanh" if activation != "tanh" else "relu"
        wrong = build_ours(build_reference("125m", activation_function=other))
        assert difference(wrong(ids), expected) > 1e-3


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"])
def test_each_bias_and_weight_counts(part: str) -> None:
    """A negative control: the test above would see any of them lost or swapped."""
    plain = build_ours(build_reference("125m"))
    ids = ids_of(plain, 2, 7)
    for name in ("weight", "bias"):
        state = dict(plain.state_dict())
        key = f"layers.1.{part}.{name}"
        state[key] = torch.zeros_like(state[key])
        assert difference(FastOPT(plain.config, state.items())(ids), plain(ids)) > 1e-3


def test_every_split_into_prefill_and_steps_gives_the_same_logits(kind: str) -> None:
    fast = fast_of(build_ours(build_reference(kind)))
    ids = ids_of(fast, 2, 9)
    whole = fast(ids)
    for split in range(1, 9):
        cache = fast.new_cache(2, 9)
        parts = [fast(ids[:, :split], cache=cache)]
        parts += [fast(ids[:, i : i + 1], cache=cache) for i in range(split, 9)]
        assert difference(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "no_repeat_ngram_size": 2}, {"do_sample": True, "seed": 3}])
def test_generated_tokens_are_the_plain_models(kind: str, kernels: str, options: dict[str, Any]) -> None:
    plain = build_ours(lively(kind, torch.float32))
    fast = fast_of(plain)
    ids = ids_of(plain, 2, 7)
    for mask in (None, PADDED):
        expected = minopt.generate(plain, ids, mask, max_new_tokens=20, **options)
        assert torch.equal(minopt.generate(fast, ids, mask, max_new_tokens=20, **options).sequences, expected.sequences)


def test_the_embedded_model_says_the_same_with_and_without() -> None:
    prompts = ["The ship", "It was a dark and stormy night when", "Alice"]
    fast, plain = (minopt.load(minopt.DEMO, device="cpu", optimize=optimize) for optimize in (True, False))
    assert isinstance(fast.model, FastOPT)
    assert type(plain.model) is OPT
    assert fast.generate(prompts, max_new_tokens=40) == plain.generate(prompts, max_new_tokens=40)
    assert "".join(fast.stream("The ship", max_new_tokens=9)) == plain.generate("The ship", max_new_tokens=9)
    scores = [lm.score("The ship sailed", [" the sea", " ceiling"])[0].total for lm in (fast, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_are_given_back_to_the_bit(kind: str, kernels: str, dtype: torch.dtype, quantize: bool) -> None:
    plain = build_ours(build_reference(kind)).to(dtype)
    fast = fast_of(plain, quantize=quantize)
    expected = quantized_state(plain) if quantize else plain.state_dict()
    for found in (fast.state_dict(), dict(fast.named_parameters())):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in expected.items())
    assert quantize or list(fast.state_dict()) == list(expected)
    ids = ids_of(plain, 2, 7)
    assert torch.equal(FastOPT(fast.config, fast.state_dict().items())(ids), fast(ids))


def test_what_was_packed_is_let_go() -> None:
    plain = build_ours(build_reference("125m"))
    given: dict[str, weakref.ref[Tensor]] = {}

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in plain.state_dict().items():
            own = tensor.clone()
            given[name] = weakref.ref(own)
            yield name, own
            del own
            if name == "layers.1.fc1.weight":  # those of the layer before are joined: copied, whatever the product
                assert not any(given[f"layers.0.self_attn.{p}_proj.weight"]() is not None for p in "qkv")

    FastOPT(plain.config, weights())
    assert given["layers.1.fc1.weight"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pages_of_packed_weights_go_with_them(dtype: str, tmp_path: Path) -> None:
    """Or a model that keeps the dtype of its file would be in memory twice."""
    if linear.kind_on_cpu(getattr(torch, dtype)) is linear.Plain:
        pytest.skip("this machine packs no such weights")
    reference = build_reference("125m", hidden_size=512, ffn_dim=2048, num_hidden_layers=2)
    reference.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    at_most = [0]
    build = fast.build_product

    def counted(*args: Any, **options: Any) -> Any:
        at_most[0] = max(at_most[0], mapped())
        return build(*args, **options)

    def mapped() -> int:
        spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        return sum(int(end, 16) - int(begin, 16) for begin, end in (span.split("-") for span in spans))

    with mock.patch.object(fast, "build_product", counted):
        lm = minopt.load(tmp_path, device="cpu", dtype=dtype)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < at_most[0] < 2 * size  # the reader's own mapping of the file, and what is just now packed
    assert mapped() == 0
    assert lm.decoder.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "fp4"}, 'quantize: expected None, "int8" or "int4", got \'fp4\'.'),
        ({"quantize": "int8", "optimize": False}, "quantize: int8 weights need optimize, got optimize=False."),
        ({"optimize": "fast"}, "optimize: expected True, False or \"compile\", got 'fast'."),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minopt.load("no/such-model", device="cpu", **options)


def test_a_scheme_that_passes_the_first_check_does_not_become_int8(
    write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minopt.load_options._VALUES", {})
    with pytest.raises(ValueError, match="quantize: expected None or \"int8\", got 'fp4'\\."):
        minopt.load(write_checkpoint(), device="cpu", quantize="fp4")


# int8


def dequantised(model: OPT) -> OPT:
    """A plain model of the numbers that int8 weights stand for; the head apart, which has them as well."""
    plain = OPT(model.config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in filter(int8.is_quantized, list(state)):
        state[name] = int8.dequantize(*int8.quantize(state[name]), torch.float32)
    plain.load_state_dict(state)
    table = int8.dequantize(*int8.quantize(plain.embed_tokens.weight), torch.float32)
    plain.head = lambda h: h @ table.T  # type: ignore[method-assign]
    return plain.eval()


@pytest.mark.parametrize("form", ["int8", "outliers", "weights alone"])
def test_int8_is_its_own_dequantised_reference(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "OUTLIERS_FROM", 1 if form == "outliers" else OUTLIERS_FROM)
    if form == "weights alone":
        monkeypatch.setattr(linear, "_works", lambda kind, dtype: False)
    tolerance = {"int8": 3e-2, "outliers": 2e-4, "weights alone": 1e-5}[form]
    plain = build_ours(build_reference(kind))
    quantised, ids = fast_of(plain, quantize=True), ids_of(plain, 2, 7)
    with torch.no_grad():
        for given in (ids, ids[:1, :1]):
            expected = dequantised(plain)(given)
            assert ((quantised(given) - expected).norm() / expected.norm()).item() < tolerance
            assert (plain(given) - expected).norm() / expected.norm() > 2 * tolerance or form == "int8"


def test_int8_of_the_embedded_model_reads_nearly_as_well() -> None:
    text = (Path(minopt.DEMO) / "README.md").read_text(encoding="utf-8")
    perplexities = []
    for options in ({"optimize": False}, {"quantize": "int8"}):
        lm = minopt.load(minopt.DEMO, device="cpu", **options)
        assert lm.tokenizer is not None
        perplexities.append(window_perplexity(lm.model, lm.tokenizer.encode(text), 256).perplexity)
    assert perplexities[0] != perplexities[1]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.02)


@pytest.mark.parametrize("quantize", [False, True])
def test_autocast_changes_nothing(quantize: bool) -> None:
    model = fast_of(build_ours(build_reference("125m")), quantize=quantize)
    ids = torch.arange(2, 12).view(2, 5)
    expected = model(ids), minopt.generate(model, ids, max_new_tokens=5, eos_token_id=()).sequences
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids), minopt.generate(model, ids, max_new_tokens=5, eos_token_id=()).sequences
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("change", [
    lambda layers: layers.__setitem__(0, torch.nn.Identity()),
    lambda layers: layers.__delitem__(0),
])  # fmt: skip
def test_a_model_whose_layers_were_replaced_does_not_give_weights(change: Any, tmp_path: Path) -> None:
    model = fast_of(build_ours(build_reference("125m")))
    change(model.layers)
    with pytest.raises(ValueError, match="others took the place of its layers, so their weights cannot be read"):
        minopt.save_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_wanted_positions_alone_are_those_of_all(kind: str, kernels: str) -> None:
    model = fast_of(build_ours(build_reference(kind)))
    ids, wanted = ids_of(model, 2, 7), torch.tensor([6, 13, 5])
    assert difference(model.hidden_states(ids, wanted=wanted), model.hidden_states(ids).flatten(0, 1)[wanted]) < 1e-5


@torch.no_grad()
def test_the_last_layer_of_a_prompt_ends_with_the_wanted_tokens_unless_a_hook_watches_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build_ours(build_reference(kind))
    ids, wanted = ids_of(plain, 2, 7), torch.tensor([6, 13])
    at, expected = torch.arange(7).expand(2, 7), plain(ids).flatten(0, 1)
    for model in (plain, fast_of(plain)):
        own, seen = type(model.layers[0]), list[Any]()
        forward: Callable[..., Tensor] = own.forward

        def spy(*inputs: Any, forward: Any = forward, seen: Any = seen) -> Any:
            y = forward(*inputs)
            seen.append([*y.shape[:-1]])
            return y

        monkeypatch.setattr(own, "forward", spy)
        watched = [None, model.layers[-1], model.layers[-1].get_submodule("fc2") if model is plain else None]
        for module in (*watched, model.final_layer_norm, model.project_out):
            hooked = list[Any]()
            handle = module and module.register_forward_hook(lambda *call: hooked.append(call[-1].shape[:2]))  # noqa: B023
            seen.clear()
            cache = model.new_cache(2, 8)
            assert difference(model.read(ids, at, None, wanted, cache), expected[wanted]) < 1e-5
            assert seen == [[2, 7]] * (len(seen) - 1) + ([[2]] if handle is None else [[2, 7]])
            assert hooked == ([] if handle is None else [(2, 7)])
            assert cache.length == 7
            if handle is not None:
                handle.remove()
        everywhere = list[Any]()
        of_all = torch.nn.modules.module.register_module_forward_hook(lambda *call: everywhere.append(call[0]))  # noqa: B023
        seen.clear()
        model.read(ids, at, None, wanted, model.new_cache(2, 8))
        of_all.remove()
        assert everywhere
        assert seen[-1] == [2, 7]
        assert difference(model.read(ids, at, None, None, model.new_cache(2, 8)), expected) < 1e-5


def test_a_run_on_a_cpu_generates_with_it_and_measures_a_text_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(method, "evaluate", lambda model, *args, **options: used.append(type(model)))
    for number, data in enumerate((small.examples(2), "some text to measure")):
        config = small.settings(tmp_path / str(number), max_steps=1, do_eval=True)
        with pytest.raises(TrainingStopped):  # as if a signal had come: there is no result
            train(small.model_of(), small.examples(4), config, tokenizer=small.tokenizer(), eval_data=data)
    assert used == [FastOPT, OPT]

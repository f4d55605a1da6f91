"""Where looking makes the host wait, it looks every few steps: the same results, and steps behind the last are cut."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minopt import OPT, GenerationConfig, GenerationOutput, OPTConfig, generate
from minopt.generation import decode
from minopt.generation.request import prepare
from minopt.generation.rules import block_ngrams
from tests.conftest import SIZE
from tests.generation.decoders import Watched, say
from tests.generation.test_properties import Case, build_decoder, check, sensible
from tests.generation.test_properties import search as of_examples


@contextmanager
def late(steps: int) -> Iterator[None]:
    """The host looks as rarely as on a GPU, every so many steps."""
    rarely = decode.steps_between_looks

    def as_on_a_gpu(request: Any) -> int:
        return rarely(dataclasses.replace(request, decoder=Watched(request.decoder, "cuda")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "LOOK_EVERY", steps)
        patch.setattr(decode, "steps_between_looks", as_on_a_gpu)
        yield


def everything(found: GenerationOutput) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(found).items()}


def test_all_that_comes_out_is_the_same() -> None:
    """Bit by bit, behind the ends of rows too; and neither the cache nor the generator knows of more or less."""
    met: Counter[str] = Counter()

    @of_examples(600)
    @given(case=sensible(), steps=st.sampled_from((2, 3, 8, 100)))
    def is_the_same(case: Case, steps: int) -> None:
        case.options |= {"num_beams": 1}
        for name in ("length_penalty", "early_stopping"):
            case.options.pop(name, None)
        if not case.options["do_sample"]:
            case.options.pop("num_return_sequences", None)
        decoder = build_decoder(*case.decoder)
        plain, calls, state = case.run(decoder), decoder.calls, torch.get_rng_state()
        with late(steps):
            found = case.run(decoder)
        assert torch.equal(torch.get_rng_state(), state)
        assert str(everything(found)) == str(everything(plain))  # a NaN is the same as a NaN
        check(case, decoder, found)
        more = decoder.calls - 2 * calls
        assert 0 <= more < steps
        is_seen = case.processors or case.criteria or case.options.get("max_time")
        assert more == 0 or not is_seen
        met["more"] += more > 0
        met["sampled"] += more > 0 and case.options["do_sample"]
        met.update(f"{reason} late" for reason in set(found.stop_reasons) if more)
        met["not at once"] += more > 0 and len(set(found.lengths)) > 1
        met["seen"] += bool(is_seen) and max(found.lengths) > 2

    is_the_same()
    wanted = ("more", "sampled", "eos late", "exhausted late", "not at once", "seen")
    assert [what for what in wanted if not met[what]] == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.2, "presence_penalty": 0.1, "suppress_tokens": (5,), "forced_bos_token_id": 9},
        {"bad_words_ids": [[3, 4]], "sequence_bias": {(6,): 1.0}, "min_new_tokens": 2, "eos_token_id": (7, 8)},
        {"output_logprobs": True, "top_logprobs": 2, "output_scores": True},
        {"do_sample": True, "temperature": 0.5, "top_k": 9},
        {"do_sample": True, "top_k": 0, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.1, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_nothing_is_read_between_two_looks(options: dict[str, Any], is_padded: bool) -> None:
    """On torch's device without values, where reading one fails."""
    shape = OPTConfig(**SIZE | {"vocab_size": 2000})
    model, there = (OPT(shape, device=device).eval() for device in ("meta", "cpu"))  # one without numbers is refused
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]) if is_padded else None
    config = GenerationConfig(max_new_tokens=12, **options)
    request = dataclasses.replace(prepare(there, torch.full((2, 4), 3), mask, config), decoder=model).on_device()
    steps = decode.decode_steps(request, 8)
    assert [next(steps).tokens.device.type for _ in range(7)] == ["meta"] * 7
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        next(steps)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        next(decode.decode_steps(request))
    ids = torch.ones(2, 9, dtype=torch.long, device="meta")
    assert block_ngrams(ids, torch.ones(2, 50, device="meta"), None, 2).shape == (2, 50)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("step", [0, 3, 4, 9])
@pytest.mark.parametrize("every", [1, 4])
def test_scores_that_are_no_numbers_are_refused_at_the_next_look(every: int, step: int, do_sample: bool) -> None:
    decoder = say([[*range(10, 20)], [*range(20, 30)]])
    decoder.written *= 100
    decoder.written[step:, 1] = torch.nan
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": do_sample}
    message = rf"expected numbers, got NaN or infinity at new token {step}\. In float16 a model may "
    with late(every), pytest.raises(ValueError, match=message):
        generate(decoder, torch.ones(2, 1).long(), **options)
    assert decoder.calls == 1 + min(10, (step // every + 1) * every)  # a cache, and up to the next look
    if step > 0:  # of a row that had ended by then
        decoder.written[step - 1, 1, 2] = 1e6
        with late(every):
            assert generate(decoder, torch.ones(2, 1).long(), **options).lengths == (10, step)


def test_the_host_looks_each_step_where_it_costs_nothing_or_somebody_sees_the_steps() -> None:
    decoder, ids = say([[10, 11]]), torch.ones(1, 1).long()

    def every(decoder: Any, processor: Any = None, criterion: Any = None, **options: Any) -> int:
        config = GenerationConfig(**options)
        request = prepare(say([[10, 11]]), ids, None, config, processor, criterion)
        return decode.steps_between_looks(dataclasses.replace(request, decoder=decoder))

    gpu = Watched(decoder, "cuda")
    assert every(gpu) == every(gpu, do_sample=True) == every(gpu, no_repeat_ngram_size=2) == decode.LOOK_EVERY == 8
    assert every(decoder) == 1
    assert every(gpu, processor=lambda ids, scores: scores) == every(gpu, criterion=lambda ids, scores: False) == 1
    assert every(gpu, max_time=1.0) == every(gpu, prompt_lookup_num_tokens=2) == 1

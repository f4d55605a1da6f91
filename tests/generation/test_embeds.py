"""Prompts that are embeddings: in a pass, in generation and in scores, against transformers and against ids."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import minopt
from minopt import OPT, generate
from minopt.generation.scoring import token_logprobs
from minopt.inference.fast import FastOPT
from minopt.inference.program import ExportedModel
from tests.conftest import KINDS, build_ours, lively, pad_left

Pair = tuple[Any, OPT]
IDS, MASK = pad_left([torch.tensor([5, 20, 33, 47, 60]), torch.tensor([2, 9, 71])])
OPTIONS = {
    "greedy": {},
    "rules": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "beams and rules": {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Pair:
    reference = lively(request.param, torch.float64)
    return reference, build_ours(reference)


def embeds_of(model: OPT) -> Tensor:
    """Embeddings that no token has."""
    generator = torch.Generator().manual_seed(3)
    embeds = model.embed_tokens(IDS).detach()
    return embeds + 0.3 * torch.randn(embeds.shape, generator=generator, dtype=embeds.dtype)


@torch.no_grad()
def test_a_pass_over_embeddings_is_transformers(pair: Pair) -> None:
    reference, ours = pair
    embeds = embeds_of(ours)
    found = ours(inputs_embeds=embeds, attention_mask=MASK)
    expected = reference(inputs_embeds=embeds, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-10, atol=1e-10)
    assert torch.equal(ours(inputs_embeds=ours.embed_tokens(IDS), attention_mask=MASK), ours(IDS, MASK))
    cache = ours.new_cache(2, 5)
    first = ours(None, MASK[:, :3], None, cache, inputs_embeds=embeds[:, :3])
    rest = ours(None, MASK, None, cache, inputs_embeds=embeds[:, 3:])
    torch.testing.assert_close(torch.cat([first, rest], 1)[MASK.bool()], found[MASK.bool()], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_embeddings_are_cast_to_the_models_dtype() -> None:
    model = build_ours(lively("350m", torch.float32)).bfloat16()
    embeds = embeds_of(model).float() + 1e-4
    found = model(inputs_embeds=embeds)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, model(inputs_embeds=embeds.bfloat16()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_generation_from_embeddings_is_transformers(pair: Pair, options: dict[str, Any]) -> None:
    reference, ours = pair
    embeds = embeds_of(ours)
    found = generate(ours, inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=12, **options)
    # Each row alone: transformers' repetition_penalty goes wrong in a padded row of embeddings.
    for row, alone in zip(found.sequences, (embeds[:1], embeds[1:, 2:]), strict=True):
        expected = reference.generate(
            inputs_embeds=alone, max_new_tokens=12, do_sample=False, pad_token_id=1, **options
        )
        assert row.tolist() == expected[0].tolist()
    assert found.lengths == (12, 12)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 5, "num_return_sequences": 3}, {"num_beams": 3}])
def test_embeddings_of_ids_give_what_the_ids_give(options: dict[str, Any]) -> None:
    reference = lively("350m", torch.float32)
    plain = build_ours(reference)
    fast = FastOPT(plain.config, plain.state_dict().items())
    for model in (plain, fast):
        embeds = model.embed_tokens(IDS)
        by_ids = generate(model, IDS, MASK, max_new_tokens=8, output_logprobs=True, **options)
        found = generate(
            model, inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=8, output_logprobs=True, **options
        )
        assert torch.equal(found.sequences, by_ids.sequences[:, 5:])
        assert found.logprobs is not None
        torch.testing.assert_close(found.logprobs, by_ids.logprobs)


@torch.no_grad()
def test_texts_are_scored_after_embeddings(pair: Pair) -> None:
    reference, ours = pair
    soft = embeds_of(ours)[0, :3]
    shared = list(range(10, 22))
    for rows in (
        [[4, 9, 30], [2, 50, 61, 7, 8]],
        [[*shared, 5, 6], [*shared, 7], [*shared, 8, 9, 10, 11], [*shared, 1]],
    ):
        found = token_logprobs(ours, rows, [1] * len(rows), soft)
        for row, got in zip(rows, found, strict=True):
            ids = torch.tensor([row])
            embeds = torch.cat([soft, reference.get_input_embeddings()(ids)[0]])[None]
            logprobs = reference(inputs_embeds=embeds).logits[0, 3:-1].log_softmax(-1)
            torch.testing.assert_close(got, logprobs.gather(1, ids[0, 1:, None])[:, 0].float())
            assert not torch.allclose(got, token_logprobs(ours, [row], [1])[0])


def test_a_soft_prompt_before_texts() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu")
    soft = lm.model.embed_tokens(torch.tensor(lm.tokenizer.encode("The ship sailed")))  # type: ignore[union-attr]
    texts = [" out upon the sea.", " the"]
    plain = lm.score([f"The ship sailed{text}" for text in texts], add_bos=None)
    after = lm.score(texts, inputs_embeds=soft, add_bos=False)
    for whole, part in zip(plain, after, strict=True):
        count = len(part.token_ids) - 1
        if count:
            torch.testing.assert_close(whole.logprobs[-count:], part.logprobs[1:], rtol=1e-4, atol=1e-4)


def test_wrong_embeddings_are_told() -> None:
    model = build_ours(lively("350m", torch.float32))
    embeds = model.embed_tokens(IDS)
    wide, ids = (
        "inputs_embeds: expected [batch, tokens, 16], got [2, 5, 7].",
        "input_ids, inputs_embeds: expected one, got ",
    )
    floats = "inputs_embeds: expected floats [batch, tokens, 16], got "
    cases: list[tuple[Any, str]] = [
        (lambda: model(), f"{ids}none."),
        (lambda: model(IDS, inputs_embeds=embeds), f"{ids}both."),
        (lambda: model(inputs_embeds=embeds[..., :7]), wide),
        (lambda: generate(model, IDS, inputs_embeds=embeds), f"{ids}both."),
        (lambda: generate(model, inputs_embeds=IDS), f"{floats}[2, 5] of torch.int64."),
        (lambda: generate(model, inputs_embeds=[0.5]), f"{floats}list."),  # type: ignore[arg-type]
        (lambda: generate(model), "input_ids: expected ids and mask as tensors, got NoneType."),
        (lambda: generate(model, None, MASK[:, 1:], inputs_embeds=embeds),
         "attention_mask: expected the shape of inputs_embeds [2, 5], got [2, 4]."),
        (lambda: generate(model, inputs_embeds=embeds, prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens: copies"),
        (lambda: generate(model, inputs_embeds=embeds, max_new_tokens=60), "prompt: 5 tokens + max_new_tokens 60 = 65"),
        (lambda: token_logprobs(model, [[1, 2]], [1], embeds), "inputs_embeds: expected floats [tokens, 16], got"),
        (lambda: token_logprobs(model, [[1] * 63], [1], embeds[0]), "text: 63 tokens behind 5 embeddings, the model"),
    ]  # fmt: skip
    for wrong, message in cases:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            wrong()


def test_a_program_refuses_embeddings() -> None:
    program = object.__new__(ExportedModel)
    with pytest.raises(ValueError, match=r"^inputs_embeds: expected ids, for an exported program"):
        program.read(torch.zeros(1, 1, 16), torch.zeros(1, 1), None, None, None)  # type: ignore[arg-type]

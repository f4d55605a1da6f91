"""Models that draft for others: real ones of each kind, what is drawn, how long drafts are, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minopt
from minopt import generate
from minopt.generation.decoder import Draft
from tests.conftest import build_ours, lively, pad_left
from tests.generation.decoders import Table, Watched
from tests.generation.test_decode import chi_square, random_prompts
from tests.generation.test_drafts import assert_same

SAMPLED = {"do_sample": True, "top_k": 0, "seed": 3}


@pytest.fixture(autouse=True)
def is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models spend their time in calls of operators, where no draft would pay."""
    monkeypatch.setattr(Draft, "cost_for", lambda self, other: 0.2)


LOADED: dict[str, dict[str, Any]] = {"fast": {}, "plain": {"optimize": False}, "offloaded": {"offload": "disk"}}


@pytest.mark.parametrize("options", LOADED.values(), ids=LOADED)
def test_each_form_of_each_kind_has_a_draft_of_its_own_weights(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Tokens are those without, in padded batches too; what is not in int8 is held once."""
    lively(kind, torch.float32).save_pretrained(tmp_path)
    lm = minopt.load(tmp_path, device="cpu", draft="int8", **options)
    assert lm.draft is not None
    tables = [decoder.as_opt().embed_tokens.weight for decoder in (lm.decoder, lm.draft.decoder)]
    assert tables[0].data_ptr() == tables[1].data_ptr()
    alone = minopt.load(tmp_path, device="cpu", quantize="int8")
    ids, mask = pad_left(random_prompts(2, seed=2))
    assert torch.equal(lm.draft.decoder.as_opt()(ids), alone.model(ids))
    for call in ({}, SAMPLED):
        more: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": (), **call}
        found = generate(lm.decoder, ids, mask, draft=lm.draft, **more)
        assert torch.equal(found.sequences, generate(lm.decoder, ids, mask, **more).sequences)
        assert max(found.accepted_tokens or ()) > 0


def test_a_model_drafts_for_one_in_int8_and_for_padded_lists() -> None:
    large, draft = (minopt.load(minopt.DEMO, device="cpu", quantize=quantize) for quantize in ("int8", None))
    prompts = ["The captain said", "It was"]
    plain = large.generate(prompts, max_new_tokens=12, batch_size=2, show_progress=False)
    options: dict[str, Any] = {"max_new_tokens": 12, "draft": draft, "return_details": True, "show_progress": False}
    for limit in (None, 2):
        found = large.generate(prompts, batch_size=limit, **options)
        assert [each.text for each in found] == plain
        assert sum(each.accepted_tokens for each in found) > 0


def test_a_draft_that_could_hardly_pay_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.8 of the model's step with drafts that are all right, decoding would be 17 / (1 + 16 * 0.83) as fast."""
    for cost, drafts in ((0.75, True), (0.8, False)):
        monkeypatch.setattr(Draft, "cost_for", lambda self, other, cost=cost: cost)
        model, draft = (Watched(Table(torch.eye(60).roll(1, 1) * 9, max_position_embeddings=400)) for _ in range(2))
        found = generate(model, torch.tensor([[4]]), draft=draft, max_new_tokens=80)
        assert (found.drafted_tokens != (0,)) == bool(draft.reads) == drafts


def rounded(model: Any, noise: float) -> Any:
    """A model near another one."""
    other = minopt.OPT(model.config, dtype=model.dtype).eval()
    torch.manual_seed(0)
    other.load_state_dict({name: t + noise * t.std() * torch.randn_like(t) for name, t in model.state_dict().items()})
    return other


@pytest.mark.parametrize("options", [{}, SAMPLED, SAMPLED | {"num_return_sequences": 2, "no_repeat_ngram_size": 3}],
                         ids=["greedy", "sampling", "several"])  # fmt: skip
@pytest.mark.parametrize("shares_cache", [False, True])
def test_models_of_each_kind_give_what_they_give_without(
    kind: str, shares_cache: bool, options: dict[str, Any]
) -> None:
    """In padded batches and alone, in float64, where no rounding decides; drafts are used, and save passes."""
    model = build_ours(lively(kind))
    ours, draft = Watched(model), Draft(rounded(model, 0.003), shares_cache)
    for prompts in (random_prompts(2, seed=2), random_prompts(1, seed=4)):
        ids, mask = pad_left(prompts)
        more = {"max_new_tokens": 30, "output_logprobs": True, **options}
        plain = generate(ours, ids, mask, **more)
        before = len(ours.reads)
        found = generate(ours, ids, mask, draft=draft, **more)
        assert_same(found, plain, 1e-6)
        assert found.accepted_tokens is not None
        assert len(ours.reads) == 2 * before - max(found.accepted_tokens)
        assert max(found.accepted_tokens) > 0.1 * before
        ours.reads.clear()


def test_in_16_bits_logits_are_those_of_a_pass_without_drafts_up_to_rounding() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", dtype="bfloat16", draft="int8")
    plain = minopt.load(minopt.DEMO, device="cpu", dtype="bfloat16")
    ids = torch.tensor([[2, 100, 300, 20]])
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": (), "output_scores": True}
    ours = generate(lm.decoder, ids, draft=lm.draft, **options)
    theirs = generate(plain.decoder, ids, **options)
    assert ours.scores is not None
    assert theirs.scores is not None
    differ = (ours.sequences[0, 4:] != theirs.sequences[0, 4:]).nonzero()
    same = int(differ[0, 0]) + 1 if len(differ) else 40
    torch.testing.assert_close(ours.scores[:, :same], theirs.scores[:, :same], rtol=0, atol=0.25)
    assert same > 5


def test_sampling_with_a_draft_has_the_models_distribution() -> None:
    """Chi-square of two tokens, the second of which is drafted; at another temperature it would not fit."""
    tables = 0.7 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    model, draft = (Table(table) for table in tables)
    counts, accepted = torch.zeros(16), 0
    for seed in range(1200):
        found = generate(model, torch.tensor([[2]]), draft=draft, max_new_tokens=3, eos_token_id=(),
                         do_sample=True, top_k=0, seed=seed)  # fmt: skip
        counts[4 * int(found.sequences[0, 1]) + int(found.sequences[0, 2])] += 1
        accepted += sum(found.accepted_tokens or ())
    for table, fits in ((tables[0], True), (tables[0] / 1.7, False), (tables[1], False)):
        expected = (table[2].softmax(0)[:, None] * table.softmax(-1)).flatten()
        assert (chi_square(counts, expected) < 4) == fits
    assert 150 < accepted < 1150


def test_a_draft_that_is_never_right_is_hardly_asked_and_one_that_always_is_gives_long_drafts() -> None:
    table = torch.eye(60).roll(1, 1) * 9
    model, wrong, right = (Watched(Table(t, max_position_embeddings=400)) for t in (table, -table, table))
    plain = generate(model, torch.tensor([[4]]), max_new_tokens=300)
    for draft, most, least in ((wrong, 30, 0), (right, 10**6, 200)):
        model.reads.clear()
        found = generate(model, torch.tensor([[4]]), max_new_tokens=300, draft=Draft(draft, shares_cache=True))
        assert_same(found, plain)
        assert found.drafted_tokens is not None
        assert found.accepted_tokens is not None
        assert found.drafted_tokens[0] < most
        assert found.accepted_tokens[0] >= least
        assert len(model.reads) == 300 - found.accepted_tokens[0]


def test_a_draft_costs_the_bytes_that_it_reads_and_the_operators_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on a CPU: int8 takes 0.32 of float32's step and 0.6 of bfloat16's at opt-125m's size, more than 1 of a
    small model's.
    """
    monkeypatch.undo()

    def cost(name: str | None, dtype: torch.dtype, **sizes: int) -> float:
        config = minopt.OPTConfig.preset(name) if name else minopt.OPTConfig(**sizes)
        model, draft = (minopt.OPT(config, device="meta", dtype=dtype) for _ in range(2))
        draft.in_8_bits = True
        return Draft(draft, shares_cache=True).cost_for(model)

    assert 0.3 < cost("opt-125m", torch.float32) < 0.45
    assert 0.55 < cost("opt-125m", torch.bfloat16) < 0.7
    small = {"hidden_size": 256, "num_hidden_layers": 4, "ffn_dim": 1024, "num_attention_heads": 4, "vocab_size": 2048}
    assert cost(None, torch.float32, **small) > 0.85
    large, draft = (minopt.OPT(minopt.OPTConfig.preset(f"opt-{size}"), device="meta") for size in ("1.3b", "125m"))
    assert 0.08 < Draft(draft).cost_for(large) < 0.15
    large.in_8_bits = True
    assert 0.3 < Draft(draft).cost_for(large) < 0.45


def refused(ids: Tensor | None = None, **options: Any) -> str:
    table = torch.eye(60)
    model = Watched(Table(table))
    with pytest.raises(ValueError, match="draft: expected") as error:
        generate(model, torch.tensor([[4]]) if ids is None else ids, **({"draft": Table(table)} | options))
    assert model.reads == []
    assert str(error.value).endswith(".")
    return str(error.value)


def test_drafts_that_do_not_fit_are_refused_and_say_why() -> None:
    few = Table(torch.eye(60), max_position_embeddings=10)
    program = Table(torch.eye(60))
    program.max_batch = 1  # type: ignore[assignment]
    assert "got num_beams 2" in refused(num_beams=2)
    assert "got prompt_lookup_num_tokens too" in refused(prompt_lookup_num_tokens=2)
    assert "vocabulary of 60 tokens, got 50" in refused(draft=Table(torch.eye(50)))
    assert "at least 21 positions, for prompt and new tokens, got 10" in refused(draft=few)
    assert "at most 1 rows, for which its program was exported, got 2" in refused(
        torch.ones(2, 1).long(), draft=program
    )
    assert "got str" in refused(draft="facebook/opt-125m")
    assert "on cpu, where the model is, got cuda" in refused(draft=Watched(Table(torch.eye(60)), "cuda"))


def test_a_draft_larger_than_the_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generate(Table(torch.eye(60)), torch.tensor([[4]]), draft=Table(torch.eye(60), num_hidden_layers=9))
    assert "draft: is larger than the model" in caplog.text


# --- loaded with a draft of its own weights


def test_a_model_loaded_with_an_int8_draft_gives_its_texts_in_fewer_passes() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", dtype="float32", draft="int8")
    assert lm.draft is not None
    assert lm.draft.shares_cache
    prompts = ["The captain said", "It was"]
    for options in ({}, {"do_sample": True, "seed": 5, "top_p": 0.9}, {"stop_strings": (". ",)}):
        drafted = [lm.generate(prompt, return_details=True, max_new_tokens=30, **options) for prompt in prompts]
        streamed = ["".join(lm.stream(prompt, max_new_tokens=30, **options)) for prompt in prompts[:1]]
        own, lm.draft = lm.draft, None
        plain = [lm.generate(prompt, return_details=True, max_new_tokens=30, **options) for prompt in prompts]
        lm.draft = own
        assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
        assert [r.stop_reason for r in drafted] == [r.stop_reason for r in plain]
        assert streamed[0] == plain[0].text
        assert sum(r.accepted_tokens for r in drafted) > 0.3 * sum(len(r.token_ids) for r in drafted)
    assert [each.drafted_tokens for each in lm.generate(prompts, max_new_tokens=3, return_details=True)] == [None, None]
    assert lm.generate("It was", num_beams=2, max_new_tokens=3, return_details=True).drafted_tokens is None
    assert lm.generate("It was", prompt_lookup_num_tokens=2, max_new_tokens=3)


def test_an_int8_draft_is_refused_where_there_is_none_or_it_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draft: the model is int8 itself"):
        minopt.load(minopt.DEMO, device="cpu", quantize="int8", draft="int8")
    minopt.load(minopt.DEMO, device="cpu", quantize="int8").save(tmp_path / "int8")
    with pytest.raises(ValueError, match="draft: the model is int8 itself"):
        minopt.load(tmp_path / "int8", device="cpu", draft="int8")
    with pytest.raises(ValueError, match=r'draft: expected None or "int8" \(another model is an option of generate\)'):
        minopt.load(minopt.DEMO, draft="facebook/opt-125m")


def test_a_draft_with_another_tokenizer_is_refused() -> None:
    lm, other = (minopt.load(minopt.DEMO, device="cpu") for _ in range(2))
    assert other.tokenizer is not None
    other.tokenizer.backend.add_tokens(["zzyzx"])
    with pytest.raises(ValueError, match="draft: expected the model's tokenizer, got one with other ids, such as that"):
        lm.generate("It was", draft=other)

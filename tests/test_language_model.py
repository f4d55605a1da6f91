"""Text in, text out, on the checkpoint that the package carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import minopt

PROMPTS = ["It was a dark night", "The captain", "“I will go,” said the old man, and he", ""]


@pytest.fixture(scope="module")
def lm() -> minopt.LanguageModel:
    return minopt.load(minopt.DEMO, device="cpu")


def test_the_embedded_checkpoint_is_small_long_and_known_to_transformers(lm: minopt.LanguageModel) -> None:
    weights = Path(minopt.DEMO) / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert lm.model.config.max_position_embeddings >= 1024
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("x")[0] == lm.model.config.bos_token_id == 2
    assert transformers.AutoConfig.from_pretrained(minopt.DEMO).model_type == "opt"


def test_text_is_that_of_transformers(lm: minopt.LanguageModel) -> None:
    """Through its own tokenizer, model and generate, one prompt at a time and as a padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minopt.DEMO)
    reference = transformers.OPTForCausalLM.from_pretrained(minopt.DEMO, dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = reference.generate(ids, max_new_tokens=30, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert [lm.generate(prompt, max_new_tokens=30) for prompt in PROMPTS] == expected
    assert lm.generate(PROMPTS, max_new_tokens=30) == expected


def test_echo_puts_the_prompt_first(lm: minopt.LanguageModel) -> None:
    plain = lm.generate(PROMPTS, max_new_tokens=5)
    echoed = lm.generate(PROMPTS, max_new_tokens=5, echo=True)
    assert echoed == [prompt + text for prompt, text in zip(PROMPTS, plain, strict=True)]


def test_details_tell_tokens_log_probabilities_and_why_it_stopped(lm: minopt.LanguageModel) -> None:
    assert lm.tokenizer is not None
    for prompt, record in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=8, return_details=True), strict=True):
        assert record.text == lm.generate(prompt, max_new_tokens=8)
        assert lm.tokenizer.decode(record.token_ids) == record.text
        assert (len(record.token_ids), record.stop_reason) == (8, "length")
        ids = torch.tensor([lm.tokenizer.encode(prompt) + list(record.token_ids)])
        expected = lm.model(ids)[0, -9:-1].log_softmax(-1)[range(8), ids[0, -8:]]
        assert torch.allclose(torch.tensor(record.logprobs), expected, atol=1e-4)


def test_a_text_that_ends_says_so_and_shows_no_end_token(lm: minopt.LanguageModel) -> None:
    first = lm.generate(PROMPTS[0], max_new_tokens=4, return_details=True)
    again = lm.generate(PROMPTS[:2], max_new_tokens=9, eos_token_id=first.token_ids[2], return_details=True)[0]
    assert again.stop_reason == "eos"
    assert again.token_ids == first.token_ids[:3]
    assert len(again.logprobs) == 3


def test_no_prompts_give_no_texts(lm: minopt.LanguageModel) -> None:
    assert lm.generate([]) == []


def test_an_empty_prompt_starts_from_the_beginning_token(lm: minopt.LanguageModel) -> None:
    expected = minopt.generate(lm.model, torch.tensor([[2]]), max_new_tokens=6).sequences[0, 1:]
    assert lm.generate("", max_new_tokens=6, return_details=True).token_ids == tuple(expected.tolist())
    assert lm.generate("", max_new_tokens=6, add_bos=False) == lm.generate("", max_new_tokens=6)
    headless = dataclasses.replace(lm.model.config, bos_token_id=None)
    model = minopt.OPT(headless)
    with pytest.raises(ValueError, match="prompt: empty, and the model has no beginning-of-text token"):
        minopt.LanguageModel(model, lm.tokenizer).generate("", add_bos=False)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 1.5}])
def test_a_stream_adds_up_to_the_text(lm: minopt.LanguageModel, options: dict[str, object]) -> None:
    for prompt in PROMPTS:
        pieces = lm.stream(prompt, max_new_tokens=40, **options)
        assert isinstance(pieces, Iterator)
        parts = list(pieces)
        assert len(parts) > 10
        assert "".join(parts) == lm.generate(prompt, max_new_tokens=40, **options)


def test_a_stream_refuses_before_the_first_piece(lm: minopt.LanguageModel) -> None:
    with pytest.raises(ValueError, match="unknown option beams"):
        lm.stream("x", beams=3)
    with pytest.raises(ValueError, match="max_new_tokens 2000"):
        lm.stream("x", max_new_tokens=2000)
    with pytest.raises(ValueError, match="give a seed or a generator, not both"):
        lm.stream("x", do_sample=True, seed=1, generator=torch.Generator())


def test_what_would_be_ignored_is_refused(lm: minopt.LanguageModel) -> None:
    with pytest.raises(ValueError, match="output_scores: there is no place for them beside texts"):
        lm.generate("x", output_scores=True)
    with pytest.raises(ValueError, match=r"output_logprobs: there is no place .* Use return_details=True"):
        lm.generate("x", output_logprobs=True)
    with pytest.raises(ValueError, match="a generator acts on sampling only, and do_sample is off"):
        lm.generate("x", generator=torch.Generator())


def test_rows_without_a_token_are_never_generated(lm: minopt.LanguageModel) -> None:
    """OPT's table is padded from 50,265 to 50,272 rows; here the padding is made the most probable of all."""
    config = dataclasses.replace(lm.model.config, vocab_size=lm.model.config.vocab_size + 8)
    model = minopt.OPT(config).eval()
    state = dict(lm.model.state_dict())
    table = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = torch.cat([table, 3 * table[200:201].expand(8, -1)])
    model.load_state_dict(state)
    ids = torch.tensor([lm.tokenizer.encode(PROMPTS[0])])  # type: ignore[union-attr]
    model.embed_tokens.weight.data[2048:] = 100 * model.hidden_states(ids)[0, -1]
    free = minopt.generate(model, ids, max_new_tokens=3).sequences[0, -3:]
    assert free[0] >= 2048
    record = minopt.LanguageModel(model, lm.tokenizer).generate(PROMPTS[0], max_new_tokens=20, return_details=True)
    assert max(record.token_ids) < 2048


def test_save_then_load_gives_the_same_text(lm: minopt.LanguageModel, tmp_path: Path) -> None:
    lm.save(tmp_path / "saved")
    again = minopt.load(tmp_path / "saved", device="cpu")
    assert again.generate(PROMPTS, max_new_tokens=12) == lm.generate(PROMPTS, max_new_tokens=12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("The sea")["input_ids"] == again.tokenizer.encode("The sea")  # type: ignore[union-attr]


def test_seeds_repeat_and_generators_go_on(lm: minopt.LanguageModel) -> None:
    options = {"do_sample": True, "max_new_tokens": 20}
    assert lm.generate("The", seed=1, **options) == lm.generate("The", seed=1, **options)
    assert lm.generate("The", seed=1, **options) != lm.generate("The", seed=2, **options)
    generator = torch.Generator().manual_seed(1)
    first = lm.generate("The", generator=generator, **options)
    assert first == lm.generate("The", seed=1, **options)
    assert lm.generate("The", generator=generator, **options) != first


def test_generation_leaves_nothing_behind_on_the_model(lm: minopt.LanguageModel) -> None:
    before = {name: value for name, value in vars(lm.model).items() if not name.startswith("_")}
    lm.generate("The", max_new_tokens=3)
    assert {name: value for name, value in vars(lm.model).items() if not name.startswith("_")} == before
    assert all(p.requires_grad for p in lm.model.parameters())


def test_files_that_name_different_tokens_are_pointed_out(
    lm: minopt.LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(lm.model.config, bos_token_id=0, eos_token_id=(2, 7), pad_token_id=None)
    model = minopt.OPT(config)
    minopt.LanguageModel(model, lm.tokenizer).save(tmp_path / "saved")
    minopt.load(tmp_path / "saved", device="cpu")
    (message,) = caplog.messages
    assert "bos_token_id is 0 in config.json and 2 in the tokenizer's files" in message


def test_what_is_no_text_is_refused(lm: minopt.LanguageModel) -> None:
    for prompt in (None, 5, [["a"]], [None]):
        with pytest.raises(ValueError, match="prompt: expected a text"):
            lm.generate(prompt)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"got list\. A list of texts goes to generate"):
        lm.stream(["a", "b"])  # type: ignore[arg-type]
    assert lm.tokenizer is not None
    with pytest.raises(ValueError, match="texts: expected a list of texts, got one"):
        lm.tokenizer.encode_batch("abc")
    with pytest.raises(ValueError, match="texts: expected at least one"):
        lm.tokenizer.encode_batch([])

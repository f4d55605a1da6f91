"""New tokens have the same ids and rows in minopt and in transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import minopt
from minopt import LanguageModel, Tokenizer
from tests.conftest import build_ours, build_reference
from tests.training.small import VOCAB, tokenizer

TEXT = "a <x>b<|end|> c"


def opened(tmp_path: Path, kind: str, **changes: Any) -> LanguageModel:
    build_reference(kind, vocab_size=VOCAB, **changes).save_pretrained(tmp_path / "m")
    tokenizer().save(tmp_path / "m")
    return minopt.load(tmp_path / "m", device="cpu", optimize=False)


@pytest.mark.parametrize("count", [3, 9])  # the table has four free rows
def test_transformers_opens_model_and_tokenizer_with_the_same_ids(kind: str, count: int, tmp_path: Path) -> None:
    lm = opened(tmp_path, kind)
    file, before = (tmp_path / "m" / "model.safetensors").read_bytes(), lm.model.embed_tokens.weight.clone()
    tokens = ["<x>", *(f"<{i}>" for i in range(count - 2))]
    ids = [*lm.add_tokens(tokens), *lm.add_tokens(["<|end|>"], special=True)]
    assert ids == [*range(100, 100 + count)]
    assert lm.add_tokens(["<x>", "a"]) == [100, tokenizer().encode("a", add_bos=False)[0]]
    rows = VOCAB if count == 3 else 112
    assert lm.model.config.vocab_size == rows
    mean = before[:100].double().mean(0)  # of the tokens' rows, without the free ones
    table = lm.model.embed_tokens.weight
    assert table.shape == (rows, before.shape[1])
    assert torch.allclose(table[100:103].double(), mean.expand(3, -1), atol=1e-6)
    assert torch.equal(table[:100], before[:100])
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == file

    lm.save(tmp_path / "new")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values())
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    expected = reader(TEXT).input_ids
    assert len(reader) == 100 + count
    again = minopt.load(tmp_path / "new", device="cpu")
    for ours in (lm, again):
        assert ours.tokenizer is not None
        assert ours.tokenizer.encode(TEXT) == expected
        assert {100, 99 + count} <= set(expected)
        assert ours.tokenizer.decode(expected) == reader.decode(expected, skip_special_tokens=True) == "a <x>b c"
        with torch.no_grad():
            logits = ours.model(torch.tensor([expected]))
            assert torch.allclose(logits, theirs(torch.tensor([expected])).logits, atol=1e-4)
    theirs.resize_token_embeddings(120)  # transformers goes on from there


def test_the_new_rows_train_and_are_generated(tmp_path: Path) -> None:
    lm = opened(tmp_path, "125m")
    assert lm.generate("b", max_new_tokens=1)  # rows without a token are remembered from here on
    (new,) = lm.add_tokens(["<x>"])
    ids = torch.tensor([[2, 40, new, 41, new, 40, new]])
    optimizer = torch.optim.AdamW(lm.model.parameters(), 1e-2)
    for _ in range(30):
        logits = lm.model(ids)[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lm.tokenizer is not None
    assert lm.generate(lm.tokenizer.decode([40]), max_new_tokens=1) == "<x>"
    assert lm.model.embed_tokens.weight[new].isfinite().all()


def test_opts_own_tokenizer_gets_the_ids_of_transformers(shared_data: Path, tmp_path: Path) -> None:
    reference = build_reference("125m", vocab_size=50272)
    lm = LanguageModel(build_ours(reference), Tokenizer.load(shared_data / "opt-tokenizer"))
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "opt-tokenizer")
    new = [f"<{i}>" for i in range(8)]
    theirs.add_tokens(new)
    assert lm.add_tokens(new[:7]) == theirs.convert_tokens_to_ids(new[:7]) == [*range(50265, 50272)]
    assert lm.model.config.vocab_size == 50272
    assert lm.add_tokens(new) == theirs.convert_tokens_to_ids(new)
    assert lm.model.config.vocab_size == 50280
    lm.save(tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["model.decoder.embed_tokens.weight"].shape == (50280, 32)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "It is <3>, <7> and so on"
    assert reader(text).input_ids == theirs(text).input_ids == Tokenizer.load(tmp_path / "m").encode(text)


def test_an_added_tokens_decoder_of_the_files_knows_the_new_tokens(tmp_path: Path) -> None:
    lm = opened(tmp_path, "125m")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "theirs")
    own = Tokenizer.load(tmp_path / "theirs")
    own.settings["added_tokens_decoder"] = {"1": {"content": "<pad>", "special": True}}
    lm.tokenizer = own
    lm.add_tokens(["<x>"])
    lm.save(tmp_path / "m", force=True)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert reader("a<x>").input_ids == Tokenizer.load(tmp_path / "m").encode("a<x>") == own.encode("a<x>")


def test_what_cannot_get_tokens_says_what_to_do(tmp_path: Path) -> None:
    lm = opened(tmp_path, "125m")
    fast = minopt.load(tmp_path / "m", device="cpu")
    for call, message in (
        (
            lambda: fast.add_tokens(["<x>"]),
            "made for inference, its token table cannot get new rows. Load the plain mo",
        ),
        (lambda: LanguageModel(lm.model, None).add_tokens(["<x>"]), "tokenizer: the model's folder has none"),
        (lambda: lm.add_tokens("<x>"), "tokens: expected a list of texts, none of them blank, got '<x>'"),
        (lambda: lm.add_tokens(["<x>", " "]), "none of them blank"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert len(fast.tokenizer or ()) == len(lm.tokenizer or ()) == 100  # nothing was added

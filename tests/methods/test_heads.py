"""Classifiers, reward models and readers: transformers' folders and numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import minopt
from minopt import QuestionAnswering, SequenceClassifier
from tests.conftest import build_reference, error, pad_left
from tests.training.small import VOCAB, tokenizer

LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}


def reference_of(kind: str, name: str, **changes: Any) -> Any:
    """transformers' class, all its parameters perturbed."""
    decoder = build_reference(kind, **({"vocab_size": VOCAB} | changes))
    model = getattr(transformers, name)(decoder.config).eval()
    model.model = decoder.model
    torch.manual_seed(1)
    for parameter in list(model.parameters())[-2:]:
        torch.nn.init.normal_(parameter)
    return model


def write(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCAB - 8, (n,), generator=generator) for n in lengths]


def padded(given: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left(given)
    if side == "right":
        lengths = mask.sum(1).tolist()
        ids, mask = (torch.stack([x.roll(n, 0) for x, n in zip(t, lengths, strict=True)]) for t in (ids, mask))
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimize", [False, True])
def test_logits_are_those_of_transformers_under_any_padding(
    kind: str, optimize: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = reference_of(kind, "OPTForSequenceClassification", **LABELS)
    ours = SequenceClassifier.load(write(tmp_path / "m", theirs, dtype), optimize=optimize, dtype=dtype, device="cpu")
    assert ours.labels == ("bad", "fair", "good")
    assert ours.score.weight.shape == (3, 16 if kind == "350m" else 32)  # behind the projection to the table's width
    most = 1e-5 if dtype == torch.float32 else 3e-2
    for ids, mask in (padded(rows(9, 5), "left"), padded(rows(9, 5), "right"), padded(rows(7, 7), "left")):
        with torch.no_grad():
            found, expected = ours(ids, mask), theirs(ids, attention_mask=mask).logits
            alone = torch.cat([ours(row[m.bool()][None]) for row, m in zip(ids, mask, strict=True)])
        assert error(found.float(), expected.float()) < most
        assert error(found.float(), alone.float()) < most
        assert error(found.float(), expected.float().flip(0)) > 0.1


def test_a_padding_token_inside_a_text_is_a_token_of_it(tmp_path: Path) -> None:
    theirs = reference_of("125m", "OPTForSequenceClassification", **LABELS)
    ours = SequenceClassifier.load(write(tmp_path / "m", theirs), device="cpu")
    first, second = rows(6, 4)
    first[-1] = 1
    ids, mask = padded([first, second], "left")
    with torch.no_grad():
        hidden = theirs.model(ids, attention_mask=mask).last_hidden_state
        expected = theirs.score(hidden[:, -1])  # both rows end with their last token
        assert error(ours(ids, mask), expected) < 1e-5
        assert error(theirs(ids, attention_mask=mask).logits, expected) > 0.01  # it looks at the ids alone
        ids[1, :2] = 5  # another padding
        assert error(ours(ids, mask)[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", ["OPTForSequenceClassification", "OPTForQuestionAnswering"])
@pytest.mark.parametrize("optimize", [False, True])
def test_folders_go_round_to_the_bit(kind: str, name: str, optimize: bool, tmp_path: Path) -> None:
    changes = LABELS | {"problem_type": "multi_label_classification"} if "Sequence" in name else {}
    theirs = reference_of(kind, name, **changes)
    ours = {"OPTForSequenceClassification": SequenceClassifier, "OPTForQuestionAnswering": QuestionAnswering}[name]
    folder = write(tmp_path / "m", theirs, torch.bfloat16)
    ours.load(folder, dtype=torch.bfloat16, device="cpu", optimize=optimize).save(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    opened, report = getattr(transformers, name).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values())
    one, other = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    kept = ("id2label", "label2id", "problem_type", "architectures")
    assert {key: one.get(key) for key in kept} == {key: other.get(key) for key in kept}
    assert opened.config.num_labels == theirs.config.num_labels
    assert one.keys() <= {*other, "dtype"}


def test_what_else_is_in_a_folder_can_be_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "m", reference_of("125m", "OPTForSequenceClassification", **LABELS)) / "model.safetensors"
    plain = SequenceClassifier.load(tmp_path / "m", device="cpu")
    save_file(load_file(file) | {"v_head.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"v_head\.weight"):
        SequenceClassifier.load(tmp_path / "m", device="cpu")
    found = SequenceClassifier.load(tmp_path / "m", device="cpu", ignore=["v_head.*"])
    assert torch.equal(found.score.weight, plain.score.weight)


def test_int8_and_layers_on_the_disk_classify_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", reference_of("350m", "OPTForSequenceClassification", **LABELS))
    ids, mask = padded(rows(9, 5), "right")
    with torch.no_grad():
        plain = SequenceClassifier.load(folder, device="cpu", optimize=False)(ids, mask)
        assert error(SequenceClassifier.load(folder, device="cpu", offload="disk")(ids, mask), plain) < 1e-5
        ours = SequenceClassifier.load(folder, device="cpu", quantize="int8")
        assert 1e-5 < error(ours(ids, mask), plain) < 0.1
        ours.save(tmp_path / "int8")
        again = SequenceClassifier.load(tmp_path / "int8", device="cpu")
        assert torch.equal(again(ids, mask), ours(ids, mask))


def test_texts_are_classified_in_batches_as_alone(tmp_path: Path) -> None:
    theirs = reference_of("125m", "OPTForSequenceClassification", **LABELS)
    ours = SequenceClassifier.load(write(tmp_path / "m", theirs), device="cpu")
    texts = ["a good day", "bad", "<pad>b", "fair enough it was"]
    for found, text in zip(ours.classify(texts, batch_size=2), texts, strict=True):
        with torch.no_grad():
            h = theirs.model(torch.tensor([tokenizer().encode(text)])).last_hidden_state
        expected = theirs.score(h[0, -1]).softmax(0)
        assert found.text == text
        assert list(found.probabilities) == ["bad", "fair", "good"]
        assert torch.allclose(torch.tensor([*found.probabilities.values()]), expected, atol=1e-6)
        assert found.label == list(found.probabilities)[int(expected.argmax())]
    several = SequenceClassifier(minopt.load(tmp_path / "m", ignore=["score.*"], device="cpu"), 3,
                                 problem_type="multi_label_classification")  # fmt: skip
    several.score = ours.score
    logits = torch.tensor([*ours.classify(texts)[0].probabilities.values()]).log()
    each = torch.tensor([*several.classify(texts)[0].probabilities.values()]).logit()
    assert torch.allclose(each - each[0], logits - logits[0], atol=1e-4)
    assert ours.classify([]) == []


def test_a_new_classifier_shares_its_decoder_and_trains(tmp_path: Path) -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    torch.manual_seed(0)
    ours = SequenceClassifier(lm, ["no", "yes"])
    assert ours.model is lm.model
    assert ours.tokenizer is lm.tokenizer
    assert 0.7 < ours.score.weight.std() / lm.model.config.init_std < 1.3
    ids, mask = lm.tokenizer.encode_batch(["one", "two and three"])
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        losses.append(torch.nn.functional.cross_entropy(ours(ids, mask), torch.tensor([0, 1])))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    ours.save(tmp_path / "m")
    opened = SequenceClassifier.load(tmp_path / "m", device="cpu")
    assert [x.label for x in opened.classify(["one", "two and three"])] == ["no", "yes"]
    rater = SequenceClassifier(lm, 1)
    assert rater.rewards(["one", "two and three"]) == pytest.approx(rater(ids, mask).flatten().tolist(), abs=1e-5)
    rater.save(tmp_path / "r")
    config = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "r").config
    assert (config.num_labels, config.problem_type) == (1, None)


def test_a_new_head_does_not_inherit_what_was_said_of_an_old_one(tmp_path: Path) -> None:
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    SequenceClassifier(lm, 3, "single_label_classification").save(tmp_path / "old")
    decoder = minopt.load(tmp_path / "old", ignore=["score.*"], device="cpu", optimize=False)
    SequenceClassifier(decoder, 1).save(tmp_path / "new")
    assert len(SequenceClassifier.load(tmp_path / "new", device="cpu").rewards(["one"])) == 1


def test_starts_and_ends_of_answers_are_scored_as_by_transformers(kind: str, tmp_path: Path) -> None:
    theirs = reference_of(kind, "OPTForQuestionAnswering")
    ours = QuestionAnswering.load(write(tmp_path / "m", theirs), device="cpu")
    ids, mask = padded(rows(9, 5), "left")
    with torch.no_grad():
        found, expected = ours(ids, mask), theirs(ids, attention_mask=mask)
    for one, other in zip(found, (expected.start_logits, expected.end_logits), strict=True):
        assert error(one[mask.bool()], other[mask.bool()]) < 1e-5
    assert QuestionAnswering(ours.model).qa_outputs.bias.abs().max() == 0  # a new one


def test_a_folder_with_a_head_that_is_opened_as_another_model_says_what_opens_it(
    tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    for name, head in (("SequenceClassification", "score"), ("QuestionAnswering", "qa_outputs")):
        folder = write(tmp_path / name, reference_of("125m", f"OPTFor{name}"))
        opens = {"score": "SequenceClassifier", "qa_outputs": "QuestionAnswering"}[head]
        with pytest.raises(ValueError, match=rf"{head}\.weight: .*which minopt\.{opens}\.load opens"):
            minopt.load(folder)
        assert minopt.load(folder, ignore=[f"{head}.*"], device="cpu").model(torch.tensor([[2, 5]])).isfinite().all()
    with pytest.raises(
        ValueError, match=r"expected qa_outputs\.weight, as in OPTForQuestionAnswering, got a model wit"
    ):
        QuestionAnswering.load(tmp_path / "SequenceClassification")
    with pytest.raises(ValueError, match=r"language model: minopt\.SequenceClassifier\(minopt\.load\(\.\.\., optim"):
        SequenceClassifier.load(write_checkpoint())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {}}, "expected a head of {'weight': [2, 32]}, by word_embed"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: expected a name for each label from 0 on, got {'0': 'a', '2"),
        ({"id2label": ["a", "b", "c"]}, "id2label: expected a name for each label"),
        ({"problem_type": "poetry"}, "problem_type: expected None, multi_label_classification, "),
    ],
)
def test_a_configuration_that_does_not_fit_the_head_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "m", reference_of("125m", "OPTForSequenceClassification", **LABELS))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        SequenceClassifier.load(folder)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", reference_of("125m", "OPTForSequenceClassification", **LABELS))
    ours = SequenceClassifier.load(folder, device="cpu")
    decoder = ours.model
    ids, mask = padded(rows(5, 3), "left")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ours(ids), "attention_mask: expected one, for rows begin or end with the padding token 1, got None"),
        (lambda: ours(ids, mask * 0), "attention_mask: expected a real token in each row"),
        (lambda: ours.classify("one text"), "texts: expected a list of texts, got str"),
        (lambda: ours.classify(["a", " "]), "texts: expected words, got an empty one (2 of 2)"),
        (lambda: ours.classify(["a", 3]), "got int (2 of 2)"),
        (lambda: ours.classify(["a" * 70]), "expected at most 64 tokens, the model's positions, got 71 (1 of 1)"),
        (lambda: ours.rewards(["a"]), "rewards: expected a model of one output, got 3 labels. Call classify"),
        (lambda: SequenceClassifier(decoder, 1, tokenizer=tokenizer()).classify(["a"]), "got a regression"),
        (lambda: SequenceClassifier(decoder, 2).classify(["a"]), "tokenizer: the model's folder has none"),
        (lambda: SequenceClassifier(decoder, 0), "labels: expected how many, at least 1, or their names"),
        (lambda: SequenceClassifier(decoder, ["a", "a"]), "labels: expected how many"),
        (lambda: SequenceClassifier.load(folder, optimize="compile"), "optimize: expected True or False, got"),
        (lambda: ours.train(), "model: made for inference, it cannot be trained"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.bias": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"a head of \{'weight': \[3, 32\]\}, .*got \{.*'bias': \[3\].*\. Do conf"):
        SequenceClassifier.load(folder)

"""Evaluation: losses and generated answers against transformers, one example at a time, and what is warned of."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from minopt.distributed import World
from minopt.evaluation import answers as module
from minopt.evaluation.answers import EvaluationResult, evaluate
from minopt.evaluation.squad import exact_match, f1, rouge_scores
from minopt.evaluation.tasks import EvaluationConfig
from minopt.model import OPT
from minopt.training.batches import tokenise
from minopt.training.checks import warn
from minopt.training.data import Example, references_of
from tests.conftest import build_ours, lively
from tests.training.small import EOS, VOCAB, examples, model_of, rows_of, tokenizer

ALONE = World(0, 1, torch.device("cpu"))
WITHOUT_TOKEN = [100, 101, 102, 103]


class OfContinuation(LogitsProcessor):
    """A rule of transformers' that does not see the prompt."""

    def __init__(self, rule: LogitsProcessor, prompt_length: int) -> None:
        self.rule, self.prompt_length = rule, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rule(input_ids[:, self.prompt_length :], scores)


def reference_of(kind: str) -> Any:
    """A model whose texts vary, and of which some end before they are 16 tokens long."""
    reference = lively(kind, torch.float32, vocab_size=VOCAB, eos_token_id=EOS)
    with torch.no_grad():
        reference.model.decoder.embed_tokens.weight[EOS] *= {"125m": 1.5, "350m": 3.0, "galactica": 1.2}[kind]
    return reference


def settings(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig(**({"src_length": 32, "tgt_length": 16} | changes))


def result_of(
    reference: Any, data: list[Example] | str, config: EvaluationConfig, model: OPT | None = None, **options: Any
) -> EvaluationResult | None:
    model = model or build_ours(reference)
    tokens = tokenise(data, tokenizer(), model.config, config, training=False)
    return evaluate(
        model, tokenizer(), tokens.rows, references_of(data), config.resolved_task().scores,
        config.generation, ALONE, batch_size=config.per_device_eval_batch_size, **options,
    )  # fmt: skip


@torch.no_grad()
def loss_of(reference: Any, rows: list[tuple[list[int], int]]) -> float:
    """The mean over all tokens from the given ones on, one row at a time, as labels of transformers' give it."""
    total, count = 0.0, 0
    for ids, start in rows:
        input_ids = torch.tensor([ids])
        labels = input_ids.clone()
        labels[:, :start] = -100
        total += reference(input_ids, labels=labels).loss.item() * (len(ids) - start)
        count += len(ids) - start
    return total / count


@torch.no_grad()
def answers_of(reference: Any, data: list[Example], ngram: int = 0, **options: Any) -> tuple[dict[str, str], list[int]]:
    """transformers' continuations, one prompt at a time, and how many tokens each has."""
    answers, lengths = {}, []
    for example in data:
        ids = torch.tensor([tokenizer().encode(example.prompt)])
        rules = LogitsProcessorList()
        if ngram:
            rules.append(OfContinuation(NoRepeatNGramLogitsProcessor(ngram), ids.shape[1]))
        new = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=1,
            suppress_tokens=WITHOUT_TOKEN, logits_processor=rules, **options,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        lengths.append(new.index(EOS) + 1 if EOS in new else len(new))
        answers[example.id] = tokenizer().decode(new[: lengths[-1]]).strip()
    return answers, lengths


@pytest.mark.parametrize("size", [1, 3, 8])
def test_loss_is_transformers_mean_over_all_completions(kind: str, size: int) -> None:
    reference, data = reference_of(kind), examples(7)
    result = result_of(reference, data, settings(per_device_eval_batch_size=size))
    assert result is not None
    expected = loss_of(reference, rows_of(data))
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.metrics["examples"] == 7
    every = loss_of(reference, [(ids, 1) for ids, _ in rows_of(data)])
    assert result.metrics["loss"] != pytest.approx(every, rel=1e-4)  # of prompts too


GREEDY: dict[str, Any] = {}
BEAMS = {"num_beams": 3}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GREEDY, {}),
        ({"min_tgt_length": 8}, {"min_new_tokens": 8}),
        ({"no_repeat_ngram_size": 1}, {"ngram": 1}),
        (BEAMS, BEAMS),
        (BEAMS | {"length_penalty": 3.0}, BEAMS | {"length_penalty": 3.0}),
        (BEAMS | {"length_penalty": -2.0}, BEAMS | {"length_penalty": -2.0}),
        (BEAMS | {"no_repeat_ngram_size": 2, "min_tgt_length": 5}, BEAMS | {"ngram": 2, "min_new_tokens": 5}),
    ],
    ids=["greedy", "least length", "no token twice", "beams", "long beams", "short beams", "all of it"],
)
def test_answers_are_those_of_transformers_on_each_prompt_alone(
    kind: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    reference, data = reference_of(kind), examples(8)
    expected, _ = answers_of(reference, data, **theirs)
    result = result_of(reference, data, settings(per_device_eval_batch_size=3, **ours))
    assert result is not None
    assert result.predictions == expected
    references = {example.id: example.references for example in data}
    for name, metric in (("exact_match", exact_match), ("f1", f1)):
        mean = sum(metric(expected[id], references[id]) for id in expected) / len(expected)
        assert result.metrics[name] == pytest.approx(100 * mean)


def test_the_options_above_change_answers_and_some_end_early(kind: str) -> None:
    """What shows that the comparison is of something."""
    reference, data = reference_of(kind), examples(8)
    greedy, lengths = answers_of(reference, data)
    assert min(lengths) < 8 < max(lengths)
    changes: list[dict[str, Any]] = [{"min_new_tokens": 8}, {"ngram": 1}, BEAMS, {"no_repeat_ngram_size": 1}]
    answers = [greedy, *(answers_of(reference, data, **options)[0] for options in changes)]
    answers += [answers_of(reference, data, length_penalty=x, **BEAMS)[0] for x in (3.0, -2.0)]
    assert not [(i, j) for i in range(len(answers)) for j in range(i) if answers[i] == answers[j]]


def test_unanswerable_is_no_answer_however_it_is_written_and_scores_are_the_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = [" unanswerable", "The Unanswerable.", "unanswerable", " unanswerable x", "what is it?", "who came"]
    references = [("",), ("",), ("dog",), ("x unanswerable",), ("What is this?",), ("who came home",)]
    data = [Example("a" * (9 - i), " b", r, f"q{i}") for i, r in enumerate(references)]

    class Written:
        def __init__(self, model: Any, config: Any, lengths: list[int], request_of: Any, batch_size: int) -> None:
            self.count, self.request_of = len(lengths), request_of

        def run(self) -> Iterator[Any]:
            for i in range(self.count):
                request = self.request_of([i])
                new = torch.tensor([[*tokenizer().encode(next(left), add_bos=False), EOS]])
                ids = torch.cat([request.input_ids, new], 1)
                yield [i], request, SimpleNamespace(sequences=ids, lengths=[new.shape[1]])

    monkeypatch.setattr(module, "Prompts", Written)
    left = iter(written)
    result = result_of(reference_of("125m"), data[:4], settings(per_device_eval_batch_size=1))
    assert result is not None
    assert [result.predictions[f"q{i}"] for i in range(4)] == ["", "", "", "unanswerable x"]
    assert (result.metrics["exact_match"], result.metrics["f1"]) == (50, 75)
    left = iter(written[4:])
    config = settings(task="squad-question", per_device_eval_batch_size=1)
    result = result_of(reference_of("125m"), data[4:], config)
    assert result is not None
    expected = rouge_scores({"q4": written[4], "q5": written[5]}, {"q4": references[4], "q5": references[5]})
    assert {name: value for name, value in result.metrics.items() if "rouge" in name} == expected
    assert expected["rouge_l"] == pytest.approx((2 / 3 + 0.8) / 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_drawn_answers_follow_from_the_seed_and_are_of_the_tokens_that_are_allowed(beams: int) -> None:
    reference, data = reference_of("125m"), examples(8)

    def answers(**changes: Any) -> Any:
        config = settings(per_device_eval_batch_size=3, num_beams=beams, **changes)
        return result_of(reference, data, config).predictions

    drawn = answers(select_topk=False)
    assert drawn == answers(select_topk=False) == answers(select_topk=False, top_p=1.0)
    others = [answers(), answers(select_topk=False, seed=7), answers(select_topk=False, top_k=2),
              answers(select_topk=False, top_p=0.3)]  # fmt: skip
    assert all(other != drawn for other in others)
    alike = [Example("a b c", " d", ("d",), f"q{i}") for i in range(4)]  # batches do not repeat each other's draws
    config = settings(per_device_eval_batch_size=1, num_beams=beams, select_topk=False)
    assert len(set(result_of(reference, alike, config).predictions.values())) > 1
    if beams == 1:
        assert answers(select_topk=False, top_k=1) == answers(select_topk=False, top_p=1e-9) == answers()


@torch.no_grad()
def test_a_text_gives_the_perplexity_of_all_its_tokens(kind: str) -> None:
    reference, text = reference_of(kind), "abc def gh " * 11
    result = result_of(reference, text, settings())
    assert result is not None
    ids, nll = tokenizer().encode(text), 0.0
    for at in range(0, len(ids) - 1, 48):
        window = torch.tensor(ids[at : at + 49])
        nll += F.cross_entropy(reference(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    assert result.metrics["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert set(result.metrics) == {"loss", "perplexity", "examples"}
    assert result.predictions == {}


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_evaluated_without_dropout_and_left_as_it_was(training: bool) -> None:
    reference, data = lively("125m", torch.float32, vocab_size=VOCAB, eos_token_id=EOS, dropout=0.5), examples(6)
    model, asked = build_ours(reference).train(training), list[bool]()
    result = result_of(reference, data, settings(), model)
    assert result is not None
    assert result.metrics["loss"] == pytest.approx(loss_of(reference, rows_of(data)), rel=1e-5)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 1

    assert result_of(reference, data, settings(per_device_eval_batch_size=2), model, stop=stop) is None
    assert len(asked) <= 3  # between batches
    assert model.training is training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tgt_length": 6}, "--min_tgt_length 6: no completion of --dev_file has more than 5 tokens"),
        ({"no_repeat_ngram_size": 1}, "--no_repeat_ngram_size 1: 2 of 2 completions of --dev_file repeat an n-gram"),
        ({"no_repeat_ngram_size": 2}, "--no_repeat_ngram_size 2: 1 of 2 completions of --dev_file repeat an n-gram"),
        ({"min_tgt_length": 5}, ""),
        ({"no_repeat_ngram_size": 3}, ""),
        ({"src_length": 2, "tgt_length": 4}, "--dev_file: of 2 examples, 2 have their prompt cut to --src_length 2; "
         "1 have their completion cut to --tgt_length 4."),
    ],
)  # fmt: skip
def test_what_was_cut_and_settings_with_which_no_answer_can_be_right_are_warned_of(
    changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = [Example("ab", " aaa", ("aaa",), "x"), Example("ab", "aba", ("aba",), "y")]  # 5 and 4 tokens with an eos
    config = settings(**changes)
    tokens = tokenise(data, tokenizer(), model_of().config, config, training=False)
    with caplog.at_level(logging.WARNING, "minopt"):
        for world in (ALONE, World(1, 2, ALONE.device)):
            warn(config, world, {"train_file": None, "dev_file": tokens}, eval_is_text=False)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(message)  # of the first process alone
    assert all(m.startswith(message) for m in messages)

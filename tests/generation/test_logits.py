"""The rules on scores, against transformers' processors and against their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minopt import GenerationConfig
from minopt.generation.logits import build_rules, keep_top_k, keep_top_p, suppress

V = 40
CPU = torch.device("cpu")
IDS = torch.zeros(3, 5, dtype=torch.long)


def random_scores() -> Tensor:
    return 3 * torch.randn(3, V, generator=torch.Generator().manual_seed(0))


def tied_scores() -> Tensor:
    """Each value several times, and a row of one value only."""
    scores = random_scores().round()
    scores[1] = 0.5
    return scores


SCORES = {"random": random_scores(), "ties": tied_scores(), "some excluded": suppress(random_scores(), torch.arange(9))}


@pytest.fixture(params=list(SCORES))
def scores(request: pytest.FixtureRequest) -> Tensor:
    """Float32 scores of three rows, without and with ties, and with tokens that an earlier rule excluded."""
    return SCORES[request.param].clone()


def apply(rules: Any, ids: Tensor, scores: Tensor) -> Tensor:
    for rule in rules:
        scores = rule(ids, scores)
    return scores


def sampling(**options: Any) -> GenerationConfig:
    return GenerationConfig(**({"do_sample": True, "top_k": 0} | options))


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.5])
def test_temperature_is_that_of_transformers(scores: Tensor, temperature: float) -> None:
    (rule,) = build_rules(sampling(temperature=temperature), 5, (), CPU)
    assert torch.equal(rule(IDS, scores), TemperatureLogitsWarper(temperature)(IDS, scores))


@pytest.mark.parametrize("k", [1, 2, 5, V - 1, V, 1000])
def test_top_k_is_that_of_transformers(scores: Tensor, k: int) -> None:
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(IDS, scores))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_is_that_of_transformers(scores: Tensor, p: float) -> None:
    assert torch.equal(keep_top_p(scores, p), TopPLogitsWarper(p)(IDS, scores))


def test_suppressing_is_that_of_transformers(scores: Tensor) -> None:
    ids = [0, 7, V - 1]
    assert torch.equal(suppress(scores, torch.tensor(ids)), SuppressTokensLogitsProcessor(ids)(IDS, scores))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_keeps_k_tokens_and_those_equal_to_the_last(k: int) -> None:
    kept = keep_top_k(random_scores(), k).isfinite()
    assert kept.sum(1).tolist() == [k] * 3
    tied = keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]]), 2)
    assert tied.isfinite().tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.6, 0.95])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p: float) -> None:
    for row in random_scores():
        probability = row.double().softmax(0)
        kept = keep_top_p(row[None], p)[0].isfinite()
        assert probability[kept].sum() >= p
        assert probability[kept].sum() - probability[kept].min() < p
        assert probability[kept].min() > probability[~kept].max()


def test_top_p_always_keeps_one_token() -> None:
    assert keep_top_p(tied_scores(), 1e-9).isfinite().any(1).all()
    assert keep_top_p(random_scores(), 1e-9).isfinite().sum(1).tolist() == [1, 1, 1]


CHAINS = [
    dict(zip(("min_new_tokens", "suppress_tokens", "temperature", "top_k", "top_p"), values, strict=True))
    for values in itertools.product((0, 3), ((), (1, 8, 30)), (1.0, 0.6), (0, 12), (1.0, 0.8))
]


def of_transformers(options: dict[str, Any], prompt_length: int, eos: list[int]) -> LogitsProcessorList:
    """Its processors in the order in which its ``generate`` has them."""
    chain: list[Any] = []
    if options["min_new_tokens"]:
        minimum = options["min_new_tokens"]
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_length, minimum, torch.tensor(eos), device="cpu"))
    if options["suppress_tokens"]:
        chain.append(SuppressTokensLogitsProcessor(list(options["suppress_tokens"])))
    if options["temperature"] != 1.0:
        chain.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        chain.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] != 1.0:
        chain.append(TopPLogitsWarper(options["top_p"]))
    return LogitsProcessorList(chain)


@pytest.mark.parametrize("options", CHAINS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_chained_rules_are_those_of_transformers(scores: Tensor, options: dict[str, Any]) -> None:
    eos, prompt_length = [2, 9], 4
    rules = build_rules(sampling(**options), prompt_length, eos, CPU)
    theirs = of_transformers(options, prompt_length, eos)
    assert len(rules) == len(theirs)
    for length in range(prompt_length, prompt_length + 5):
        ids = torch.zeros(3, length, dtype=torch.long)
        before = scores.clone()
        assert torch.equal(apply(rules, ids, scores), theirs(ids, scores.clone()))
        assert torch.equal(scores, before)


def test_the_order_of_the_rules_matters_to_the_test_above() -> None:
    """A negative control: warped in another order, the same scores come out different."""
    scores, rules = random_scores(), build_rules(sampling(temperature=0.6, top_k=12, top_p=0.8), 4, (), CPU)
    assert not torch.equal(apply(rules, IDS, scores), apply(reversed(rules), IDS, scores))


def test_eos_is_held_back_until_the_least_length_is_reached() -> None:
    (rule,) = build_rules(GenerationConfig(min_new_tokens=2), 4, (2, 9), CPU)
    held = [
        torch.nonzero(rule(torch.zeros(1, length, dtype=torch.long), torch.zeros(1, V))[0].isinf()).flatten().tolist()
        for length in (4, 5, 6, 7)
    ]
    assert held == [[2, 9], [2, 9], [], []]


@pytest.mark.parametrize(
    ("config", "eos"),
    [(GenerationConfig(), (2,)), (sampling(), (2,)), (GenerationConfig(min_new_tokens=3), ())],
    ids=["greedy", "unlimited sampling", "a minimum without eos"],
)
def test_where_nothing_is_asked_for_there_is_no_rule(config: GenerationConfig, eos: tuple[int, ...]) -> None:
    assert build_rules(config, 4, eos, CPU) == []

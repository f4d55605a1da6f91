"""Evaluation on examples: the loss of their completions, and the scores of generated ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minopt.distributed import World
from minopt.evaluation.squad import normalize_answer, rouge_l, rouge_n
from minopt.evaluation.squad import score as squad_score
from minopt.generation.batches import cut_batches
from minopt.generation.decode import generate
from minopt.generation.options import GenerationConfig
from minopt.generation.scoring import token_logprobs
from minopt.model import OPT
from minopt.progress import bar
from minopt.tokenizer import Tokenizer, pad_left
from minopt.training.batches import seed_of
from minopt.training.config import TrainingConfig
from minopt.training.data import UNANSWERABLE, Example
from minopt.training.tokens import Tokens


@dataclass(frozen=True)
class EvaluationResult:
    """What a model is worth on some data.

    Attributes:
        metrics: ``loss``, the mean over all learned tokens in nats, and ``perplexity``, its exponential; of generated
            answers ``exact_match`` and ``f1`` in percent as SQuAD's script gives them, of generated questions
            ``rouge_1``, ``rouge_2`` and ``rouge_l`` from 0 to 1; ``examples``, how many.
        score: the one of them by which checkpoints are compared, higher is better.
        predictions: generated texts by the examples' ids, empty for plain text.
    """

    metrics: Mapping[str, float]
    score: float
    predictions: Mapping[str, str] = field(repr=False)


def generation_options(config: TrainingConfig, first: int = 0) -> GenerationConfig:
    """How answers are generated: greedily, unless the settings say otherwise; ``first``, of a batch, changes draws."""
    options: dict[str, Any] = {}
    if config.num_beams > 1:
        options = {"num_beams": config.num_beams, "length_penalty": config.length_penalty}
    if not config.select_topk:
        options |= {"do_sample": True, "seed": seed_of(config.seed, first), "top_k": config.top_k,
                    "top_p": config.top_p or 1.0}  # fmt: skip
    if config.no_repeat_ngram_size:
        options |= {"no_repeat_ngram_size": config.no_repeat_ngram_size, "no_repeat_ngram_include_prompt": False}
    return GenerationConfig(max_new_tokens=config.tgt_length, min_new_tokens=config.min_tgt_length, **options)


def evaluate(
    model: OPT,
    tokenizer: Tokenizer,
    data: Sequence[Example] | str,
    tokens: Tokens,
    config: TrainingConfig,
    world: World,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Evaluates a model; each process takes its share of the examples, each example is taken once.

    Args:
        model: whole, on the process' device.
        tokenizer: its.
        data: examples, or a text.
        tokens: of them, as ``tokenise(..., around_answer=False)`` gives them.
        config: says how to generate, and ``task``.
        world: the processes.
        stop: asked between batches; once it says yes in any process, there is no result.

    Returns:
        The result, the same in all processes; ``None`` if stopped.
    """
    was_training = model.training
    model.eval()
    mine = range(world.rank, len(tokens), world.size)
    generates = not isinstance(data, str)
    predictions: dict[str, str] = {}
    nll, learned = 0.0, 0
    rows = {i: tokens.row(i) for i in mine}
    lengths = [len(rows[i][0]) for i in mine]
    batches = [[mine[i] for i in batch] for batch in cut_batches(lengths, config.per_device_eval_batch_size)]
    with bar(len(mine), "example", desc="evaluating", leave=False) as drawn:
        for batch in batches:
            if stop():
                break
            for logprobs in token_logprobs(model, [rows[i][0].tolist() for i in batch], [rows[i][1] for i in batch]):
                nll -= logprobs.double().sum().item()
                learned += len(logprobs)
            if generates:
                options = generation_options(config, batch[0])
                texts = _continue(model, tokenizer, [tokens.prompt(i) for i in batch], options)
                predictions |= {data[i].id: text for i, text in zip(batch, texts, strict=True)}  # type: ignore[union-attr]
            drawn.update(len(batch))
    model.train(was_training)
    total, count, stopped = world.sum(nll, learned, float(stop()))
    if stopped:
        return None
    loss = total / count
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "examples": float(len(tokens))}
    if isinstance(data, str):
        return EvaluationResult(metrics, -loss, {})
    everyone = {id: text for part in world.gather(predictions) for id, text in part.items()}
    predictions = {example.id: everyone[example.id] for example in data}
    references = {example.id: example.references or (example.completion.strip(),) for example in data}
    if config.task == "squad-question" and config.prompt_template is None:
        pairs = [(predictions[id], right) for id, right in references.items()]
        for n in (1, 2):
            metrics[f"rouge_{n}"] = sum(rouge_n(*pair, n) for pair in pairs) / len(pairs)
        metrics["rouge_l"] = sum(rouge_l(*pair) for pair in pairs) / len(pairs)
        return EvaluationResult(metrics, metrics["rouge_l"], predictions)
    metrics |= squad_score(predictions, references)
    return EvaluationResult(metrics, metrics["f1"], predictions)


def _continue(model: OPT, tokenizer: Tokenizer, prompts: list[list[int]], options: GenerationConfig) -> list[str]:
    """The texts that a model adds to prompts; none where it says that there is no answer."""
    input_ids, mask = pad_left(prompts, model.config.pad_token_id)
    options = options.replace(suppress_tokens=tokenizer.ids_without_token(model.config.vocab_size))
    output = generate(model, input_ids, mask, config=options)
    new = output.sequences[:, input_ids.shape[1] :].tolist()
    texts = [tokenizer.decode(ids[:n]).strip() for ids, n in zip(new, output.lengths, strict=True)]
    return ["" if normalize_answer(text) == UNANSWERABLE else text for text in texts]

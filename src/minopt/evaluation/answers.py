"""Measures a model on examples: the loss of their completions, and the scores of the texts that it generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minopt.distributed import World
from minopt.evaluation.squad import UNANSWERABLE, Scores, normalize_answer
from minopt.generation.batches import cut_batches
from minopt.generation.decode import generate
from minopt.generation.options import GenerationConfig
from minopt.generation.scoring import token_logprobs
from minopt.model import OPT
from minopt.progress import bar
from minopt.tokenizer import Tokenizer, pad_left


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation."""

    # loss, the mean over the tokens of all completions in nats; perplexity, its exponential; examples, how many; and
    # what the task's scores give.
    metrics: Mapping[str, float]
    predictions: Mapping[str, str] = field(repr=False)  # by the examples' ids; empty for plain text


def evaluate(
    model: OPT, tokenizer: Tokenizer, rows: Sequence[tuple[Tensor, int]], references: Mapping[str, Sequence[str]],
    scores: Scores, generation: Callable[[int], GenerationConfig], world: World, *, batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:  # fmt: skip
    """Evaluates a model. Each process takes a share of the rows, and each row is taken once.

    Args:
        model: whole, on the device of the process.
        rows: each example's ids ``[T]``, and the index at which its completion begins.
        references: the right texts by the examples' ids, in the order of ``rows``; empty for plain text, of which only
            the loss is measured.
        generation: gives the options for a batch from the index of its first row.
        world: the processes; each has to call this, and gets the same result.
        batch_size: rows that a process evaluates at once.
        stop: asked between batches; once it says yes in any process, the result is ``None``.
        tokenizer, scores: the model's, and the task's.
    """
    was_training, ids = model.training, list(references)
    model.eval()
    predictions: dict[str, str] = {}
    nll, count = 0.0, 0.0
    mine = range(world.rank, len(rows), world.size)
    with bar(len(mine), "example", desc="evaluating", leave=False) as drawn:
        for found in cut_batches([len(rows[i][0]) for i in mine], batch_size):
            if stop():
                break
            batch = [mine[i] for i in found]
            texts, starts = [rows[i][0].tolist() for i in batch], [rows[i][1] for i in batch]
            for logprobs in token_logprobs(model, texts, starts):
                nll, count = nll - logprobs.double().sum().item(), count + len(logprobs)
            if ids:
                prompts = [text[:start] for text, start in zip(texts, starts, strict=True)]
                written = _continue(model, tokenizer, prompts, generation(batch[0]))
                predictions |= {ids[i]: text for i, text in zip(batch, written, strict=True)}
            drawn.update(len(batch))
    model.train(was_training)
    nll, count, stopped = world.sum(nll, count, float(stop()))
    if stopped:
        return None
    loss = nll / count
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "examples": float(len(rows))}
    if ids:
        everyone = {key: text for part in world.gather(predictions) for key, text in part.items()}
        predictions = {key: everyone[key] for key in ids}
        metrics |= scores(predictions, references)
    return EvaluationResult(metrics, predictions)


def _continue(model: OPT, tokenizer: Tokenizer, prompts: list[list[int]], options: GenerationConfig) -> list[str]:
    """The texts that a model adds to prompts; an empty one where it says that there is no answer."""
    input_ids, mask = pad_left(prompts, model.config.pad_token_id)
    options = options.replace(suppress_tokens=tokenizer.ids_without_token(model.config.vocab_size))
    output = generate(model, input_ids, mask, config=options)
    new = output.sequences[:, input_ids.shape[1] :].tolist()
    texts = [tokenizer.decode(ids[:n]).strip() for ids, n in zip(new, output.lengths, strict=True)]
    return ["" if normalize_answer(text) == UNANSWERABLE else text for text in texts]

"""Measures a model on examples: the loss of their completions, and the scores of the texts that it generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minopt.distributed import World
from minopt.evaluation.squad import UNANSWERABLE, Scores, normalize_answer
from minopt.generation.batches import cut_batches
from minopt.generation.continuous import Prompts
from minopt.generation.options import GenerationConfig
from minopt.generation.request import Request, prepare
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
    nll, count, is_over = 0.0, 0.0, False
    mine = range(world.rank, len(rows), world.size)
    with bar(len(mine) * (2 if ids else 1), "example", desc="evaluating", leave=False) as drawn:
        for found in cut_batches([len(rows[i][0]) for i in mine], batch_size):
            if is_over := stop():
                break
            batch = [mine[i] for i in found]
            texts, starts = [rows[i][0].tolist() for i in batch], [rows[i][1] for i in batch]
            for logprobs in token_logprobs(model, texts, starts):
                nll, count = nll - logprobs.double().sum().item(), count + len(logprobs)
            drawn.update(len(batch))
        prompts = [rows[i][0][: rows[i][1]].tolist() for i in mine] if ids and not is_over else []
        for found, written in _continue(model, tokenizer, prompts, generation, mine, batch_size):
            predictions |= {ids[mine[i]]: text for i, text in zip(found, written, strict=True)}
            drawn.update(len(found))
            if stop():
                break
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


def _continue(
    model: OPT, tokenizer: Tokenizer, prompts: list[list[int]], generation: Callable[[int], GenerationConfig],
    mine: Sequence[int], batch_size: int,
) -> Iterator[tuple[list[int], list[str]]]:  # fmt: skip
    """Indices of prompts and the texts that a model adds; an empty one where it says that there is no answer."""
    without_token = tokenizer.ids_without_token(model.config.vocab_size)

    def options(first: int) -> GenerationConfig:
        return generation(mine[first]).replace(suppress_tokens=without_token)

    def request_of(batch: list[int]) -> Request:
        input_ids, mask = pad_left([prompts[i] for i in batch], model.config.pad_token_id)
        return prepare(model, input_ids, mask, options(batch[0]))

    lengths = [*map(len, prompts)]
    for batch, request, output in Prompts(model, options(0), lengths, request_of, batch_size).run() if prompts else ():
        new = output.sequences[:, request.input_ids.shape[1] :].tolist()
        texts = [tokenizer.decode(ids[:n]).strip() for ids, n in zip(new, output.lengths, strict=True)]
        yield batch, ["" if normalize_answer(text) == UNANSWERABLE else text for text in texts]

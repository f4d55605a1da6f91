"""Prompts that run together, and what becomes of each: a text, and what is known about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minopt.generation.batches import cut_batches
from minopt.generation.decode import decode_steps, run, steps_between_looks
from minopt.generation.options import GenerationConfig
from minopt.generation.request import STOP_REASONS, Decoder, GenerationOutput, Request
from minopt.progress import bar
from minopt.stops import Pieces, StopStrings, StreamDecoder
from minopt.tokenizer import Tokenizer

# What a few float32 rows of OPT's vocabulary weigh, in tokens of opt-125m's cache.
SCORES_IN_TOKENS = 8


@dataclass(frozen=True)
class GeneratedText:
    """One continuation, with what is known about it; see ``GenerationOutput``."""

    text: str  # after its prompt if ``echo`` asked for that, without the stop string that ended it
    token_ids: tuple[int, ...]  # the new ones, those that ended the text included
    logprobs: tuple[float, ...]  # of each, natural; empty if not asked for
    stop_reason: str
    score: float | None = None  # of beam search
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # the most probable ids in place of each, if asked for
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


def cut_prompts(
    decoder: Decoder,
    config: GenerationConfig,
    lengths: list[int],
    in_order: bool,
    batch_size: int | None,
    max_batch_tokens: int | None,
    has_draft: bool = False,
) -> list[list[int]]:
    """Indices of the prompts that run together, from their lengths."""
    new, beams, R = config.max_new_tokens + SCORES_IN_TOKENS, config.num_beams, config.num_return_sequences
    reads_ahead = has_draft or config.prompt_lookup_num_tokens is not None
    if batch_size is None and max_batch_tokens is None and reads_ahead:
        batch_size = 1  # rows of a batch wait for each other's drafts
    elif batch_size is None and decoder.max_batch is not None:
        batch_size = max(1, decoder.max_batch // (R if beams == 1 else 1))
    room = decoder.config.max_position_embeddings - config.max_new_tokens
    kept = [min(length, room) for length in lengths]
    # Tokens whose keys and values a prompt takes, and its scores as so many more. Beams share the prompt.
    costs = [length + beams * new if beams > 1 else (length + new) * R for length in kept]
    return cut_batches(costs, batch_size, max_batch_tokens, in_order)


@dataclass(frozen=True)
class TextBatch:
    """Prompts that run together, by their indices in the caller's list."""

    indices: list[int]
    request: Request
    stops: StopStrings | None
    tokenizer: Tokenizer
    skip_special_tokens: bool

    def text(self, ids: list[int], stop_reason: str) -> str:
        """Text of a row's new ids."""
        cut = self.stops.cut(ids) if self.stops is not None and stop_reason in ("stop", "eos") else None
        return self.tokenizer.decode(ids, self.skip_special_tokens) if cut is None else cut

    def record(self, output: GenerationOutput, row: int) -> GeneratedText:
        """What is known about a row."""
        begin, length, reason = self.request.input_ids.shape[1], output.lengths[row], output.stop_reasons[row]

        def values(tensor: Tensor | None) -> list[Any]:
            return [] if tensor is None else tensor[row, :length].tolist()

        ids = output.sequences[row, begin : begin + length].tolist()
        top = zip(values(output.top_token_ids), values(output.top_logprobs), strict=True)
        return GeneratedText(
            self.text(ids, reason),
            tuple(ids),
            tuple(values(output.logprobs)),
            reason,
            None if output.sequences_scores is None else output.sequences_scores[row].item(),
            tuple(tuple(zip(*step, strict=True)) for step in top),
            None if output.drafted_tokens is None else output.drafted_tokens[row],
            None if output.accepted_tokens is None else output.accepted_tokens[row],
        )

    def stream(self) -> Iterator[str]:
        """The text of the only row, piece by piece; what may begin a stop string waits until that is known."""
        decoder = StreamDecoder(Pieces(self.tokenizer, self.skip_special_tokens), self.stops)
        ids, given, reason = list[int](), 0, ""
        for step in decode_steps(self.request.on_device(), steps_between_looks(self.request)):
            token, is_new, number = torch.cat([step.tokens, step.is_new, step.reasons]).tolist()  # one wait for a GPU
            if is_new:
                ids.append(token)
            if (reason := STOP_REASONS[number]) == "exhausted":
                continue  # the loop ends by itself, or refuses scores that are no numbers
            if reason:
                break
            if piece := decoder.push(ids[-1]):
                given += len(piece)
                yield piece
        if rest := self.text(ids, reason)[given:]:
            yield rest


def run_each(batches: list[TextBatch], show_progress: bool) -> Iterator[tuple[int, list[GeneratedText]]]:
    """Runs batches in turn; gives each prompt's index and continuations."""
    count = sum(len(batch.indices) for batch in batches)
    with bar(count, "prompt", shown=show_progress and len(batches) > 1) as drawn:
        for batch in batches:
            output, copies = run(batch.request), batch.request.config.num_return_sequences
            rows = [batch.record(output, row) for row in range(len(output.lengths))]
            for at, index in enumerate(batch.indices):
                yield index, rows[at * copies : (at + 1) * copies]
                drawn.update()


def in_rising_order(results: Iterator[tuple[int, list[GeneratedText]]]) -> Iterator[tuple[int, list[GeneratedText]]]:
    """Puts results in the order of their indices."""
    waiting: dict[int, list[GeneratedText]] = {}
    count = 0
    for index, records in results:
        waiting[index] = records
        while count in waiting:
            yield count, waiting.pop(count)
            count += 1

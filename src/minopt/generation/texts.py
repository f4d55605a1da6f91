"""Prompts that run together, and what becomes of each: a text, and what is known about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minopt.generation.continuous import Prompts
from minopt.generation.decode import decode_steps, steps_between_looks
from minopt.generation.request import STOP_REASONS, GenerationOutput
from minopt.progress import bar
from minopt.stops import Pieces, StopStrings, StreamDecoder
from minopt.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Texts:
    """Prompts that are to be continued, and how ids become texts."""

    prompts: Prompts
    stops: StopStrings | None
    tokenizer: Tokenizer
    skip_special_tokens: bool

    def text(self, ids: list[int], stop_reason: str) -> str:
        """Text of a row's new ids."""
        cut = self.stops.cut(ids) if self.stops is not None and stop_reason in ("stop", "eos") else None
        return self.tokenizer.decode(ids, self.skip_special_tokens) if cut is None else cut

    def record(self, begin: int, output: GenerationOutput, row: int) -> GeneratedText:
        """What is known about a row, whose prompt ends at ``begin``."""
        length, reason = output.lengths[row], output.stop_reasons[row]

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
        request = self.prompts.request_of([0]).on_device()
        for step in decode_steps(request, steps_between_looks(request)):
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

    def run_each(self, show_progress: bool) -> Iterator[tuple[int, list[GeneratedText]]]:
        """Gives each prompt's index and continuations."""
        count, copies = len(self.prompts.lengths), self.prompts.config.num_return_sequences
        with bar(count, "prompt", shown=show_progress and len(self.prompts.batches) > 1) as drawn:
            for indices, request, output in self.prompts.run():
                begin = request.input_ids.shape[1]
                rows = [self.record(begin, output, row) for row in range(len(output.lengths))]
                for at, index in enumerate(indices):
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

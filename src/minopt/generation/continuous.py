"""Full batches: prompts that have ended leave the pass, and waiting prompts take their place (continuous batching).

After Orca (Yu et al., OSDI 2022). All rows share one ``KVCache`` and one ``Decoder.read`` a step. A row's tokens are in
its first slots. A step writes behind the longest row, in the same slot of all, and every few steps what is new moves to
the end of its own row. Positions are in the embeddings and a mask says which slots belong to a row, so any decoder can
do this.

Shapes: R rows (a prompt's continuations side by side), T prompt tokens (padding included), N new tokens, S slots, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.generation.batches import cut_batches, limits_of
from minopt.generation.decode import Rows, Step, output_of, run, stacked
from minopt.generation.decoder import Decoder
from minopt.generation.options import GenerationConfig
from minopt.generation.request import GenerationOutput, Request
from minopt.masks import step_mask

# What a few float32 rows of OPT's vocabulary weigh, in tokens of opt-125m's cache.
SCORES_IN_TOKENS = 8

# Prompts leave, and others join, once an eighth of the batch can: fewer cost more for each group of prompts that began
# together, and more are waited for.
SHARE = 8

# The cache gets another shape, for which all is copied, only for so many times as many prompts.
GROWTH = 1.25

# Steps between two moves of new tokens to the ends of their rows: a move costs as much as five slots more to attend to.
MOVE_EVERY = 8

Found = tuple[list[int], Request, GenerationOutput]


@dataclass(frozen=True)
class Prompts:
    """Many prompts, and how many run at once.

    Args:
        decoder, config: what runs, and the options.
        lengths: tokens of each prompt.
        request_of: the request of some prompts, by their indices.
        batch_size, max_batch_tokens, in_order: see ``cut_batches``; new tokens count.
        has_draft: whether the requests have a draft.
    """

    decoder: Decoder
    config: GenerationConfig
    lengths: list[int]
    request_of: Callable[[list[int]], Request]
    batch_size: int | None = None
    max_batch_tokens: int | None = None
    in_order: bool = False
    has_draft: bool = False

    @cached_property
    def batches(self) -> list[list[int]]:
        """Indices of the prompts that run together where none leaves or joins."""
        beams, R = self.config.num_beams, self.config.num_return_sequences
        new = self.config.max_new_tokens + SCORES_IN_TOKENS
        # Tokens whose keys and values a prompt takes, and its scores as so many more. Beams share the prompt.
        costs = [length + beams * new if beams > 1 else (length + new) * R for length in self._kept]
        return cut_batches(costs, *self._limits, self.in_order)

    def run(self) -> Iterator[Found]:
        """Runs all prompts: gives the indices of some, their request, and what was found, as soon as it is there.

        What was found has the rows of these prompts alone. The request may be that of more.
        """
        config, decoder = self.config, self.decoder
        by_batch = config.num_beams > 1 or self._reads_ahead
        # A GPU's host does not know which rows have ended, and CUDA graphs want the same rows in each step.
        if by_batch or decoder.device.type != "cpu" or len(self.batches) == 1:
            for batch in self.batches:
                request = self.request_of(batch)
                yield batch, request, run(request)
            return
        waiting = [i for batch in self.batches for i in sorted(batch, key=lambda i: -self._kept[i])]
        yield from _Pool(self).run(waiting[::-1])

    def room(self, slots: int) -> int:
        """How many prompts run at once, of which the longest takes so many slots."""
        rows, tokens = limits_of(*self._limits)
        return max(1, int(min(rows, len(self.lengths), tokens // ((slots + SCORES_IN_TOKENS) * self._copies))))

    def slots(self, index: int) -> int:
        """How many slots of the cache a row of a prompt takes."""
        return self._kept[index] + self.config.max_new_tokens

    @cached_property
    def _kept(self) -> list[int]:
        most = self.decoder.config.max_position_embeddings - self.config.max_new_tokens
        return [min(length, most) for length in self.lengths]

    @property
    def _reads_ahead(self) -> bool:
        return self.has_draft or self.config.prompt_lookup_num_tokens is not None

    @property
    def _copies(self) -> int:
        return self.config.num_return_sequences if self.config.num_beams == 1 else 1

    @property
    def _limits(self) -> tuple[int | None, int | None]:
        batch_size, max_batch = self.batch_size, self.decoder.max_batch
        if batch_size is None and self.max_batch_tokens is None and self._reads_ahead:
            batch_size = 1  # rows of a batch wait for each other's drafts
        elif batch_size is None and max_batch is not None:
            batch_size = max(1, max_batch // self._copies)
        return batch_size, self.max_batch_tokens


class _Group:
    """Prompts that began together; each has ``copies`` rows."""

    def __init__(self, indices: list[int], request: Request, begin: int) -> None:
        self.indices, self.request, self.rows = indices, request, Rows(request)
        self.copies = request.config.num_return_sequences
        self.slots = request.prompt_length + request.config.max_new_tokens
        self.prompts = request.input_ids.repeat_interleave(self.copies, dim=0)
        self.places = torch.arange(begin, begin + len(self.prompts))  # of its rows in the cache
        self.place: Tensor | slice = slice(begin, begin + len(self.prompts))  # the same; rows side by side are a view
        self.steps: list[Step] = []  # since rows left
        self.before: dict[str, Tensor] = {}  # and until then

    def step(self, logits: Tensor) -> None:
        self.steps.append(self.rows.step(logits))

    @property
    def newest(self) -> Tensor:
        """The newest token of each row."""
        return self.rows.sequences[:, self.request.input_ids.shape[1] + self.rows.count - 1]

    @property
    def has_ended(self) -> list[bool]:
        """Whether all rows of a prompt have, for each."""
        if self.rows.none_has_ended:
            return [False] * len(self.indices)
        ended: list[bool] = (~self.rows.running.view(-1, self.copies).any(1)).tolist()
        return ended

    def move(self, places: Tensor) -> None:
        """Notes where its rows are now."""
        first, count = int(places[0]), len(places)
        is_slice = torch.equal(places, torch.arange(first, first + count))
        self.places, self.place = places, slice(first, first + count) if is_slice else places

    def leave(self) -> Found | None:
        """What was found for the prompts that have ended, which leave the group."""
        has_ended = self.has_ended
        if not any(has_ended):
            return None
        parts, reasons = stacked(self.steps), self.steps[-1].reasons
        if self.before:
            parts = {name: torch.cat([self.before[name], part], dim=1) for name, part in parts.items()}
        ended = torch.tensor(has_ended).repeat_interleave(self.copies)
        index, rest = ended.nonzero()[:, 0], (~ended).nonzero()[:, 0]
        found = output_of(self.prompts[index], {name: part[index] for name, part in parts.items()}, reasons[index])
        gone = [i for i, is_over in zip(self.indices, has_ended, strict=True) if is_over]
        self.indices = [i for i, is_over in zip(self.indices, has_ended, strict=True) if not is_over]
        self.before, self.steps = {name: part[rest] for name, part in parts.items()}, []
        self.prompts, self.places = self.prompts[rest], self.places[rest]
        self.rows.keep(rest)
        return gone, self.request, found


class _Pool:
    """The rows of one cache. Those that take part in a step are the first."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts, self.decoder, self.copies = prompts, prompts.decoder, prompts.config.num_return_sequences
        self.groups: list[_Group] = []
        self.count = 0  # prompts in the pass
        self.lengths = self.positions = torch.zeros(0, dtype=torch.long)  # [R] filled slots of each row; next positions
        self.moved = 0  # the longest of the lengths; slots behind it hold what has not been moved yet
        self.visible = torch.zeros(0, 0, dtype=torch.bool)  # [R, S] which slots belong to a row
        self.memory: KVCache | None = None

    @torch.inference_mode()
    def run(self, waiting: list[int]) -> Iterator[Found]:
        """Runs waiting prompts, the last one first."""
        while waiting or self.groups:
            ended = sum(sum(group.has_ended) for group in self.groups)
            if ended and ended * SHARE >= self.count:
                yield from self._leave()
            if waiting and (joining := self._joining(waiting)):
                self._join(joining, len(waiting))
            elif self.groups:
                self._read()

    def _leave(self) -> Iterator[Found]:
        """Prompts that have ended leave; the last rows take the places of theirs."""
        assert self.memory is not None
        self._settle()
        found = [each for group in self.groups if (each := group.leave()) is not None]
        self.groups = [group for group in self.groups if group.indices]
        self.count = sum(len(group.indices) for group in self.groups)
        R = self.count * self.copies
        if self.groups:
            places = torch.cat([group.places for group in self.groups])
            behind = places[places >= R]
            is_free = torch.ones(len(self.lengths), dtype=torch.bool).index_fill(0, places, False)
            free = is_free[:R].nonzero()[:, 0]
            self.memory.copy_rows(behind, free)
            to = torch.arange(len(self.lengths)).index_copy(0, behind, free)
            for group in self.groups:
                group.move(to[group.places])
            for tensor in (self.lengths, self.positions, self.visible):
                tensor[free] = tensor[behind]
        self.lengths, self.positions = self.lengths[:R], self.positions[:R]
        self._set_length()
        yield from found

    def _joining(self, waiting: list[int]) -> list[int]:
        """Takes the prompts that may join now from those that wait; none, if they are too few."""
        slots, count = max((group.slots for group in self.groups), default=0), 0
        while count < len(waiting):
            longest = max(slots, self.prompts.slots(waiting[-1 - count]))
            if self.count + count + 1 > self._most(longest):
                break
            slots, count = longest, count + 1
        if count == 0 or (self.count and count < min(len(waiting), math.ceil(self._most(slots) / SHARE))):
            return []
        joining = waiting[: -count - 1 : -1]
        del waiting[-count:]
        return joining

    def _most(self, slots: int) -> int:
        """How many prompts may be in the pass, of which the longest takes so many slots."""
        most = self.prompts.room(slots)
        if self.memory is None or not self.count or slots > self.memory.capacity:
            return most
        here = self.memory.batch_size // self.copies
        return most if most >= GROWTH * here else min(most, here)

    def _join(self, indices: list[int], waiting: int) -> None:
        """Reads prompts, and chooses their first tokens."""
        request = self.prompts.request_of(indices).on_device()
        group, begin = _Group(indices, request, self.count * self.copies), self.count * self.copies
        self._settle()
        self.groups.append(group)
        self.count += len(indices)
        self._fit(max(group.slots for group in self.groups), waiting)
        assert self.memory is not None
        T, own = request.prompt_length, self.memory.rows(begin, len(group.prompts))
        logits, real, positions = group.rows.begin(own)
        is_real = torch.ones(len(positions), T, dtype=torch.bool) if real is None else real[:, :T]
        self.visible[begin : begin + len(positions)] = torch.nn.functional.pad(is_real, (0, self.visible.shape[1] - T))
        self.lengths = torch.cat([self.lengths, torch.full((len(positions),), T)])
        self.positions = torch.cat([self.positions, positions])
        self._set_length()
        group.step(logits)

    def _fit(self, slots: int, waiting: int) -> None:
        """Gives the cache room for the prompts in the pass, and for others that wait."""
        most = min(self.prompts.room(slots), self.count + waiting)
        if self.memory is None:
            self.memory = self.decoder.new_cache(most * self.copies, slots)
        elif slots > self.memory.capacity or self.count * self.copies > self.memory.batch_size:
            self.memory.reshape(len(self.lengths), most * self.copies, slots)
        else:
            return
        visible = torch.zeros(self.memory.batch_size, self.memory.capacity, dtype=torch.bool)
        R, S = len(self.lengths), min(self.moved, visible.shape[1])
        visible[:R, :S] = self.visible[:R, :S]
        self.visible = visible

    def _read(self) -> None:
        """Reads the newest tokens, and chooses the next."""
        if self.cache.length - self.moved >= MOVE_EVERY or self.cache.length == self.cache.capacity:
            self._settle()
        tokens = torch.zeros(len(self.lengths), dtype=torch.long)
        for group in self.groups:
            tokens[group.place] = group.newest
        S = self.cache.length + 1
        self.visible[:, S - 1] = True
        mask = None if self.is_plain else step_mask(self.visible[: len(tokens)], S)
        logits = self.decoder.read(tokens[:, None], self.positions, mask, None, self.cache)
        self.positions = (self.positions + 1).clamp(
            max=self.decoder.config.max_position_embeddings - 1
        )  # of ended rows
        for group in self.groups:
            if group.rows.any_runs:
                group.step(logits[group.place])

    def _settle(self) -> None:
        """Moves new tokens to the ends of their rows."""
        if not len(self.lengths):
            return
        new = self.cache.length - self.moved
        runs = torch.zeros(len(self.lengths), dtype=torch.bool)
        for group in self.groups:
            runs[group.place] = group.rows.running
        if new and not bool((self.lengths == self.moved)[runs].all()):
            to = self.lengths.where(runs, 0)
            self.cache.move(self.moved, to)
            self.visible[:, self.moved : self.cache.length] = False
            self.visible[: len(to)].scatter_(1, to[:, None] + torch.arange(new), True)
        self.lengths = (self.lengths + new).where(runs, 0)
        self._set_length()

    def _set_length(self) -> None:
        """What follows from the lengths once they are known."""
        assert self.memory is not None
        R, self.moved = len(self.lengths), int(self.lengths.max()) if len(self.lengths) else 0
        if R:
            self.cache = self.memory.rows(0, R)
            self.cache.length = self.moved
        self.memory.length = self.moved
        self.is_plain = bool(self.visible[:R, : self.moved].all())

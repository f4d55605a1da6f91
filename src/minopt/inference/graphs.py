"""Decoding on a GPU as CUDA graphs: a step is one launch, whatever number of kernels it has.

Shapes: B batch, Q tokens of a row this step (beams, or 1), S capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.inference.fast import FastOPT, weights_of
from minopt.inference.plan import check_fits
from minopt.load_options import LoadOptions

# Capacities are rounded up to it, so that texts of like lengths share a graph; attention wants a multiple of 8.
ROUND = 256


class GraphedOPT(FastOPT):
    """A ``FastOPT`` whose steps behind a prompt are replayed CUDA graphs.

    A step attends the whole capacity of its cache under a mask. The graphs of the last cache are kept with it, and
    serve the next text of the same batch size and rounded capacity once nobody holds that cache any more.

    Attributes:
        compile_step: compile a step by ``torch.compile`` before it is captured: faster yet, after a minute of waiting.
    """

    compile_step = False
    _last: tuple[weakref.ref[GraphCache], list[Tensor], list[Tensor], dict[int, Graph]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # graphs belong to this process and this model

    @torch.inference_mode(False)  # what was made in this mode could not be written to outside of it
    def new_cache(self, batch_size: int, capacity: int) -> GraphCache:
        """An empty cache of at least that capacity; the last one's memory and graphs, if it is free and fits."""
        capacity = min(-(-capacity // ROUND) * ROUND, max(capacity, self.config.max_position_embeddings))
        last, self._last = self._last, None
        if last is not None and last[0]() is None and last[1][0].shape[::2] == (batch_size, capacity):
            cache = GraphCache.__new__(GraphCache)
            cache.keys, cache.values, cache.graphs, cache.length = last[1], last[2], last[3], 0
            for tensor in (*cache.keys, *cache.values):
                tensor.zero_()  # a text with NaN must not reach the next
        else:
            del last  # its memory, before more is asked for
            cache = GraphCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)
        self._last = weakref.ref(cache), cache.keys, cache.values, cache.graphs
        return cache

    @torch.inference_mode()
    def decode_step(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
        """See ``OPT.decode_step``. The logits hold until the next step."""
        assert isinstance(cache, GraphCache)
        length = cache.move_length_to(self.device)
        slots = torch.arange(cache.capacity, device=self.device)
        if attention_mask is None:
            mask, positions = slots <= length, length
        else:
            real = torch.nn.functional.pad(attention_mask, (0, cache.capacity - attention_mask.shape[1])).bool()
            mask, positions = real | (slots == length), real.sum(1, keepdim=True) - 1
        return self._replay(input_ids, mask[..., None, :], positions, cache)[:, -1]

    @torch.inference_mode()
    def decode_beams(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """See ``OPT.decode_beams``. The logits hold until the next step."""
        assert isinstance(cache, GraphCache)
        cache.move_length_to(self.device)
        mask = torch.nn.functional.pad(attention_mask, (0, cache.capacity - attention_mask.shape[2]))
        return self._replay(input_ids, mask, position_ids, cache)

    def _replay(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: GraphCache) -> Tensor:
        Q = input_ids.shape[1]
        if Q not in cache.graphs:
            cache.graphs[Q] = Graph(self, cache, Q)
        return cache.graphs[Q](input_ids, mask, position_ids, cache)


def check(options: LoadOptions) -> None:
    """Refuses options that do not go with CUDA graphs."""
    if options.quantize is not None and options.optimize == "compile":
        raise ValueError('quantize: int8 programs run on a CPU, got optimize="compile" on a GPU. Leave out one.')


def build(checkpoint: Checkpoint, options: LoadOptions) -> GraphedOPT:
    """The fast model of a checkpoint with its steps as CUDA graphs, for ``minopt.load``.

    Raises:
        ValueError: if it does not fit into memory.
    """
    check_fits(checkpoint, options)
    model = GraphedOPT(checkpoint.config, weights_of(checkpoint, options))
    model.compile_step = options.optimize == "compile"
    return model


class GraphCache(KVCache):
    """A ``KVCache`` with the graphs that read and write its memory, by tokens a step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphs: dict[int, Graph] = {}

    def move_length_to(self, device: torch.device) -> Tensor:
        """Makes the length a tensor, which a graph can count on; returns it."""
        if not isinstance(self.length, Tensor):
            self.length = torch.tensor(self.length, device=device)
        return self.length

    def expand(self, copies: int) -> None:
        """See ``KVCache.expand``."""
        super().expand(copies)
        self.graphs = {}  # they write to the tensors of before


class Graph:
    """A step of ``[B, Q]`` tokens into one cache's memory, with the places that it reads its input from."""

    def __init__(self, model: GraphedOPT, cache: GraphCache, Q: int) -> None:
        B, S, device = cache.batch_size, cache.capacity, model.device
        self.input_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.mask = torch.ones(B, 1, Q, S, dtype=torch.bool, device=device)
        self.cache = KVCache.__new__(KVCache)  # of the same memory: it outlives the caller's, which is given anew
        self.cache.keys, self.cache.values = cache.keys, cache.values
        self.cache.length = self.length = torch.zeros((), dtype=torch.long, device=device)
        step = torch.compile(model.forward) if model.compile_step else model.forward
        self.run = capture(lambda: step(self.input_ids, self.mask, self.position_ids, self.cache), self.length, S - Q)

    def __call__(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: GraphCache) -> Tensor:
        """Reads tokens ``[B, Q]`` under a mask ``[B or 1, Q, S]``; returns their logits ``[B, Q, V]``."""
        assert isinstance(cache.length, Tensor)
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        self.mask.copy_(mask.unsqueeze(1) if mask.ndim == 3 else mask)
        self.length.copy_(cache.length)
        logits = self.run()
        cache.length.copy_(self.length)
        return logits


def capture(step: Callable[[], Tensor], length: Tensor, free: int) -> Callable[[], Tensor]:
    """A step as a CUDA graph.

    Args:
        step: launches it and returns the place of its result.
        length: where it writes to the cache; moved by it.
        free: a place that may be written to.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in their first calls, which cannot be captured
        for _ in range(3):
            length.fill_(free)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    length.fill_(free)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay

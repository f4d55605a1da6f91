"""Decoding on a GPU as CUDA graphs: a step is one launch, whatever number of kernels it has.

Shapes: B batch, Q tokens of a row this step (beams, a draft, or 1), S capacity of the cache, V vocabulary.
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
from minopt.masks import plain_causal_mask

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
            cache = GraphCache.of(last[1], last[2])
            cache.graphs = last[3]
            for tensor in (*cache.keys, *cache.values):
                tensor.zero_()  # a text with NaN must not reach the next
        else:
            del last  # its memory, before more is asked for
            cache = GraphCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)
        self._last = weakref.ref(cache), cache.keys, cache.values, cache.graphs
        return cache

    @torch.inference_mode()
    def read(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See ``Decoder.read``. A call that wants all logits is a step; its logits hold until the next step."""
        assert isinstance(cache, GraphCache)
        if wanted is not None:  # prompts and scored texts, whose shapes hardly come again
            cache.length = int(cache.length)
            return super().read(input_ids, position_ids, mask, wanted, cache)
        if not isinstance(cache.length, Tensor):
            cache.length = torch.tensor(cache.length, device=self.device)  # which the graph reads and moves
        Q = input_ids.shape[1]
        if Q not in cache.graphs:
            cache.graphs[Q] = Graph(self, cache, Q)
        return cache.graphs[Q](input_ids, position_ids, mask, cache)


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
        self.is_masked = False
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.cache = KVCache.of(cache.keys, cache.values, self.length)  # outlives the caller's cache
        read = super(GraphedOPT, model).read
        if model.compile_step:
            read = torch.compile(read)

        def step() -> Tensor:
            # No token attends to slots behind its own, whatever the buffer holds there.
            mask = self.mask & plain_causal_mask(self.length, Q, S, device)
            return read(self.input_ids, self.position_ids, mask, None, self.cache)

        self.run = capture(step, self.length, S - Q)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: GraphCache) -> Tensor:
        """Reads tokens as ``Decoder.read`` says; the logits ``[B * Q, V]`` hold until the next call."""
        assert isinstance(cache.length, Tensor)
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        if mask is not None:
            self.mask[..., : mask.shape[3]] = mask
        elif self.is_masked:
            self.mask.fill_(True)
        self.is_masked = mask is not None
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

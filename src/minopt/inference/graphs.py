"""Decoding on a GPU as CUDA graphs: a step is one launch, whatever number of kernels it has.

Shapes: B batch, Q tokens of a row this step (beams, a draft, or 1), S capacity of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.config import OPTConfig
from minopt.inference.fast import FastOPT, weights_of
from minopt.inference.plan import check_fits
from minopt.load_options import LoadOptions
from minopt.masks import plain_causal_mask

# Capacities are rounded up to it, so that texts of similar length share a graph; attention wants a multiple of 8.
ROUND = 256


class GraphedOPT(FastOPT):
    """A ``FastOPT`` whose steps after a prompt are replayed CUDA graphs.

    A step attends the whole capacity of its cache under a mask. The memory and the graphs of the last cache are kept.
    They serve the next text of the same batch size and rounded capacity, once nobody holds that cache any more.

    Args:
        config, weights: see ``FastOPT``.
        compile_step: compile a step by ``torch.compile`` before it is captured: faster yet, after a minute of waiting.
    """

    def __init__(self, config: OPTConfig, weights: Iterable[tuple[str, Tensor]], *, compile_step: bool = False) -> None:
        super().__init__(config, weights)
        self.compile_step = compile_step
        self._graphs: WeakKeyDictionary[KVCache, _Graphs] = WeakKeyDictionary()
        self._last: _Graphs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": WeakKeyDictionary(), "_last": None}  # they belong to this process and model

    @torch.inference_mode(False)  # what was made in this mode could not be written to outside of it
    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of at least that capacity; in the last one's memory, if that is free and fits."""
        capacity = min(-(-capacity // ROUND) * ROUND, max(capacity, self.config.max_position_embeddings))
        last, self._last = self._last, None
        if last is None or last in self._graphs.values() or last.keys[0].shape[::2] != (batch_size, capacity):
            del last  # its memory, before more is asked for
            cache = super().new_cache(batch_size, capacity)
            last = _Graphs(cache)
        else:
            for tensor in (*last.keys, *last.values):
                tensor.zero_()  # a text with NaN must not reach the next
            cache = KVCache.of(last.keys, last.values)
        self._graphs[cache] = self._last = last
        return cache

    @torch.inference_mode()
    def read(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See ``Decoder.read``. A call that wants all logits is a step; its logits hold until the next step."""
        if wanted is not None:  # prompts and scored texts, whose shapes hardly come again
            cache.length = int(cache.length)
            return super().read(input_ids, position_ids, mask, wanted, cache)
        if not isinstance(cache.length, Tensor):
            cache.length = torch.tensor(cache.length, device=self.device)  # which the graph reads and moves
        graphs = self._graphs.get(cache)
        if graphs is None or graphs.keys is not cache.keys:  # an expanded cache has other memory
            graphs = self._graphs[cache] = self._last = _Graphs(cache)
        Q = input_ids.shape[1]
        if Q not in graphs.by_tokens:
            graphs.by_tokens[Q] = Graph(self, cache, Q)
        return graphs.by_tokens[Q](input_ids, position_ids, mask, cache.length)


def check(options: LoadOptions) -> None:
    """Refuses options that do not go with CUDA graphs."""
    if options.quantize is not None and options.optimize == "compile":
        raise ValueError(
            'quantize: expected None with optimize="compile" on a GPU, got "int8". Leave out one of the two.'
        )


def build(checkpoint: Checkpoint, options: LoadOptions) -> GraphedOPT:
    """The fast model of a checkpoint with its steps as CUDA graphs, for ``minopt.load``.

    Raises:
        ValueError: if it does not fit into memory.
    """
    check_fits(checkpoint, options)
    weights = weights_of(checkpoint, options)
    return GraphedOPT(checkpoint.config, weights, compile_step=options.optimize == "compile")


class _Graphs:
    """The memory of a cache, and the graphs that read and write it, by tokens a step."""

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.by_tokens: dict[int, Graph] = {}


class Graph:
    """A step of ``[B, Q]`` tokens into one cache's memory, with the places that it reads its input from."""

    def __init__(self, model: GraphedOPT, cache: KVCache, Q: int) -> None:
        B, S, device = cache.batch_size, cache.capacity, model.device
        self.input_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.mask, self.is_masked = torch.ones(B, 1, Q, S, dtype=torch.bool, device=device), False
        self.length = torch.zeros((), dtype=torch.long, device=device)
        own = KVCache.of(cache.keys, cache.values, self.length)  # it outlives the caller's
        read = super(GraphedOPT, model).read
        if model.compile_step:
            read = torch.compile(read)

        def step() -> Tensor:
            # No token attends to slots after its own, whatever the buffer holds there.
            mask = self.mask & plain_causal_mask(self.length, Q, S, device)
            return read(self.input_ids, self.position_ids, mask, None, own)

        self.run = capture(step, self.length, S - Q)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, length: Tensor) -> Tensor:
        """Reads tokens as ``Decoder.read`` says, and moves ``length``; the logits hold until the next call."""
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        if mask is not None:
            self.mask[..., : mask.shape[3]] = mask
        elif self.is_masked:
            self.mask.fill_(True)
        self.is_masked = mask is not None
        self.length.copy_(length)
        logits = self.run()
        length.copy_(self.length)
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

"""Decoding on a GPU as CUDA graphs: a step is one launch, whatever number of kernels it has.

Shapes: B batch, Q tokens of a row this step (beams, a draft, or 1), S slots that a step attends, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from threading import Lock
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
from minopt.masks import added_mask, mask_of_slots

# A step attends a multiple of so many slots, and a cache has one: texts of similar length share a graph. Kernels of
# attention want a multiple of 8.
BUCKET = 256

_ONE_CAPTURE = Lock()  # at a time in a process: another one's would wait for the GPU, which ends the first


class GraphedOPT(FastOPT):
    """A ``FastOPT`` whose steps after a prompt are replayed CUDA graphs.

    A step attends the filled slots of its cache, rounded up to ``BUCKET``, under a mask. The memory and the graphs of
    the last cache are kept. They serve the next text of the same batch size and rounded capacity, once nobody holds
    that cache any more.

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
        capacity = -(-capacity // BUCKET) * BUCKET
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
        self, inputs: Tensor, position_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See ``Decoder.read``. A call that wants all logits is a step; its logits hold until the next step."""
        if wanted is not None or cache not in self._graphs:  # prompts and scored texts, whose shapes hardly come again
            return super().read(inputs, position_ids, mask, wanted, cache)
        try:
            logits = self._graphs[cache].run(self, inputs, position_ids, mask, cache.length)
        except BaseException:  # torch captures nothing more into a pool whose first capture failed
            del self._graphs[cache]
            self._last = None
            raise
        cache.length += inputs.shape[1]
        return logits


def check(options: LoadOptions) -> None:
    """Refuses nothing: all options go with this form."""


def build(checkpoint: Checkpoint, options: LoadOptions) -> GraphedOPT:
    """The fast model of a checkpoint with its steps as CUDA graphs, for ``minopt.load``.

    Raises:
        ValueError: if it does not fit into memory.
    """
    check_fits(checkpoint, options)
    weights = weights_of(checkpoint, options)
    return GraphedOPT(checkpoint.config, weights, compile_step=options.optimize == "compile")


class _Graphs:
    """The memory of a cache, and the graphs that read and write it, by tokens of a step and slots that it attends."""

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.pool = torch.cuda.graph_pool_handle() if cache.keys[0].is_cuda else None  # one for all: they never overlap
        self.by_shape: dict[tuple[int, int], Graph] = {}

    def run(
        self, model: GraphedOPT, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, length: int
    ) -> Tensor:
        """Reads tokens as ``Decoder.read`` says, into the slots from ``length`` on."""
        Q = input_ids.shape[1]
        shape = Q, -(-(length + Q) // BUCKET) * BUCKET
        if shape not in self.by_shape:
            cache = KVCache.of(self.keys, self.values, window=shape[1])
            self.by_shape[shape] = Graph(model, cache, Q, length, self.pool)
        return self.by_shape[shape](input_ids, position_ids, mask, length)


class Graph:
    """A step of ``[B, Q]`` tokens into one cache's memory, with the places that it reads its input from."""

    def __init__(self, model: GraphedOPT, cache: KVCache, Q: int, length: int, pool: Any) -> None:
        B, S, device = cache.batch_size, cache.window, model.device
        self.input_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(B, Q, dtype=torch.long, device=device)
        self.mask, self.is_masked = torch.ones(B, 1, Q, S, dtype=torch.bool, device=device), False
        self.length = torch.full((), length, device=device)
        new, every = torch.arange(Q, device=device), torch.arange(S, device=device)
        read = super(GraphedOPT, model).read
        if model.compile_step:
            read = torch.compile(read, dynamic=False, options={"coordinate_descent_tuning": True})

        def step() -> Tensor:
            cache.slots = new + self.length
            # No token attends to slots after its own, whatever the buffer holds there. As numbers, which attention
            # would make of it in each layer.
            mask = added_mask(self.mask & mask_of_slots(cache.slots, every), model.dtype)
            return read(self.input_ids, self.position_ids, mask, None, cache)

        # torch would compile the first 8 shapes of a process alone, and the first 256 of all models in it.
        limits = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6}
        with torch._dynamo.config.patch(limits) if model.compile_step else nullcontext():
            self.replay = capture(step, device, pool)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """Reads tokens into the slots from ``length`` on; the logits hold until the next call."""
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        if mask is not None:
            self.mask[..., : mask.shape[3]] = mask
        elif self.is_masked:
            self.mask.fill_(True)
        self.is_masked = mask is not None
        self.length.fill_(length)
        return self.replay()


def capture(step: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """A step as a CUDA graph, with memory from ``pool``: it launches kernels and returns the place of its result.

    The step runs three times before, because libraries set themselves up in their first calls, which cannot be
    captured. It may: it writes nothing but the slots that the first replay writes.
    """
    stream, graph, before = _side_stream(device), torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # The stream is chosen around all: where a capture fails, torch would leave its own the current one.
    with _ONE_CAPTURE, torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_stream(before)
        for _ in range(3):
            step()
        # The first capture makes tensors for the random generator, into which captures outside of this mode write too.
        # Other threads may use the GPU meanwhile. The stream is named: torch's own is one of the first device.
        with (
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
            torch.inference_mode(),
        ):
            logits = step()
    before.wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: the memory of a pool serves the next graph only on the stream of the last one."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

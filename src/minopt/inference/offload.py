"""An OPT larger than the memory at hand: its layers pass through two places, one read while the other computes.

What FlexGen (arXiv 2303.06865) calls offloading. A step takes as long as the layers take to come, whatever the batch,
so that a large one pays for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor, nn

from minopt.cache import KVCache
from minopt.checkpoint.pieces import SourceTensor, main_dtype
from minopt.checkpoint.source import Checkpoint
from minopt.checkpoint.weights import read_weights
from minopt.config import OPTConfig
from minopt.inference.frozen import Frozen, InferenceOPT, refuse
from minopt.inference.linear import Plain
from minopt.model import DecoderLayer, Packed


class StreamedOPT(InferenceOPT):
    """An OPT whose layers are fetched in turn, each while the one before it computes.

    Embeddings, projections and the norms outside of layers stay on the device.

    Args:
        checkpoint: an open one; its files have to stay as they are.
        device: which computes.
        dtype: ``None`` is ``"auto"``.
        in_memory: let layers wait in pinned memory, for a GPU; else in the checkpoint's own files, of whatever kind,
            from which they are read, put together and cast each time.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, *, in_memory: bool
    ) -> None:
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else main_dtype(checkpoint.tensors.values())
        super().__init__(checkpoint.config, dtype, device)
        kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("layers.")}
        weights = dict(read_weights(replace(checkpoint, tensors=kept), device, dtype))
        stream = _Stream(checkpoint, device, dtype, in_memory)
        self.layers = nn.ModuleList(_StreamedLayer(stream, index) for index in range(len(self.layers)))
        self._pass, self._sources = Lock(), checkpoint.tensors
        self._head = Plain(weights["embed_tokens.weight"], None)
        self.finish(weights)

    def hidden_states(self, *args: Any, **options: Any) -> Tensor:
        """As of any model; passes of several threads come one after the other."""
        with self._pass:
            return super().hidden_states(*args, **options)

    def read(self, name: str) -> Tensor:
        """See ``InferenceOPT.read``; out of the checkpoint's files."""
        return self._sources[name].read(self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse("its layers are in their files, it cannot be copied or pickled")


class _StreamedLayer(Frozen):
    """``DecoderLayer``, wherever it is just now."""

    def __init__(self, stream: _Stream, index: int) -> None:
        super().__init__()
        self._stream, self._index = stream, index

    def forward(self, x: Tensor, mask: Tensor | Packed | None = None, cache: KVCache | None = None) -> Tensor:
        """As ``DecoderLayer``'s."""
        y: Tensor = self._stream.take(self._index)(x, mask, cache)
        return y


class _Place:
    """Memory for one layer on the device, and, where layers come from the disk to a GPU, pinned memory on the way."""

    def __init__(self, config: OPTConfig, device: torch.device, dtype: torch.dtype, with_host: bool) -> None:
        self.index: int | None = None  # of the layer that is here
        self.layer = DecoderLayer(config, 0, device, dtype).requires_grad_(False).eval()
        self.tensors = {name: parameter.data for name, parameter in self.layer.named_parameters()}
        self.host = _pinned(self.tensors) if with_host else self.tensors
        if device.type == "cuda":
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Stream:
    """The layers of a checkpoint, in turn."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, in_memory: bool) -> None:
        count, on_gpu = checkpoint.config.num_hidden_layers, device.type == "cuda"
        self._places = [
            _Place(checkpoint.config, device, dtype, with_host=on_gpu and not in_memory) for _ in range(min(2, count))
        ]
        names = list(self._places[0].tensors)
        self._sources: list[dict[str, SourceTensor]] = [
            {name: checkpoint.tensors[f"layers.{index}.{name}"] for name in names} for index in range(count)
        ]
        self._waiting: list[dict[str, Tensor]] | None = None
        if in_memory:
            self._waiting = [_pinned(self._places[0].tensors) for _ in range(count)]
            for sources, tensors in zip(self._sources, self._waiting, strict=True):
                _read(sources, tensors)
        self._device = device
        self._coming: _Fetch | None = None
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def take(self, index: int) -> DecoderLayer:
        """A layer, good until the next one is taken; the one behind it is sent for."""
        self._arrive()
        place = self._holder(index)
        if place is None:  # the first, or one behind a pass that was broken off
            self._send_for(index, self._places[0])
            self._arrive()
            place = self._places[0]
        following = (index + 1) % len(self._sources)
        if self._holder(following) is None:
            self._send_for(following, next(p for p in self._places if p is not place))
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(place.arrived)
        place.layer.self_attn.index = index
        return place.layer

    def _holder(self, index: int) -> _Place | None:
        return next((place for place in self._places if place.index == index), None)

    def _send_for(self, index: int, place: _Place) -> None:
        """Has a place filled; on a GPU behind all that it has been sent so far, for which the place may be in use."""
        passed = None if self._copies is None else torch.cuda.current_stream(self._device).record_event()
        self._coming = _Fetch(partial(self._fetch, index, place, passed))
        self._coming.begin()

    def _arrive(self) -> None:
        """Waits for what was sent for: nothing else may fill places. After an interrupt the next call waits on."""
        if self._coming is not None:
            self._coming.wait()
            coming, self._coming = self._coming, None
            if coming.error is not None:
                raise coming.error

    def _fetch(self, index: int, place: _Place, passed: torch.cuda.Event | None) -> None:
        place.index = None
        host = place.host if self._waiting is None else self._waiting[index]
        if self._waiting is None:
            if self._copies is not None:
                place.arrived.synchronize()  # what is on the way from this memory
            _read(self._sources[index], host)
        if self._copies is not None and passed is not None:
            with torch.cuda.device(self._copies.device), torch.cuda.stream(self._copies):
                self._copies.wait_event(passed)
                for name, tensor in place.tensors.items():
                    tensor.copy_(host[name], non_blocking=True)
                place.arrived.record()
        place.index = index


class _Fetch(Thread):
    """Reads a layer while another computes. A thread for each, so that none is missing in a fork or at the end."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__(name="minopt-layers")
        self.error: BaseException | None = None
        self._fill, self._done = run, Event()

    def begin(self) -> None:
        try:
            self.start()
        except RuntimeError:  # the interpreter is about to end and starts no more threads
            self.run()

    def run(self) -> None:
        try:
            self._fill()
        except BaseException as error:
            self.error = error
        self._done.set()

    def wait(self) -> None:
        while not self._done.wait(1):
            if not self.is_alive():  # an interrupt came before it had begun, or a fork has left it behind
                return


def _pinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory for as many numbers, out of which a GPU copies by itself."""
    return {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}


def _read(sources: dict[str, SourceTensor], tensors: dict[str, Tensor]) -> None:
    for name, source in sources.items():
        source.fill(tensors[name])

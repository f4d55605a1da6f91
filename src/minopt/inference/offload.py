"""An OPT larger than the memory at hand: two layers are in memory, one is read while the other computes.

This is FlexGen's offloading (arXiv 2303.06865). A step takes as long as reading all layers takes, whatever the batch:
use large batches.
"""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from minopt.cache import KVCache
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.names import parameter_shapes
from minopt.checkpoint.weights import read_weights
from minopt.inference.frozen import Frozen, InferenceOPT, refuse
from minopt.inference.linear import Plain
from minopt.inference.plan import check_fits
from minopt.load_options import LoadOptions
from minopt.masks import Packed
from minopt.memory import empty
from minopt.model import DecoderLayer
from minopt.progress import size_of


class StreamedOPT(InferenceOPT):
    """An OPT whose layers are fetched in turn, each while the one before it computes.

    Embeddings, projections and the norms outside of layers stay on the device.

    Args:
        checkpoint: an open one; its files have to stay as they are.
        device: the one that computes.
        dtype: ``None`` is ``"auto"``.
        in_memory: let layers wait in pinned memory, for a GPU. Otherwise each pass reads them from the checkpoint's own
            files, of whatever kind, and casts them.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, *, in_memory: bool
    ) -> None:
        kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("layers.")}
        dtype = dtype or checkpoint.dtype_on(device)
        weights = dict(read_weights(replace(checkpoint, tensors=kept), device, dtype))
        stream = _Stream(checkpoint, device, dtype, in_memory)
        layers = [_StreamedLayer(stream, index) for index in range(checkpoint.config.num_hidden_layers)]
        super().__init__(checkpoint.config, weights, layers, Plain(weights["embed_tokens.weight"], None))
        self._pass, self._sources = Lock(), checkpoint.tensors

    def hidden_states(self, *args: Any, **options: Any) -> Tensor:
        """See ``OPT.hidden_states``. Passes of several threads run one after the other."""
        with self._pass:
            return super().hidden_states(*args, **options)

    def read_weight(self, name: str) -> Tensor:
        """See ``InferenceOPT.read_weight``; out of the checkpoint's files."""
        return self._sources[name].read(self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse("its layers are in their files, it cannot be copied or pickled")


@cache
def _finish_before_the_end() -> None:
    """Has the process, before it ends, wait for a layer that is being read: its thread would end in torch's code, and
    take the process with it ("terminate called without an active exception").
    """

    def wait() -> None:
        for thread in threading.enumerate():
            if isinstance(thread, _Fetch):
                thread.join()

    atexit.register(wait)


def check(options: LoadOptions) -> None:
    """Refuses options that do not go with layers that are offloaded."""
    if options.offload == "cpu" and options.device.type == "cpu":
        raise ValueError('offload: expected "disk", got "cpu": the device is the CPU itself. Offload to disk.')
    if options.optimize is not True:
        raise ValueError(f"optimize: expected True for an offloaded model, got {options.optimize!r}. Leave it out.")
    if options.quantize is not None:
        raise ValueError(
            "quantize: an offloaded model reads the checkpoint's weights as they are. Write an int8 folder first "
            "(minopt convert --quantize int8), and load that without quantize."
        )


def build(checkpoint: Checkpoint, options: LoadOptions) -> StreamedOPT:
    """A model whose layers are fetched in turn, for ``minopt.load``.

    Raises:
        ValueError: if what has to stay in memory does not fit.
    """
    check_fits(checkpoint, options)
    return StreamedOPT(checkpoint, options.device, options.dtype, in_memory=options.offload == "cpu")


class _StreamedLayer(Frozen):
    """A ``DecoderLayer`` without weights, which come with each call."""

    def __init__(self, stream: _Stream, index: int) -> None:
        super().__init__()
        layer = DecoderLayer(stream.checkpoint.config, index, "meta", stream.dtype).eval()
        self._run, self._weights = partial(functional_call, layer), partial(stream.take, index)

    def forward(self, *inputs: Tensor | Packed | KVCache | None) -> Tensor:
        """See ``DecoderLayer.forward``."""
        y: Tensor = self._run(self._weights(), inputs)
        return y


class _Place:
    """Memory for one layer on the device, and where layers are on the way to it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> None:
        self.index: int | None = None  # of the layer that is here
        self.tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        self.host = self.tensors
        if device.type == "cuda":
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Stream:
    """The layers of a checkpoint, in turn."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, in_memory: bool) -> None:
        _finish_before_the_end()
        self.checkpoint, self.dtype, self._device = checkpoint, dtype, device
        self._count, on_gpu = checkpoint.config.num_hidden_layers, device.type == "cuda"
        first = "layers.0."
        shapes = {name.removeprefix(first): shape for name, shape in parameter_shapes(checkpoint.config).items()
                  if name.startswith(first)}  # fmt: skip
        self.places = [_Place(shapes, device, dtype) for _ in range(min(2, self._count))]
        self._waiting: list[dict[str, Tensor]] = []
        if in_memory:
            self._waiting = self._pinned(self._count, shapes)
            for index, tensors in enumerate(self._waiting):
                self._read(index, tensors)
        elif on_gpu:
            for place, tensors in zip(self.places, self._pinned(len(self.places), shapes), strict=True):
                place.host = tensors
        self._coming: _Fetch | None = None
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def take(self, index: int) -> dict[str, Tensor]:
        """A layer's weights, which hold until the next layer's are taken; the next layer is sent for."""
        self._arrive()
        place = self._holder(index)
        if place is None:  # the first, or one after a pass that was broken off
            place = self.places[0]
            self._send_for(index, place)
            self._arrive()
        following = (index + 1) % self._count
        if self._holder(following) is None:
            self._send_for(following, next(p for p in self.places if p is not place))
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(place.arrived)
        return place.tensors

    def _holder(self, index: int) -> _Place | None:
        return next((place for place in self.places if place.index == index), None)

    def _send_for(self, index: int, place: _Place) -> None:
        """Has a place filled; on a GPU after all work that was sent so far, which may use the place."""
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
        host = self._waiting[index] if self._waiting else place.host
        if not self._waiting:
            if self._copies is not None:
                place.arrived.synchronize()  # the last copy out of this memory
            self._read(index, host)
        if self._copies is not None and passed is not None:
            with torch.cuda.device(self._copies.device), torch.cuda.stream(self._copies):
                self._copies.wait_event(passed)
                for name, tensor in place.tensors.items():
                    tensor.copy_(host[name], non_blocking=True)
                place.arrived.record()
        place.index = index

    def _pinned(self, count: int, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
        """Memory for layers that a GPU copies from by itself.

        All of it is one piece that the driver is told of: torch's own allocator of pinned memory would round each
        tensor up to a power of two.
        """
        sizes = [math.prod(shape) for shape in shapes.values()]
        memory = empty((count, sum(sizes)), self.dtype)
        driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failure = driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(failure) != 0:
            with suppress(RuntimeError):  # CUDA reports it once more, with the next kernel, whoever launches that
                torch.zeros(1, device=self._device)
            advice = "Use offload disk." if count > len(self.places) else "Free some of the machine's memory."
            raise ValueError(f"offload: the driver cannot pin {size_of(memory.nbytes)} of memory ({failure}). {advice}")
        weakref.finalize(self, driver.cudaHostUnregister, memory.data_ptr())
        return [
            {name: part.view(shape) for (name, shape), part in zip(shapes.items(), layer.split(sizes), strict=True)}
            for layer in memory
        ]

    def _read(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.checkpoint.tensors[f"layers.{index}.{name}"].fill(tensor)


class _Fetch(Thread):
    """Reads a layer while another computes. A thread for each, so that none is missing in a fork or at the end."""

    def __init__(self, fill: Callable[[], None]) -> None:
        super().__init__(name="minopt-layers")
        self.error: BaseException | None = None
        self._fill, self._done = fill, Event()

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

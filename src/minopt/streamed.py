"""An OPT larger than the memory at hand: its layers pass through two places, one read while the other computes.

What FlexGen (arXiv 2303.06865) calls offloading. A step takes as long as the layers take to come, whatever the batch,
so that a large one pays for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minopt.cache import KVCache
from minopt.checkpoint.load import read_weights
from minopt.checkpoint.pieces import SourceTensor
from minopt.checkpoint.source import Checkpoint
from minopt.config import OPTConfig
from minopt.inference.fast import InferenceOPT
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
        kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("layers.")}
        weights = dict(read_weights(replace(checkpoint, tensors=kept), device, dtype))
        super().__init__(checkpoint.config, device="meta", dtype=weights["embed_tokens.weight"].dtype)
        stream = _Stream(checkpoint, device, weights["embed_tokens.weight"].dtype, in_memory)
        self.layers = nn.ModuleList(_StreamedLayer(stream, index) for index in range(len(self.layers)))
        self.load_state_dict(weights, assign=True)
        self.freeze()

    def state_dict(self, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Refuses: the layers are in their files."""
        raise ValueError(
            "model: its layers pass through memory one by one and are not saved from there. Use minopt convert."
        )


class _StreamedLayer(nn.Module):
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
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="minopt-layers")
        self._coming: Future[_Place] | None = None
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def take(self, index: int) -> DecoderLayer:
        """A layer, good until the next one is taken; the one behind it is sent for."""
        coming, self._coming = self._coming, None
        place = None if coming is None else coming.result()
        passed = None if self._copies is None else torch.cuda.current_stream().record_event()
        if place is None or place.index != index:  # the first, or one behind a pass that was broken off
            here = [p for p in self._places if p.index == index]
            place = here[0] if here else self._fetch(index, self._places[0], passed)
        following = (index + 1) % len(self._sources)
        if all(p.index != following for p in self._places):
            other = next(p for p in self._places if p is not place)
            self._coming = self._reader.submit(self._fetch, following, other, passed)
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(place.arrived)
        place.layer.self_attn.index = index
        return place.layer

    def _fetch(self, index: int, place: _Place, passed: torch.cuda.Event | None) -> _Place:
        """Fills a place; on a GPU behind all that had been sent to it by then, for which the place may be in use."""
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
        return place


def _pinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory for as many numbers, out of which a GPU copies by itself."""
    return {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}


def _read(sources: dict[str, SourceTensor], tensors: dict[str, Tensor]) -> None:
    for name, source in sources.items():
        source.fill(tensors[name])

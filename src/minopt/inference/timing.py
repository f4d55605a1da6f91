"""How fast a program is beside the model that it was made of: a few calls of each kind of work, in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch

from minopt.config import OPTConfig
from minopt.generation.decoder import Decoder
from minopt.masks import beam_mask
from minopt.memory import keep_activations

Times = dict[str, dict[str, float]]

_SLOWER = 1.05  # times the model's time: less is noise
_SECONDS, _LEAST = 0.7, 3  # for each kind of work, and rounds
_CACHED = 64  # tokens before a step


@torch.inference_mode()
def beside(program: Decoder, model: Decoder) -> Times:
    """Times one call of both, as far as the program's longest row and most rows allow.

    Returns:
        Milliseconds, the least of several samples: ``{"1 row": {"program": 5.1, "model": 5.3}, "8 rows": ...}``.
    """
    keep_activations()  # as in a process that loads them
    found: Times = {}
    for name, rows, tokens, cached in _work(program.config, program.max_batch):
        both = {"program": program, "model": model}
        samples = {which: _sampler(decoder, rows, tokens, cached) for which, decoder in both.items()}
        best = {which: math.inf for which, sample in samples.items() if sample()}  # the first call warms up
        begin, rounds = time.perf_counter(), 0
        while rounds < _LEAST or time.perf_counter() - begin < _SECONDS:
            for which in list(best)[:: 1 if rounds % 2 else -1]:
                best[which] = min(best[which], samples[which]())
            rounds += 1
        found[name] = {which: round(1e3 * seconds, 4) for which, seconds in best.items()}
    return found


def worst(times: Times) -> float:
    """The program's time by the model's, where it is largest; 0 if nothing was timed."""
    return max((both["program"] / both["model"] for both in times.values()), default=0.0)


def slower(times: Times) -> str:
    """Where a program is slower than the model and by how much, in words; empty if it is nowhere."""
    return ", ".join(
        f"{name} in {both['program']:.3g} ms, the model in {both['model']:.3g} ms"
        for name, both in times.items()
        if both["program"] > _SLOWER * both["model"]
    )


def _work(config: OPTConfig, max_batch: int | None) -> Iterator[tuple[str, int, int, int]]:
    """Names, rows, tokens of a call, and cached tokens. Beams are tokens of one row that do not see each other."""
    longest, rows = config.max_position_embeddings, min(8, max_batch or 8)
    cached, prompt = min(_CACHED, longest - 1), min(512, longest)
    yield "1 row", 1, 1, cached
    if rows > 1:
        yield f"{rows} rows", rows, 1, cached
    yield "5 beams", 1, 5, cached
    yield f"a prompt of {prompt} tokens", 1, prompt, 0


def _sampler(decoder: Decoder, rows: int, tokens: int, cached: int) -> Callable[[], float]:
    """Gives the seconds of one call, with ``cached`` tokens read before."""
    config, device, calls = decoder.config, decoder.device, 4 if cached else 1
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, cached + tokens), generator=draw).to(device)
    places = torch.arange(cached + tokens, device=device).clamp_max(config.max_position_embeddings - 1).expand(rows, -1)
    cache, last = decoder.new_cache(rows, cached + tokens), torch.arange(1, rows + 1, device=device) * tokens - 1
    are_beams = cached > 0 and tokens > 1
    own = torch.eye(tokens, dtype=torch.bool, device=device)[None]
    mask = beam_mask(None, cached, own) if are_beams else None
    if cached:
        decoder.read(ids[:, :cached], places[:, :cached], None, torch.zeros_like(last), cache)

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            cache.length = cached
            decoder.read(ids[:, cached:], places[:, cached:], mask, None if are_beams else last, cache)
        return (time.perf_counter() - begin) / calls

    return sample

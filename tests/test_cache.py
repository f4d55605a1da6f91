"""KVCache: its size, and that moving rows and tokens about in it changes nothing that is computed from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minopt import OPT, KVCache, OPTConfig
from tests.conftest import build_ours, build_reference, error

CONFIG = OPTConfig(vocab_size=96, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, ffn_dim=32)
B, CAPACITY = 2, 7


@pytest.fixture
def model(kind: str) -> OPT:
    """A float64 model of each kind."""
    return build_ours(build_reference(kind, dtype=torch.float64))


def fill(cache: KVCache, tokens: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Appends random keys and values to every layer; returns what each layer was told to attend."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads, _, head_dim = cache.keys[0].shape
    attended = []
    for layer in range(len(cache.keys)):
        key, value = torch.randn(2, rows, heads, tokens, head_dim, generator=generator)
        attended.append(cache.append(layer, key, value))
    cache.length += tokens
    return attended


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_it_takes_the_bytes_of_its_keys_and_values_and_not_one_more(dtype: torch.dtype, itemsize: int) -> None:
    cache = KVCache(CONFIG, B, CAPACITY, dtype=dtype)
    expected = 2 * CONFIG.num_hidden_layers * B * CAPACITY * CONFIG.hidden_size * itemsize
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*cache.keys, *cache.values)}
    assert cache.nbytes == sum(storages.values()) == expected
    assert (cache.batch_size, cache.capacity, cache.length) == (B, CAPACITY, 0)
    fill(cache, CAPACITY)
    assert cache.nbytes == expected


@pytest.mark.parametrize("chunks", [(3, 1, 2), (1, 1, 1), (7,)])
def test_slots_write_what_an_int_writes(chunks: tuple[int, ...]) -> None:
    """With them a step attends the whole window, and the length stays."""
    by_int, cache = KVCache(CONFIG, B, CAPACITY), KVCache(CONFIG, B, CAPACITY + 2)
    begin = 0
    for seed, tokens in enumerate(chunks):
        slots = torch.arange(begin, begin + tokens)
        by_slots = KVCache.of(cache.keys, cache.values, slots, CAPACITY)
        begin += tokens
        for filled, whole in zip(fill(by_int, tokens, seed), fill(by_slots, tokens, seed), strict=True):
            for some, all_ in zip(filled, whole, strict=True):
                assert some.shape[2] == begin
                assert all_.shape[2] == by_slots.window == CAPACITY
                assert torch.equal(some, all_[:, :, :begin])
                assert not all_[:, :, begin:].any()
    for layer, keys in enumerate(by_int.keys):
        assert by_int.append(layer, *torch.zeros(2, B, 4, 0, 6))[0].data_ptr() == keys.data_ptr()  # no copy
    assert by_int.length == sum(chunks)


def test_a_truncated_cache_goes_on_like_a_fresh_one(model: OPT) -> None:
    ids, other = ids_of(B, 6), ids_of(B, 3, seed=1)
    cache, fresh = model.new_cache(B, 8), model.new_cache(B, 8)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate(4)
        ours = model(other, cache=cache)
        model(ids[:, :4], cache=fresh)
        theirs = model(other, cache=fresh)
    assert cache.length == fresh.length == 7
    assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("copies", [1, 2])
def test_repeated_rows_decode_as_if_they_had_been_read_there(model: OPT, copies: int) -> None:
    """In place: the memory stays, and what stands behind the end is not written."""
    ids, index = ids_of(3, 5), torch.arange(3).repeat_interleave(copies)
    cache, fresh = model.new_cache(3 * copies, 7), model.new_cache(3 * copies, 7)
    places = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    with torch.no_grad():
        first = cache.rows(0, 3)
        model(ids, cache=first)
        kept = [t.clone() for t in (*first.keys, *first.values)]
        cache.repeat_rows(first)
        for before, after in zip(kept, (*cache.keys, *cache.values), strict=True):
            assert torch.equal(after, before.index_select(0, index))
        model(ids[index], cache=fresh)
        for step in range(2):
            token = ids_of(3 * copies, 1, seed=step + 1)
            assert error(model(token, cache=cache)[:, -1], model(token, cache=fresh)[:, -1]) <= 1e-12
    assert [t.data_ptr() for t in (*cache.keys, *cache.values)] == places


@pytest.mark.parametrize(
    ("start", "slots"),
    [
        (3, [[0, 2], [3, 1]]),  # forwards and backwards, over each other
        (0, [[6, 1, 1], [0, 4, 2]]),  # one of them twice
        (2, [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]),  # as many as there are
        (6, [[0], [0]]),
        (4, [[], []]),
        (7, [[], []]),
    ],
)
def test_a_compacted_cache_holds_the_beginning_and_the_slots_asked_for(start: int, slots: list[list[int]]) -> None:
    """In place: no tensor is made anew, and neither the beginning nor what stands behind the end is written."""
    cache = KVCache(CONFIG, B, CAPACITY + 2)
    fill(cache, CAPACITY)
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    places = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    cache.compact(start, torch.tensor(slots, dtype=torch.long).view(B, -1))
    end = start + len(slots[0])
    assert cache.length == end
    assert [t.data_ptr() for t in (*cache.keys, *cache.values)] == places
    assert cache.capacity == CAPACITY + 2
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        for row, kept in enumerate(slots):
            assert torch.equal(new[row, :, :start], old[row, :, :start])
            assert torch.equal(new[row, :, start:end], old[row, :, [start + slot for slot in kept]])
        assert torch.equal(new[:, :, end:], old[:, :, end:])


def test_truncating_to_more_than_is_filled_is_refused() -> None:
    cache = KVCache(CONFIG, B, CAPACITY)
    fill(cache, 3)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"expected a length from 0 to 3, got {wrong}"):
            cache.truncate(wrong)
    assert cache.length == 3


@pytest.mark.parametrize(("rows", "capacity"), [(0, 5), (2, 0), (-1, 5), (2, -3)])
def test_a_cache_of_no_size_is_refused(rows: int, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size and capacity must be positive, got {rows} and {capacity}"):
        KVCache(CONFIG, rows, capacity)

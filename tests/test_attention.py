"""Attention of single tokens in 16 bits, which takes another way on some processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minopt import attention
from minopt.attention import attend
from minopt.masks import added_mask


def numbers(B: int, T: int, S: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, 3, T, 8]``, and keys and values ``[B, 3, S, 8]`` as views of a longer cache."""
    draw = torch.Generator().manual_seed(B + T + S)
    q, k, v = (torch.randn(B, 3, size, 8, generator=draw).to(dtype) for size in (T, S + 4, S + 4))
    return q, k[:, :, :S], v[:, :, :S]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(2, 3) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("rows_of_mask", [0, 1, 5])
@pytest.mark.parametrize("piece", [1, 3 * 8 * 11 * 2, 2**20])
def test_single_tokens_are_attended_in_float32_where_16_bits_are_slow(
    piece: int, rows_of_mask: int, adds: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, two, and all at once; five rows are no multiple of two. Masks are booleans, or are added."""
    q, k, v = numbers(5, 1, 11, dtype)
    mask = torch.rand(rows_of_mask, 1, 1, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., -1] = True
    mask = added_mask(mask, dtype) if adds else mask
    given, seen, kernel = (mask if rows_of_mask else None), list[Any](), attention._attention

    def spy(q: Tensor, *rest: Any) -> Tensor:
        seen.append((q.dtype, len(q)))
        return kernel(q, *rest)

    monkeypatch.setattr(attention, "_attention", spy)
    monkeypatch.setattr(attention, "_PIECE", piece)
    for has_amx in (False, True):
        monkeypatch.setattr(attention, "_has_amx", lambda has_amx=has_amx: has_amx)
        seen.clear()
        y = attend(q, k, v, given, scale=0.3)
        assert (y.dtype, y.shape) == (dtype, q.shape)
        error = (y - exact(q, k, v, given)).abs().max()
        if has_amx:
            assert seen == [(dtype, 5)]
        else:
            sizes = {1: [1] * 5, 528: [2, 2, 1], 2**20: [5]}[piece]
            assert seen == [(torch.float32, size) for size in sizes]
            assert error < 2 * torch.finfo(dtype).eps  # the result's own rounding alone
        assert 0 < error < 0.05


def test_other_work_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens, other dtypes, gradients, and autocast, which would cast all back."""
    monkeypatch.setattr(attention, "_has_amx", lambda: False)
    one, several = (numbers(2, T, 6)[0] for T in (1, 2))
    assert not attention._is_slow(one)  # gradients
    with torch.no_grad():
        assert attention._is_slow(one)
        assert not attention._is_slow(several)
        assert not attention._is_slow(one.float())
        assert not attention._is_slow(one.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not attention._is_slow(one)

"""Which tokens a token attends to, and the positions of tokens. All masks and positions of the package are made here.

Shapes: B rows, T tokens this call, S cached + T, N tokens to be generated, K beams. Masks are boolean, True = attend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Several texts in one row, without padding. Each text attends only to itself."""

    lengths: tuple[int, ...]  # tokens of each text; their sum is the length of the row

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """The cumulated lengths from 0 on, int32 ``[texts + 1]``: the same tensor for all layers."""
        return _cu_seqlens(self.lengths, device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what was made in this mode could not serve a training step later
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def positions(attention_mask: Tensor | Packed | None, past: int, T: int, device: torch.device) -> Tensor:
    """The position of each new token among the real tokens of its row, -1 for padding on the left.

    Args:
        attention_mask: ``[B, past + T]``, which tokens are real; ``None`` if all are; or the ``Packed`` texts. A mask
            of 4 dims says nothing of padding.
        past, T: tokens before the new ones, and new ones.
        device: where the result is made.

    Returns:
        int64 ``[B, T]``, or ``[T]`` if all rows are alike.
    """
    if isinstance(attention_mask, Packed):
        each = [torch.arange(length) for length in attention_mask.lengths]
        return torch.cat(each).to(device, non_blocking=True)  # a GPU would launch a kernel for each
    new = torch.arange(T, device=device) + past
    if attention_mask is None or attention_mask.ndim == 4:
        return new
    real = attention_mask.long()
    return (real.cumsum(1) * real - 1).index_select(1, new)


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """The rows ``[N, C]`` of ``x`` ``[B, T, C]`` that are wanted, counted through the batch; ``None`` wants all."""
    return x if wanted is None else x.flatten(0, 1)[wanted]


def plain_causal_mask(past: int, T: int, S: int, device: torch.device) -> Tensor:
    """``[1, 1, T, S]``: each new token attends to all tokens up to itself; ``past`` is the first one's slot."""
    return mask_of_slots(torch.arange(past, past + T, device=device), torch.arange(S, device=device))


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to scores: 0 where it is True, else minus infinity."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), -torch.inf)


def mask_of_slots(slots: Tensor, every: Tensor) -> Tensor:
    """``[1, 1, T, S]``: a token in each of ``slots`` ``[T]`` attends to ``every`` slot ``[S]`` up to its own."""
    return (every <= slots[:, None])[None, None]


def causal_mask(attention_mask: Tensor | None, past: int, T: int, S: int, device: torch.device) -> Tensor | None:
    """The mask of new tokens of which some may be padding.

    Args:
        attention_mask: ``[B, S]``, which tokens are real; ``None`` if all are.
        past: tokens before the new ones.
        T, S: new tokens, and keys to attend to.
        device: where the result is made.

    Returns:
        ``None`` where causal attention needs no mask (T == S, or T == 1 at the end). Else ``[B or 1, 1, T, S]``. Every
        token attends at least to itself, padding too, so that no kernel divides by zero.
    """
    if attention_mask is None and T in (1, S):
        return None
    mask = plain_causal_mask(past, T, S, device)
    if attention_mask is None:
        return mask
    # The diagonal: what is causal up to the token itself, less what is causal up to the one before it.
    itself = mask & ~plain_causal_mask(past - 1, T, S, device)
    return mask & attention_mask[:, None, None].bool() | itself


def with_new_tokens(attention_mask: Tensor | None, N: int) -> Tensor | None:
    """Which tokens are real, N new tokens after each prompt included: ``[B, T + N]``, or ``None`` for all."""
    return None if attention_mask is None else F.pad(attention_mask, (0, N), value=True)


def step_mask(real: Tensor | None, S: int) -> Tensor | None:
    """The mask ``[B, 1, 1, S]`` of a single token in slot S - 1; ``real`` is ``[B, S or more]``."""
    return None if real is None else real[:, None, None, :S]


def beam_mask(attention_mask: Tensor | None, T: int, visible: Tensor) -> Tensor:
    """The mask ``[B, 1, K, T + C]`` of the newest tokens of K beams, which share a prompt of T tokens.

    ``attention_mask`` is the prompts'; ``visible [B, K, C]`` says which of the C tokens after them belong to a beam.
    """
    B, K, _ = visible.shape
    prompts = visible.new_ones(B, T) if attention_mask is None else attention_mask
    return torch.cat([prompts[:, None].expand(B, K, T), visible], 2)[:, None]

"""Draws tokens in such a way that two models with the same random numbers mostly draw the same token.

A model that drafts for another draws each token with the number that the other one will draw it with. So a draft is
right in nearly as many steps as any method can reach, and a seed gives the same tokens with a draft and without.

Shapes: R rows, V vocabulary, G groups of W tokens each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minopt.generation.request import Request

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIXES = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def random_numbers(steps: int, rows: int, request: Request) -> Tensor:
    """All random numbers of a call, ``[steps, rows, 1]``: a generator moves on by as many, whenever the rows end."""
    device, generator = request.decoder.device, request.generator
    return request.decoder.agreed(torch.rand(steps, rows, 1, dtype=torch.float64, device=device, generator=generator))


def draw(scores: Tensor, at: Tensor) -> Tensor:
    """A token of each row, by its probability. Rows whose scores are no numbers draw any token, which is not used.

    The highest score after Gumbel noise has been added has the softmax's distribution. Of two models with the same
    noise, tokens differ with a probability of at most 2 D / (1 + D), where D is the total variation distance of their
    distributions (Daliri, Musco and Suresh 2024, arXiv 2408.07978); D is the least possible. Noise for each token would
    take longer than a small model's step. So a group of tokens is drawn first, by the sum of its probabilities,
    and then a token of the group: 450 numbers instead of OPT's 50,272.

    Args:
        scores: ``[R, V]`` float32.
        at: ``[R, 1]`` float64 from 0 to 1, a random number of each row, which decides all.
    """
    V = scores.shape[1]
    W = math.isqrt(V - 1) + 1
    G = -(-V // W)
    groups = F.pad(scores, (0, G * W - V), value=-torch.inf).view(-1, G, W)
    noise = -(-uniform((at * 2**53).long(), G + W).log()).log()
    group = (groups.logsumexp(-1) + noise[:, :G]).argmax(-1, keepdim=True)
    within = groups.take_along_dim(group[..., None], 1)[:, 0]
    token = group * W + (within + noise[:, G:]).argmax(-1, keepdim=True)
    return token[:, 0].clamp(max=V - 1)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Numbers between 0 and 1, neither of them included, float64 ``[R, count]``, from ``seeds [R, 1]`` int64."""
    return ((splitmix64(seeds, count) >> 12 & (1 << 52) - 1).double() + 0.5) / 2**52


def splitmix64(seeds: Tensor, count: int) -> Tensor:
    """The first numbers of the generators with these seeds, 64 bits each: int64 ``[R, count]``."""
    z = seeds + _STEP * torch.arange(1, count + 1, device=seeds.device)
    for shift, factor in _MIXES:
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor  # the shift of a signed integer repeats its sign
    return z

"""Rules: functions from the tokens so far and their scores to new scores.

Shapes: B rows, S tokens so far (padding and prompt included), V vocabulary. Scores are float32 logits ``[B, V]``; what
a rule excludes becomes ``-inf``. Each rule returns a new tensor. Semantics are those of transformers' processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minopt.generation.config import GenerationConfig

Rule = Callable[[Tensor, Tensor], Tensor]


def build_rules(
    config: GenerationConfig, prompt_length: int, eos_token_ids: Sequence[int], device: torch.device
) -> list[Rule]:
    """The rules that a configuration asks for, in the order in which they act."""
    rules: list[Rule] = []
    if config.min_new_tokens > 0 and eos_token_ids:
        eos = torch.tensor(eos_token_ids, device=device)
        end = prompt_length + config.min_new_tokens
        rules.append(lambda ids, scores: suppress(scores, eos) if ids.shape[1] < end else scores)
    if config.suppress_tokens:
        banned = torch.tensor(config.suppress_tokens, device=device)
        rules.append(lambda ids, scores: suppress(scores, banned))
    if config.do_sample:
        if config.temperature != 1.0:
            rules.append(lambda ids, scores: scores / config.temperature)
        if config.top_k > 0:
            rules.append(lambda ids, scores: keep_top_k(scores, config.top_k))
        if config.top_p < 1.0:
            rules.append(lambda ids, scores: keep_top_p(scores, config.top_p))
    return rules


def suppress(scores: Tensor, ids: Tensor) -> Tensor:
    """Excludes tokens ``ids [N]`` in every row."""
    return scores.index_fill(1, ids, -torch.inf)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Excludes all but the ``k`` highest scores of each row; those equal to the last of them stay."""
    least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Excludes the least probable tokens of each row that together have at most ``1 - p``; one always stays.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).
    """
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)

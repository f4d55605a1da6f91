"""A model that gives its loss: cross-entropy at the learned positions alone, their logits never whole in memory.

Shapes: R rows, T tokens of a row, M learned positions, E word_embed_proj_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minopt.masks import Packed
from minopt.model import OPT

# Positions whose logits are in memory at once: 103 MB of OPT's vocabulary in float32.
CHUNK = 512


class ModelWithLoss(nn.Module):
    """A model whose forward gives a sum of losses and how many it sums: what data parallelism wraps.

    The mean over all processes and microbatches is the sum of the sums over the sum of the counts.
    """

    def __init__(self, model: OPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        lengths: tuple[int, ...] | None,
        at: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, int]:
        """Sums the losses of a ``Batch``.

        Args:
            input_ids, lengths, at, targets: see ``Batch``.
            label_smoothing: the probability that is spread over all rows of the vocabulary, as in torch's.

        Returns:
            The sum over M positions in nats, a scalar (see ``cross_entropy_sum``), and M.
        """
        h = self.model.hidden_states(input_ids, None if lengths is None else Packed(lengths))
        loss = cross_entropy_sum(h.flatten(0, 1)[at], self.model.embed_tokens.weight, targets, label_smoothing)
        return loss, len(targets)


def cross_entropy_sum(h: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``F.cross_entropy(h @ weight.T, targets, reduction="sum")`` in float32, some positions at a time.

    Gradients are computed with the loss, while a chunk's logits are there, and scaled in the backward pass: no logits
    are kept, and none computed twice. Under autocast the products are in its dtype.

    Args:
        h: ``[M, E]``; M may be 0.
        weight: the token table, ``[V, E]``.
        targets: ``[M]``.
        label_smoothing: see ``ModelWithLoss``.

    Returns:
        A float32 scalar; float64 where ``h`` is.
    """
    return _CrossEntropySum.apply(h, weight, targets, label_smoothing)  # type: ignore[no-untyped-call]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        ctx.dtypes = h.dtype, weight.dtype
        with torch.autocast(kind, enabled=False):
            return _forward(ctx, h, weight, h.to(dtype), weight.to(dtype), targets, label_smoothing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_h, grad_weight), ctx.gradients = ctx.gradients, None
        # In place: there is no second use, and the second is as large as the token table.
        return _scaled(grad_h, grad, ctx.dtypes[0]), _scaled(grad_weight, grad, ctx.dtypes[1]), None, None


def _forward(
    ctx: Any, h: Tensor, weight: Tensor, x: Tensor, w: Tensor, targets: Tensor, label_smoothing: float
) -> Tensor:
    V = len(w)
    needs_h, needs_weight = ctx.needs_input_grad[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    # The loss is not scaled yet, and float16 would take small probabilities for 0.
    narrow = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
    loss = torch.zeros((), dtype=wide, device=h.device)
    grad_h = torch.zeros_like(h) if needs_h else None
    grad_weight: Tensor | None = None
    for begin in range(0, len(x), CHUNK):
        part, target = x[begin : begin + CHUNK], targets[begin : begin + CHUNK, None]
        logits = F.linear(part, w).to(wide)  # [CHUNK, V]
        total = logits.logsumexp(1, keepdim=True)
        nll = (total - logits.gather(1, target)).sum()
        if label_smoothing:
            evenly = (total - logits.mean(1, keepdim=True)).sum()
            loss += (1 - label_smoothing) * nll + label_smoothing * evenly
        else:
            loss += nll
        if needs_h or needs_weight:
            # The gradient by the logits: the model's distribution less the wanted one.
            error = logits.sub_(total).exp_().sub_(label_smoothing / V)
            error.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=error.dtype))
            error = error.to(narrow)
            if grad_h is not None:
                grad_h[begin : begin + CHUNK] = error @ w.to(narrow)
            if needs_weight:  # summed in float32, where there is anything to sum
                more = error.T @ part.to(narrow)
                grad_weight = more if grad_weight is None else grad_weight.to(wide).add_(more)
    if needs_weight:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
    ctx.gradients = grad_h, grad_weight
    return loss


def _scaled(gradient: Tensor | None, by: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(torch.promote_types(gradient.dtype, dtype)).mul_(by).to(dtype)

"""A model that gives its loss: cross-entropy where tokens count, without the logits of all positions in memory.

Shapes: M positions that count, E word_embed_proj_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minopt.devices import has_bfloat16
from minopt.masks import Packed
from minopt.model import OPT
from minopt.training.batches import Batch

# Positions whose logits are in memory at once: 103 MB of OPT's vocabulary in float32.
CHUNK = 512


class ModelWithLoss(nn.Module):
    """A model whose forward gives the sum of the losses of a batch, in nats: what data parallelism wraps.

    The mean over all processes and microbatches is the sum of these sums over the number of tokens that count.
    """

    def __init__(self, model: OPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        weight = self.model.embed_tokens.weight
        if weight.device.type == "cpu":  # a GPU would add rows in any order, and give other bits each time
            inputs["inputs_embeds"], weight = _look_up(weight, inputs.pop("input_ids"), self.model.config.pad_token_id)
        packed = None if batch.lengths is None else Packed(batch.lengths)
        h = self.model.hidden_states(**inputs, attention_mask=packed, wanted=batch.at)
        return cross_entropy_sum(h, weight, batch.targets, label_smoothing)


class _Lookup(torch.autograd.Function):
    """``F.embedding(ids, table)``, and the table for the head.

    The head's gradient of the table is dense, and the rows of tokens are added to it. Autograd would make a second
    tensor of that size for them, which takes a tenth of a small step.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.ids = ids if padding is None else torch.where(ids == padding, -1, ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, grad: Tensor) -> tuple[Tensor, None, None]:
        real = ctx.ids >= 0  # padding has no gradient here, see OPT.embed_tokens
        return grad.index_add_(0, ctx.ids[real], rows[real]), None, None


_look_up: Callable[..., Any] = _Lookup.apply


class _CrossEntropySum(torch.autograd.Function):
    """``F.cross_entropy(h @ weight.T, targets, reduction="sum")`` in float32, some positions at a time.

    Takes ``h [M, E]``, the token table ``[V, E]``, ``targets [M]``, and the probability that is spread over all rows of
    the vocabulary, as in torch's; M may be 0. Gives a float32 scalar; float64 where ``h`` is.

    Gradients are computed together with the loss, while the logits of a chunk are in memory, and scaled in the backward
    pass: no logits are kept, and none computed twice. Under autocast the products are in its dtype.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        wide = torch.promote_types(dtype, torch.float32)
        narrow = dtype
        if narrow == torch.float16:  # the loss is not scaled yet, and float16 would round small probabilities to 0
            narrow = torch.bfloat16 if has_bfloat16(h.device) else torch.float32
        ctx.dtypes = h.dtype, weight.dtype
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        h, weight = h.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=wide, device=h.device)
        grad_h, grad_weight = torch.zeros_like(h, dtype=narrow), None
        with torch.autocast(kind, enabled=False):
            for begin in range(0, len(h), CHUNK):
                part, target = h[begin : begin + CHUNK], targets[begin : begin + CHUNK, None]
                logits = F.linear(part, weight).to(wide)  # [CHUNK, V]
                total = logits.logsumexp(1, keepdim=True)
                loss += (1 - label_smoothing) * (total - logits.gather(1, target)).sum()
                if label_smoothing:
                    loss += label_smoothing * (total - logits.mean(1, keepdim=True)).sum()
                if needs_h or needs_weight:
                    # The gradient by the logits: the model's distribution minus the wanted one.
                    error = logits.sub_(total).exp_().sub_(label_smoothing / weight.shape[0])
                    error.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=wide))
                    error = error.to(narrow)
                    grad_h[begin : begin + CHUNK] = error @ weight.to(narrow)
                    if needs_weight:  # summed in float32, from the second chunk on
                        more = error.T @ part.to(narrow)
                        grad_weight = more if grad_weight is None else grad_weight.to(wide).add_(more)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = grad_h if needs_h else None, grad_weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        grad_h, grad_weight = (
            # In place: there is no second use, and the gradient of the token table is as large as the table.
            None if g is None else g.to(torch.promote_types(g.dtype, dtype)).mul_(grad).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return grad_h, grad_weight, None, None


cross_entropy_sum: Callable[..., Tensor] = _CrossEntropySum.apply

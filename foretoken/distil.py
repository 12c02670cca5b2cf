"""What heads 2..n learn from head 1: its distribution of the token that they predict one or more positions earlier.

Head i at position t and head 1 at position t + i - 1 speak of the same token; a draft is accepted by how near their
distributions p (head 1's, the teacher's) and q are. Three terms: cross-entropy of q with p (Hinton et al. 2015), total
variation, and -log sum(min(p, q)), the chance that rejection sampling accepts the draft (Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.config import LossConfig
from foretoken.loss import CHUNK_ELEMENTS, IGNORE, distinct, product_dtype


def teachable(labels: Tensor) -> Tensor:
    """Labels (n, B, T) of `loss.targets` with IGNORE where head 1's view of a head's token is not in the window."""
    kept = torch.full_like(labels, IGNORE)
    for d in range(1, len(labels)):
        kept[d, :, : labels.size(2) - d] = labels[d, :, : labels.size(2) - d]
    return kept


def distil_loss(
    hidden: Sequence[Tensor], weight: Tensor | Sequence[Tensor], labels: Tensor, scales: Tensor, terms: LossConfig, *,
    weight_learns: bool = True,
) -> Tensor:  # fmt: skip
    """The terms of heads 2..n, with at most one chunk of logits in memory.

    hidden: n normalised states (B, T, D), of which head 1's only teaches; weight: unembedding (V, D) of all heads, or
    n of them; labels (n, B, T) from `teachable`; scales (n,): weight / count of these labels. weight_learns: whether
    the unembedding that is head 1's too gets gradients; others do.
    """
    weights, which = distinct(weight, len(hidden))
    dtype = product_dtype(weights[0])
    teacher, *students = (h.to(dtype) for h in hidden)
    if not torch.is_grad_enabled():
        weights, students = [w.detach() for w in weights], [h.detach() for h in students]
    if not weight_learns or 0 not in which[1:]:
        weights[0] = weights[0].detach()
    total: Tensor = _Distil.apply(  # type: ignore[no-untyped-call]
        teacher.detach(), labels, scales, terms, which, *weights, *students
    )
    return total


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, teacher: Tensor, labels: Tensor, scales: Tensor, terms: LossConfig, which: list[int], *tensors: Tensor
    ) -> Tensor:
        n, dtype = len(which), teacher.dtype
        weights, students = tensors[: 1 - n], tensors[1 - n :]
        ctx.types = [t.dtype for t in tensors]
        wide, learn = torch.promote_types(dtype, torch.float32), ctx.needs_input_grad[5:]
        grad_weights = [
            torch.zeros_like(w, dtype=wide) if yes else None for w, yes in zip(weights, learn, strict=False)
        ]
        grads = [torch.zeros_like(h) for h in students] if any(learn) else []
        rows = max(1, CHUNK_ELEMENTS // 16 // weights[0].size(0))
        first = weights[0].to(dtype)
        total = torch.zeros(n, dtype=torch.float64, device=first.device)
        for d, states in enumerate(students, 1):
            weight, grad_weight = weights[which[d]].to(dtype) if which[d] else first, grad_weights[which[d]]
            at = (labels[d] != IGNORE).nonzero()  # (valid, 2)
            for part in torch.split(at, rows):
                row, place = part.unbind(1)
                student = states[row, place]
                value, grad = _terms((teacher[row, place + d] @ first.T).to(wide), (student @ weight.T).to(wide), terms)
                total[d] += value.double().sum()
                if grads:
                    grad = (grad * scales[d].to(wide)).to(weight.dtype)
                    grads[d - 1][row, place] = grad @ weight
                    if grad_weight is not None:
                        grad_weight += grad.T @ student
        ctx.save_for_backward(*grad_weights, *grads)
        return (total * scales.to(total)).sum().to(wide)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        return None, None, None, None, None, *(None if g is None else (g * grad_total).to(kind) for g, kind in pairs)


def _terms(teacher: Tensor, student: Tensor, terms: LossConfig) -> tuple[Tensor, Tensor]:
    """From logits (rows, V): the weighted terms (rows), and their gradient for the student's logits (rows, V)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    overlap = torch.minimum(p, q).sum(-1)
    known = p
    if terms.soft_top_k and terms.soft_top_k < p.size(-1):
        kth = log_p.topk(terms.soft_top_k, -1).values[:, -1:]
        known = log_p.masked_fill(log_p < kth, float("-inf")).log_softmax(-1).exp()
    cross = -(known * log_q).sum(-1)
    value = terms.soft * cross + terms.total_variation * (1 - overlap) - terms.acceptance * overlap.log()
    grad = terms.soft * (q - known)
    if terms.total_variation or terms.acceptance:  # min(p, q) rises with q where q < p
        below = (q < p).to(q.dtype)
        rise = q * (below - (q * below).sum(-1, keepdim=True))
        grad -= rise * (terms.total_variation + terms.acceptance / overlap)[:, None]
    return value, grad

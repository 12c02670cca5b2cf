"""What heads 2..n learn from head 1: its distribution of the token that they predict one or more positions earlier.

Head i at position t and head 1 at position t + i - 1 speak of the same token; a draft is accepted by how near their
distributions p (head 1's, the teacher's) and q are. Three terms: cross-entropy of q with p (Hinton et al. 2015), total
variation, and -log sum(min(p, q)), the chance that rejection sampling accepts the draft (Leviathan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foretoken.loss import CHUNK_ELEMENTS, IGNORE


@dataclass(frozen=True)
class Terms:
    """Weights of the terms; soft_top_k: the teacher's likeliest tokens that the soft term knows, 0 for all."""

    soft: float = 0.0
    total_variation: float = 0.0
    acceptance: float = 0.0
    soft_top_k: int = 0


@dataclass(frozen=True)
class DistilOutput:
    """total: scalar with a gradient. divergence, overlap (n,) float64: each head's summed KL(p | q) in nats (with
    soft_top_k to what is left of p), and sum(min(p, q)); head 1's are 0."""

    total: Tensor
    divergence: Tensor
    overlap: Tensor


def teachable(labels: Tensor) -> Tensor:
    """Labels (n, B, T) of `loss.targets` with IGNORE where head 1's view of a head's token is not in the window."""
    kept = torch.full_like(labels, IGNORE)
    for d in range(1, len(labels)):
        kept[d, :, : labels.size(2) - d] = labels[d, :, : labels.size(2) - d]
    return kept


def distil_loss(
    hidden: Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    scales: Tensor,
    terms: Terms,
    *,
    weight_learns: bool = True,
) -> DistilOutput:
    """The terms of heads 2..n, with at most one chunk of logits in memory.

    hidden: n normalised states (B, T, D), of which head 1's only teaches; weight: unembedding (V, D); labels (n, B, T)
    from `teachable`; scales (n,): weight / count of these labels. weight_learns: whether the unembedding gets
    gradients.
    """
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    teacher, *students = (h.to(dtype) for h in hidden)
    if not torch.is_grad_enabled():
        weight, students = weight.detach(), [h.detach() for h in students]
    shared = weight if weight_learns else weight.detach()
    total, divergence, overlap = _Distil.apply(  # type: ignore[no-untyped-call]
        shared, teacher.detach(), labels, scales, terms, *students
    )
    return DistilOutput(total, divergence, overlap)


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, teacher: Tensor, labels: Tensor, scales: Tensor, terms: Terms, *students: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.weight_dtype, weight = weight.dtype, weight.to(teacher.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        needs = any(ctx.needs_input_grad)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(h) for h in students] if needs else []
        rows = max(1, CHUNK_ELEMENTS // 4 // weight.size(0))
        n = len(students) + 1
        total, divergence, overlap = (torch.zeros(n, dtype=torch.float64, device=weight.device) for _ in range(3))
        for d, states in enumerate(students, 1):
            at = (labels[d] != IGNORE).nonzero()  # (valid, 2)
            for part in torch.split(at, rows):
                row, place = part.unbind(1)
                student = states[row, place]
                value, grad, kl, shared = _terms(
                    (teacher[row, place + d] @ weight.T).to(wide), (student @ weight.T).to(wide), terms
                )
                total[d] += value.double().sum()
                divergence[d] += kl.double().sum()
                overlap[d] += shared.double().sum()
                if needs:
                    grad = (grad * scales[d].to(wide)).to(weight.dtype)
                    grads[d - 1][row, place] = grad @ weight
                    if grad_weight is not None:
                        grad_weight += grad.T @ student
        ctx.save_for_backward(*([] if grad_weight is None else [grad_weight]), *grads)
        ctx.mark_non_differentiable(divergence, overlap)
        return (total * scales.to(total)).sum().to(wide), divergence, overlap

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        weight = (saved.pop(0) * grad_total).to(ctx.weight_dtype) if ctx.needs_input_grad[0] else None
        return weight, None, None, None, None, *((h * grad_total).to(h.dtype) for h in saved)


def _terms(teacher: Tensor, student: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From logits (rows, V): the weighted terms (rows), their gradient for the student's logits (rows, V), the KL
    divergence of what the soft term knows (rows), and sum(min(p, q)) (rows)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    overlap = torch.minimum(p, q).sum(-1)
    known, log_known = p, log_p
    if terms.soft_top_k and terms.soft_top_k < p.size(-1):
        kth = log_p.topk(terms.soft_top_k, -1).values[:, -1:]
        log_known = log_p.masked_fill(log_p < kth, float("-inf")).log_softmax(-1)
        known = log_known.exp()
    cross = -(known * log_q).sum(-1)
    divergence = cross + torch.where(known > 0, known * log_known, 0.0).sum(-1)
    value = terms.soft * cross + terms.total_variation * (1 - overlap) - terms.acceptance * overlap.log()
    grad = terms.soft * (q - known)
    if terms.total_variation or terms.acceptance:  # min(p, q) rises with q where q < p
        below = (q < p).to(q.dtype)
        rise = q * (below - (q * below).sum(-1, keepdim=True))
        grad -= rise * (terms.total_variation + terms.acceptance / overlap)[:, None]
    return value, grad, divergence, overlap

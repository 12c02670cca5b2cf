"""The loss of n heads: where targets come from, the slow oracle, and two fast forms that equal it.

`targets` is the only place where a shift is computed. A head's loss is the mean over its own valid targets, the total
is the weighted sum of the heads' losses. Counts are taken before the forward, over all accumulation steps, and enter
as `scales` (weight / count), so a sum over micro-batches is the loss of the whole batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretoken.errors import ConfigError

IGNORE = -100
CHUNK_ELEMENTS = 1 << 26  # logits held at a time, whatever n, T and V are; on a GPU `ON_GPU` times as many
ON_GPU = 4
SLICE, SLICE_ELEMENTS = 1 << 12, 1 << 22  # of the vocabulary on a CPU: tokens, and logits that are held in a wide type


def targets(
    tokens: Tensor, document_ids: Tensor, label_mask: Tensor, n: int, *, across_documents: bool = False
) -> Tensor:
    """What each head must predict at each position, or IGNORE where there is nothing to learn.

    tokens, document_ids (int64) and label_mask (bool) are windows (B, T + n); document id -1 marks padding. The
    result (n, B, T), int64, holds at [d, b, t] the token at t + d + 1 if it exists, its label is not masked, and it
    lies in the same document as position t; `across_documents` drops the last condition.
    """
    T = tokens.size(1) - n
    assert T >= 1, f"a window of {tokens.size(1)} tokens has no position with {n} targets"
    here = document_ids[:, :T]
    labels = []
    for d in range(n):
        there = slice(d + 1, d + 1 + T)
        valid = label_mask[:, there] & (here >= 0) & (document_ids[:, there] >= 0)
        if not across_documents:
            valid &= document_ids[:, there] == here
        labels.append(torch.where(valid, tokens[:, there], IGNORE))
    return torch.stack(labels)


def valid_counts(labels: Tensor) -> Tensor:
    """Valid targets of each head: (n, B, T) -> (n,) int64."""
    return (labels != IGNORE).flatten(1).sum(1)


def scales(weights: Sequence[float], counts: Tensor) -> Tensor:
    """Factor of each head's summed cross-entropy in the total: weight / count (n,) float64, 0 without a target."""
    return torch.tensor(list(weights), dtype=torch.float64) / counts.cpu().clamp(min=1)


@dataclass(frozen=True)
class LossOutput:
    """What one pass over the logits gives.

    total: scalar with a gradient (already backpropagated in the sequential form). sums (n,) float64: each head's summed
    cross-entropy in nats. correct (n,): targets that are the head's first choice. predictions (n, B, T): first choices.
    """

    total: Tensor
    sums: Tensor
    correct: Tensor
    predictions: Tensor


def mtp_loss(
    hidden: Sequence[Tensor], weight: Tensor | Sequence[Tensor], labels: Tensor, scales: Tensor, *,
    weight_learns_from: int | None = None,
) -> LossOutput:  # fmt: skip
    """Cross-entropy of all heads with at most one chunk of logits in memory.

    hidden: n normalised states (B, T, D); weight: unembedding (V, D) of all heads, or n of them; labels (n, B, T) from
    `targets`; scales (n,) from `scales`. Gradients are computed while a chunk's logits are there, so nothing is
    computed twice and a weight has one gradient buffer for all its heads. Under autocast the products run in its type,
    which must not be float16; sums stay in float32. weight_learns_from: head 1's unembedding gets the gradients of so
    many heads, the first; None: of all that share it. Others always learn. Returns the weighted total in nats, whose
    backward can be called once, with what LossOutput says beside it.
    """
    weights, which = distinct(weight, len(hidden))
    dtype = product_dtype(weights[0])
    flat = [h.to(dtype).flatten(0, 1) for h in hidden]
    if not torch.is_grad_enabled():  # an autograd function cannot see this from inside
        weights, flat = [w.detach() for w in weights], [h.detach() for h in flat]
    learns_from = len(flat) if weight_learns_from is None else weight_learns_from
    total, sums, predictions = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        labels.flatten(1), scales, learns_from, which, *weights, *flat
    )
    predictions = predictions.view_as(labels)
    return LossOutput(total, sums, _correct(predictions, labels), predictions)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What products with `weight` run in. Raises ConfigError for float16 where there are gradients: they are made in
    the forward, where a GradScaler's factor, which would keep them above its smallest number, is not known yet."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if dtype == torch.float16 and torch.is_grad_enabled():
        raise ConfigError("float16 rounds this loss's gradients to 0; use bfloat16 (autocast, or bf16=True) or float32")
    return dtype


def per_head(weight: Tensor | Sequence[Tensor], n: int) -> list[Tensor]:
    """The unembeddings of n heads, given one for all or n."""
    weights = [weight] * n if isinstance(weight, Tensor) else list(weight)
    assert len(weights) == n, f"{len(weights)} unembeddings for {n} heads"
    return weights


def distinct(weight: Tensor | Sequence[Tensor], n: int) -> tuple[list[Tensor], list[int]]:
    """The different unembeddings among n heads', head 1's first, and which of them is each head's."""
    weights = per_head(weight, n)
    different = list({id(w): w for w in weights}.values())
    places = {id(w): place for place, w in enumerate(different)}
    return different, [places[id(w)] for w in weights]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, scales: Tensor, learns_from: int, which: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, hidden = tensors[: -len(which)], tensors[-len(which) :]
        learn, taught = ctx.needs_input_grad[4 : -len(which)], ctx.needs_input_grad[-len(which) :]
        ctx.heads, ctx.weight_dtype = len(which), weights[0].dtype
        dtype, device = hidden[0].dtype, hidden[0].device
        rows = _chunk_rows(weights[0], labels.size(1))
        wide = torch.promote_types(dtype, torch.float32)
        grads = [torch.zeros_like(w, dtype=wide) if needs else None for w, needs in zip(weights, learn, strict=True)]
        grad_hidden = [torch.zeros_like(h) if any(ctx.needs_input_grad) else None for h in hidden]
        sums = torch.zeros(len(hidden), dtype=torch.float64, device=device)
        factors = scales.to(device, non_blocking=True)  # nothing here waits for the device
        predictions = torch.empty_like(labels)
        for d, (states, wanted) in enumerate(zip(hidden, labels, strict=True)):
            if d == 0 or which[d] != which[d - 1]:
                weight = weights[which[d]].to(dtype)  # here, not before: its gradient is made once, in a wide type
            learns = grads[which[d]] if which[d] or d < learns_from else None
            for start in range(0, wanted.size(0), rows):
                part = slice(start, start + rows)
                label, valid = wanted[part].clamp(min=0), wanted[part] != IGNORE
                chunk = _Chunk(states[part], weight)
                predictions[d, part] = chunk.best
                sums[d] += _fused(_nll, weight.is_cuda)(states[part], weight, label, valid, chunk.normaliser)
                if learns is not None or taught[d]:
                    factor = valid * factors[d].to(wide)
                    grad_hidden[d][part] = chunk.backward(label, factor, learns)  # type: ignore[index]
        ctx.save_for_backward(*grads, *grad_hidden)
        total = (sums * factors).sum().to(wide)
        ctx.mark_non_differentiable(sums, predictions)
        return total, sums, predictions

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)  # the weights', and the states'
        # in their own memory: what is saved here is used once
        grads = [grad.mul_(grad_total.to(grad.dtype)) if needs else None for grad, needs in saved]
        weights = [None if grad is None else grad.to(ctx.weight_dtype) for grad in grads[: -ctx.heads]]
        return None, None, None, None, *weights, *grads[-ctx.heads :]


def _chunk_rows(weight: Tensor, positions: int) -> int:
    """Positions whose logits are held at a time: chunks of one size, as near as can be."""
    size = weight.size(0)
    if weight.device.type == "cuda":
        most = max(1, CHUNK_ELEMENTS * ON_GPU // size)
    else:
        most = max(1, min(CHUNK_ELEMENTS // size, SLICE_ELEMENTS // min(SLICE, size)))
    return -(-positions // -(-positions // most))


class _Chunk:
    """The logits of some positions, slice by slice of the vocabulary, as exponentials.

    states (rows, D), weight (V, D). best (rows): first choices. normaliser (rows): logsumexp of the logits. A slice
    holds exp(logit - its row's highest in the slice) in the weight's type, which makes rounding small beside what is
    rounded; what is missing to the softmax is a factor of a slice's row, and goes into the products beside it.
    """

    def __init__(self, states: Tensor, weight: Tensor) -> None:
        self.states, self.weight, self.slices = states, weight, _slices(weight)
        rows, size = states.size(0), weight.size(0)
        flat = states.new_empty(rows * size)  # slice after slice, each of them contiguous
        self.parts = [flat[rows * c.start : rows * min(c.stop, size)].view(rows, -1) for c in self.slices]
        wide, count = torch.promote_types(weight.dtype, torch.float32), (len(self.slices), rows)
        self.tops, sums = (states.new_empty(count, dtype=wide) for _ in range(2))
        firsts = torch.empty(count, dtype=torch.int64, device=weight.device)
        exponentiate = _fused(_exponentiate, weight.is_cuda)
        # One buffer for all slices: small tensors that outlive large ones would leave holes in a processor's memory.
        buffer = None if weight.is_cuda else states.new_empty(rows * min(SLICE, size), dtype=wide)
        for index, (part, columns) in enumerate(zip(self.parts, self.slices, strict=True)):
            torch.mm(states, weight[columns].T, out=part)
            room = None if buffer is None else buffer[: part.numel()].view(part.shape)
            self.tops[index], firsts[index], sums[index] = exponentiate(part, room)
        top, which = self.tops.max(0)
        self.best = firsts.gather(0, which[None])[0] + which * self.slices[0].stop
        self.normaliser = top + (sums * (self.tops - top).exp()).sum(0).log()

    def backward(self, label: Tensor, factor: Tensor, grad_weight: Tensor | None) -> Tensor:
        """The gradient (rows, D) of the states, in a wide type: of factor (rows) x cross-entropy with `label` (rows).

        That of the weight is added to `grad_weight`, if it is given.
        """
        found = -factor[:, None] * self.weight[label].to(factor.dtype)
        room = None if self.weight.is_cuda else torch.empty_like(self.weight[self.slices[0]])
        for part, columns, top in zip(self.parts, self.slices, self.tops, strict=True):
            share = (factor * (top - self.normaliser).exp())[:, None]
            found += (part @ self.weight[columns]) * share
            if grad_weight is not None:
                taught, into = (share * self.states).to(part.dtype), grad_weight[columns]
                if part.is_cuda and not torch.compiler.is_compiling():  # the product is added where it is made
                    torch.addmm(into, part.T, taught, out_dtype=into.dtype, out=into)
                else:
                    into += torch.mm(part.T, taught, out=None if room is None else room[: part.size(1)])
        if grad_weight is not None:
            grad_weight.index_add_(0, label, -factor[:, None] * self.states.to(factor.dtype))
        return found


def _slices(weight: Tensor) -> list[slice]:
    """Parts of the vocabulary, small enough that a processor's cache holds what is computed of a chunk's logits."""
    size = weight.size(0) if weight.device.type == "cuda" else SLICE
    return [slice(start, start + size) for start in range(0, weight.size(0), size)]


def _exponentiate(logits: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Make of logits (rows, columns) exp(logits - top): their highest, where it is, and the sum; wide but the place."""
    top, best = logits.max(-1)
    top = top.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.sub(logits, top[:, None], out=room).mul_(1 / math.log(2)).exp2_()  # CPUs are faster at it than at exp
    logits.copy_(wide)
    return top, best, wide.sum(-1)


def _nll(states: Tensor, weight: Tensor, label: Tensor, valid: Tensor, normaliser: Tensor) -> Tensor:
    """The summed cross-entropy (), in float64."""
    wide = normaliser.dtype
    found: Tensor = normaliser - (states.to(wide) * weight[label].to(wide)).sum(-1)
    return found.masked_fill(~valid, 0.0).sum(dtype=torch.float64)


_compiled = functools.cache(torch.compile)


def _fused(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """On a GPU one pass over memory for what is several operations; elsewhere, or inside torch.compile, as it is."""
    return _compiled(function) if on_gpu and not torch.compiler.is_compiling() else function


def sequential_backward(
    z: Tensor, heads: Sequence[Callable[[Tensor], Tensor]], weight: Tensor | Sequence[Tensor], labels: Tensor,
    scales: Tensor, around: AbstractContextManager[object] | None = None,
) -> LossOutput:  # fmt: skip
    """The paper's memory trick (section 2, figure 2): forward and backward head by head, then the trunk once.

    z (B, T, D): trunk output with its graph; heads: functions z -> normalised state (B, T, D); weight: as for
    `mtp_loss`. Gradients are in the parameters' `.grad` on return. All logits of one head are held: the readable twin
    of `mtp_loss`. around: entered before the first head, left before the trunk's backward.
    """
    trunk = z.detach().requires_grad_()
    sums, predictions = [], []
    weights = per_head(weight, len(heads))
    with around or nullcontext():
        for d, head in enumerate(heads):
            logits = F.linear(head(trunk), weights[d])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            total = F.cross_entropy(logits, labels[d].flatten(), ignore_index=IGNORE, reduction="sum")
            (total * scales[d].to(total)).backward()  # type: ignore[no-untyped-call]
            sums.append(total.detach().double())
            predictions.append(logits.detach().argmax(-1).view_as(labels[d]))
    if z.requires_grad:
        z.backward(trunk.grad)  # type: ignore[no-untyped-call]
    all_sums, first = torch.stack(sums), torch.stack(predictions)
    return LossOutput((all_sums * scales.to(all_sums)).sum(), all_sums, _correct(first, labels), first)


def oracle_loss(
    hidden: Sequence[Tensor], weight: Tensor | Sequence[Tensor], tokens: Tensor, document_ids: Tensor,
    label_mask: Tensor, head_weights: Sequence[float], *, across_documents: bool = False,
) -> Tensor:  # fmt: skip
    """The definition in plain loops over heads, rows and positions: slow, differentiable, shares no code with the rest.

    hidden: n states (B, T, D); weight (V, D), or n of them; windows (B, T + n) as in `targets`; head_weights: n
    numbers. Returns the weighted sum of the heads' mean cross-entropies, in nats. Run it on a batch of your own to
    check a loss.
    """
    n, (B, T, _) = len(hidden), hidden[0].shape
    weights = [weight] * n if isinstance(weight, Tensor) else weight
    total = weights[0].new_zeros(())
    for i in range(1, n + 1):
        losses = []
        for b in range(B):
            for t in range(T):
                if document_ids[b, t] < 0 or document_ids[b, t + i] < 0 or not label_mask[b, t + i]:
                    continue
                if not across_documents and document_ids[b, t] != document_ids[b, t + i]:
                    continue
                logits = weights[i - 1] @ hidden[i - 1][b, t]
                losses.append(torch.logsumexp(logits, 0) - logits[tokens[b, t + i]])
        if losses:
            total = total + head_weights[i - 1] * torch.stack(losses).sum() / len(losses)
    return total


def _correct(predictions: Tensor, labels: Tensor) -> Tensor:
    return (predictions == labels).flatten(1).sum(1)


@dataclass(frozen=True)
class Agreement:
    """How often a head's first choice is what head 1 chooses for the same token once it stands there.

    agreed, count (n,): pairs that agree and pairs compared; head 1 agrees with itself. accepted (n - 1,): positions at
    which the drafts of heads 2..i+1 all agree; positions: how many have every pair.
    """

    agreed: Tensor
    count: Tensor
    accepted: Tensor
    positions: Tensor


def agreement(predictions: Tensor, document_ids: Tensor) -> Agreement:
    """Teacher-forced agreement with head 1 from first choices (n, B, T) and the windows' document ids (B, T + n)."""
    n, B, T = predictions.shape
    # Head 1's choice at position t stands at t + 1: as a token sequence, `targets` aligns it with every head.
    chosen = torch.zeros(B, T + n, dtype=torch.int64, device=predictions.device)
    chosen[:, 1 : T + 1] = predictions[0]
    known = torch.zeros_like(chosen, dtype=torch.bool)
    known[:, 1 : T + 1] = True
    wanted = targets(chosen, document_ids, known, n)
    agrees = predictions == wanted
    complete = (wanted != IGNORE).all(0)
    accepted = agrees[1:].int().cumprod(0).bool() & complete
    return Agreement(agrees.flatten(1).sum(1), valid_counts(wanted), accepted.flatten(1).sum(1), complete.sum())


def predicted_tokens_per_step(accepted: Tensor, positions: Tensor) -> float:
    """1 + the mean number of drafts accepted, from the sums of `Agreement`."""
    return 1.0 + float(accepted.sum()) / max(1, int(positions))

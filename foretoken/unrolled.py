"""The block of a sequential head, and its attention when all depths are unrolled over true tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from foretoken.config import ModelConfig
from foretoken.layers import MLP, Attention, Context, RMSNorm, attention, causal_mask
from foretoken.packing import Mask, block_attention

# Private names: `scaled_dot_product_attention` gives no normaliser. `masked_attention` is the twin without them.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SequentialBlock(nn.Module):
    """A Llama layer whose attention reads two states side by side: a token's embedding and the hidden state.

    The hidden state is also the residual. A plain Llama's whatever the model is, as engines' EAGLE-3 layers are: no
    biases, no norm of queries and keys. Parameter names are theirs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config = config.model_copy(update={"architecture": "llama"})
        self.self_attn = Attention(config, inputs=2)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # of the embedding
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, context: Context, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Embeddings and states (B, T, D) -> states (B, T or context.keep, D).

        keys and values (B, T, Nkv, H) are those of the depths before, to which this one's are added.
        """
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), -1)
        q, k, v = self.self_attn.project(both, context)
        keys.append(k)
        values.append(v)
        x = context.kept(hidden) + self.self_attn.o_proj(unrolled_attention(q, keys, values, context.mask).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


def unrolled_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Mask | None) -> Tensor:
    """Queries (B, T, N, H) of depth d over keys and values (B, T, Nkv, H) of depths 1..d -> (B, T, N, H).

    Those of depth 1, (B, S, Nkv, H) where queries are of the last T positions only, are seen as `mask` says, by default
    causally; of the others a position sees its own.
    """
    if len(keys) == 1:
        return attention(q, keys[0], values[0], mask)
    if mask is None and q.device.type == "cpu" and q.size(1) == keys[0].size(1):
        return merged_attention(q, keys, values)
    if mask is None or isinstance(mask, Tensor):
        return masked_attention(q, keys, values, mask)
    return merged_block_attention(q, keys, values, mask)


def masked_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """The readable twin of the merged forms, by a mask (B or 1, 1, T or more, S): d times depth 1's memory and work."""
    T, depths = q.size(1), len(keys)
    mask = causal_mask(q, keys[0]) if mask is None else mask[:, :, -T:]
    own = torch.eye(T, dtype=torch.bool, device=q.device).expand(mask.size(0), 1, T, T)
    mask = torch.cat((mask, *[own] * (depths - 1)), -1)
    return attention(q, torch.cat(list(keys), 1), torch.cat(list(values), 1), mask)


def merged_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Without a mask, on a CPU: causal attention to depth 1, merged with a position's own keys."""
    groups = q.size(2) // keys[0].size(2)
    k, v = ([t.repeat_interleave(groups, 2) for t in tensors] if groups > 1 else tensors for tensors in (keys, values))
    own_keys, own_values = torch.stack(list(k[1:])), torch.stack(list(v[1:]))
    return _MergedAttention.apply(q, k[0], v[0], own_keys, own_values)  # type: ignore[no-any-return, no-untyped-call]


def merged_block_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: BlockMask) -> Tensor:
    """With a mask of tiles: attention to depth 1 by the kernel, merged with a position's own keys."""
    y, lse = block_attention(q, keys[0], values[0], mask)  # (B, T, N, H), (B, T, N)
    groups, wide = q.size(2) // keys[0].size(2), lse.dtype
    own_k, own_v = (torch.stack(list(t[1:])).repeat_interleave(groups, 3) for t in (keys, values))  # (d-1, B, T, N, H)
    scores = (q.to(wide) * own_k.to(wide)).sum(-1) * q.size(-1) ** -0.5
    return _merge(y, lse, scores, own_v)[0].to(y.dtype)


def _merge(y: Tensor, lse: Tensor, scores: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's output (..., H) and normaliser's logarithm (...), joined by further scores (d - 1, ...) and values.

    Returns the joint output, in the normaliser's type, the joint logarithm, and the shares of the scores.
    """
    joint = torch.logsumexp(torch.cat((lse[None], scores)), 0)
    shares = torch.exp(scores - joint)
    y = torch.exp(lse - joint)[..., None] * y.to(lse.dtype) + (shares[..., None] * own_v.to(lse.dtype)).sum(0)
    return y, joint, shares


class _MergedAttention(torch.autograd.Function):
    """softmax over [causal keys, own keys] without forming it."""

    # The kernel gives the causal part and the logarithm of its normaliser; the own scores join in by their share of the
    # joint one. Its backward needs only the joint output and normaliser, as when attention is split over devices (Liu
    # et al. 2023, ring attention).

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        scale = q.size(-1) ** -0.5
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, T, H)
        own_k, own_v = own_k.transpose(2, 3), own_v.transpose(2, 3)  # (d - 1, B, N, T, H)
        y, lse = _flash(q, k, v, is_causal=True)
        wide = lse.dtype
        scores = (q.to(wide) * own_k.to(wide)).sum(-1) * scale  # (d - 1, B, N, T)
        y, joint, shares = _merge(y, lse, scores, own_v)
        y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, own_k, own_v, y, joint, shares)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, own_k, own_v, y, joint, shares = ctx.saved_tensors
        grad, scale, wide = grad.transpose(1, 2), q.size(-1) ** -0.5, joint.dtype
        grad_q, grad_k, grad_v = _flash_backward(grad, q, k, v, y, joint, 0.0, True)
        g = grad.to(wide)
        grad_scores = (g * own_v.to(wide)).sum(-1) - (g * y.to(wide)).sum(-1)
        grad_scores = (grad_scores * shares * scale)[..., None]
        grad_q = grad_q + (grad_scores * own_k.to(wide)).sum(0).to(q.dtype)
        grad_own_k, grad_own_v = (grad_scores * q.to(wide)).to(k.dtype), (shares[..., None] * g).to(v.dtype)
        plain = (t.transpose(1, 2) for t in (grad_q, grad_k, grad_v))
        return *plain, grad_own_k.transpose(2, 3), grad_own_v.transpose(2, 3)

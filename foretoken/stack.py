"""The same block as `layers.Block` in the form decoding runs: batched over what reads one input, with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foretoken.cache import KVCache, Window
from foretoken.layers import Context, rotate

FEW_ROWS = 32  # as many as a step has


@dataclass(frozen=True)
class At:
    """Where the tokens (B, T) of a step stand: what its blocks share, their slots (B, T), and the cache."""

    context: Context
    slots: Tensor
    cache: KVCache | Window


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x (..., D) divided by its root mean square, computed in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def grouped_mask(visible: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, groups T, S) from visible (B, T, S), once for each query head of a group.

    Additive, because the attention kernel would turn a boolean mask into this once per block.
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return mask[:, None].repeat(1, 1, groups, 1) if groups > 1 else mask[:, None]


class BlockStack:
    """m blocks that read the same input, run as one batched block with a cache: what decoding executes.

    `Block` is its readable twin; a test holds the two equal. The stacked matrices are new storage and the blocks'
    parameters become views of it, so the weights exist once and both forms always agree.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        attentions = [block.self_attn for block in blocks]
        first = attentions[0]
        self.m, self.heads, self.kv_heads, self.head_dim = len(blocks), first.heads, first.kv_heads, first.head_dim
        self.eps = blocks[0].input_layernorm.eps
        self.qkv = _share([[a.q_proj.weight, a.k_proj.weight, a.v_proj.weight] for a in attentions])
        self.o = _share([[a.o_proj.weight] for a in attentions])
        self.gate_up = _share([[b.mlp.gate_proj.weight, b.mlp.up_proj.weight] for b in blocks])
        self.down = _share([[b.mlp.down_proj.weight] for b in blocks])
        self.norm_1 = _share([[b.input_layernorm.weight] for b in blocks])  # (m, 1, D)
        self.norm_2 = _share([[b.post_attention_layernorm.weight] for b in blocks])
        self.qkv_bias: Tensor | None = None
        if first.q_proj.bias is not None:
            self.qkv_bias = _share([[a.q_proj.bias, a.k_proj.bias, a.v_proj.bias] for a in attentions])
        self.qk_norm: Tensor | None = None
        if first.q_norm is not None and first.k_norm is not None:
            norms = _share([[a.q_norm.weight, a.k_norm.weight] for a in attentions if a.q_norm and a.k_norm])
            self.qk_norm = norms.view(self.m, 1, 2, self.head_dim)
            self.norm_of = torch.tensor([0] * self.heads + [1] * self.kv_heads, device=norms.device)

    def forward(self, x: Tensor, at: At, block: int, used: int, last: bool = False) -> Tensor:
        """Run the first `used` of the m blocks on x (1, B, T, D); cache them from index `block` on.

        The mask is (B, 1, N / Nkv * T, S), see `grouped_mask`. Returns (used, B, T, D). last: of the last position,
        which sees all there is, alone, (used, B, 1, D); of the others keys and values are all that is made.
        """
        inputs = unit_rms(x, self.eps) * self.norm_1[:used, None]
        return self._run(inputs, x, at, block, last)

    def _run(self, inputs: Tensor, x: Tensor, at: At, block: int, last: bool) -> Tensor:
        """What attention reads (m, B, T, its width) and the residual x (1, B, T, D) -> (m, B, T or 1, D)."""
        m, context = inputs.size(0), at.context
        qk, v = self._project(inputs, context, self.heads if last else 0)
        keys, values = at.cache.write(block, qk[:, :, -self.kv_heads :], v, at.slots)
        if last:
            context = Context(context.cos[..., -1:, :], context.sin[..., -1:, :])
            qk, _ = self._project(inputs[:, :, -1:], context, 0, self.heads)
            x = x[:, :, -1:]
        assert context.mask is None or isinstance(context.mask, Tensor)
        y = self._attend(qk[:, :, : self.heads], keys, values, context.mask)  # (m, BT, N H)
        x, shape = x.flatten(1, 2), x.shape
        x = x + _bmm(y, self.o[:m], last)
        gate, up = _bmm(unit_rms(x, self.eps) * self.norm_2[:m], self.gate_up[:m], last).chunk(2, -1)
        return (x + _bmm(F.silu(gate) * up, self.down[:m], last)).view(m, *shape[1:])

    def _project(self, inputs: Tensor, context: Context, begin: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs (m, B, T, width) -> of the N query, Nkv key and Nkv value heads those from `begin` to `end`.

        Rotated queries and keys (m, B, how many, T, H), and values.
        """
        m, B, T, _ = inputs.shape
        H, rows, rotated = self.head_dim, B * T, self.heads + self.kv_heads - begin
        part = slice(begin * H, None if end is None else end * H)
        qkv = _bmm(inputs.reshape(m, rows, -1), self.qkv[:m, part], end is not None)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[:m, :, part]
        qkv = qkv.view(m, rows, -1, H)
        qk, v = qkv[:, :, :rotated], qkv[:, :, rotated:]
        if self.qk_norm is not None:
            qk = unit_rms(qk, self.eps) * self.qk_norm[:m, :, self.norm_of[begin:end]]
        cos, sin = (table.expand(B, T, H).reshape(1, rows, 1, H) for table in (context.cos, context.sin))
        qk = rotate(qk, cos, sin).view(m, B, T, -1, H).transpose(2, 3)
        return qk, v.reshape(m, B, T, v.size(2), H).transpose(2, 3)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        m, B, N, T, H = q.shape
        groups = N // self.kv_heads
        # The query heads of a group become rows of their key/value head, so keys are never repeated in memory.
        q = q.reshape(m * B, self.kv_heads, groups * T, H)
        if mask is not None and m > 1:
            mask = mask.repeat(m, 1, 1, 1)  # (m B, 1, groups T, S)
        y = F.scaled_dot_product_attention(q, keys.flatten(0, 1), values.flatten(0, 1), attn_mask=mask)
        return y.reshape(m, B, N, T, H).transpose(2, 3).reshape(m, B * T, N * H)


class SequentialStack(BlockStack):
    """The block of a sequential head with a cache: its readable twin is `heads.SequentialBlock`."""

    def __init__(self, block: Any) -> None:
        super().__init__([block])
        self.hidden_norm = _share([[block.hidden_norm.weight]])

    def draft(self, embedded: Tensor, hidden: Tensor, at: At, last: bool = False) -> Tensor:
        """Embeddings of the newest tokens and states (B, T, D) -> states (B, T, D); keys are written where `at` says.

        last: as in `BlockStack.forward`.
        """
        width = (hidden.size(-1),)
        sides = (
            F.rms_norm(embedded, width, self.norm_1[0, 0], self.eps),
            F.rms_norm(hidden, width, self.hidden_norm[0, 0], self.eps),
        )
        return self._run(torch.cat(sides, -1)[None], hidden[None], at, 0, last and hidden.size(1) > 1)[0]


class Parts(NamedTuple):
    """What compiled steps are made of: weights of both ends and of the final norm, with its eps, and the blocks."""

    embedding: Tensor  # (V, D)
    unembedding: Tensor
    norm: Tensor  # (D)
    eps: float
    trunk: Sequence[BlockStack]
    heads: BlockStack
    drafter: SequentialStack | None


def _bmm(x: Tensor, weight: Tensor, apart: bool = False) -> Tensor:
    """x (m, R, in) times weight (m, out, in), each of the m apart, and as many products where they must be."""
    if weight.size(0) == 1:
        return F.linear(x[0], weight[0])[None]
    if apart or x.size(1) > FEW_ROWS:  # one by one: nothing is gained by a batch, and head 1 rounds alike whatever m is
        return torch.stack([F.linear(a, w) for a, w in zip(x, weight, strict=True)])
    return torch.bmm(x, weight.mT)


@torch.inference_mode(False)  # decoding calls this, and parameters must stay trainable
@torch.no_grad()
def _share(parameters: Sequence[Sequence[Tensor]]) -> Tensor:
    """One tensor of which the given parameters, m lists of them, become views.

    Vectors (out,) give (m, 1, sum of out), matrices (out, in) give (m, sum of out, in).
    """
    stacked = torch.stack([torch.cat([p.data for p in group]) for group in parameters])
    for shared, group in zip(stacked, parameters, strict=True):
        for p, view in zip(group, shared.split([p.size(0) for p in group]), strict=True):
            p.data = view
    return stacked if stacked.dim() == 3 else stacked[:, None]

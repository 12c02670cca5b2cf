"""The parts of a Llama block: RMSNorm, rotary embedding, attention, MLP; and the same block in the form decoding runs.

Letters, here and in every other file: B batch, T positions, S cached positions, D width, N attention heads, H head
width, V vocabulary, K drafts, n heads of the model, m blocks that read the same input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretoken.cache import KVCache, Window
from foretoken.config import ModelConfig
from foretoken.packing import Mask, block_attention

SHORT = 384  # positions up to which a CPU attends in bfloat16 by products


@dataclass(frozen=True)
class Context:
    """What every block of one forward shares.

    cos, sin (B or 1, T, H), or (T, H) of all rows: the rotary tables at the tokens' positions. mask: None for plain
    causal attention, a mask (B, 1, T, S) that `scaled_dot_product_attention` takes, or one of tiles, see
    `packing.document_mask`.
    """

    cos: Tensor
    sin: Tensor
    mask: Mask | None = None


@dataclass(frozen=True)
class At:
    """Where the tokens (B, T) of a step stand: what its blocks share, their slots (B, T), and the cache."""

    context: Context
    slots: Tensor
    cache: KVCache | Window


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) with Llama 3's frequency scaling. No parameters."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self._frequencies(), persistent=False)

    def _frequencies(self) -> Tensor:
        exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        inv_freq = 1.0 / self.config.rope_theta**exponent
        scaling = self.config.rope_scaling
        if scaling is None:
            return inv_freq
        # Llama 3: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(inv_freq / scaling.factor, inv_freq, smooth.clamp(0, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = self._frequencies().to(self.inv_freq.device)  # a model in bfloat16 still needs exact angles
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., T, H), float32, at `positions` (..., T); the first half of sin is negative (`rotate`)."""
        angles = positions[..., None].float() * self.inv_freq  # (..., T, H/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., H) by the angles of `cos` and `sin`, which broadcast against it.

    Hugging Face's layout: component i turns with component i + H/2. Swapping the halves is one roll; the minus sign of
    the rotation sits in the table.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


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


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention over one window, without a cache. inputs: states of width D read side by side."""

    def __init__(self, config: ModelConfig, inputs: int = 1) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = inputs * config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.o_proj(attention(*self.project(x, context), context.mask).flatten(2))  # type: ignore[no-any-return]

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, N, H) and keys, and values (B, T, Nkv, H), of x (B, T, inputs * D)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = context.cos[..., None, :].to(q.dtype), context.sin[..., None, :].to(q.dtype)  # (B, T, 1, H)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Queries (B, T, N, H) over keys and values (B, S, Nkv, H) -> (B, T, N, H); causal without a mask (B, 1, T, S)."""
    if mask is not None and not isinstance(mask, Tensor):
        return block_attention(q, k, v, mask)[0]
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if mask is None and narrow and q.device.type == "cpu" and q.size(1) == k.size(1) <= SHORT:
        return short_attention(q, k, v)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, N, T, H)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, q (B, T, N, H), k and v (B, T, Nkv, H) -> (B, T, N, H), that holds all weights (B, N, T, T).

    The kernel for CPUs is slower on short windows of bfloat16, its backward several times (docs/log.md).
    """
    B, T, N, H = q.shape
    future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    k, v = (t.repeat_interleave(N // t.size(2), 2) if t.size(2) < N else t for t in (k, v))
    q, k, v = (t.transpose(1, 2).reshape(B * N, T, H) for t in (q, k, v))
    weights = torch.softmax(torch.baddbmm(future, q, k.mT, alpha=H**-0.5), -1)
    return (weights @ v).view(B, N, T, H).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One Llama layer: x + attention(norm(x)), then + MLP(norm(.)). Parameter names are Hugging Face's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


FEW_ROWS = 32  # as many as a step has


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

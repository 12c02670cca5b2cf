"""The parts of a Llama block: RMSNorm, rotary embedding, attention, MLP.

Letters, here and in every other file: B batch, T positions, S cached positions, D width, N attention heads, H head
width, V vocabulary, K drafts, n heads of the model, m blocks that read the same input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretoken.config import ModelConfig
from foretoken.packing import Mask, block_attention

SHORT = 384  # positions up to which a CPU attends in bfloat16 by products


@dataclass(frozen=True)
class Context:
    """What every block of one forward shares.

    cos, sin (B or 1, T, H), or (T, H) of all rows: the rotary tables at the tokens' positions. mask: None for plain
    causal attention, a mask (B, 1, T, S) that `scaled_dot_product_attention` takes, or one of tiles, see
    `packing.document_mask`. keep: a block gives states of so many last positions only; None: of all that it reads.
    """

    cos: Tensor
    sin: Tensor
    mask: Mask | None = None
    keep: int | None = None

    def kept(self, x: Tensor) -> Tensor:
        """Of x (B, T, D) the positions whose states are asked for."""
        return x if self.keep is None else x[:, -self.keep :]

    def turned(self, cos: Tensor, sin: Tensor) -> Context:
        """The same at other positions, by their rotary tables."""
        return replace(self, cos=cos, sin=sin)


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
        """(B, T, D) -> (B, T or context.keep, D)."""
        return self.o_proj(attention(*self.project(x, context), context.mask).flatten(2))  # type: ignore[no-any-return]

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, N, H) and keys, and values (B, T, Nkv, H), of x (B, T, inputs * D), which stands last
        in the context; queries of `context.keep` positions."""
        q, k, v = (
            proj(part).unflatten(-1, (-1, self.head_dim))
            for proj, part in ((self.q_proj, context.kept(x)), (self.k_proj, x), (self.v_proj, x))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = context.cos, context.sin
        q, k = (rotate(t, *(table[..., -t.size(1) :, None, :].to(t.dtype) for table in tables)) for t in (q, k))
        return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Queries (B, T, N, H) of the last positions over keys and values (B, S, Nkv, H) -> (B, T, N, H).

    mask (B, 1, T or more, S), of which the last rows count; causal without one.
    """
    if mask is not None and not isinstance(mask, Tensor):
        return block_attention(q, k, v, mask)[0]
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if mask is None and narrow and q.device.type == "cpu" and q.size(1) == k.size(1) <= SHORT:
        return short_attention(q, k, v)
    if q.size(1) < k.size(1):
        mask = causal_mask(q, k) if mask is None else mask[..., -q.size(1) :, :]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, N, T, H)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """Which of the keys (B, S, ..) queries (B, T, ..) of the last T positions see, (1, 1, T, S)."""
    T, S = q.size(1), k.size(1)
    return torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T)


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
        """(B, T, D) -> (B, T or context.keep, D)."""
        x = context.kept(x) + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

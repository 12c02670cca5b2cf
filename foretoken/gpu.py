"""A block of a decoding step on a GPU: what stands between the matrix products, as a few Triton kernels.

`BlockStack` in PyTorch is the readable twin, and what runs where Triton is not there (it comes with PyTorch's builds
for CUDA on Linux) or in float64. Attention goes over the slots that a row holds, in parts side by side (flash decoding,
Dao et al. 2023), and sees the drafts of a tree by their ancestors' bits. Matrix products are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from foretoken.cache import Window
from foretoken.layers import BlockStack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # that attention is spread over, two for each multiprocessor of a large GPU
MOST_PARTS = 16


class Places:
    """Where the tokens (B, T) of a step stand: rotary positions and slots of each, what rows hold, what nodes see."""

    def __init__(
        self, tables: tuple[Tensor, Tensor], positions: Tensor, slots: Tensor, lengths: Tensor, seen: Tensor,
        window: Window,
    ) -> None:  # fmt: skip
        self.window = window
        self.cos, self.sin = tables  # (positions, H), float32
        self.positions, self.slots = positions.reshape(-1).contiguous(), slots.reshape(-1).contiguous()
        self.lengths, self.seen = lengths.contiguous(), seen.contiguous()  # (B), and words (T) of ancestors' bits


def run(stack: BlockStack, inputs: Tensor, x: Tensor, places: Places, block: int) -> Tensor:
    """What attention reads (m, B, T, its width) and the residual x (m, B, T, D), which is overwritten -> x.

    As `BlockStack` does, whose caches are blocks `block`.. of the window.
    """
    m, B, T, D = x.shape
    rows, heads, kv_heads, H = B * T, stack.heads, stack.kv_heads, stack.head_dim
    x = x.view(m, rows, D)
    qkv = _linear(inputs.reshape(m, rows, -1), stack.qkv[:m])
    if stack.qkv_bias is not None:
        qkv += stack.qkv_bias[:m]
    q = torch.empty(m, B, heads, T, H, dtype=x.dtype, device=x.device)
    window = places.window
    keys, values = window.keys[block : block + m], window.values[block : block + m]
    norms = stack.qk_norm
    _place[(rows, heads + 2 * kv_heads, m)](
        qkv, q, keys, values, qkv if norms is None else norms, places.cos, places.sin, places.positions, places.slots,
        T, heads, kv_heads, rows, keys.stride(0), keys.stride(1), keys.stride(2), stack.eps,
        H=H, HALF=triton.next_power_of_2(H // 2), NORM=norms is not None,
    )  # fmt: skip
    y = _attention(q, keys, values, places, kv_heads)
    _add_linear(x, y, stack.o[:m])
    gate_up = _linear(normed(x, stack.norm_2[:m], stack.eps), stack.gate_up[:m])
    _add_linear(x, _gated(gate_up), stack.down[:m])
    return x.view(m, B, T, D)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (m or 1, R, D) / its root mean square, times weight (m, 1, D): (m, R, D)."""
    m, (shared, rows, width) = weight.size(0), x.shape
    out = torch.empty(m, rows, width, dtype=x.dtype, device=x.device)
    stride = 0 if shared == 1 else x.stride(0)
    _norm[(rows, m)](x, weight, out, rows, width, stride, weight.stride(0), eps, BLOCK=triton.next_power_of_2(width))
    return out


def _attention(q: Tensor, keys: Tensor, values: Tensor, places: Places, kv_heads: int) -> Tensor:
    """Queries (m, B, N, T, H) over the cached keys and values -> (m, B T, N H)."""
    m, B, heads, T, H = q.shape
    groups, count = heads // kv_heads, m * B * kv_heads
    parts = min(MOST_PARTS, triton.next_power_of_2(max(1, PROGRAMS // count)))
    y = torch.empty(m, B * T, heads * H, dtype=q.dtype, device=q.device)
    sums = torch.empty(count, parts, groups * T, H + 2, dtype=torch.float32, device=q.device) if parts > 1 else y
    WIDE = max(16, triton.next_power_of_2(H))
    _attend[(count, parts)](
        q, keys, values, sums, y, places.lengths, places.seen, B, T, kv_heads,
        keys.stride(0), keys.stride(1), keys.stride(2), H**-0.5,
        GROUPS=groups, H=H, PARTS=parts, ROWS=max(16, triton.next_power_of_2(groups * T)), WIDE=WIDE,
        SLOTS=64 if WIDE <= 128 else 32, EXACT=q.dtype == torch.float32,
    )  # fmt: skip
    if parts > 1:
        _combine[(count, groups * T)](sums, y, B, T, kv_heads, GROUPS=groups, H=H, PARTS=parts, WIDE=WIDE)
    return y


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, side by side in (m, R, 2 F): (m, R, F)."""
    m, rows, both = gate_up.shape
    out = torch.empty(m, rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(m * rows, triton.cdiv(both // 2, 1024))](gate_up, out, both // 2, BLOCK=1024)
    return out


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (m, R, in) times weight (m, out, in)."""
    return F.linear(x[0], weight[0])[None] if len(weight) == 1 else torch.bmm(x, weight.mT)


def _add_linear(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add y (m, R, in) times weight (m, D, in) to x (m, R, D)."""
    if len(weight) == 1:
        x[0].addmm_(y[0], weight[0].mT)
    else:
        x.baddbmm_(y, weight.mT)


@triton.jit
def _norm(x, weight, out, rows, width, x_stride, weight_stride, eps, BLOCK: tl.constexpr):
    """One row of one of m blocks."""
    row, m = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + m * x_stride + row * width + at, mask=inside, other=0.0).to(tl.float32)
    unit = value * tl.rsqrt(tl.sum(value * value) / width + eps)
    scale = tl.load(weight + m * weight_stride + at, mask=inside)
    tl.store(out + (m * rows + row) * width + at, unit.to(out.dtype.element_ty) * scale, mask=inside)


@triton.jit
def _place(
    qkv, q, keys, values, norms, cos, sin, positions, slots, count, heads, kv_heads, rows,
    block_stride, row_stride, head_stride, eps, H: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One head of one row: queries and keys are normalised and turned, keys and values put into the cache."""
    row, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    B, b, t = rows // count, row // count, row % count
    half = tl.arange(0, HALF)
    inside = half < H // 2
    source = qkv + ((m * rows + row) * (heads + 2 * kv_heads) + head) * H + half
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + H // 2, mask=inside, other=0.0)
    kv_head = (head - heads) % kv_heads
    slot = tl.load(slots + row)
    cached = m * block_stride + b * row_stride + kv_head * head_stride + slot * H + half
    if head >= heads + kv_heads:
        tl.store(values + cached, first, mask=inside)
        tl.store(values + cached + H // 2, second, mask=inside)
    else:
        a, c = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            scale = tl.rsqrt((tl.sum(a * a) + tl.sum(c * c)) / H + eps)
            weight = norms + (m * 2 + (head >= heads)) * H + half
            a = ((a * scale).to(first.dtype) * tl.load(weight, mask=inside, other=0.0)).to(tl.float32)
            c = ((c * scale).to(first.dtype) * tl.load(weight + H // 2, mask=inside, other=0.0)).to(tl.float32)
        at = tl.load(positions + row) * H + half
        turn = tl.load(cos + at, mask=inside, other=0.0)
        lean = tl.load(sin + at + H // 2, mask=inside, other=0.0)
        to_first, to_second = (a * turn - c * lean).to(first.dtype), (c * turn + a * lean).to(first.dtype)
        if head >= heads:
            tl.store(keys + cached, to_first, mask=inside)
            tl.store(keys + cached + H // 2, to_second, mask=inside)
        else:
            to = q + (((m * B + b) * heads + head) * count + t) * H + half
            tl.store(to, to_first, mask=inside)
            tl.store(to + H // 2, to_second, mask=inside)


@triton.jit
def _attend(
    q, keys, values, sums, y, lengths, seen, B, count, kv_heads, block_stride, row_stride, head_stride, scale,
    GROUPS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one key/value head of one row, for all queries that read it."""
    which, part = tl.program_id(0), tl.program_id(1)
    m, b, kv_head = which // (B * kv_heads), which // kv_heads % B, which % kv_heads
    length = tl.load(lengths + b)
    total = length + count
    queries = GROUPS * count
    row, lane = tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = (row < queries)[:, None] & (lane < H)[None, :]
    query = tl.load(q + (which * queries + row)[:, None] * H + lane[None, :], mask=real, other=0.0)
    words = tl.load(seen + row % count)
    base = m * block_stride + b * row_stride + kv_head * head_stride
    each = tl.cdiv(tl.cdiv(total, PARTS), SLOTS) * SLOTS
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, total), SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < total)[:, None] & (lane < H)[None, :]
        at = base + slot[:, None] * H + lane[None, :]
        key = tl.load(keys + at, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * scale
        node = tl.minimum(tl.maximum(slot - length, 0), 63)
        sees = (slot < length)[None, :] | (((words[:, None] >> node[None, :]) & 1) != 0)
        score = tl.where(sees & (slot < total)[None, :], score, -1e30)
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - higher)
        # a part in which a row sees nothing yet has no weight, whatever its scores' exponentials are
        odds = tl.where(score > -1e29, tl.exp(score - higher[:, None]), 0.0)
        weight = weight * shrink + tl.sum(odds, 1)
        value = tl.load(values + at, mask=there, other=0.0)
        sum_ = sum_ * shrink[:, None] + tl.dot(odds.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        top = higher
    if PARTS == 1:
        to = ((m * B + b) * count + row % count) * kv_heads * GROUPS + kv_head * GROUPS + row // count
        tl.store(y + to[:, None] * H + lane[None, :], (sum_ / weight[:, None]).to(y.dtype.element_ty), mask=real)
    else:
        to = sums + ((which * PARTS + part) * queries + row) * (H + 2)
        tl.store(to[:, None] + lane[None, :], sum_, mask=real)
        tl.store(to + H, top, mask=row < queries)
        tl.store(to + H + 1, weight, mask=row < queries)


@triton.jit
def _combine(
    sums, y, B, count, kv_heads, GROUPS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One query's parts together."""
    which, row = tl.program_id(0), tl.program_id(1)
    m, b, kv_head = which // (B * kv_heads), which // kv_heads % B, which % kv_heads
    part, lane = tl.arange(0, PARTS), tl.arange(0, WIDE)
    at = sums + ((which * PARTS + part) * (GROUPS * count) + row) * (H + 2)
    top = tl.load(at + H)
    share = tl.exp(top - tl.max(top))
    weight = tl.sum(tl.load(at + H + 1) * share)
    parts = tl.load(at[:, None] + lane[None, :], mask=(lane < H)[None, :], other=0.0)
    to = ((m * B + b) * count + row % count) * kv_heads * GROUPS + kv_head * GROUPS + row // count
    sum_ = tl.sum(parts * share[:, None], 0) / weight
    tl.store(y + to * H + lane, sum_.to(y.dtype.element_ty), mask=lane < H)


@triton.jit
def _gate(gate_up, out, width, BLOCK: tl.constexpr):
    """A piece of one row."""
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + at, mask=inside, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)
    tl.store(out + row * width + at, silu * up, mask=inside)

"""A block of a decoding step on a GPU, as a few Triton kernels.

`BlockStack` in PyTorch is the readable twin, and what runs where Triton is not there (it comes with PyTorch's builds
for CUDA on Linux) or in float64. Attention goes over the slots that a row holds, in parts side by side (flash decoding,
Dao et al. 2023), and sees the drafts of a tree by their ancestors' bits. Matrix products of few rows read each weight
once, with norms, gates and sums in the same kernel; of more they are PyTorch's. From Hopper on a kernel of few rows
begins before the one ahead of it ends (programmatic dependent launch) and waits for what that writes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from foretoken.cache import Window
from foretoken.stack import BlockStack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # that attention is spread over, two for each multiprocessor of a large GPU
MOST_PARTS = 16
FEW = 32  # rows that weights are read once for
NVIDIA = bool(torch.version.cuda and torch.cuda.is_available())
HOPPER = NVIDIA and min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())) >= 9


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


def run(stack: BlockStack, inputs: Tensor, norm: Tensor | None, x: Tensor, places: Places, block: int) -> Tensor:
    """What attention reads (m or 1, B T, its width), by `product`, and x (m, B, T, D), which is overwritten -> x.

    As `BlockStack` does, whose caches are blocks `block`.. of the window.
    """
    m, B, T, D = x.shape
    rows, heads, kv_heads, H = B * T, stack.heads, stack.kv_heads, stack.head_dim
    x = x.view(m, rows, D)
    qkv = product(inputs, stack.qkv[:m], norm, stack.eps)
    if stack.qkv_bias is not None:
        qkv += stack.qkv_bias[:m]
    q = torch.empty(m, B, heads, T, H, dtype=x.dtype, device=x.device)
    window = places.window
    keys, values = window.keys[block : block + m], window.values[block : block + m]
    norms = stack.qk_norm
    _place[(rows, heads + 2 * kv_heads, m)](
        qkv, q, keys, values, qkv if norms is None else norms, places.cos, places.sin, places.positions, places.slots,
        T, heads, kv_heads, rows, keys.stride(0), keys.stride(1), keys.stride(2), stack.eps,
        H=H, HALF=triton.next_power_of_2(H // 2), NORM=norms is not None, **_launch(rows),
    )  # fmt: skip
    y = _attention(q, keys, values, places, kv_heads)
    product(y, stack.o[:m], into=x)
    product(product(x, stack.gate_up[:m], stack.norm_2[:m], stack.eps, gated=True), stack.down[:m], into=x)
    return x.view(m, B, T, D)


def product(
    x: Tensor, weight: Tensor, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (m or 1, R, in), by a norm's weight (m, 1, in) `normed`, times weight (m, out, in): (m, R, out).

    gated: of the two halves of `out` silu(first) * second. into: what the product is added to, in place.
    """
    (m, lines, width), rows = weight.shape, x.size(1)
    if norm is not None and rows > 1:
        x, norm = normed(x, norm, eps), None
    if rows > FEW:
        if into is not None:
            return into[0].addmm_(x[0], weight[0].mT)[None] if m == 1 else into.baddbmm_(x, weight.mT)
        found = F.linear(x[0], weight[0])[None] if m == 1 else torch.bmm(x, weight.mT)
        return _gated(found) if gated else found
    out = x.new_empty(m, rows, lines // (1 + gated)) if into is None else into
    per, chunk, warps, stages = _tile(rows, lines, x.dtype)
    _multiply[(triton.cdiv(lines, per), m)](
        x, weight, x if norm is None else norm, out, rows, out.size(2), 0 if x.size(0) == 1 else x.stride(0),
        weight.stride(0), eps, width=width, NORM=norm is not None, GATED=gated, ADD=into is not None,
        ROWS=1 if rows == 1 else max(8, triton.next_power_of_2(rows)), LINES=per, CHUNK=chunk, STAGES=stages,
        EXACT=x.dtype == torch.float32, num_warps=warps, **_launch(rows),
    )  # fmt: skip
    return out


def _launch(rows: int) -> dict[str, bool]:
    # Of a step of 32 rows and more, beginning early makes kernels slower.
    early = HOPPER and rows < FEW and not triton.knobs.runtime.interpret
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def _tile(rows: int, lines: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Lines of a weight and numbers of each that a program holds at a time, its warps, and loads under way."""
    if rows == 1:
        return (8, 1024, 8, 1) if lines < 4096 else (2, 1024, 4, 1)
    stages = 4 if dtype.itemsize == 2 else 2  # into a hundred KiB of shared memory
    return (16, 256, 4, stages) if lines < 4096 else (32, 128, 4, stages)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (m or 1, R, D) / its root mean square, times weight (m, 1, D): (m, R, D)."""
    m, (shared, rows, width) = weight.size(0), x.shape
    out = torch.empty(m, rows, width, dtype=x.dtype, device=x.device)
    stride = 0 if shared == 1 else x.stride(0)
    block = triton.next_power_of_2(width)
    _norm[(rows, m)](x, weight, out, rows, width, stride, weight.stride(0), eps, BLOCK=block, **_launch(rows))
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
        SLOTS=64 if WIDE <= 128 else 32, EXACT=q.dtype == torch.float32, **_launch(B * T),
    )  # fmt: skip
    if parts > 1:
        _combine[(count, groups * T)](sums, y, B, T, kv_heads, groups, H, parts, WIDE, **_launch(B * T))
    return y


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, side by side in (m, R, 2 F): (m, R, F)."""
    m, rows, both = gate_up.shape
    out = torch.empty(m, rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(m * rows, triton.cdiv(both // 2, 1024))](gate_up, out, both // 2, BLOCK=1024)
    return out


@triton.jit
def _begin(EARLY: tl.constexpr):
    """What kernels ahead wrote is there behind it; the next kernel may begin, and waits at its own."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _multiply(
    x, weight, norm, out, rows, outputs, x_stride, weight_stride, eps, width: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """LINES lines of one of m weights times all rows; gated ones stand in turn, a gate and what it lets through."""
    PER: tl.constexpr = 2 if GATED else 1
    m = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, at = tl.arange(0, ROWS), tl.arange(0, CHUNK)[None, :]
    weights = weight + m * weight_stride + ((line % PER) * outputs + line // PER)[:, None] * width + at
    inside = (line < PER * outputs)[:, None]
    sums = tl.zeros([LINES, CHUNK if ROWS == 1 else ROWS], tl.float32)
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    if ROWS == 1:
        ahead = tl.load(weights, mask=inside & (at < width), other=0.0)
    _begin(EARLY)
    x += m * x_stride + row[:, None] * width + at
    for start in tl.range(0, width, CHUNK, num_stages=STAGES):
        here = start + at < width
        value = tl.load(x + start, mask=(row < rows)[:, None] & here, other=0.0)
        if ROWS == 1:
            value, part = value.to(tl.float32), ahead
            ahead = tl.load(weights + start + CHUNK, mask=inside & (start + CHUNK + at < width), other=0.0)
            if NORM:
                squares += value * value
                value *= tl.load(norm + m * width + start + at, mask=here, other=0.0).to(tl.float32)
            sums += part.to(tl.float32) * value
        else:
            part = tl.load(weights + start, mask=inside & here, other=0.0)
            sums = tl.dot(part, tl.trans(value), sums, input_precision="ieee" if EXACT else "tf32")
    found = tl.sum(sums, 1)[:, None] if ROWS == 1 else sums
    if NORM:
        found *= tl.rsqrt(tl.sum(squares, 1) / width + eps)[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(found, (LINES // 2, 2, ROWS)), (0, 2, 1)))
        silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
        found = silu * up.to(out.dtype.element_ty).to(tl.float32)
    n = tl.program_id(0) * (LINES // PER) + tl.arange(0, LINES // PER)
    to = out + (m * rows + row[None, :]) * outputs + n[:, None]
    real = (n < outputs)[:, None] & (row < rows)[None, :]
    if ADD:
        found += tl.load(to, mask=real, other=0.0).to(tl.float32)
    tl.store(to, found.to(out.dtype.element_ty), mask=real)


@triton.jit
def _norm(x, weight, out, rows, width, x_stride, weight_stride, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row of one of m blocks."""
    row, m = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale = tl.load(weight + m * weight_stride + at, mask=inside)
    _begin(EARLY)
    value = tl.load(x + m * x_stride + row * width + at, mask=inside, other=0.0).to(tl.float32)
    unit = value * tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(out + (m * rows + row) * width + at, unit.to(out.dtype.element_ty) * scale, mask=inside)


@triton.jit
def _place(
    qkv, q, keys, values, norms, cos, sin, positions, slots, count, heads, kv_heads, rows,
    block_stride, row_stride, head_stride, eps, H: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one row: queries and keys are normalised and turned, keys and values put into the cache."""
    _begin(EARLY)
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
    SLOTS: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one key/value head of one row, for all queries that read it."""
    _begin(EARLY)
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
    EARLY: tl.constexpr,
):  # fmt: skip
    """One query's parts together."""
    _begin(EARLY)
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

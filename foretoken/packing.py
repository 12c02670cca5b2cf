"""Windows that hold several documents: positions that restart with each, and attention that stays inside it.

Documents stand one behind another, so where a position's own begins says all there is to know: it sees the keys from
there up to itself. An exact mask does that anywhere; on a GPU FlexAttention (Dong et al. 2024) does, which skips what
lies in other documents and holds no mask of T x T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

Mask = Tensor | BlockMask
BLOCK = 128  # positions in a tile of a block mask
LEAST_HEAD_WIDTH = 16  # of Triton's products


def document_starts(document_ids: Tensor) -> Tensor:
    """Where in its window each position's document begins, int32 (B, T), from document ids (B, T).

    The document that a window's edge cuts begins with the window. Padding (id -1) is as a document. An id that comes
    again behind another is a new document.
    """
    places = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(begins, places, 0).cummax(1).values.int()


def restarted_positions(document_ids: Tensor) -> Tensor:
    """Position ids (B, T) that are 0 where a document, or the part of it that is in the window, begins."""
    return torch.arange(document_ids.size(1), device=document_ids.device) - document_starts(document_ids)


def document_mask(document_ids: Tensor, head_dim: int, dtype: torch.dtype) -> Mask:
    """Causal attention inside documents, ids (B, T), for `layers.attention`, made once for all blocks.

    The only place that chooses between the kernel and its exact twin: the kernel runs on a GPU, has no float64, and
    heads of at least `LEAST_HEAD_WIDTH`.
    """
    starts = document_starts(document_ids)
    kernel = starts.is_cuda and head_dim >= LEAST_HEAD_WIDTH and dtype != torch.float64
    return block_mask(starts) if kernel else dense_mask(starts)


def dense_mask(starts: Tensor) -> Tensor:
    """Which keys each position sees (B, 1, T, T), from `document_starts` (B, T)."""
    places = torch.arange(starts.size(1), device=starts.device)
    return ((starts[:, :, None] <= places) & (places <= places[:, None]))[:, None]


def block_mask(starts: Tensor) -> BlockMask:
    """The same for FlexAttention: which tiles are seen in part and which whole, in memory of (T / BLOCK)^2.

    As `create_block_mask` would find by looking at every pair. Starts never fall along a window, so a row of tiles sees
    those from its first position's start on, and whole those between its last position's start and its own.
    """
    T = starts.size(1)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (starts[b, q] <= k) & (k <= q)

    begins = torch.arange(0, T, BLOCK, device=starts.device)  # of tiles
    first, last = starts[:, begins, None], starts[:, (begins + BLOCK - 1).clamp(max=T - 1), None]
    seen = (begins + BLOCK > first) & (begins <= begins[:, None])  # (B, rows of tiles, tiles)
    whole = (begins >= last) & (begins < begins[:, None])
    whole &= (begins + BLOCK <= T)[:, None]  # a row that is cut off is none
    partly, whole = (seen & ~whole)[:, None].int(), whole[:, None].int()
    return BlockMask.from_kv_blocks(
        partly.sum(-1, dtype=torch.int32), _first(partly), whole.sum(-1, dtype=torch.int32), _first(whole),
        BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T),
    )  # fmt: skip


def _first(tiles: Tensor) -> Tensor:
    """The indices (..., tiles) of those that are 1, in order, then of the others."""
    return tiles.argsort(dim=-1, descending=True, stable=True).int()


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """As `layers.attention`, and the logarithm of softmax's normaliser (B, T, N): both have gradients.

    Outside of torch.compile the kernel is compiled by itself.
    """
    attend: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = torch.compile(flex_attention)
    y, rest = attend(
        q.to(v.dtype).transpose(1, 2),  # (B, N, T, H); autocast does not reach the kernel
        k.to(v.dtype).transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q.size(2) != k.size(2),
        kernel_options={"BACKEND": "TRITON"},  # for short windows, too, which would get one made for decoding
        return_aux=AuxRequest(lse=True),
    )
    return y.transpose(1, 2), rest.lse.transpose(1, 2)

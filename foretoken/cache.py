"""The key/value cache of decoding: write at positions, roll back. Nothing else rolls back.

Slot s of a row holds the key and value of that row's position s. `lengths` says how many positions a row holds; a write
goes behind them, a roll-back forgets the newest. Rows may have different lengths, so a batch needs no left padding.
Rows come and go: those in use are the first ones, the memory stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values, each of shape (blocks, rows, key/value heads, positions a row can hold, head width).

    All rows are in use at first; `select` gives some up, and `vacant` and `join` take one again. memory: of an earlier
    cache of this shape, whatever lies there.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        if memory is None:
            memory = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        assert all(side.shape == shape and side.dtype == dtype for side in memory)
        self.keys, self.values = memory
        self.lengths = [0] * shape[1]
        self.desk: dict[tuple[int, ...], Any] = {}  # what compiled steps behind it work with, by their shape

    @property
    def capacity(self) -> int:
        """Positions a row can hold."""
        return self.keys.size(3)

    @cached_property
    def address(self) -> tuple[object, ...]:
        """Where it lies: what has been captured for it serves any cache of this layout there.

        A row of a larger cache may begin where a cache of one row lay before, but its blocks lie further apart.
        """
        return self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape, self.keys.stride()

    def positions(self, count: int) -> Tensor:
        """Absolute positions (B, count) that the next `count` tokens of every row get."""
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(count, device=self.keys.device)

    def write(self, block: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (m, B, N, T, H) of blocks `block`..`block + m - 1` at `positions` (B, T).

        Returns the keys and values (m, B, N, S, H) of all slots up to the longest row's last new one. Slots that a row
        may not see yet are among them: the attention mask hides them.
        """
        m, rows, _, count, _ = keys.shape
        assert max(self.lengths) + count <= self.capacity, "cache is full"
        k, v = self.keys[block : block + m, :rows], self.values[block : block + m, :rows]
        start = self.lengths[0]
        if all(length == start for length in self.lengths):
            k[:, :, :, start : start + count] = keys
            v[:, :, :, start : start + count] = values
        else:
            row = torch.arange(rows, device=keys.device)[:, None]
            k[:, row, :, positions] = keys.permute(1, 3, 0, 2, 4)  # (B, T, m, N, H): the indexed dimensions come first
            v[:, row, :, positions] = values.permute(1, 3, 0, 2, 4)
        used = max(self.lengths) + count
        return k[:, :, :, :used], v[:, :, :, :used]

    def advance(self, count: int) -> None:
        """Count `count` more positions in every row, once all blocks have written them."""
        self.lengths = [length + count for length in self.lengths]

    def keep(self, row: int, places: Sequence[int], count: int) -> None:
        """Of a row's newest `count` positions keep those at `places` among them, in order, and forget the others."""
        start = self.lengths[row] - count
        moved = [(new, old) for new, old in enumerate(places) if new != old]
        if moved:
            to, origin = ([start + place for place in side] for side in zip(*moved, strict=True))
            for tensor in (self.keys, self.values):
                tensor[:, row, :, to] = tensor[:, row, :, origin]
        self.lengths[row] = start + len(places)

    def move(self, rows: Tensor, origins: Tensor, places: Tensor) -> None:
        """Copy positions `origins` (B, T) of rows (B, 1) to `places` (B, T)."""
        for tensor in (self.keys, self.values):
            tensor[:, rows, :, places] = tensor[:, rows, :, origins]

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forget every row's positions from `lengths[row]` on."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows`, in this order; those that stay where they are cost nothing."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            to, origin = (torch.tensor(side, device=self.keys.device) for side in zip(*moved, strict=True))
            used = max(self.lengths[old] for _, old in moved)
            for tensor in (self.keys, self.values):
                tensor[:, to, :, :used] = tensor[:, origin, :, :used]
        self.lengths = [self.lengths[row] for row in rows]

    def vacant(self) -> KVCache:
        """The first row not in use, as an empty cache of its own in the same memory."""
        row, view = len(self.lengths), object.__new__(KVCache)
        view.keys, view.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        view.lengths, view.desk = [0], {}
        return view

    def join(self, row: KVCache) -> None:
        """Use the row that `vacant` gave, with what has been written to it, as the last."""
        assert row.keys.data_ptr() == self.keys[:, len(self.lengths)].data_ptr()
        self.lengths += row.lengths


class Window:
    """The first rows and slots of a cache, written at places that tensors say: nothing here depends on lengths."""

    def __init__(self, cache: KVCache, rows: int, slots: int) -> None:
        self.keys, self.values = (side[:, :rows, :, :slots] for side in (cache.keys, cache.values))
        self.row = torch.arange(rows, device=cache.keys.device)[:, None]

    def write(self, block: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.write`; returns all slots of the window."""
        own = slice(block, block + keys.size(0))
        for whole, new in ((self.keys, keys), (self.values, values)):
            whole[own, self.row, :, positions] = new.permute(1, 3, 0, 2, 4)  # (B, T, m, N, H)
        return self.keys[own], self.values[own]

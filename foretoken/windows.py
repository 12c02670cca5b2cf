"""Tokens to batches: windows of T + n tokens, and which of them a step has.

A batch is a pure function of (seed, step, rank, world_size). There is no loader state: to resume at a step is to ask
for its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.data import Tokens
from foretoken.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of T + n tokens, each (B, T + n): position t's targets are tokens t+1..t+n.

    `document_ids` tells the documents of a window apart and is -1 where the epoch has ended; there the token is 0 and
    `label_mask` false, as it is for prompts.
    """

    tokens: torch.Tensor
    document_ids: torch.Tensor
    label_mask: torch.Tensor


@dataclass(frozen=True)
class _Epoch:
    documents: NDArray[np.int64]  # in stream order
    ends: NDArray[np.int64]  # of those documents, in the stream
    windows: NDArray[np.int64]


class Windows:
    """Batches of windows, a pure function of the arguments and of (step, rank, world_size).

    An epoch is a stream of all documents in an order drawn from (seed, epoch). Windows start at multiples of T
    (`seq_len`) and carry n (`n_future`) tokens more, which the next window repeats, so every token of an epoch is the
    input of exactly one position and every target that exists is there; the last window is padded. The order of the
    windows is drawn too. With `shuffle=False` documents and windows keep their order, in every epoch.

    Raises DataError for a corpus shorter than one window.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, n_future: int, batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if tokens.total < seq_len + n_future:
            raise DataError(f"corpus has {tokens.total} tokens, one window needs {seq_len + n_future}")
        self.tokens, self.seq_len, self.n_future = tokens, seq_len, n_future
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self._epochs: dict[int, _Epoch] = {}  # the newest two: drawing an order reads all document bounds

    @property
    def windows_per_epoch(self) -> int:
        """Windows that use every token once as an input."""
        return -(-self.tokens.total // self.seq_len)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's share of step `step`: B = batch_size / world_size windows, the ranks' one after the other.

        Raises ConfigError where world_size does not divide batch_size.
        """
        if self.batch_size % world_size:
            raise ConfigError(f"batch_size = {self.batch_size} is not a multiple of the {world_size} processes")
        share = self.batch_size // world_size
        numbers = step * self.batch_size + rank * share + np.arange(share)
        epochs, windows = np.divmod(numbers, self.windows_per_epoch)
        parts = [self._read(int(epoch), windows[epochs == epoch]) for epoch in np.unique(epochs)]
        tokens, document_ids, label_mask = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )
        return Batch(tokens, document_ids, label_mask)

    def _read(self, epoch: int, windows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        order = self._epoch(epoch)
        positions = order.windows[windows][:, None] * self.seq_len + np.arange(self.seq_len + self.n_future)
        exists = positions < self.tokens.total  # both (B, T + n), in the stream
        positions = np.minimum(positions, self.tokens.total - 1)
        slots = np.searchsorted(order.ends, positions, side="right")
        rows = self.tokens.rows[order.documents[slots]]  # (B, T + n, 5)
        offsets = positions - order.ends[slots] + rows[..., 1] - rows[..., 0]  # in the document
        places = rows[..., 0] + offsets  # in the corpus
        tokens = np.where(exists, self.tokens.gather(places), 0)
        return tokens, np.where(exists, slots, -1), exists & (offsets >= rows[..., 2]) & ~self.tokens.in_gap(places)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            documents, windows = np.arange(self.tokens.documents), np.arange(self.windows_per_epoch)
            if self.shuffle:
                random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
                documents, windows = random.permutation(documents), random.permutation(windows)
            lengths = self.tokens.rows[:, 1] - self.tokens.rows[:, 0]
            self._epochs = dict([*self._epochs.items()][-1:])
            self._epochs[epoch] = _Epoch(documents, np.cumsum(lengths[documents]), windows)
        return self._epochs[epoch]

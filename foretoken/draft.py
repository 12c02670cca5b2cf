"""Where drafts come from: one small class a source, one signature.

The model has run on some positions, and up to one of them everything is committed. `propose` gives the K tokens that
are likely to stand behind the committed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.model import Stepper
from foretoken.request import Request
from foretoken.sampling import Keys


class Drafter(Protocol):
    """Drafts K tokens a step for the rows of a batch.

    heads: how many heads the model's own forward must run for it, head 1 included.
    """

    heads: int

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """Take a request as the batch's last row: K drafts behind its first token.

        hidden (heads, 1, T, D) and z (1, T, D): what the model's forward returned for its prompt.
        """
        ...

    def propose(
        self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, keys: Keys
    ) -> list[list[int]]:
        """Drafts (B, K) behind the committed tokens; those of `keys` are picked with the noise of their positions.

        hidden (heads, B, T, D) and z (B, T, D): what the model's forward returned for the newest positions; `at` says
        for each row at which of them its last token but one stands, whose head 1 picked its last.
        """
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows` of the batch, in this order."""
        ...


class ParallelDrafter:
    """Heads 2..K+1, which ran with head 1: drafts cost no pass of their own, and do not see each other."""

    def __init__(self, stepper: Stepper, drafts: int) -> None:
        self.stepper, self.heads = stepper, drafts + 1

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """See `Drafter`."""
        return self.propose([request], [z.size(1) - 1], hidden, z, keys)[0]

    def propose(
        self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, keys: Keys
    ) -> list[list[int]]:
        """See `Drafter`."""
        if self.heads == 1:
            return [[] for _ in requests]
        if len(at) == 1:
            states = hidden[1:, :, at[0]].transpose(0, 1)  # (1, K, D)
        else:
            rows = torch.arange(len(at), device=hidden.device)
            states = hidden[1:, rows, torch.tensor(at, device=hidden.device)].transpose(0, 1)  # (B, K, D)
        return self.stepper.pick_drafts(states, keys)

    def select(self, rows: Sequence[int]) -> None:
        """Nothing is kept between steps."""


class SequentialDrafter:
    """One block that drafts token after token through its own cache: each draft sees those before it.

    1. The block runs on the newly committed positions, each with the token that follows it: these keys stay.
    2. It goes on from its own state and draft, K - 1 times. These keys are forgotten: true ones follow.
    """

    heads = 1

    def __init__(self, stepper: Stepper, drafts: int, rows: int, capacity: int) -> None:
        self.stepper, self.drafts = stepper, drafts
        self.cache = stepper.new_draft_cache(rows, capacity)
        self.cache.select([])

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """See `Drafter`."""
        row, last = self.cache.vacant(), z.size(1) - 1
        if last:
            self.stepper.draft(torch.tensor([request.prompt[1:]], device=z.device), z[:, :last], row)
        drafts = self._chain(row, [request], [0], z[:, last:], keys)
        self.cache.join(row)
        return drafts[0]

    def propose(
        self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, keys: Keys
    ) -> list[list[int]]:
        """See `Drafter`."""
        return self._chain(self.cache, requests, at, z[:, : max(at) + 1], keys)

    def _chain(
        self, cache: KVCache, requests: Sequence[Request], at: Sequence[int], z: Tensor, keys: Keys
    ) -> list[list[int]]:
        following = [r.since(start + 1) for r, start in zip(requests, cache.lengths, strict=True)]
        assert [len(tokens) for tokens in following] == [index + 1 for index in at]
        padded = [tokens + [0] * (z.size(1) - len(tokens)) for tokens in following]
        return self.stepper.chain(padded, at, z, cache, keys, self.drafts)

    def select(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        self.cache.select(rows)


def make_drafter(stepper: Stepper, drafts: int, rows: int, capacity: int) -> Drafter:
    """What drafts `drafts` tokens a step for the model behind `stepper`; its rows hold at most `capacity` positions."""
    if stepper.config.sequential and drafts:
        return SequentialDrafter(stepper, drafts, rows, capacity)
    return ParallelDrafter(stepper, drafts)

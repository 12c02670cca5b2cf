"""Where drafts come from: one small class a head kind, one signature.

The model has run on some positions, and up to one of them everything is committed. `propose` gives the K tokens that
are likely to stand behind the committed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from foretoken.model import Stepper
from foretoken.request import Request

# Picks the tokens (B, k) that drafts number d, d + 1, .. stand for, from logits (B, k, V) and d.
Pick = Callable[[Tensor, int], Tensor]


class Drafter(Protocol):
    """Drafts K tokens a step for the rows of a batch.

    heads: how many heads the model's own forward must run for it, head 1 included.
    """

    heads: int

    def propose(self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, pick: Pick) -> Tensor:
        """Drafts (B, K) behind the committed tokens.

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

    def propose(self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, pick: Pick) -> Tensor:
        """See `Drafter`."""
        rows = torch.arange(len(at), device=hidden.device)
        states = hidden[1:, rows, torch.tensor(at, device=hidden.device)].transpose(0, 1)  # (B, K, D)
        return pick(self.stepper.logits(states), 0)

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

    def propose(self, requests: Sequence[Request], at: Sequence[int], hidden: Tensor, z: Tensor, pick: Pick) -> Tensor:
        """See `Drafter`."""
        cache, device, count = self.cache, z.device, max(at) + 1
        following = [r.since(start + 1) for r, start in zip(requests, cache.lengths, strict=True)]
        kept = [start + len(tokens) for start, tokens in zip(cache.lengths, following, strict=True)]
        assert [len(tokens) for tokens in following] == [index + 1 for index in at]
        padded = [tokens + [0] * (count - len(tokens)) for tokens in following]
        states = self.stepper.draft(torch.tensor(padded, device=device), z[:, :count], cache)
        cache.roll_back(kept)  # what was padding
        state = states[torch.arange(len(at), device=device), torch.tensor(at, device=device)][:, None]  # (B, 1, D)
        tokens = [pick(self.stepper.logits(state), 0)]
        while len(tokens) < self.drafts:
            state = self.stepper.draft(tokens[-1], state, cache)
            tokens.append(pick(self.stepper.logits(state), len(tokens)))
        cache.roll_back(kept)
        return torch.cat(tokens, 1)

    def select(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        self.cache.select(rows)


def make_drafter(stepper: Stepper, drafts: int, rows: int, capacity: int) -> Drafter:
    """What drafts `drafts` tokens a step for the model behind `stepper`; its rows hold at most `capacity` positions."""
    if stepper.config.sequential and drafts:
        return SequentialDrafter(stepper, drafts, rows, capacity)
    return ParallelDrafter(stepper, drafts)

"""Where drafts come from: one small class a source, one signature; and a step of the model with its drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.model import Stepper
from foretoken.native import MOST_TOKENS
from foretoken.processors import changes
from foretoken.request import Request
from foretoken.sampling import Keys, accepted

# Drafts (B, K), and the logits (B, K, V) they were picked from.
Proposal = tuple[list[list[int]], Tensor | None]


@dataclass(frozen=True)
class Turn:
    """What a step gave: the tokens (B, T) that the target picks, their log-probabilities, how many drafts of each row
    they accept, the next drafts (B, K) and the noise these were picked with, which is to verify them too."""

    picked: list[list[int]]
    logprobs: list[list[float]]
    accepted: list[int]
    drafts: list[list[int]]
    ahead: Keys


class Drafter:
    """Drafts K tokens a step for the rows of a batch.

    heads: how many heads the model's own forward must run for it, head 1 included. cache: the drafter's own, if any.
    proposed (B, K, V): the logits that the drafts on their way were drawn from, kept for acceptance by rejection.
    compiled: whether `turn` may run as one compiled call. heads_draft: whether the model's own heads draft, which is
    then part of that call; other drafters are asked behind it and get no states.
    """

    heads = 1
    cache: KVCache | None = None
    proposed: Tensor | None = None
    compiled = True
    heads_draft = True

    def __init__(self, stepper: Stepper, drafts: int) -> None:
        self.stepper, self.drafts = stepper, drafts

    def most(self) -> int:
        """How many drafts the next step can have: heads whose keys are missing cannot come back."""
        return self.drafts

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """Take a request as the batch's last row: K drafts behind its first token.

        hidden (heads, 1, T, D) and z (1, T, D): what the model's forward returned for its prompt.
        """
        drafts, proposed = self.first(request, hidden, z, keys)
        if keys.rejection and proposed is not None:
            self.proposed = proposed if self.proposed is None else torch.cat((self.proposed, proposed.float()))
        return drafts[0]

    def first(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> Proposal:
        """The drafts of `join`, as `propose` gives them."""
        return self.propose([request], [[]], [z.size(1) - 1], hidden, z, keys)

    def propose(
        self,
        requests: Sequence[Request],
        new: list[list[int]],
        at: Sequence[int],
        hidden: Tensor,
        z: Tensor,
        keys: Keys,
    ) -> Proposal:
        """Drafts (B, K) behind `new`, what each row commits beyond its request's ids, and the logits they come from.

        hidden (heads, B, T, D) and z (B, T, D): what the model's forward returned for the newest positions; `at` says
        for each row at which of them its last token but one stands, whose head 1 picked its last.
        """
        return [[] for _ in requests], None

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows` of the batch, in this order."""
        if self.cache is not None:
            self.cache.select(rows)
        if self.proposed is not None:
            self.proposed = self.proposed[list(rows)] if rows else None

    def turn(self, requests: Sequence[Request], tokens: list[list[int]], cache: KVCache, keys: Keys) -> Turn:
        """Run the model on `tokens` (B, K + 1), each row's last one and its drafts; accept, and draft on."""
        native, device = self.stepper.native, self.stepper.model.device
        inside = self.drafts if self.heads_draft else 0
        short = len(tokens[0]) + inside < MOST_TOKENS
        drafted = [row[1:] for row in tokens]
        change = changes(requests, drafted)
        drafts: list[list[int]] | None = None
        hidden = z = torch.empty(0)
        if native is not None and self.compiled and short and change is None and not keys.sampling.filters:
            self.stepper.grow_tables(cache)
            own = self.cache if inside else None
            picked, logprobs, counts, drafts, self.proposed = native.turn(
                tokens, cache, own, keys, inside, self.proposed
            )
        else:
            hidden, z = self.stepper.forward(torch.tensor(tokens, device=device), cache, self.heads)
            if keys.rejection and self.proposed is not None:
                these = torch.tensor(drafted, device=device)
                picked, logprobs, counts = self.stepper.reject(hidden[0], these, self.proposed, keys, change)
            else:
                picked, logprobs = self.stepper.pick_targets(hidden[0], keys, change)
                counts = [accepted(row, own) for row, own in zip(drafted, picked, strict=True)]
        ahead = keys.behind([count + 1 for count in counts], self.drafts + 1)
        if drafts is None or not self.heads_draft:
            new = [own[: count + 1] for own, count in zip(picked, counts, strict=True)]
            drafts, self.proposed = self.propose(requests, new, counts, hidden, z, ahead)
        return Turn(picked, logprobs, counts, drafts, ahead)


class ParallelDrafter(Drafter):
    """Heads 2..K+1, which ran with head 1: drafts cost no pass of their own, and do not see each other."""

    @property
    def heads(self) -> int:  # type: ignore[override]
        """Head 1 and those that draft."""
        return self.drafts + 1

    def propose(
        self,
        requests: Sequence[Request],
        new: list[list[int]],
        at: Sequence[int],
        hidden: Tensor,
        z: Tensor,
        keys: Keys,
    ) -> Proposal:
        """See `Drafter`."""
        if not self.drafts:
            return [[] for _ in requests], None
        rows = torch.arange(len(at), device=hidden.device)
        states = hidden[1:, rows, torch.tensor(at, device=hidden.device)].transpose(0, 1)  # (B, K, D)
        if changes(requests, new) is None:
            drafts, proposed = self.stepper.pick_drafts(states, keys)
            return drafts.tolist(), proposed
        return chained(
            self.drafts, lambda picks: states[:, len(picks) : len(picks) + 1], self.stepper, requests, new, keys
        )


class SequentialDrafter(Drafter):
    """One block that drafts token after token through its own cache: each draft sees those before it.

    1. The block runs on the newly committed positions, each with the token that follows it: these keys stay.
    2. It goes on from its own state and draft, K - 1 times. These keys are forgotten: true ones follow.
    """

    cache: KVCache

    def __init__(self, stepper: Stepper, drafts: int, rows: int, capacity: int) -> None:
        super().__init__(stepper, drafts)
        self.room = drafts
        self.cache = stepper.new_draft_cache(rows, capacity)
        self.cache.select([])

    def most(self) -> int:
        """See `Drafter`."""
        return self.room if self.drafts else 0

    def first(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> Proposal:
        """See `Drafter`."""
        row = self.cache.vacant()
        if not self.drafts:
            self.cache.join(row)
            return [[]], None
        following = [*request.prompt[1:], request.ids[-1]]
        proposal = self._chain(row, [request], [following], [[]], [len(following) - 1], z, keys)
        self.cache.join(row)
        return proposal

    def propose(
        self,
        requests: Sequence[Request],
        new: list[list[int]],
        at: Sequence[int],
        hidden: Tensor,
        z: Tensor,
        keys: Keys,
    ) -> Proposal:
        """See `Drafter`."""
        if not self.drafts:
            return [[] for _ in requests], None
        return self._chain(self.cache, requests, new, new, at, z[:, : max(at) + 1], keys)

    def _chain(
        self,
        cache: KVCache,
        requests: Sequence[Request],
        following: list[list[int]],
        new: list[list[int]],
        at: Sequence[int],
        z: Tensor,
        keys: Keys,
    ) -> Proposal:
        """Drafts behind the tokens `following` (B, up to T), the block's next ones beside z (B, T, D)."""
        kept = [start + len(tokens) for start, tokens in zip(cache.lengths, following, strict=True)]
        state = last_of(self.stepper.draft(padded(following, z.device), z, cache), at)
        cache.roll_back(kept)  # what was padding

        def states(picks: list[Tensor]) -> Tensor:
            nonlocal state
            state = self.stepper.draft(picks[-1], state, cache) if picks else state
            return state

        proposal = chained(self.drafts, states, self.stepper, requests, new, keys)
        cache.roll_back(kept)
        return proposal


def chained(
    count: int,
    states: Callable[[list[Tensor]], Tensor],
    stepper: Stepper,
    requests: Sequence[Request],
    new: Sequence[Sequence[int]],
    keys: Keys,
) -> Proposal:
    """`count` drafts, one after the other, from the states (B, 1, D) that those before them give."""
    picks: list[Tensor] = []
    laws: list[Tensor] = []
    while len(picks) < count:
        state = states(picks)
        drafted = torch.cat(picks, 1).tolist() if picks else [[] for _ in requests]
        change = changes(requests, [[*tokens, *further] for tokens, further in zip(new, drafted, strict=True)])
        pick, law = stepper.pick_drafts(state, keys, len(picks), change)
        picks.append(pick)
        laws.append(law)
    return torch.cat(picks, 1).tolist(), torch.cat(laws, 1)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of any lengths as one tensor (B, T), with zeros behind them."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def last_of(states: Tensor, at: Sequence[int]) -> Tensor:
    """Of states (B, T, D) the one at place at[row] of each row: (B, 1, D)."""
    device = states.device
    return states[torch.arange(len(at), device=device), torch.tensor(at, device=device)][:, None]

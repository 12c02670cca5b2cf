"""Where drafts come from: one small class a source, one signature; and a step of the model with its drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.model import Stepper
from foretoken.native import MOST_TOKENS
from foretoken.pace import Pace, measured_costs
from foretoken.request import Request
from foretoken.sampling import Keys, Sampling, accepted

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
    compiled: whether `turn` may run as one compiled call, which drafts as the model's own heads do.
    """

    heads = 1
    cache: KVCache | None = None
    proposed: Tensor | None = None
    compiled = True

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
        return self.propose([request], [[request.ids[-1]]], [z.size(1) - 1], hidden, z, keys)

    def propose(
        self,
        requests: Sequence[Request],
        new: list[list[int]],
        at: Sequence[int],
        hidden: Tensor,
        z: Tensor,
        keys: Keys,
    ) -> Proposal:
        """Drafts (B, K) behind `new`, the tokens that each row commits, and the logits they were picked from.

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
        short = len(tokens[0]) + self.drafts < MOST_TOKENS
        if native is not None and self.compiled and short and not keys.sampling.filters:
            self.stepper.grow_tables(cache)
            own = self.cache if self.drafts else None
            found = native.turn(tokens, cache, own, keys, self.drafts, self.proposed)
            picked, logprobs, counts, drafts, self.proposed = found
            return Turn(picked, logprobs, counts, drafts, keys.behind([count + 1 for count in counts], self.drafts + 1))
        hidden, z = self.stepper.forward(torch.tensor(tokens, device=device), cache, self.heads)
        if keys.rejection and self.proposed is not None:
            drafted = torch.tensor([row[1:] for row in tokens], device=device)
            picked, logprobs, counts = self.stepper.reject(hidden[0], drafted, self.proposed, keys)
        else:
            picked, logprobs = self.stepper.pick_targets(hidden[0], keys)
            counts = [accepted(row[1:], own) for row, own in zip(tokens, picked, strict=True)]
        new = [own[: count + 1] for own, count in zip(picked, counts, strict=True)]
        ahead = keys.behind([count + 1 for count in counts], self.drafts + 1)
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
        drafts, proposed = self.stepper.pick_drafts(states, keys)
        return drafts.tolist(), proposed


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
        proposal = self._chain(row, [following], [len(following) - 1], z, keys)
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
        return self._chain(self.cache, new, at, z[:, : max(at) + 1], keys)

    def _chain(self, cache: KVCache, new: list[list[int]], at: Sequence[int], z: Tensor, keys: Keys) -> Proposal:
        device, count = z.device, z.size(1)
        kept = [start + len(tokens) for start, tokens in zip(cache.lengths, new, strict=True)]
        padded = [tokens + [0] * (count - len(tokens)) for tokens in new]
        states = self.stepper.draft(torch.tensor(padded, device=device), z, cache)
        cache.roll_back(kept)  # what was padding
        state = states[torch.arange(len(at), device=device), torch.tensor(at, device=device)][:, None]  # (B, 1, D)
        picks = [self.stepper.pick_drafts(state, keys)]
        while len(picks) < self.drafts:
            state = self.stepper.draft(picks[-1][0], state, cache)
            picks.append(self.stepper.pick_drafts(state, keys, len(picks)))
        cache.roll_back(kept)
        drafts, proposed = (torch.cat(parts, 1) for parts in zip(*picks, strict=True))
        return drafts.tolist(), proposed


def step_pace(stepper: Stepper, rows: int) -> Pace:
    """The pace of steps of `rows` rows, measured when it is first asked for and kept with the stepper."""
    if rows not in stepper.paces:
        most = stepper.config.n_future - (0 if stepper.config.sequential and stepper.config.n_future > 1 else 1)
        length = min(128, stepper.config.max_position_embeddings)
        requests = [Request([0] * length, 1, ids=[0]) for _ in range(rows)]
        sampling = Sampling(1.0)

        def step(drafts: int) -> Callable[[], object]:
            drafter = make_drafter(stepper, drafts, rows, length + 3 * drafts + 2)
            cache = stepper.new_cache(rows, length + 3 * drafts + 2, drafter.heads)
            keys = Keys(
                sampling, [0] * rows, [length] * rows, drafts + 1, stepper.config.vocab_size, stepper.model.device
            )

            def run() -> None:
                cache.lengths = [length] * rows
                if drafter.cache is not None:
                    drafter.cache.lengths = [length] * rows
                drafter.turn(requests, [[0] * (drafts + 1)] * rows, cache, keys)

            return run

        stepper.paces[rows] = Pace(measured_costs([step(drafts) for drafts in range(most + 1)]))
    return stepper.paces[rows]


def make_drafter(stepper: Stepper, drafts: int, rows: int, capacity: int) -> Drafter:
    """What drafts `drafts` tokens a step for the model behind `stepper`; its rows hold at most `capacity` positions."""
    if stepper.config.sequential and drafts:
        return SequentialDrafter(stepper, drafts, rows, capacity)
    return ParallelDrafter(stepper, drafts)

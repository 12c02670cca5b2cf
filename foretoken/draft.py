"""Where drafts come from: one small class a source, one signature; and a step of the model with its drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.model import Stepper
from foretoken.native import MOST_TOKENS
from foretoken.processors import Change
from foretoken.request import Request, changes
from foretoken.sampling import Keys
from foretoken.tree import Tree, chain

# Drafts (B, K), and the logits (B, K, V) they were picked from.
Proposal = tuple[list[list[int]], Tensor | None]


@dataclass(frozen=True)
class Start:
    """Where the rows of a batch draft from, by the noise `keys`: behind the last of `new`, of each row what it commits
    beyond its request's ids, nothing behind a prompt.

    hidden (heads, B, T, D) and z (B, T, D): what the model's forward returned for the newest positions; `at` says for
    each row at which of them its last token but one stands, whose head 1 picked its last.
    """

    requests: Sequence[Request]
    new: list[list[int]]
    at: Sequence[int]
    hidden: Tensor
    z: Tensor
    keys: Keys

    @property
    def following(self) -> list[list[int]]:
        """Of each row the tokens behind the newest positions up to `at`, which its last token ends."""
        return [own or [*r.prompt[1:], *r.ids] for r, own in zip(self.requests, self.new, strict=True)]

    @property
    def texts(self) -> list[list[int]]:
        """Each row's prompt and tokens."""
        return [[*r.prompt, *r.ids, *own] for r, own in zip(self.requests, self.new, strict=True)]


@dataclass(frozen=True)
class Turn:
    """What a step gave. Of each row: the accepted nodes, node 0 first; the tokens that the target picks behind them
    (what follows means nothing) and their log-probabilities; the next drafts. And the noise these are verified with."""

    picked: list[list[int]]
    logprobs: list[list[float]]
    paths: list[list[int]]
    drafts: list[list[int]]
    ahead: Keys


class Drafter:
    """Drafts K tokens a step for the rows of a batch.

    heads: how many heads the model's own forward must run for it, head 1 included. cache: the drafter's own, if any.
    proposed (B, K, V): the logits that the drafts on their way were drawn from, kept for acceptance by rejection.
    tree: the shape of the next drafts; None is a chain of K. draft_vocab: among how many first tokens these are; None
    is all. Tokens of a byte-pair encoding stand in the order of their merges, frequent ones first; of the unembedding
    fewer rows are read. heads_draft: whether the model's own heads draft; other drafters get no states from a compiled
    step. compiled: whether such a step is one call with the drafts of the heads, if these share the unembedding.
    """

    heads = 1
    cache: KVCache | None = None
    proposed: Tensor | None = None
    tree: Tree | None = None
    draft_vocab: int | None = None
    compiled = True
    heads_draft = True

    def __init__(self, stepper: Stepper, drafts: int) -> None:
        self.stepper, self.drafts = stepper, drafts

    def most(self) -> int:
        """How many drafts the next step can have: heads whose keys are missing cannot come back."""
        return self.drafts

    @property
    def ranks(self) -> int:
        """How many candidates there must be for each place."""
        return 1 if self.tree is None else self.tree.width

    def placed(self, candidates: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
        """The drafts of each row, from candidates (B, K, ranks)."""
        if self.tree is None:
            return [[place[0] for place in row] for row in candidates]
        return [self.tree.nodes(row) for row in candidates]

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """Take a request as the batch's last row: K drafts behind its first token.

        hidden (heads, 1, T, D) and z (1, T, D): what the model's forward returned for its prompt.
        """
        start = Start([request], [[]], [z.size(1) - 1], hidden, z, keys)
        row = None if self.cache is None else self.cache.vacant()
        drafts, proposed = self._drafts(start, row)
        if self.cache is not None and row is not None:
            self.cache.join(row)
        if keys.sampling.rejects and proposed is not None:
            self.proposed = proposed if self.proposed is None else torch.cat((self.proposed, proposed.float()))
        return drafts[0]

    def _drafts(self, start: Start, cache: KVCache | None) -> Proposal:
        return self.propose(start, cache) if self.drafts else ([[] for _ in start.requests], None)

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """K > 0 drafts of each row, and the logits they come from; cache: these rows of the drafter's own, if any."""
        raise NotImplementedError

    def stand(self, lengths: Sequence[int]) -> None:
        """Be behind so many positions of each row, whatever they hold: for measuring what a step costs."""
        if self.cache is not None:
            self.cache.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows` of the batch, in this order."""
        if self.cache is not None:
            self.cache.select(rows)
        if self.proposed is not None:
            self.proposed = self.proposed[list(rows)] if rows else None

    def turn(
        self, requests: Sequence[Request], tokens: list[list[int]], cache: KVCache, keys: Keys, tree: Tree | None = None
    ) -> Turn:
        """Run the model on `tokens` (B, T), each row's last one and its drafts; accept, and draft on."""
        stepper = self.stepper
        steps = stepper.graphs or stepper.native
        inside = self.drafts if self.heads_draft else 0
        change = changes(requests, lambda row: (tree or chain(len(tokens[0]) - 1)).before(tokens[row][1:]))
        if steps is not None and change is None and self._at_once(len(tokens[0])):
            own, ranks, among = (self.cache, self.ranks, self.draft_vocab) if inside else (None, 1, None)
            picked, logprobs, paths, flat, self.proposed = steps.turn(
                tokens, cache, own, keys, inside, self.proposed, tree, ranks, among
            )
            ahead = keys.behind(map(len, paths), self.drafts + 1)
            if inside or not self.drafts:
                return Turn(picked, logprobs, paths, self._of(flat), ahead)
            hidden = z = torch.empty(0)
        else:
            picked, logprobs, paths, hidden, z = self._verify(tokens, cache, keys, change, tree)
            ahead = keys.behind(map(len, paths), self.drafts + 1)
        new = [own[: len(path)] for own, path in zip(picked, paths, strict=True)]
        start = Start(requests, new, [len(path) - 1 for path in paths], hidden, z, ahead)
        drafts, self.proposed = self._drafts(start, self.cache)
        return Turn(picked, logprobs, paths, drafts, ahead)

    def _at_once(self, count: int) -> bool:
        """Whether a compiled step of so many tokens is one call, with the drafts of the model's heads."""
        inside = self.drafts if self.heads_draft else 0
        known = not inside or (self.compiled and not self.stepper.config.own_unembeddings)
        return known and count + inside < MOST_TOKENS

    def _of(self, flat: list[list[int]]) -> list[list[int]]:
        """The drafts of each row, from candidates (B, K x ranks), place by place."""
        return flat if self.tree is None else self.placed([_pairs(row, self.ranks) for row in flat])

    def _verify(
        self, tokens: list[list[int]], cache: KVCache, keys: Keys, change: Change | None, tree: Tree | None
    ) -> tuple[list[list[int]], list[list[float]], list[list[int]], Tensor, Tensor]:
        """The first half of `turn` in PyTorch; what the forward returned stands along the accepted nodes."""
        stepper, device, count = self.stepper, self.stepper.model.device, len(tokens[0])
        hidden, z = stepper.forward(torch.tensor(tokens, device=device), cache, self.heads, tree)
        if keys.sampling.rejects and self.proposed is not None and count > 1:
            drafted = torch.tensor([row[1:] for row in tokens], device=device)
            picked, logprobs, counts = stepper.reject(hidden[0], drafted, self.proposed, keys, change)
            return picked, logprobs, [list(range(right + 1)) for right in counts], hidden, z
        shape = chain(count - 1) if tree is None else tree
        picked, logprobs = stepper.pick_targets(hidden[0], keys, change, None if tree is None else shape.depths)
        paths = [shape.walk(row[1:], own) for row, own in zip(tokens, picked, strict=True)]
        if tree is None:
            return picked, logprobs, paths, hidden, z
        for row, path in enumerate(paths):
            cache.keep(row, path, count)
            picked[row] = [picked[row][node] for node in path]
            logprobs[row] = [logprobs[row][node] for node in path]
        rows, nodes = torch.arange(len(paths), device=device)[:, None], padded(paths, device)
        return picked, logprobs, paths, hidden[:, rows, nodes], z[rows, nodes]


class ParallelDrafter(Drafter):
    """Heads 2..K+1, which ran with head 1: drafts cost no pass of their own, and do not see each other."""

    @property
    def heads(self) -> int:  # type: ignore[override]
        """Head 1 and those that draft."""
        return self.drafts + 1

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`."""
        states = self.states(start.hidden, start.at)
        if changes(start.requests, lambda row: ()) is None:
            candidates, law = self.stepper.pick_drafts(states, start.keys, 0, None, self.ranks, self.draft_vocab, 1)
            return self.placed(candidates.tolist()), law
        return chained(self, start, self.stepper, lambda picks: states[:, len(picks) : len(picks) + 1])

    def states(self, hidden: Tensor, at: Sequence[int]) -> Tensor:
        """What drafts are picked from (B, K, D): the heads' states (1 + K, B, T, D) at place at[row] of each row."""
        rows = torch.arange(len(at), device=hidden.device)
        return hidden[1:, rows, torch.tensor(at, device=hidden.device)].transpose(0, 1)


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

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`."""
        assert cache is not None
        following, z, native = start.following, start.z[:, : max(start.at) + 1], self.stepper.native
        if native and self._at_once(1) and len(following) == 1 and changes(start.requests, lambda row: ()) is None:
            *before, last = following[0]
            if before:
                self.stepper.draft(torch.tensor([before]), z[:, :-1], cache, last=True)
            keys, state = start.keys.behind([-1], self.drafts), z[:, -1].float().contiguous()
            _, _, _, flat, law = native.turn(
                [[last]], cache, cache, keys, self.drafts, None, None, self.ranks, self.draft_vocab, state
            )
            return self._of(flat), law
        kept = [length + len(tokens) for length, tokens in zip(cache.lengths, following, strict=True)]
        alone = len(following) == 1  # its last state is the one
        state = last_of(self.stepper.draft(padded(following, z.device), z, cache, last=alone), start.at)
        cache.roll_back(kept)  # what was padding

        def states(picks: list[Tensor]) -> Tensor:
            nonlocal state
            state = self.stepper.draft(picks[-1], state, cache) if picks else state
            return state

        proposal = chained(self, start, self.stepper, states)
        cache.roll_back(kept)
        return proposal


def chained(drafter: Drafter, start: Start, stepper: Stepper, states: Callable[[list[Tensor]], Tensor]) -> Proposal:
    """Drafts, one after the other, from the states (B, 1, D) that the first candidates (B, 1) before them give."""
    firsts: list[Tensor] = []
    candidates: list[Tensor] = []
    laws: list[Tensor] = []
    while len(firsts) < drafter.drafts:
        state = states(firsts)
        change = changes(
            start.requests, lambda row: [[*start.new[row], *(torch.cat(firsts, 1)[row].tolist() if firsts else ())]]
        )
        depth = len(firsts) + 1 if drafter.heads_draft else 0
        found, law = stepper.pick_drafts(
            state, start.keys, len(firsts), change, drafter.ranks, drafter.draft_vocab, depth
        )
        firsts.append(found[..., 0])
        candidates.append(found)
        laws.append(law)
    return drafter.placed(torch.cat(candidates, 1).tolist()), torch.cat(laws, 1)


def _pairs(row: list[int], ranks: int) -> list[list[int]]:
    return [row[at : at + ranks] for at in range(0, len(row), ranks)]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of any lengths as one tensor (B, T), with zeros behind them."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def last_of(states: Tensor, at: Sequence[int]) -> Tensor:
    """Of states (B, T, D) the one at place at[row] of each row: (B, 1, D)."""
    device = states.device
    if len(at) == 1:
        return states[:, at[0] : at[0] + 1]
    return states[torch.arange(len(at), device=device), torch.tensor(at, device=device)][:, None]

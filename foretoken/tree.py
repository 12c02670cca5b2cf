"""Drafts as a tree: several candidates for a place, of which verification takes the one that the target picks.

A step verifies all nodes in one forward. Node 0 is the last committed token; a node sees its ancestors and what is
committed. From node 0 on, the child that holds the target's own token is accepted, as long as there is one. A chain is
the tree whose nodes have one child each. Shapes are sparse (Medusa, Cai et al. 2024): `grown` takes the nodes that are
accepted most often.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """A shape. Node i + 1 hangs on node `parents[i]` and holds the candidate of rank `ranks[i]` for its depth."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of all nodes; node 0's is 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Of all nodes, themselves included, as words: bit j is set for node j."""
        seen = [1]
        for index, parent in enumerate(self.parents):
            seen.append(seen[parent] | 1 << (index + 1))
        return tuple(seen)

    @cached_property
    def _sees(self) -> Tensor:
        nodes = range(len(self.ancestors))
        return torch.tensor([[seen >> node & 1 > 0 for node in nodes] for seen in self.ancestors])

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """Of all nodes: the nodes that hang on them, by rank."""
        below: tuple[dict[int, int], ...] = tuple({} for _ in self.depths)
        for node, (parent, rank) in enumerate(zip(self.parents, self.ranks, strict=True), 1):
            below[parent][rank] = node
        return below

    @cached_property
    def width(self) -> int:
        """How many candidates a place needs."""
        return max(self.ranks, default=0) + 1

    def first(self, count: int) -> Tree:
        """Of `count` nodes."""
        return Tree(self.parents[:count], self.ranks[:count])

    def nodes(self, candidates: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of nodes 1.., from candidates (depth, rank)."""
        return [candidates[depth - 1][rank] for depth, rank in zip(self.depths[1:], self.ranks, strict=True)]

    def visible(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Which of the slots (S) are seen by the nodes of each row, which stand at `positions` (B, T): (B, T, S)."""
        count, starts = positions.size(1), positions[:, 0].tolist()
        own = self._sees.to(slots.device)
        visible = (slots < positions[:, :1, None]).repeat(1, count, 1)
        for row, start in enumerate(starts):
            visible[row, :, start : start + count] = own
        return visible

    def before(self, tokens: Sequence[int]) -> list[list[int]]:
        """For every node the drafts on the way to it, its own among them; `tokens` are those of nodes 1.."""
        ways: list[list[int]] = [[]]
        for parent, token in zip(self.parents, tokens, strict=True):
            ways.append([*ways[parent], token])
        return ways

    def walk(self, tokens: Sequence[int], picked: Sequence[int]) -> list[int]:
        """The accepted nodes, node 0 first: `picked` are the target's tokens behind every node."""
        way = [0]
        for index, (parent, token) in enumerate(zip(self.parents, tokens, strict=True)):
            if parent == way[-1] and token == picked[parent]:
                way.append(index + 1)
        return way


@lru_cache
def chain(count: int) -> Tree:
    """`count` drafts, one after the other."""
    return Tree(tuple(range(count)), (0,) * count)


def grown(
    count: int, depth: int, width: int, branching: bool, rate: Callable[[int, int], float]
) -> tuple[Tree, list[float]]:
    """The best tree of up to `count` nodes, by the odds that they are accepted, and these, from the best node on.

    Its first nodes are the best tree of so many. rate(d, r): how often the candidate of rank r < width at depth d, from
    1 to `depth`, is right where all before it are. branching: whether every node may have children, or those of rank 0
    at all depths alone, as with a drafter that goes on from its own first candidates.
    """
    parents: list[int] = []
    ranks: list[int] = []
    found: list[float] = []
    waiting: list[tuple[float, int, int, int, bool]] = []  # odds (negative), depth, rank, parent, on the first way
    rates = [[rate(deep, rank) for rank in range(width)] for deep in range(1, depth + 1)]

    def offer(odds: float, deep: int, parent: int, first: bool) -> None:
        if deep <= depth and (first or branching):
            for rank, share in enumerate(rates[deep - 1]):
                heapq.heappush(waiting, (-odds * share, deep, rank, parent, first and rank == 0))

    offer(1.0, 1, 0, True)
    while waiting and len(parents) < count:
        odds, deep, rank, parent, first = heapq.heappop(waiting)
        parents.append(parent)
        ranks.append(rank)
        found.append(-odds)
        offer(-odds, deep + 1, len(parents), first)
    return Tree(tuple(parents), tuple(ranks)), found

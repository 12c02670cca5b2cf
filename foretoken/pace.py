"""How many drafts a step should have: what steps cost here, and how many drafts are accepted now.

speedup = tokens per step / step cost. The cost of a step with K drafts is measured once for a model and batch size, on
a cache of its own. How often draft d is accepted where those before it were is followed while decoding, the newest
steps counting most; a new batch begins with what many before it gave. The K of the highest expected tokens per second
is taken, down to plain decoding. So is the part of the vocabulary that drafts are among: how many accepted drafts a
smaller one holds is seen while all tokens may be drafted, now and then.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence

from foretoken.tree import Tree, chain, grown

MEMORY, LONG_MEMORY = 48.0, 1000.0  # steps that are remembered, within a batch and of all
BEGINNING = 12.0  # steps that those before a batch are worth
HOPE = 3.0  # steps in which, it is assumed at first, the first draft was accepted
PROBE_EVERY = 16  # requests, where drafts have not paid
ROUND, ENOUGH = 0.003, 0.25  # seconds, at least, of a step's measurement, and of all of them
DOUBT = 1.0  # standard errors
GUESS = 0.3  # of what is left, the next candidate's share, before anything is known
WIDTH, MOST_NODES = 4, 16  # of a tree: candidates for a place, and nodes
GAIN = 1.02  # another K, or another vocabulary of drafts, must promise this much
# And drafts this much over none: costs are known to some percent, and of several rows some end before the others.
WARY, WARY_OF_ROWS = 1.05, 1.15
SMALLEST_VOCABULARY = 2048  # of drafts
LOOK_EVERY = 16  # choices, one of which is that all tokens may be drafted


class Pace:
    """Chooses K from costs[K], seconds of a step with K drafts, and from what `record` has seen.

    row: seconds that one more node of a tree costs. branching: whether every node of a tree may have children. spared:
    seconds that a step of the most drafts is shorter by when they are among so many first tokens. draft_vocab: how many
    are taken; None is all. wary: how much drafts must promise over none.
    """

    def __init__(
        self, costs: Sequence[float], row: float = math.inf, branching: bool = True,
        spared: Mapping[int, float] | None = None, wary: float = WARY,
    ) -> None:  # fmt: skip
        self.costs, self.row, self.branching, self.wary = list(costs), row, branching, wary
        self.spared = dict[int | None, float]([(None, 0.0), *(spared or {}).items()])
        # Of the drafts that are accepted among all tokens: how many a smaller vocabulary holds.
        self.within = {size: [0.0, HOPE] for size in self.spared if size is not None}
        self.draft_vocab: int | None = None
        self.choices = 0
        self.best = len(costs) - 1
        self.accepted, self.tried = [HOPE] + [0.0] * self.best, [HOPE] + [0.0] * self.best
        self.all_accepted, self.all_tried = list(self.accepted), list(self.tried)
        # Of further candidates, by depth and rank: how often they were right where those before them were not.
        self.others = [[[2 * GUESS, 2.0] for _ in range(WIDTH)] for _ in costs]
        self.refused = 0  # requests that began without drafts

    def anew(self) -> Pace:
        """One with the same costs that has seen nothing."""
        spared = {size: seconds for size, seconds in self.spared.items() if size}
        return Pace(self.costs, self.row, self.branching, spared, self.wary)

    def record(
        self, trees: Sequence[Tree], paths: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]] = (),
        draft_vocab: int | None = None,
    ) -> None:  # fmt: skip
        """A step of rows whose drafts were `trees` (B), of which the nodes `paths` (B) were accepted.

        tokens (B, nodes): what the nodes hold. draft_vocab: how many first tokens the drafts were among.
        """
        if self.within and draft_vocab is None:
            right_ones = [row[node] for row, path in zip(tokens, paths, strict=False) for node in path[1:]]
            for size, seen in self.within.items():
                keep = (1 - 1 / LONG_MEMORY) ** len(right_ones)
                seen[0] = seen[0] * keep + sum(token < size for token in right_ones)
                seen[1] = seen[1] * keep + len(right_ones)
        one = 1 / max(GUESS, self.share(draft_vocab))  # rates are kept as they would be with all tokens
        for depth in range(max(max(tree.depths) for tree in trees)):
            asked = first = 0
            for tree, path in zip(trees, paths, strict=True):
                if depth >= len(path):
                    continue  # what hung there was never asked
                below, right = tree.children[path[depth]], path[depth + 1] if depth + 1 < len(path) else 0
                if 0 in below:
                    asked += 1
                    first += below[0] == right
                if len(below) > 1 and below.get(0) != right:
                    self._record_others(depth, below, right)
            if asked:
                for memory, tried, accepted in (
                    (MEMORY, self.tried, self.accepted), (LONG_MEMORY, self.all_tried, self.all_accepted)
                ):  # fmt: skip
                    keep = (1 - 1 / memory) ** asked
                    tried[depth] = tried[depth] * keep + asked
                    accepted[depth] = accepted[depth] * keep + first * one

    def _record_others(self, depth: int, below: dict[int, int], right: int) -> None:
        for rank in range(1, WIDTH):
            if rank in below:
                seen = self.others[depth][rank]
                seen[0] = seen[0] * (1 - 1 / LONG_MEMORY) + (below[rank] == right)
                seen[1] = seen[1] * (1 - 1 / LONG_MEMORY) + 1
                if below[rank] == right:
                    return

    def rate(self, depth: int, rank: int) -> float:
        """How often a candidate for the place `depth` behind a right token, from 1 on, is the right one."""
        index = min(depth, len(self.tried)) - 1
        while index and not self.tried[index]:
            index -= 1  # what is untried is as the place before it
        first = min(1.0, self.accepted[index] / self.tried[index]) if self.tried[index] else GUESS
        first *= self.share(self.draft_vocab)
        odds = 1 - first if rank else first
        for before in range(1, rank + 1):
            right, tried = self.others[index][before]
            odds *= right / tried if before == rank else 1 - right / tried
        return odds

    def tree(self, drafts: int, nodes: int | None = None) -> Tree | None:
        """The tree of `nodes` nodes and at most `drafts` places, or of as many as pay; None is a chain of `drafts`."""
        if not drafts or (nodes is None and not math.isfinite(self.row)):
            return None
        tree, odds = grown(MOST_NODES if nodes is None else nodes, drafts, WIDTH, self.branching, self.rate)
        count = len(odds)
        if nodes is None:
            best, count = GAIN * self.speed(drafts, self.draft_vocab), 0
            expected, deepest = 1.0, 0
            for number, share in enumerate(odds, 1):
                expected, deepest = expected + share, max(deepest, tree.depths[number])
                speed = expected / (self.cost(deepest, self.draft_vocab) + self.row * (number - deepest))
                if speed > best:
                    best, count = speed, number
        found = tree.first(count)
        return None if not count or found == chain(drafts) else found

    def share(self, draft_vocab: int | None) -> float:
        """Of the drafts that are accepted among all tokens, those among so many first ones."""
        if draft_vocab not in self.within:
            return 1.0
        held, seen = self.within[draft_vocab]
        return held / seen

    def cost(self, drafts: int, draft_vocab: int | None) -> float:
        """Seconds of a step with so many drafts among so many first tokens: fewer drafts spare in proportion."""
        spared = self.spared.get(draft_vocab, 0.0) * drafts / max(1, len(self.costs) - 1)
        return max(self.costs[0], self.costs[drafts] - spared)

    def speed(self, drafts: int, draft_vocab: int | None) -> float:
        """Expected tokens per second."""
        return self.tokens_per_step(share=self.share(draft_vocab))[drafts] / self.cost(drafts, draft_vocab)

    def tokens_per_step(self, doubt: float = 0.0, share: float = 1.0) -> list[float]:
        """Expected with 0, 1, 2, .. drafts; doubt: by how many standard errors rates may be better than they looked.

        share: of right drafts, those that can be drafted.
        """
        expected, still, rate = [1.0], 1.0, 1.0
        for depth, (accepted, tried) in enumerate(zip(self.accepted, self.tried, strict=True)):
            if depth:  # one step's worth: accepted as often as the draft before it
                accepted, tried = accepted + rate, tried + 1
            rate = min(1.0, accepted / tried)
            if doubt:
                rate = min(1.0, rate + doubt * math.sqrt(rate * (1 - rate) / tried))
            still *= rate * share
            expected.append(expected[-1] + still)
        return expected

    def choose(self, most: int) -> int:
        """K, at most `most`; the one before where no other promises clearly more, and fewer only beyond doubt.

        Heads that have stopped drafting cannot come back before the next batch: a run of bad luck must not stop them.
        """
        speeds = self._speeds(most)
        best = max(range(len(speeds)), key=speeds.__getitem__)
        now = min(self.best, len(speeds) - 1)
        held = self._speeds(most, DOUBT)[now] if best < now else speeds[now]
        self.best = best if speeds[best] > GAIN * held else now
        self._choose_vocabulary()
        return self.best

    def _speeds(self, most: int, doubt: float = 0.0) -> list[float]:
        """Of 0 to `most` drafts, each among the first tokens that are best for it; none counts for a little more."""
        found = [0.0] * (min(most, len(self.costs) - 1) + 1)
        for size in self.spared:
            expected = self.tokens_per_step(doubt, self.share(size))
            found = [max(x, expected[drafts] / self.cost(drafts, size)) for drafts, x in enumerate(found)]
        return [self.wary * found[0], *found[1:]]

    def _choose_vocabulary(self) -> None:
        """For `best` drafts."""
        if not self.within:
            return
        best = max(self.spared, key=lambda size: self.speed(self.best, size))
        if self.speed(self.best, best) > GAIN * self.speed(self.best, self.draft_vocab):
            self.draft_vocab = best
        self.choices += 1
        if self.choices % LOOK_EVERY == 0:
            self.draft_vocab = None

    def begin(self, most: int) -> int:
        """K for a batch that begins: where drafts have not paid, they are tried again now and then."""
        worth = [min(1.0, BEGINNING / tried) if tried else 0.0 for tried in self.all_tried]
        self.tried = [tried * share for tried, share in zip(self.all_tried, worth, strict=True)]
        self.accepted = [right * share for right, share in zip(self.all_accepted, worth, strict=True)]
        self.best = 0
        best = self.choose(most)
        if best == 0 and most:
            self.refused += 1
            if self.refused % PROBE_EVERY == 0:
                self.best = min(1, most)
        return self.best


def measured_costs(steps: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Seconds of each of the steps: the lowest of so many rounds in turn, or more, after one that warms up.

    A round runs a short step some times in a row, since that is how decoding finds the processor's caches. The lowest:
    nothing makes a step shorter than it is, and a K that looked cheap while others were disturbed is kept for good.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    number, first = 0, time.perf_counter()
    while number <= rounds or time.perf_counter() - first < ENOUGH:
        for index, step in enumerate(steps):
            times = max(1, min(20, int(ROUND / seconds[index][-1]))) if number > 1 else 1
            began = time.perf_counter()
            for _ in range(times):
                step()
            if number:
                seconds[index].append((time.perf_counter() - began) / times)
        number += 1
    return [min(values) for values in seconds]


def never_falling(costs: Sequence[float]) -> list[float]:
    """Costs of steps of which each does more than the one before: that it looked cheaper was a disturbance."""
    return list(itertools.accumulate(costs, max))

"""How many drafts a step should have: what steps cost here, and how many drafts are accepted now.

speedup = tokens per step / step cost. The cost of a step with K drafts is measured once for a model and batch size, on
a cache of its own. How often draft d is accepted where those before it were is followed while decoding, the newest
steps counting most; a new batch begins with what many before it gave. The K of the highest expected tokens per second
is taken, down to plain decoding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

MEMORY, LONG_MEMORY = 48.0, 1000.0  # steps that are remembered, within a batch and of all
BEGINNING = 12.0  # steps that those before a batch are worth
HOPE = 3.0  # steps in which, it is assumed at first, the first draft was accepted
PROBE_EVERY = 8  # requests, where drafts have not paid
ROUND = 0.003  # seconds, at least, of a step's measurement
DOUBT = 1.0  # standard errors
GAIN = 1.02  # another K must promise this much


class Pace:
    """Chooses K from costs[K], seconds of a step with K drafts, and from what `record` has seen."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = list(costs)
        self.best = len(costs) - 1
        self.accepted, self.tried = [HOPE] + [0.0] * self.best, [HOPE] + [0.0] * self.best
        self.all_accepted, self.all_tried = list(self.accepted), list(self.tried)
        self.refused = 0  # requests that began without drafts

    def record(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """A step of rows with `drafted` (B) drafts, of which the first `accepted` (B) were right."""
        for depth in range(max(drafted)):
            rows = [
                right > depth for had, right in zip(drafted, accepted, strict=True) if had > depth and right >= depth
            ]
            if rows:
                for memory, tried, right in (
                    (MEMORY, self.tried, self.accepted), (LONG_MEMORY, self.all_tried, self.all_accepted)
                ):  # fmt: skip
                    keep = (1 - 1 / memory) ** len(rows)
                    tried[depth] = tried[depth] * keep + len(rows)
                    right[depth] = right[depth] * keep + sum(rows)

    def tokens_per_step(self, drafts: int, doubt: float = 0.0) -> float:
        """Expected with so many drafts; doubt: by how many standard errors rates may be better than they looked."""
        expected, still, rate = 1.0, 1.0, 1.0
        for depth in range(drafts):
            of_before = rate if depth else 0.0  # one step's worth: accepted as often as the draft before it
            tried = self.tried[depth] + (1 if depth else 0)
            rate = (self.accepted[depth] + of_before) / tried
            rate = min(1.0, rate + doubt * math.sqrt(rate * (1 - rate) / tried))
            still *= rate
            expected += still
        return expected

    def choose(self, most: int) -> int:
        """K, at most `most`; the one before where no other promises clearly more, and fewer only beyond doubt.

        Heads that have stopped drafting cannot come back before the next batch: a run of bad luck must not stop them.
        """
        speeds = [self.tokens_per_step(k) / self.costs[k] for k in range(min(most, len(self.costs) - 1) + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        now = min(self.best, len(speeds) - 1)
        held = self.tokens_per_step(now, DOUBT if best < now else 0.0) / self.costs[now]
        self.best = best if speeds[best] > GAIN * held else now
        return self.best

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
    """Seconds of each of the steps: the median of some rounds in turn, after one that warms up; never falling.

    A round runs a short step some times in a row, since that is how decoding finds the processor's caches.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for index, step in enumerate(steps):
            times = max(1, min(20, int(ROUND / seconds[index][-1]))) if number > 1 else 1
            began = time.perf_counter()
            for _ in range(times):
                step()
            if number:
                seconds[index].append((time.perf_counter() - began) / times)
    costs = [statistics.median(values) for values in seconds]
    for index in range(1, len(costs)):  # a dearer step that looked cheaper was a disturbance
        costs[index] = max(costs[index], costs[index - 1])
    return costs

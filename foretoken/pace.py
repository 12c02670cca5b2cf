"""How many drafts a step should have: what steps cost here, and how many drafts are accepted now.

speedup = tokens per step / step cost. The cost of a step with K drafts is measured once for a model and batch size, on
a cache of its own. How often draft d is accepted where those before it were is followed while decoding, the newest
steps counting most. The K of the highest expected tokens per second is taken, down to plain decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

MEMORY = 24.0  # steps that are remembered
HOPE = 3.0  # steps in which, it is assumed at first, the first draft was accepted
PROBE_EVERY = 16  # requests, where drafts have not paid
GAIN = 1.02  # another K must promise this much


class Pace:
    """Chooses K from costs[K], seconds of a step with K drafts, and from what `record` has seen."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = list(costs)
        self.best = len(costs) - 1
        self.accepted, self.tried = [HOPE] + [0.0] * self.best, [HOPE] + [0.0] * self.best
        self.refused = 0  # requests that began without drafts

    def record(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """A step of rows with `drafted` (B) drafts, of which the first `accepted` (B) were right."""
        for depth in range(max(drafted)):
            rows = [
                right > depth for had, right in zip(drafted, accepted, strict=True) if had > depth and right >= depth
            ]
            if rows:
                keep = (1 - 1 / MEMORY) ** len(rows)
                self.tried[depth] = self.tried[depth] * keep + len(rows)
                self.accepted[depth] = self.accepted[depth] * keep + sum(rows)

    def tokens_per_step(self, drafts: int) -> float:
        """Expected with so many drafts."""
        expected, still, rate = 1.0, 1.0, 1.0
        for depth in range(drafts):
            of_before = rate if depth else 0.0  # one step's worth: accepted as often as the draft before it
            rate = (self.accepted[depth] + of_before) / (self.tried[depth] + (1 if depth else 0))
            still *= rate
            expected += still
        return expected

    def choose(self, most: int) -> int:
        """K, at most `most`; the one before where no other promises clearly more."""
        speeds = [self.tokens_per_step(k) / self.costs[k] for k in range(min(most, len(self.costs) - 1) + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if self.best >= len(speeds) or speeds[best] > GAIN * speeds[self.best]:
            self.best = best
        return self.best

    def begin(self, most: int) -> int:
        """K for a batch that begins: where drafts have not paid, they are tried again now and then."""
        best = self.choose(most)
        if best == 0 and most:
            self.refused += 1
            if self.refused % PROBE_EVERY == 0:
                return min(1, most)
        return best


def measured_costs(steps: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Seconds of each of the steps: the median of some rounds in turn, after one that warms up; never falling."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for index, step in enumerate(steps):
            began = time.perf_counter()
            step()
            if number:
                seconds[index].append(time.perf_counter() - began)
    costs = [statistics.median(values) for values in seconds]
    for index in range(1, len(costs)):  # a dearer step that looked cheaper was a disturbance
        costs[index] = max(costs[index], costs[index - 1])
    return costs

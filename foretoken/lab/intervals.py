"""Means, rates and differences with their intervals, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Student's t, 97.5 %, for 1..30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z = 1.959964


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval; they are nan where there is nothing to tell them by."""

    value: float
    low: float
    high: float

    def shown(self, digits: int = 2) -> str:
        """As "0.25 [0.10 - 0.40]"."""
        ends = f" [{self.low:.{digits}f} - {self.high:.{digits}f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.{digits}f}{ends}"

    def percent(self) -> str:
        """As "25 % [10 - 40]"."""
        ends = f" [{100 * self.low:.0f} - {100 * self.high:.0f}]" if math.isfinite(self.low) else ""
        return f"{100 * self.value:.0f} %{ends}"


def mean(values: Sequence[float]) -> Interval:
    """The mean with Student's t interval over `values`, one a seed."""
    middle, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(middle, math.nan, math.nan)
    quantile = _T[count - 2] if count - 1 <= len(_T) else _Z + 2.4 / (count - 1)  # within .002 of Student's
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(middle, middle - half, middle + half)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of values - baseline, seed by seed, with Student's t interval."""
    return mean([a - b for a, b in zip(values, baseline, strict=True)])


def rate(successes: int, count: int) -> Interval:
    """A share of successes with Wilson's interval (1927), which means something at 0 and at 1 too."""
    share, z2 = successes / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True)
class Table:
    """Rows under a head, in Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As lines that begin and end with a bar."""
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

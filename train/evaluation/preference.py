"""Preference between two models from blind pairwise votes: its share with a confidence interval, and a sign test.

A tie counts as half a vote for each side. The interval is that of Wilson (1927) for a binomial share p̂ of n votes: the
shares p with (p̂ − p)² ≤ z² p (1 − p) / n. Ties make the variance smaller than that of a binomial share, so with ties
the interval is wider than it needs to be, never narrower. The sign test leaves ties out and is exact.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution, for an interval of 95 %."""


class Interval(NamedTuple):
    low: float
    high: float


def wilson(share: float, n: int, z: float = Z) -> Interval:
    """Return Wilson's interval of a share that was observed in n trials; (0, 1) without trials."""
    if not n:
        return Interval(0.0, 1.0)
    scale = 1 + z**2 / n
    center = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return Interval(max(0.0, (center - half) / scale), min(1.0, (center + half) / scale))


def sign_test(wins: int, losses: int) -> float:
    """Return the probability of a split at least as uneven as this one, if both sides were equally good (two-sided)."""
    n, least = wins + losses, min(wins, losses)
    if 2 * least >= n:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


@dataclass(frozen=True)
class Preference:
    """Counts of votes between a first and a second model."""

    first: int = 0
    second: int = 0
    ties: int = 0

    @property
    def votes(self) -> int:
        return self.first + self.second + self.ties

    @property
    def share(self) -> float:
        """Share of the votes for the second model, ties counted half; 0.5 without votes."""
        return (self.second + self.ties / 2) / self.votes if self.votes else 0.5

    @property
    def interval(self) -> Interval:
        """95 % interval of the share."""
        return wilson(self.share, self.votes)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the exact sign test, without ties."""
        return sign_test(self.second, self.first)

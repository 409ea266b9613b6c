"""Intervals over windows, by the bootstrap, and what they say in a sentence.

Tokens of one window are not independent, windows nearly are: so windows are drawn with replacement, all quantities of
one window together.  Two models are scored on the same windows and their difference is drawn as one quantity: a
paired comparison, which is far narrower than either model's own interval.

A mean per token is a ratio of sums over windows, and is drawn as one.  The plain percentile interval is too narrow
for a few dozen windows, by sqrt((n - 1) / n) and by the normal's tails in the place of Student's.  Its quantiles are
therefore moved outwards, to Phi(sqrt(n / (n - 1)) t) with t Student's quantile of n - 1 degrees (the expanded
percentile interval: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015).
tests/evaluation simulates how often it covers the truth.
For fewer than `FEW` windows Student's interval of the ratio is taken instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEW = 15
"""Below so many windows draws cannot reach beyond what was seen, and Student's interval stands for them."""

RESAMPLES = 2000
_TAIL = 6  # how many times the expected share above a quantile is looked at first

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are NaN where there is only one window."""

    mean: float
    low: float
    high: float

    def exp(self) -> "Estimate":
        """Of the logarithm of a quantity the quantity."""
        return Estimate(math.exp(self.mean), math.exp(self.low), math.exp(self.high))


class Bootstrap:
    """Windows drawn again and again, the same way for every quantity."""

    def __init__(self, windows: int, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.windows = windows
        generator = np.random.default_rng(seed)
        self._weights = generator.multinomial(windows, [1 / windows] * windows, size=resamples).astype(np.float64)

    def ratio(self, sums: Sequence[float], counts: Sequence[float]) -> Estimate:
        """The sum over all windows of `sums` by that of `counts`."""
        s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        if 2 <= self.windows < FEW:
            return _students_interval(s, c)
        return self._interval(float(s.sum() / c.sum()), (self._weights @ s) / (self._weights @ c))

    def quantile(self, values: Sequence[NDArray[np.float32]], level: float) -> Estimate:
        """The quantile of the tokens of all windows: the least value that has `level` of them at or below it."""
        together = np.concatenate(values)
        order = np.argsort(-together, kind="stable")
        ordered, owner = together[order], np.repeat(np.arange(self.windows), [len(v) for v in values])[order]
        total = self._weights @ np.array([len(v) for v in values], np.float64)
        n = len(ordered)
        found = ordered[np.argmax(np.arange(1, n + 1) > n - level * n)]
        looked_at = min(n, math.ceil(_TAIL * (1 - level) * n) + 1)
        while True:  # from the top: so few are above the quantile that the rest need not be counted
            above = np.cumsum(self._weights[:, owner[:looked_at]], axis=1) > (total - level * total)[:, None]
            if looked_at == n or above[:, -1].all():
                return self._interval(float(found), ordered[np.argmax(above, axis=1)].astype(np.float64))
            looked_at = min(n, 2 * looked_at)

    def of(self, statistics: Callable[[NDArray[np.intp]], Sequence[float]]) -> list[Estimate]:
        """Statistics that are no ratios of sums.

        Args:
            statistics: Of the windows with these numbers, of which some are there several times.
        """
        every = np.arange(self.windows)
        drawn = np.array([statistics(np.repeat(every, weights.astype(np.intp))) for weights in self._weights])
        return [self._interval(value, drawn[:, n]) for n, value in enumerate(statistics(every))]

    def _interval(self, value: float, drawn: Floats) -> Estimate:
        if self.windows < 2:
            return Estimate(value, math.nan, math.nan)
        z = math.sqrt(self.windows / (self.windows - 1)) * _student(self.windows - 1)
        tail = 0.5 * math.erfc(z / math.sqrt(2))  # what the normal has beyond z, expanded as above
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


def _students_interval(s: Floats, c: Floats) -> Estimate:
    """Of a ratio of sums, by its linear part (Cochran, Sampling Techniques, eq. 2.39), with Student's quantile."""
    n, value = len(s), float(s.sum() / c.sum())
    error = math.sqrt(float(((s - value * c) ** 2).sum()) * n / (n - 1)) / float(c.sum())
    half = _student(n - 1) * error
    return Estimate(value, value - half, value + half)


def verdict(ratio: Estimate) -> str:
    """What an interval of perplexity, model / reference, says.

    Example:
        >>> verdict(Estimate(1.006, 1.004, 1.009))
        'worse by 0.40 % to 0.90 %'
    """
    if math.isnan(ratio.low):
        return "one window: no interval, so nothing can be said"
    low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
    if low > 0:
        return f"worse by {_percent(low)} to {_percent(high)}"
    if high < 0:
        return f"better by {_percent(-high)} to {_percent(-low)}"
    return "indistinguishable at 95 %"


def better_or_worse(difference: Estimate) -> str:
    """What an interval of a difference says, model less reference, of a measure of which more is better.

    Example:
        >>> better_or_worse(Estimate(-0.006, -0.009, -0.004))
        'worse by 0.0040 to 0.0090'
    """
    if math.isnan(difference.low):
        return "one alone: no interval, so nothing can be said"
    if difference.high < 0:
        return f"worse by {-difference.high:.4f} to {-difference.low:.4f}"
    if difference.low > 0:
        return f"better by {difference.low:.4f} to {difference.high:.4f}"
    return "indistinguishable at 95 %"


def _percent(value: float) -> str:
    digits = 2 if value >= 0.01 else 4
    return f"{value:.{digits}f} %"


def _student(degrees: int) -> float:
    """The 97.5 % point of Student's distribution, by bisection of its integral (the density is elementary)."""

    def below(t: float) -> float:
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        x = np.linspace(0.0, t, 4001)
        y = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        return 0.5 + float(np.trapezoid(y, x))

    low, high = 0.0, 15.0  # one degree: 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < (1 + LEVEL) / 2 else (low, middle)
    return (low + high) / 2

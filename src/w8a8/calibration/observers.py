"""Observers: from a stream of activations to a static grid.

An observer is fed tensor by tensor with `update`, keeps a summary of a fixed size (`w8a8.calibration.summaries`), and
at the end `params` answers with the grid for a `QuantSpec`, by the arithmetic contract (`w8a8.core.affine`).  What
differs between observers is only which range lo..hi the grid is to hold; what lies outside is clamped.

    absmax       -absmax .. absmax.  Nothing is clamped.  The scale of SmoothQuant O3.
    minmax       min .. max.  Nothing is clamped; the range for a zero point.
    percentile   what holds p per cent of the values (McKinstry et al. 2018, arXiv:1809.04191).
    mse          the range with the least squared error of quantisation (OMSE; Choukroun et al. 2019,
                 arXiv:1902.06822, eq. 4), searched on a histogram.

An observer is per tensor or per channel of the last axis.  Where nothing but zeros was seen, the scale is 1.

Measuring and merging are apart: `measure` makes a summary of one tensor and changes nothing, so observers
that want the same summary of the same tensor can share it (q, k and v read one tensor).
"""

import abc
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from w8a8.calibration.summaries import Histogram, Range, Summary
from w8a8.core.affine import QParams, grid_of_range
from w8a8.core.scheme import PerChannel, PerTensor, QuantSpec
from w8a8.errors import CalibrationError, SchemeError, closest


class Observer(abc.ABC):
    """One stream of activations.

    Args:
        granularity: `PerTensor()`, or `PerChannel()`: one range for each of the K channels.

    Raises:
        SchemeError: another granularity.
    """

    measures: ClassVar[type[Range] | type[Histogram]]

    def __init__(self, granularity: PerTensor | PerChannel = PerTensor()) -> None:  # noqa: B008 - frozen
        if not isinstance(granularity, PerTensor | PerChannel):
            raise SchemeError(
                f"an observer of {granularity!r} is unknown: a scale that is fixed beforehand is one per tensor "
                "or per channel; use PerTensor() or PerChannel()"
            )
        self.granularity = granularity
        self._seen: Summary | None = None

    def update(self, x: Tensor) -> None:
        """Take in one tensor.

        Args:
            x: (..., K), any float dtype, device and strides; may be empty.  Not modified, not kept.

        Raises:
            SchemeError: not a float tensor.
            NonFiniteError: a NaN or an infinity; the observer is as it was.
            CalibrationError: K is not that of the tensors before.
        """
        self.merge(self.measure(x))

    def measure(self, x: Tensor) -> Summary:
        """What this observer wants to know of one tensor.  The observer is not changed."""
        return self.measures.of(x, per_channel=isinstance(self.granularity, PerChannel))

    def merge(self, summary: Summary) -> None:
        """Take in what `measure` told, here or of an observer of the same kind and granularity."""
        self._seen = summary if self._seen is None else self._seen.merged(summary)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return 0 if self._seen is None else self._seen.tokens

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude seen, float32: (K,) per channel, (1,) per tensor.

        Raises:
            CalibrationError: no token was seen.
        """
        seen = self.seen()
        return torch.maximum(-seen.lo, seen.hi)

    def seen(self) -> Summary:
        """The summary of all that was seen.

        Raises:
            CalibrationError: no token was seen.
        """
        if self._seen is None or not self._seen.tokens:
            raise CalibrationError("nothing was observed: no token has been seen; run the calibration first")
        return self._seen

    def _histogram(self) -> Histogram:
        seen = self.seen()
        assert isinstance(seen, Histogram), "an observer merges what it measures"
        return seen

    def params(self, spec: QuantSpec) -> QParams:
        """The grid for what was seen.

        Args:
            spec: Width and symmetry; its granularity is the observer's.

        Returns:
            Scale, and zero point where asymmetric: (1, 1) per tensor, (1, K) per channel.

        Raises:
            SchemeError: the granularity is another, or the observer has no such range.
            CalibrationError: no token was seen.
        """
        if spec.granularity != self.granularity:
            raise SchemeError(f"this observer is per {self.granularity}, the grid asked for is {spec}")
        lo, hi = self._range(spec)
        return grid_of_range(lo[None], hi[None], spec)

    @abc.abstractmethod
    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range that the grid is to hold, float32 (C,) each."""


class AbsMax(Observer):
    """The largest magnitude: for symmetric grids."""

    measures = Range

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if not spec.symmetric:
            raise SchemeError(
                f"the observer 'absmax' has no zero point for {spec}: use 'minmax', 'percentile' or 'mse', "
                "or a symmetric scheme"
            )
        return -self.absmax, self.absmax


class MinMax(Observer):
    """The smallest and the largest value."""

    measures = Range

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        seen = self.seen()
        return seen.lo, seen.hi


class Percentile(Observer):
    """The range that holds p per cent of the values.

    Symmetric: up to the p-th percentile of the magnitudes.  Asymmetric: up to the p-th percentile of the values, and
    down to that of the negated values.  The p-th percentile of N values is the ceil(p / 100 * N)-th smallest.

    It is read from a histogram, as the upper edge of its bin.  With q exact and `d = 2**-9` per tensor, `2**-5` per
    channel, the range v is

        q <= v <= (1 + d) * max(q, absmax * 2**-16)

    and at most the largest magnitude; p = 100 gives that exactly.

    Args:
        granularity: As for `Observer`.
        p: Per cent, over 50 and at most 100.

    Raises:
        SchemeError: `p` is out of range, or the granularity unknown.
    """

    measures = Histogram

    def __init__(self, granularity: PerTensor | PerChannel = PerTensor(), *, p: float = 99.99) -> None:  # noqa: B008
        super().__init__(granularity)
        if not 50 < p <= 100:
            raise SchemeError(f"p={p!r} is out of range: over 50 and at most 100 per cent; 99.9 and 99.99 are common")
        self.p = p

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        seen = self._histogram()
        negative, positive = seen.counts[:, 0], seen.counts[:, 1]  # (C, bins + 1)
        total = int(seen.counts[0].sum())  # the same in every channel
        rank = math.ceil(Fraction(repr(self.p)) / 100 * total)
        upper = seen.edges()[:, 1:]
        if spec.symmetric:
            bound = torch.minimum(_ranked(negative + positive, rank, upper), self.absmax)
            return -bound, bound
        hi = _ranked(positive, rank - negative.sum(-1, keepdim=True), upper)
        lo = -_ranked(negative, rank - positive.sum(-1, keepdim=True), upper)
        return torch.maximum(lo, seen.lo.clamp(max=0.0)), torch.minimum(hi, seen.hi.clamp(min=0.0))


class MSE(Observer):
    """The range whose grid has the least mean squared error on the values seen.

    Symmetric: the best of 97 clips absmax * 2**(-i / 16).  Asymmetric: the ends are such shares of the extremes,
    chosen in turn, each given the other, until neither moves: a local minimum that is no worse than the full range.

    The error is estimated on a histogram, with the values of a bin taken as evenly spread over it (the integral
    over a bin is exact), and magnitudes under the window as zero.  The distance to the nearest grid value changes
    no faster than the value, so for any grid the root of the mean squared error is misjudged by no more than

        d = 2**-9 * rms(x) + 2**-16 * absmax        (2**-5 per channel)

    and that of the chosen range exceeds that of the best candidate, the full range among them, by 2 d at most.
    """

    measures = Histogram

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        seen = self._histogram()
        shares = torch.exp2(-torch.arange(97, dtype=torch.float32, device=seen.lo.device) / 16)
        if spec.symmetric:
            _, bound = _best(seen, spec, [(-clip, clip) for clip in shares[:, None] * self.absmax])
            return -bound, bound
        lo, hi = seen.lo.clamp(max=0.0), seen.hi.clamp(min=0.0)
        lows, highs = shares[:, None] * lo, shares[:, None] * hi  # (97, C)
        while True:
            before = (lo, hi)
            lo, hi = _best(seen, spec, [(lo, hi), *((lo, end) for end in highs)])
            lo, hi = _best(seen, spec, [(lo, hi), *((end, hi) for end in lows)])
            if torch.equal(lo, before[0]) and torch.equal(hi, before[1]):
                return lo, hi


def _ranked(counts: Tensor, rank: Tensor | int, upper: Tensor) -> Tensor:
    """The upper edge, float32 (C,), of the bin with the rank-th smallest; 0 where the rank is not positive."""
    ranks = rank if isinstance(rank, Tensor) else torch.tensor(rank, dtype=torch.int64, device=counts.device)
    ranks = ranks.to(counts.device).expand(len(counts), 1)
    found = torch.searchsorted(counts.cumsum(-1), ranks.contiguous())
    edge = upper.gather(-1, found.clamp(max=counts.shape[-1] - 1))
    return edge.masked_fill(ranks <= 0, 0.0).squeeze(-1).to(torch.float32)


def _best(seen: Histogram, spec: QuantSpec, ranges: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of some ranges lo..hi, (C,) each, that of the least error in each channel; the first of equals."""
    edges = seen.edges()[:, 1:]  # what lies below the window is zero, and has no error
    negative, positive = seen.counts[:, 0, 1:], seen.counts[:, 1, 1:]
    halves = (positive + negative,) if spec.symmetric else (positive, negative)
    best_lo, best_hi = ranges[0]
    least = torch.full_like(edges[:, 0], math.inf)
    for lo, hi in ranges:
        grid = grid_of_range(lo, hi, spec)
        steps = edges / grid.scale.to(torch.float64)[:, None]  # (C, bins + 1)
        error = torch.zeros_like(least)
        for counts, last in zip(halves, _reach(grid, spec), strict=False):
            error += (counts * _mean_squares(steps, last)).sum(-1)
        error *= grid.scale.to(torch.float64) ** 2
        better = error < least
        least = torch.where(better, error, least)
        best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
    return best_lo, best_hi


def _reach(grid: QParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """How many steps a grid goes up from zero, and down, float64 (C, 1)."""
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    zero_point = zero_point.to(torch.float64)[:, None]
    return spec.qmax - zero_point, zero_point - spec.qmin


def _mean_squares(steps: Tensor, last: Tensor) -> Tensor:
    """The mean of (u - nearest(u))**2 between neighbouring edges, nearest(u) an integer of at most `last`.

    Its integral from 0 to t is nearest / 12 + (t - nearest)**3 / 3.

    Args:
        steps: Edges of magnitudes, in steps of the grid, (C, bins + 1).
        last: (C, 1).

    Returns:
        (C, bins); 0 where a bin has no float32 in it.
    """
    nearest = torch.minimum(steps.round(), last)
    beyond = steps - nearest
    integral = (beyond * beyond).mul_(beyond).div_(3).add_(nearest, alpha=1 / 12)
    return integral.diff().div_(steps.diff().clamp_(min=torch.finfo(torch.float64).tiny))


OBSERVERS: dict[str, type[Observer]] = {"absmax": AbsMax, "minmax": MinMax, "percentile": Percentile, "mse": MSE}
"""The observers by name; each is made without arguments, and is then per tensor."""


def observer_of(observer: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """What makes the observers: the class of that name, or the function itself.

    Raises:
        CalibrationError: no observer has this name; the message lists them.
    """
    if callable(observer):
        return observer
    if observer not in OBSERVERS:
        raise CalibrationError(
            f"unknown observer {observer!r} ({closest(str(observer), OBSERVERS)}); observers: " + ", ".join(OBSERVERS)
        )
    return OBSERVERS[observer]

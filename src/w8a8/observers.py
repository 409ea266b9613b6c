"""Observers: from a stream of activations to a static grid.

An observer is fed tensor by tensor with `update`, keeps a summary of a fixed size (`w8a8.summaries`), and
at the end `params` answers with the grid for a `QuantSpec`, by the arithmetic contract (`w8a8.affine`).  What
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
from typing import ClassVar

import torch
from torch import Tensor

from w8a8.affine import QParams, grid_of_range
from w8a8.errors import CalibrationError, SchemeError
from w8a8.scheme import PerChannel, PerTensor, QuantSpec
from w8a8.summaries import Histogram, Range, Summary


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


OBSERVERS: dict[str, type[Observer]] = {"absmax": AbsMax, "minmax": MinMax}
"""The observers by name, each made without arguments per tensor."""

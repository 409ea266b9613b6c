"""What a grid does to a weight, seen on some of its rows: an SQNR that needs no data.

    SQNR = 10 log10(sum w**2 / sum (w - s (q - z))**2)    over at most `ROWS` evenly spaced output rows, in dB

It is taken where the codes are made, in whatever way that is: there the rows are at hand, a smoothed weight is what it
is, and a job from files to files writes the figure into its journal.  The alternative, one look at both directories at
the end, would read scattered rows of all files again, words and transposed weights among them, and finds no smoothed
weight in the source.  The price of a sample is that a bad row beside it is not seen.

An SQNR weighs energy.  An outlier of tens of times the other elements of its row lowers it; one that has more energy
than all of them together is most of the signal, and then little shows of what the others lost.  Outputs tell
(`w8a8.analysis.layer_errors`).
"""

import math

import torch
from torch import Tensor

from w8a8.core.affine import QTensor, decibels, dequantize, l2_error

ROWS = 32
"""Enough to rank layers by; twice as many showed in the processor time of streaming small experts."""

_SERIAL = (1 << 15) - 1
"""Elements that torch takes without its threads, for which a busy machine would wait longer than the sums take."""


class RowSample:
    """The sums of one weight, which may go by in pieces.

    Args:
        rows: N of the whole weight.
    """

    def __init__(self, rows: int) -> None:
        self._step = -(-rows // ROWS) | 1  # odd: heads have 64 or 128 rows, and not the same ones of each are looked at
        self._next = 0  # the first row that is looked at, counted from the next piece
        self._signal, self._noise = 0.0, 0.0  # Euclidean norms

    def take(self, weight: Tensor, made: QTensor | Tensor) -> None:
        """Take in the next rows.

        Args:
            weight: (n, K) float.  Not modified.
            made: Their codes, or where a grid is wider than codes its values, (n, K).
        """
        span = self._step * max(1, _SERIAL // max(1, weight.shape[1]))
        for start in range(self._next, len(weight), span):
            rows = slice(start, start + span, self._step)
            exact = weight[rows].to(torch.float64)
            values = dequantize(_rows_of(made, rows)) if isinstance(made, QTensor) else made[rows]
            self._signal = math.hypot(self._signal, float(torch.linalg.vector_norm(exact)))
            self._noise = math.hypot(self._noise, l2_error(exact, values))
        self._next = (self._next - len(weight)) % self._step

    @property
    def sqnr_db(self) -> float:
        """In decibels; +inf where the sampled rows lost nothing."""
        return decibels(self._signal, self._noise)


def _rows_of(q: QTensor, rows: slice) -> QTensor:
    """Some rows with their scales, which may be shared by all rows: then there is one row of them."""

    def part(grid: Tensor) -> Tensor:
        return grid[rows] if len(grid) == len(q.codes) else grid

    return QTensor(q.codes[rows], part(q.scale), None if q.zero_point is None else part(q.zero_point))

"""What is kept of a tensor that linears read, to try scales on: bounded, and in two halves.

    rows               some of its tokens                          (R, K)
    low, high          the extremes of all its tokens              (K,)
    call_low, _high    the extremes of single calls, for ranges    (B, K)
                       that are those of one call

Scales that were made from the maxima of some tokens look better on these tokens than on others: with alpha = 1 they
level the very maxima that they were made from, and new tokens have theirs elsewhere.  So all this is also kept of
every other call and of the calls between, and what was fitted on one half can be judged on the other.  Of a single
call the halves are its first tokens and its last.  Halves of every other token would not do: neighbours are alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.calibration.observers import MinMax
from w8a8.calibration.reservoir import Reservoir
from w8a8.core.scheme import PerChannel
from w8a8.errors import CalibrationError

ROWS = 512
"""Tokens that are kept."""

CALLS = 64
"""Calls whose ranges are kept."""


@dataclass(frozen=True)
class Sample:
    """What the calibration showed of a tensor.  All float32; see the module's docstring.

    halves: The same of each half of the calls, which have no halves themselves; None where one saw nothing.
    """

    rows: Tensor
    low: Tensor
    high: Tensor
    call_low: Tensor
    call_high: Tensor
    halves: "tuple[Sample, Sample] | None" = None

    @property
    def absmax(self) -> Tensor:
        """(K,) the largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)


class Sampler:
    """Makes a `Sample`: a statistic for `w8a8.collect`.

    Args:
        rows: R, how many tokens are kept.
        calls: B, of how many calls the ranges are kept.
        seed: Of the choice of both.

    Raises:
        CalibrationError: `rows` or `calls` is not positive.
    """

    def __init__(self, rows: int = ROWS, *, calls: int = CALLS, seed: int = 0) -> None:
        self.calls = 0
        self._rows, self._places = Reservoir(rows, seed=seed), Reservoir(rows, seed=seed)
        self._ranges, self._numbers = Reservoir(calls, seed=seed), Reservoir(calls, seed=seed)
        self._extremes = (MinMax(PerChannel()), MinMax(PerChannel()))  # of even calls and odd ones
        self._first = (MinMax(PerChannel()), MinMax(PerChannel()))  # of the two parts of the first call

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self._rows.tokens

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one call's input.

        Args:
            x: (..., K), any float dtype.  Not modified, not kept.

        Raises:
            NonFiniteError: it holds a NaN or an infinity.
        """
        tokens = x.reshape(-1, x.shape[-1])
        if not len(tokens):
            return
        self._extremes[self.calls % 2].update(tokens)
        half = (len(tokens) + 1) // 2
        if not self.calls:
            for part, extremes in zip((tokens[:half], tokens[half:]), self._first, strict=True):
                extremes.update(part)
        place = 2 * self.calls + (torch.arange(len(tokens), dtype=torch.int64, device="cpu") >= half)
        self._rows.update(tokens)
        self._places.update(place[:, None])  # the same seed: of the same tokens
        self._ranges.update(torch.cat([tokens.amin(0), tokens.amax(0)])[None])
        self._numbers.update(torch.tensor([[self.calls]], dtype=torch.int64, device="cpu"))
        self.calls += 1

    def sample(self) -> Sample:
        """What was seen; `CalibrationError` where that is no token."""
        if not self.calls:
            raise CalibrationError("nothing was sampled: no token has been seen; run the calibration first")
        rows = self._rows.rows.to(torch.float32)
        ranges = self._ranges.rows.to(torch.float32)
        places, numbers = self._places.rows[:, 0], self._numbers.rows[:, 0]
        if self.calls == 1:
            extremes, of_row = self._first, places % 2
            both = _one(rows, (self._extremes[0],), ranges)
            ranges = torch.cat([torch.cat([e.seen().lo, e.seen().hi])[None] for e in extremes if e.tokens])
            numbers = torch.arange(len(ranges), dtype=torch.int64, device="cpu")
        else:
            extremes, of_row = self._extremes, places // 2 % 2
            both = _one(rows, extremes, ranges)
        picks = [((of_row == half).to(rows.device), (numbers % 2 == half).to(ranges.device)) for half in (0, 1)]
        if not all(bool(mine.any()) and bool(called.any()) for mine, called in picks):
            return both
        one, other = (
            _one(rows[mine], (seen,), ranges[called]) for (mine, called), seen in zip(picks, extremes, strict=True)
        )
        return Sample(both.rows, both.low, both.high, both.call_low, both.call_high, (one, other))


def _one(rows: Tensor, extremes: tuple[MinMax, ...], ranges: Tensor) -> Sample:
    """A sample without halves: (R, K) tokens, extremes of all, (B, 2 K) ranges of calls."""
    seen = [e.seen() for e in extremes]
    low, high = torch.stack([s.lo for s in seen]).amin(0), torch.stack([s.hi for s in seen]).amax(0)
    call_low, call_high = ranges.chunk(2, dim=-1)
    return Sample(rows, low, high, call_low, call_high)

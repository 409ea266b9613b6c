"""What is kept of a stream of tensors: summaries of a fixed size that merge.

A summary is made from one tensor, on that tensor's device, and two of them merge into the summary of both.
Merging is exact, so the result does not depend on how the data was cut into batches, and its size does not
depend on how much there was.

`Range` holds the smallest and the largest value.

`Histogram` counts values by the leading bits of their float32 pattern: sign, exponent and the first
`mantissa_bits` of the mantissa.  For positive floats the pattern as an integer (the key) grows with the value,
so a bin is a range of keys, and its width is at most 2**-mantissa_bits of its lower edge: the relative
resolution is the same for an outlier and for the bulk far below it.  Kept are the `OCTAVES` octaves under the
largest magnitude; what is smaller (zero too) is counted in bin 0.  When a larger magnitude comes, the window
moves up, and bins that leave it at the low end fall into bin 0, as if they had never been told apart.

A histogram of equal bins over [0, absmax] was not taken: where one channel is a hundred times the others, a
percentile of the others would fall into its first few bins.  A sketch of centroids (t-digest, KLL) is smaller
at the same error, but its result depends on the order of the data, and updating it is no vector code.

Per tensor, 2 x (16 * 512 + 1) counts are 128 KiB.  Per channel there are fewer bins, 8 KiB a channel.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from w8a8.core.affine import describe_non_finite, described, value_range
from w8a8.errors import CalibrationError, NonFiniteError, SchemeError

OCTAVES = 16
"""How far below the largest magnitude a histogram resolves: a factor of 2**16."""

MANTISSA_BITS = 9
"""Resolution of a histogram per tensor: a bin is at most 2**-9 = 0.2 % wide."""

CHANNEL_MANTISSA_BITS = 5
"""Resolution of histograms per channel: a bin is at most 2**-5 = 3.1 % wide."""

_FLOAT32_MANTISSA_BITS = 23
_MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 without its sign
_BLOCK = 1 << 18  # values whose bins are computed at a time: 1 MiB each for value and bin, which stays in a cache


@dataclass(frozen=True)
class Range:
    """Smallest and largest value, float32 (C,), of so many tokens; both 0 where there were none."""

    lo: Tensor
    hi: Tensor
    tokens: int

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, *, per_channel: bool) -> "Range":
        """The range of one tensor.

        Args:
            x: (..., K), any float dtype, device and strides; may be empty.  Not modified.
            per_channel: One range for each of the K channels, else one in all.

        Raises:
            SchemeError: not a float tensor, or a scalar.
            NonFiniteError: a NaN or an infinity in float32; the message has the index of the first.
        """
        if not x.is_floating_point() or x.ndim == 0:
            raise SchemeError(
                f"expected an activation (..., K) of floats to observe, found {described(x)}; observe the inputs of "
                "linear layers"
            )
        k = x.shape[-1]
        view = x if x.ndim > 1 else x[None]  # an activation of one axis is one token
        lo, hi = value_range(view, tuple(range(view.ndim - per_channel)))
        lo, hi = lo.reshape(-1), hi.reshape(-1)
        if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
            raise NonFiniteError(describe_non_finite(x))
        return cls(lo, hi, x.numel() // k if k else 0)

    def merged(self, other: "Range") -> "Range":
        """The range of both."""
        _same_channels(self, other)
        if not (self.tokens and other.tokens):
            return self if self.tokens else other
        lo, hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        return Range(lo, hi, self.tokens + other.tokens)


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of constant relative width.

    Invariants: `counts` is int64 (C, 2, bins + 1), [:, 0] the negative values and [:, 1] the others; bin 0 has
    the magnitudes below the window, bin `bins` the largest one's.  `lo` and `hi` are exact, float32 (C,).
    """

    counts: Tensor
    lo: Tensor
    hi: Tensor
    tokens: int
    mantissa_bits: int

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, *, per_channel: bool) -> "Histogram":
        """The histogram of one tensor; arguments and errors as for `Range.of`."""
        found = Range.of(x, per_channel=per_channel)
        bits = CHANNEL_MANTISSA_BITS if per_channel else MANTISSA_BITS
        bins, c = OCTAVES << bits, found.lo.numel()
        width = bins + 1
        rows = x.reshape(-1, x.shape[-1] if per_channel else 1)  # (M, C)
        base = _top(found, bits) - bins
        first = torch.arange(c, device=x.device, dtype=torch.int32) * (2 * width) + width
        counts = torch.zeros(c * 2 * width, dtype=torch.int64, device=x.device)
        for block in rows.split(max(_BLOCK, counts.numel()) // c + 1):
            pattern = block.to(torch.float32).contiguous().view(torch.int32)
            index = (pattern & _MAGNITUDE).bitwise_right_shift_(_FLOAT32_MANTISSA_BITS - bits)
            index.sub_(base).clamp_(min=0).add_(first)
            index.add_(pattern.lt(0), alpha=-width)
            counts += torch.bincount(index.view(-1), minlength=counts.numel())
        return cls(counts.view(c, 2, width), found.lo, found.hi, found.tokens, bits)

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of both: that of the larger magnitude, with the other's counts moved down."""
        _same_channels(self, other)
        both = self.range.merged(other.range)
        top = _top(both, self.mantissa_bits)
        counts = self._below(top) + other._below(top)
        return Histogram(counts, both.lo, both.hi, both.tokens, self.mantissa_bits)

    @property
    def range(self) -> Range:
        """The exact range."""
        return Range(self.lo, self.hi, self.tokens)

    @property
    def bins(self) -> int:
        """The number of bins in the window."""
        return OCTAVES << self.mantissa_bits

    def edges(self) -> Tensor:
        """Edges of the bins' magnitudes, float64 (C, bins + 2): bin j is [edges[:, j], edges[:, j + 1])."""
        shift = _FLOAT32_MANTISSA_BITS - self.mantissa_bits
        below = torch.arange(-self.bins, 2, dtype=torch.int32, device=self.lo.device)
        keys = _top(self.range, self.mantissa_bits)[:, None] + below
        keys[:, 0] = 0  # bin 0 reaches down to zero
        largest = torch.finfo(torch.float32).max
        return (keys.clamp(min=0) << shift).view(torch.float32).to(torch.float64).clamp(max=largest)

    def _below(self, top: Tensor) -> Tensor:
        """The counts as they are in a window that ends at the key `top`, (C,), which is no lower than ours."""
        move = top - _top(self.range, self.mantissa_bits)
        if not bool(move.any()):
            return self.counts
        bins = torch.arange(self.bins + 1, device=move.device, dtype=torch.int64)
        source = bins + move[:, None, None]  # (C, 1, bins + 1)
        moved = self.counts.gather(-1, source.clamp(max=self.bins).expand_as(self.counts))
        moved.masked_fill_(source > self.bins, 0)
        gone = move.to(torch.int64).clamp(max=self.bins)[:, None, None].expand(-1, 2, 1)
        moved[..., :1] = self.counts.cumsum(-1).gather(-1, gone)
        return moved


def _top(found: Range, mantissa_bits: int) -> Tensor:
    """The key of the largest magnitude, int32 (C,)."""
    return torch.maximum(-found.lo, found.hi).abs().view(torch.int32) >> (_FLOAT32_MANTISSA_BITS - mantissa_bits)


def _same_channels(a: "Summary", b: "Summary") -> None:
    if a.lo.shape != b.lo.shape:
        raise CalibrationError(
            f"an observer that has seen {a.lo.numel()} channels was given {b.lo.numel()}: "
            "observe the inputs of one layer with one observer"
        )


Summary: TypeAlias = Range | Histogram

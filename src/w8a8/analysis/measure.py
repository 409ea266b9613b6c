"""What quantising does to one linear layer, summed over the tokens that it reads.

    SQNR     10 log10(sum v**2 / sum (v - v')**2), of the weight, of the input, of the output, in dB
    cosine   sum y y' / sqrt(sum y**2 sum y'**2) over the outputs of all tokens together

Saturated codes.  Of a static grid: those at its ends, whatever lies beyond is clamped there.  A dynamic grid is made so
that its own largest element is at an end (symmetric), or its smallest and largest are at both (asymmetric): those one
or two codes per scale are there by construction and are not counted.  A share well over 0 means a range that many
values share, or, with a static grid, one that is too narrow.  A code that stands for exactly zero is not saturated: of
a one-sided grid, as after ReLU, zero is at an end.

Sums are float64.  Inputs and outputs are those of the float model, so that a layer's own error is seen and not that
of the layers before it.
"""

import math

import torch
from torch import Tensor, nn

from w8a8.core.affine import QParams, grid_of_range, sqnr_db
from w8a8.core.scheme import MAX_CODE_BITS, PerChannel, PerTensor, QuantSpec
from w8a8.core.tokens import fake_quantize_tokens, quantize_tokens
from w8a8.layers.linear import QuantLinear, float_operands
from w8a8.records.layers import Histogram

BINS = 64


class LayerMeasure:
    """The sums of one layer.

    Args:
        linear: The float layer.  Not modified.
        layer: What takes its place.
        lo, hi: (K,) the range of each input channel over all tokens that will be seen.
    """

    def __init__(self, linear: nn.Module, layer: QuantLinear, lo: Tensor, hi: Tensor) -> None:
        self._layer = layer
        self._weight, _ = float_operands(linear)
        self._range = float(lo.min()), float(hi.max())
        self._sums = dict.fromkeys(("x", "dx", "y", "dy", "yq", "yyq"), 0.0)
        self._codes, self._ends = 0, 0
        self._counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in what the float layer read, (..., K), and gave, (..., N)."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        quantized = self._layer(x)
        sums = self._sums
        sums["y"] += _dot(y, y)
        sums["yq"] += _dot(quantized, quantized)
        sums["yyq"] += _dot(y, quantized)
        sums["dy"] += _dot(y - quantized, y - quantized)
        self._counts += _counted(x, *self._range)
        spec, params = self._layer.scheme.activations, self._static()
        if spec is not None:
            difference = x.to(torch.float32) - fake_quantize_tokens(x, spec, params)
            sums["x"] += _dot(x, x)
            sums["dx"] += _dot(difference, difference)
            if spec.bits <= MAX_CODE_BITS and not isinstance(spec.granularity, PerChannel):
                self._saturate(x, spec, params)

    def figures(self) -> dict[str, float | None]:
        """The layer's record: SQNRs in dB, cosine, share of saturated codes; None for what was not measured."""
        sums = self._sums
        size = math.sqrt(sums["y"] * sums["yq"])
        weight_sqnr_db = sqnr_db(self._weight.to(torch.float32), self._layer.dequantized_weight())
        return {
            "weight_sqnr_db": weight_sqnr_db if math.isfinite(weight_sqnr_db) else None,
            "input_sqnr_db": _decibels(sums["x"], sums["dx"]),
            "output_sqnr_db": _decibels(sums["y"], sums["dy"]),
            "cosine": sums["yyq"] / size if size else None,
            "saturated_share": self._ends / self._codes if self._codes else None,
        }

    def histograms(self, name: str) -> list[Histogram]:
        """Of the weight, and of the input where it is quantised."""
        layer, spec, inputs = self._layer, self._layer.scheme.weights, self._layer.scheme.activations
        weight = self._weight.to(torch.float32)
        ends = float(weight.min()), float(weight.max())
        scale = getattr(layer, "weight_scale", None)  # a grid wider than codes keeps values only
        grid = _grid(*ends, spec) if scale is None else QParams(scale, layer.weight_zero_point)
        found = [_histogram(name, "weight", ends, _counted(weight, *ends), spec, grid)]
        if inputs is not None and int(self._counts.sum()):
            grid = self._static() or _grid(*self._range, inputs)
            found.append(_histogram(name, "input", self._range, self._counts, inputs, grid))
        return found

    def _static(self) -> QParams | None:
        scale = self._layer.input_scale
        return None if scale is None else QParams(scale, self._layer.input_zero_point)

    def _saturate(self, x: Tensor, spec: QuantSpec, params: QParams | None) -> None:
        q = quantize_tokens(x, spec, params)
        zero = torch.zeros_like(q.scale, dtype=torch.int32) if q.zero_point is None else q.zero_point  # (M, 1)
        low, high = ((q.codes == end) & (zero != end) for end in (spec.qmin, spec.qmax))
        for reached in (low | high,) if spec.symmetric else (low, high):
            self._ends += int(reached.sum())
            if params is None:  # the element that made the scale
                made = reached.any() if isinstance(spec.granularity, PerTensor) else reached.any(-1)
                self._ends -= int(made.sum())
        self._codes += q.codes.numel()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vecdot(a.to(torch.float64), b.to(torch.float64)).sum())


def _decibels(signal: float, noise: float) -> float | None:
    """None where nothing was lost, or there was nothing to lose."""
    return 10 * math.log10(signal / noise) if signal and noise else None


def _grid(lo: float, hi: float, spec: QuantSpec) -> QParams:
    ends = torch.tensor([lo, hi], dtype=torch.float32, device="cpu")
    return grid_of_range(ends[0], ends[1], spec)


def _counted(values: Tensor, lo: float, hi: float) -> Tensor:
    lo, hi = _widened(lo, hi)
    return torch.histc(values.detach().to(torch.float32), BINS, lo, hi).to(torch.int64).cpu()


def _widened(lo: float, hi: float) -> tuple[float, float]:
    """The range of the bins, of which each has some width."""
    return (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)


def _histogram(
    name: str, what: str, ends: tuple[float, float], counts: Tensor, spec: QuantSpec, grid: QParams
) -> Histogram:
    lo, hi = _widened(*ends)
    edges = [lo + (hi - lo) * i / BINS for i in range(BINS + 1)]
    loosest = int(grid.scale.argmax())
    zero = 0 if grid.zero_point is None else int(grid.zero_point.flatten()[loosest])
    scale = float(grid.scale.flatten()[loosest])
    return Histogram(name, what, edges, counts.tolist(), scale, spec.qmax, spec.qmin, zero)

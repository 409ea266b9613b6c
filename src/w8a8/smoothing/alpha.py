"""How far to smooth one group: scales by SmoothQuant, and the alpha that costs its linears least.

    s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)      Xiao et al. 2023 (arXiv:2211.10438), eq. 4

X / s is easier to quantise than X, and W * s harder than W.  Where the balance lies depends on the scheme (a static
grid wants more of it in the weights than one scale per token does) and on the group, so alpha is searched: for each
candidate, operands are quantised as the layer will quantise them, on a sample of real tokens, and the outputs are
compared with the float ones.  The error of one product is

    sum_m ||Q(X/s) Q(W s)^T - X W^T||_m**2 / ||X W^T||_m   divided by   sum_m ||X W^T||_m

over tokens m.  Without the weight 1 / ||.||_m a few tokens of huge norm decide alone; dividing by the square, so
that every token counts the same, was a little worse.  The errors of a group's readers are added: each
is relative.  A source that is itself quantised with scales shared between its rows is part of the sum, as its
rows are rescaled.

Where the scheme runs in integers so does the search, which is several times as fast as the float product of the same
numbers; other schemes, and machines without an exact int8 product, multiply fake-quantised operands.

A range is never read from the sampled tokens alone.  A static grid comes from the extremes of all the calibration; for
a dynamic one per tensor, each sampled token is quantised with the range of one of the calls that were seen.  And what
is fitted on half of the calls, scales and static ranges, is judged on the other half (`w8a8.calibration.sampling`).

A channel's maximum is not trusted to stay small.  A neuron behind a ReLU may be active once in thousands of tokens, and
scales that amplify it to the level of the others by what little it showed make one such token ruin the range of the
whole tensor; the shipped model has such.  So where alpha is searched, maxima below `QUIET` times the median count as
that much, and `QUIET_ONE_SIDED` times where the tensor is never negative.  A fixed alpha is the paper's equation as it
stands.

Scales are divided by their geometric mean over live channels.  No quantiser sees a common factor; but a dead
channel keeps the scale 1, and beside live ones of 0.01 its weights, untouched, would take over the range of every row.

Not taken: other families of scales.  Hill climbing on log s per channel from the best alpha was no better on held-out
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from w8a8.calibration.sampling import Sample
from w8a8.core.affine import QParams, fake_quantize, grid_of_range
from w8a8.core.scheme import PerGroup, PerTensor, QuantSpec, Scheme
from w8a8.core.tokens import fake_quantize_tokens, quantize_tokens
from w8a8.errors import NonFiniteError, SchemeError
from w8a8.kernels.torch_cpu import int8_product
from w8a8.layers.weights import quantize_weight
from w8a8.smoothing.fold import reader_scales

GRID = tuple(round(i / 20, 2) for i in range(21))
"""The candidates for alpha, beside no smoothing."""

QUIET = 0.3
"""The least that a channel's maximum counts for in a search, in units of the median one."""

QUIET_ONE_SIDED = 3.0
"""The same where a tensor is never negative, as behind a ReLU."""

REACH = 2.0**16
"""How far a scale may be from the geometric mean: half floats hold what is left."""

_FLOAT32 = torch.finfo(torch.float32)


def smooth_scales(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """What to divide each channel by: Xiao et al. 2023, eq. 4.

    Args:
        act_absmax: (K,) the largest magnitude of each input channel, any float dtype.
        weight_absmax: (K,) that of each column of the weights that read it.
        alpha: 0..1, how much of the difficulty goes to the weights.

    Returns:
        (K,) float32, positive and finite, not normalised.  1 for a channel whose activation or weights are all 0:
        there is nothing to balance.  Quotients out of float32's normal range are clamped to its ends.

    Raises:
        SchemeError: alpha is not in 0..1, or the shapes are not one (K,).
        NonFiniteError: a magnitude is negative or not finite.

    Example:
        >>> smooth_scales(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]), 0.5).tolist()
        [2.0, 1.0]
    """
    check_alpha(alpha)
    if act_absmax.ndim != 1 or act_absmax.shape != weight_absmax.shape:
        raise SchemeError(
            f"smooth_scales takes two vectors of one length, found {tuple(act_absmax.shape)} for the activations and "
            f"{tuple(weight_absmax.shape)} for the weights: reduce both over all but the input channels"
        )
    activations, weights = act_absmax.detach().to(torch.float64), weight_absmax.detach().to(torch.float64)
    for what, values in (("activations", activations), ("weights", weights)):
        bad = ~(torch.isfinite(values) & (values >= 0))
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"the largest magnitude of channel {index} of the {what} is {float(values[index])}; "
                "it must be finite and not negative: look for NaN or infinity in what was calibrated"
            )
    live = (activations > 0) & (weights > 0)
    one = torch.ones_like(activations)
    activations, weights = torch.where(live, activations, one), torch.where(live, weights, one)
    scales = activations**alpha / weights ** (1 - alpha)
    return scales.clamp(_FLOAT32.tiny, _FLOAT32.max).to(torch.float32)


def check_alpha(alpha: object) -> None:
    """Raise `SchemeError` unless alpha is a number in 0..1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise SchemeError(
            f"alpha={alpha!r} is not a number in 0..1: 0 leaves all the difficulty in the activations, 1 moves "
            "all of it to the weights, 0.5 is the paper's; or 'auto'"
        )


def centred(scales: Tensor, live: Tensor) -> Tensor:
    """Scales divided by their geometric mean over live channels; 1 elsewhere.

    Args:
        scales: (K,) positive.
        live: (K,) bool: the channels that have something to balance.

    Returns:
        (K,) float64, within `REACH` of 1.
    """
    logs = scales.to(torch.float64).log()
    mean = logs[live].mean() if bool(live.any()) else logs.new_zeros(())
    return torch.where(live, (logs - mean).exp().clamp(1 / REACH, REACH), 1.0)


@dataclass(frozen=True)
class Product:
    """One quantised matrix that the scales of a group change.

    sample: Its input.
    weight: (N, K) in its own dtype.
    channels: The source's channel of each of its inputs (K,), or of each of its outputs (N,) where it is the source.
    reads: Whether it reads the group's tensor; else it makes it.
    """

    sample: Sample
    weight: Tensor
    channels: Tensor
    reads: bool


@dataclass(frozen=True)
class Choice:
    """The outcome of a search: alpha and (C,) scales, both None for no smoothing, and the error without and with."""

    alpha: float | None
    scales: Tensor | None
    error_before: float
    error_after: float


@torch.no_grad()
def search(
    products: Sequence[Product], channels: int, scheme: Scheme, alphas: Sequence[float] = GRID, *, forced: bool = False
) -> Choice:
    """The alpha of least error, or none.

    Args:
        products: The quantised linears that read the group's tensor, at least one, and perhaps its source.
        channels: C, of the source.
        alphas: The candidates; none at all measures the error alone.  A tie goes to the earlier one, and before that
            to no smoothing.
        forced: Leave out no smoothing as a candidate, and take the maxima as they are.

    Returns:
        The choice; with scales for the source's channels, normalised, from the whole sample.  Its errors are those on
        the half that the scales and static ranges were not made from, the mean of both ways, where there are halves.
        What is chosen is no worse than no smoothing there, nor on the whole sample.
    """
    folds = [_Fold(fitted, judged, channels, scheme, trusting=forced) for fitted, judged in _halves(products)]
    whole = _Fold(products, products, channels, scheme, trusting=forced)
    trials = folds or [whole]

    def error(alpha: float | None) -> float:
        return sum(fold.error(alpha) for fold in trials) / len(trials)

    before = error(None)
    if not alphas:
        return Choice(None, None, before, before)
    errors = {alpha: error(alpha) for alpha in alphas}
    alpha = min(errors, key=lambda a: errors[a])
    better = errors[alpha] < before
    if not forced and not (better and (trials == [whole] or whole.error(alpha) < whole.error(None))):
        return Choice(None, None, before, before)
    return Choice(alpha, whole.scales(alpha), before, errors[alpha])


class _Fold:
    """Scales and static ranges from one sample of the products' inputs, errors on another."""

    def __init__(
        self, fitted: Sequence[Product], judged: Sequence[Product], channels: int, scheme: Scheme, *, trusting: bool
    ) -> None:
        self.activations, self.weights = magnitudes(fitted, channels)
        self.live = (self.activations > 0) & (self.weights > 0)
        if not trusting:
            least = _least_trusted(fitted, self.activations[self.live])
            self.activations = torch.where(self.live, self.activations.clamp(min=least), self.activations)
        self.scheme = scheme
        self.products = [
            replace(there, sample=replace(there.sample, low=here.sample.low, high=here.sample.high))
            for here, there in zip(fitted, judged, strict=True)
        ]

    @cached_property
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        """What each product is in float (R, N), and its norm for each token (R,)."""
        found = [product.sample.rows @ product.weight.to(torch.float32).t() for product in self.products]
        return [(y, torch.linalg.vector_norm(y, dim=-1)) for y in found]

    def scales(self, alpha: float | None) -> Tensor:
        """(C,) float64, normalised; all 1 for no smoothing."""
        if alpha is None:
            return torch.ones(len(self.live), dtype=torch.float64, device="cpu")
        return centred(smooth_scales(self.activations, self.weights, alpha), self.live)

    def error(self, alpha: float | None) -> float:
        """The sum over the products."""
        scales = self.scales(alpha)
        return sum(_error(p, *exact, scales, self.scheme) for p, exact in zip(self.products, self.exact, strict=True))


def _least_trusted(products: Sequence[Product], maxima: Tensor) -> float:
    """What a live channel's maximum counts for at the least, given all of them."""
    if not len(maxima):
        return 0.0
    one_sided = all(bool((product.sample.low >= 0).all()) for product in products if product.reads)
    return (QUIET_ONE_SIDED if one_sided else QUIET) * float(maxima.median())


def _halves(products: Sequence[Product]) -> list[tuple[list[Product], list[Product]]]:
    """The products with one half of their samples and with the other, both ways; nothing where one has no halves."""
    parts: tuple[list[Product], list[Product]] = ([], [])
    for product in products:
        if product.sample.halves is None:
            return []
        for part, half in zip(parts, product.sample.halves, strict=True):
            part.append(replace(product, sample=half))
    return [parts, parts[::-1]]


def magnitudes(products: Sequence[Product], channels: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each source channel in the inputs and in the weights of its readers, (C,) each."""
    activations = torch.zeros(channels, dtype=torch.float32, device="cpu")
    weights = torch.zeros(channels, dtype=torch.float32, device="cpu")
    for product in products:
        if product.reads:
            known = product.channels >= 0
            where = product.channels[known]
            activations.scatter_reduce_(0, where, product.sample.absmax.cpu()[known], "amax")
            columns = product.weight.abs().amax(0).to(torch.float32).cpu()
            weights.scatter_reduce_(0, where, columns[known], "amax")
    return activations, weights


def _error(product: Product, exact: Tensor, norms: Tensor, scales: Tensor, scheme: Scheme) -> float:
    """The relative error of one product under the scheme, with these scales."""
    sample, weight = product.sample, product.weight
    along = reader_scales(product.channels, scales).to(sample.rows)
    if product.reads:
        y = _quantised(sample, along, _rounded(weight * along, weight.dtype), scheme)
    else:
        folded = _rounded(weight / along[:, None], weight.dtype)
        y = _quantised(sample, torch.ones_like(sample.low), folded, scheme) * along
    distances = torch.linalg.vector_norm(y - exact, dim=-1).square()
    total = norms.sum()
    if not total:
        return 0.0
    return float((distances / norms.clamp(min=1e-3 * float(norms.mean()))).sum() / total)


def _quantised(sample: Sample, along: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """The product as the layer will make it: the sample divided by its scales, and the folded weight; (R, N)."""
    rows, spec, its = sample.rows / along, scheme.activations, scheme.weights
    if spec is None:
        return rows @ fake_quantize(weight, its).t()
    grid = _grid(sample, rows, along, spec)
    if scheme.integer_executable and its.symmetric and not isinstance(its.granularity, PerGroup):
        x, w = quantize_tokens(rows, spec, grid), quantize_weight(weight, its)
        acc = int8_product(x.codes, w.codes)
        if acc is not None:
            if x.zero_point is not None:
                acc.sub_(x.zero_point * w.codes.sum(1, dtype=torch.int32))
            return acc.to(torch.float32).mul_(x.scale).mul_(w.scale.view(1, -1))
    return fake_quantize_tokens(rows, spec, grid) @ fake_quantize(weight, its).t()


def _grid(sample: Sample, rows: Tensor, along: Tensor, spec: QuantSpec) -> QParams | None:
    """The grid of a static scheme, or one per token where a dynamic one is per tensor; else None."""
    if not spec.dynamic:
        low, high = (sample.low / along).amin(), (sample.high / along).amax()
        return grid_of_range(low[None], high[None], spec)
    if not isinstance(spec.granularity, PerTensor):
        return None
    call = torch.arange(len(rows), device=rows.device, dtype=torch.int64) % len(sample.call_low)
    low = torch.minimum((sample.call_low / along).amin(-1)[call], rows.amin(-1))
    high = torch.maximum((sample.call_high / along).amax(-1)[call], rows.amax(-1))
    return grid_of_range(low, high, spec)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A folded weight as its parameter will hold it, in float32."""
    return weight.to(dtype).to(torch.float32)

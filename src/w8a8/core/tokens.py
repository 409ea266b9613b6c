"""Quantising the input of a layer at run time, where a bad token may spoil itself but no other.

The equation is that of `w8a8.core.affine`.  The difference is what a NaN or an infinity does: there it is an error,
here the token that holds it takes no part in any statistic and comes out as NaN, as it would from a float layer.
"""

import torch
from torch import Tensor

from w8a8.core.affine import QParams, QTensor, fake_quantize, grid_of_range, round_to_codes, value_range
from w8a8.core.scheme import Operand, PerChannel, PerTensor, QuantSpec


@torch.no_grad()
def quantize_tokens(x: Tensor, spec: QuantSpec, params: QParams | None = None) -> QTensor:
    """The codes of a layer's input, with one scale per token whatever the granularity.

    The scale of a bad token is NaN, which makes its whole output NaN.

    Args:
        x: (M, K), any float dtype.  Not modified.
        spec: At most 8 bits, per token or per tensor.
        params: The fixed grid of a static scheme (one element each); dynamic ones measure `x`.

    Returns:
        int8 codes (M, K); scale (M, 1) float32 for every granularity; zero point (M, 1) int32 or None.
        The codes of a bad token are arbitrary.
    """
    grid = _token_grid(x, spec, params)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    round_to_codes(x, grid.scale, grid.zero_point, spec, codes)
    return QTensor(codes, grid.scale, grid.zero_point)


@torch.no_grad()
def fake_quantize_tokens(x: Tensor, spec: QuantSpec, params: QParams | None = None) -> Tensor:
    """A layer's input quantised and dequantised; a bad token becomes NaN.

    Args:
        x: (M, K), any float dtype.  Not modified.
        spec: Per token, per tensor or per channel, up to 16 bits.
        params: The fixed grid of a static scheme (one element each); dynamic ones measure `x`.

    Returns:
        (M, K) float32.
    """
    if isinstance(spec.granularity, PerChannel):
        lo, hi = value_range(x, (1,))
        good = torch.isfinite(lo) & torch.isfinite(hi)  # (M, 1)
        y = x.to(torch.float32).masked_fill(~good, torch.nan)
        y[good[:, 0]] = fake_quantize(y[good[:, 0]], spec, Operand.ACTIVATION)
        return y
    grid = _token_grid(x, spec, params)
    values = round_to_codes(x, grid.scale, grid.zero_point, spec)
    if grid.zero_point is not None:
        values.sub_(grid.zero_point)
    return values.mul_(grid.scale)


def _token_grid(x: Tensor, spec: QuantSpec, params: QParams | None) -> QParams:
    """The grid of each token, (M, 1); its scale is NaN where the token is not finite."""
    lo, hi = value_range(x, (1,))
    bad = ~(torch.isfinite(lo) & torch.isfinite(hi))  # (M, 1)
    if params is None:
        if isinstance(spec.granularity, PerTensor) and x.shape[0]:
            lo = lo.masked_fill(bad, 0.0).amin(0, keepdim=True)  # (1, 1)
            hi = hi.masked_fill(bad, 0.0).amax(0, keepdim=True)
        params = grid_of_range(lo, hi, spec)
    scale = params.scale.reshape(-1, 1).expand(x.shape[0], 1).masked_fill(bad, torch.nan)
    zero_point = params.zero_point
    if zero_point is not None:
        zero_point = zero_point.reshape(-1, 1).expand(x.shape[0], 1)
    return QParams(scale, zero_point)

"""The notebook's six functions, made right: quantise by hand and see the distance.

Each takes `(x, n_bits=8, inplace=True, symmetric=True)`.  With `inplace=True` the tensor itself is
overwritten with its quantised values and returned; otherwise it stays as it is and the result is the pair
`(dequantised, l2_distance)`.  Nothing is printed.

Two things differ from the notebook that w8a8 grew from.  Its asymmetric grid was laid over [min, max] even
where that does not hold zero: the zero point was then clipped, codes left 0..255, and the distance looked
better than 8 bits allow.  Here the range is widened to hold zero, as the equation needs (`w8a8.core.affine`).
And its in-place per-column version did not run.  The clamp of the range at 1e-5, which keeps an all-zero
row from dividing by zero, is kept as the argument `eps`; the rest of the package has no such epsilon.
"""

import torch
from torch import Tensor

from w8a8.core.affine import fake_quantize, l2_error, qparams
from w8a8.core.scheme import Granularity, Operand, PerChannel, PerColumn, PerTensor, PerToken, QuantSpec

Result = Tensor | tuple[Tensor, float]


def quantize_weight_per_tensor_absmax(
    w: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round a weight to one grid.

    Args:
        w: (out_features, in_features), any float dtype.  Overwritten where `inplace`.
        n_bits: Width of the grid, 2..16.
        inplace: Overwrite and return `w`, else return `(dequantised, l2_distance)`.
        symmetric: Absmax grid, else a zero point.
        eps: Ranges below this are taken to be this.

    Raises:
        SchemeError: `n_bits` out of range, or `w` is not a float matrix.
        NonFiniteError: `w` holds a NaN or an infinity.
    """
    return _apply(w, Operand.WEIGHT, PerTensor(), n_bits, inplace, symmetric, eps)


def quantize_weight_per_channel_absmax(
    w: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round a weight, one grid per output row.  Otherwise as `quantize_weight_per_tensor_absmax`."""
    return _apply(w, Operand.WEIGHT, PerChannel(), n_bits, inplace, symmetric, eps)


def quantize_weight_per_column_absmax(
    w: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round a weight, one grid per input column.  Otherwise as `quantize_weight_per_tensor_absmax`."""
    return _apply(w, Operand.WEIGHT, PerColumn(), n_bits, inplace, symmetric, eps)


def quantize_activation_per_tensor_absmax(
    x: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round an activation (batch, token, channel), or of any leading shape, to one grid.

    Otherwise as `quantize_weight_per_tensor_absmax`.
    """
    return _apply(x, Operand.ACTIVATION, PerTensor(), n_bits, inplace, symmetric, eps)


def quantize_activation_per_token_absmax(
    x: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round an activation, one grid per token.  Otherwise as `quantize_weight_per_tensor_absmax`."""
    return _apply(x, Operand.ACTIVATION, PerToken(), n_bits, inplace, symmetric, eps)


def quantize_activation_per_channel_absmax(
    x: Tensor, n_bits: int = 8, inplace: bool = True, symmetric: bool = True, *, eps: float = 1e-5
) -> Result:
    """Round an activation, one grid per channel over all tokens of all sequences.

    Otherwise as `quantize_weight_per_tensor_absmax`.
    """
    return _apply(x, Operand.ACTIVATION, PerChannel(), n_bits, inplace, symmetric, eps)


@torch.no_grad()
def _apply(
    x: Tensor, operand: Operand, granularity: Granularity, n_bits: int, inplace: bool, symmetric: bool, eps: float
) -> Result:
    spec = QuantSpec(bits=n_bits, granularity=granularity, symmetric=symmetric)
    params = qparams(x, spec, operand, smallest_range=eps)
    y = fake_quantize(x, spec, operand, params=params, inplace=inplace)
    return y if inplace else (y, l2_error(x, y))

"""Where a weight becomes codes, whoever keeps them: a layer, transformers while it loads, or a file that is written.

What goes from here to the one that keeps it is one value, `LayerWeight`: codes with their grid, in the shapes that a
file has, and what they lost.  A job from files to files makes it of some rows at a time.

The codes are those of `affine.quantize`, to the bit, made by the C++ kernel where it can: a row is to it what a token
is.  torch needs several passes over float32 copies for the same result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.core.affine import QTensor, fake_quantize, quantize
from w8a8.core.row_sample import RowSample
from w8a8.core.scheme import MAX_CODE_BITS, Granularity, PerChannel, PerColumn, PerGroup, PerTensor, PerToken, QuantSpec
from w8a8.kernels import native


@dataclass(frozen=True)
class LayerWeight:
    """The weight of a quantised layer, or some of its rows.

    codes: (N, K) int8, row-major; where the grid is wider than codes, the float32 values on it, and no grid.
    scale: float32, of the shape that `scale_shape` gives; or None.
    zero_point: int32, as `scale`; None where symmetric.
    sqnr_db: What the weight lost, on its sampled rows (`w8a8.core.row_sample`), up to the last of these.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    sqnr_db: float

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that a layer's buffers and a file have for them."""
        tensors = {"weight": self.codes, "weight_scale": self.scale, "weight_zero_point": self.zero_point}
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def make_weight(weight: Tensor, spec: QuantSpec, sample: RowSample | None = None) -> LayerWeight:
    """Quantise the weight of a layer.

    Args:
        weight: (N, K), any float dtype: the whole of it, or its next rows.  Not modified, not kept.
        spec: How; of some rows only where no rows share a scale with others.
        sample: Of the whole weight, where rows come piece by piece; changed.

    Raises:
        SchemeError: the grid does not fit the weight.
        NonFiniteError: the weight holds a NaN or an infinity.
    """
    made: QTensor | Tensor
    if spec.bits > MAX_CODE_BITS:
        made = fake_quantize(weight.to(torch.float32), spec)
        codes, scale, zero_point = made, None, None
    else:
        made = quantize_weight(weight, spec)
        shape = scale_shape(spec.granularity, *weight.shape)
        codes, scale = made.codes, made.scale.reshape(shape)
        zero_point = None if made.zero_point is None else made.zero_point.reshape(shape)
    sample = sample or RowSample(len(weight))
    sample.take(weight, made)
    return LayerWeight(codes, scale, zero_point, sample.sqnr_db)


def quantize_weight(weight: Tensor, spec: QuantSpec) -> QTensor:
    """Round a weight to the nearest codes of a grid, exactly as `affine.quantize` does.

    Args:
        weight: (N, K), any float dtype.  Not modified.
        spec: At most 8 bits.

    Returns:
        int8 codes (N, K) and their grid, scales as for `affine.quantize`.

    Raises:
        SchemeError: more than 8 bits.
        NonFiniteError: the weight holds a NaN or an infinity.
    """
    per_row = isinstance(spec.granularity, PerChannel)
    if spec.symmetric and spec.bits <= MAX_CODE_BITS and (per_row or isinstance(spec.granularity, PerTensor)):
        found = native.quantize_rows(weight, spec.bits, per_row=per_row) if weight.numel() else None
        if found is not None and bool(torch.isfinite(found[1]).all()):
            codes, scale = found
            return QTensor(codes, scale.view(-1, 1) if per_row else scale[:1].view(1, 1), None)
    return quantize(weight, spec)  # and for a weight that is not finite: it says where


def scale_shape(granularity: Granularity, n: int, k: int) -> tuple[int, ...]:
    """What the scale of a weight (N, K) is in a layer and in its file."""
    match granularity:
        case PerTensor():
            return (1,)
        case PerColumn():
            return (1, k)
        case PerGroup(size):
            return (n, k // size)
        case PerChannel() | PerToken():
            return (n, 1)

"""A weight's codes, by the C++ kernel where it can: a row is to it what a token is, to the bit.

    quantize_weight(w, spec) == affine.quantize(w, spec)

torch needs several passes over float32 copies for the same result.
"""

import torch
from torch import Tensor

from w8a8.core.affine import QTensor, quantize
from w8a8.core.scheme import MAX_CODE_BITS, PerChannel, PerTensor, QuantSpec
from w8a8.kernels import native


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

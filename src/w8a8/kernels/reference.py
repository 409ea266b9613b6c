"""The oracle: the integer layer in plain PyTorch, exact on every device.

PyTorch has no integer matrix product that runs everywhere (int32 on a CPU is a naive loop, on CUDA it is
missing, float64 is missing on MPS).  But a float32 product of small integers is exact as long as no partial
sum passes 2**24, in whatever order it is summed, with or without fused multiply-add, in TF32 and in bf16
(codes have at most 8 significant bits).  So K is cut into pieces of at most 2**24 / (255 * 128) = 514, and
their sums are added in int32.
"""

import torch
from torch import Tensor

from w8a8.kernels.request import Kernel, LinearRequest

_EXACT = 2**24  # float32 holds every integer up to here
_PIECE = _EXACT // (255 * 128)  # |qx - zx| <= 255; |qw| <= 128 in other people's files


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """sum_k a[m, k] * b[n, k], exactly.

    Args:
        a: (M, K) float32 holding integers of magnitude at most 255.
        b: (N, K) int8.

    Returns:
        (M, N) int32.
    """
    acc = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        acc += (a[:, piece] @ b[:, piece].to(torch.float32).t()).to(torch.int32)
    return acc


def linear(request: LinearRequest) -> Tensor:
    """The contract, line by line."""
    qx = request.quantize_input()
    codes = qx.codes.to(torch.float32)
    if qx.zero_point is not None:
        codes -= qx.zero_point
    weight = request.row_major()

    def accumulate(g: int, k: slice) -> Tensor:
        acc = exact_product(codes[:, k], weight[:, k])
        return request.less_weight_zero_point(
            acc, g, lambda: codes[:, k].to(torch.int32).sum(1, keepdim=True, dtype=torch.int32)
        )

    return request.rescale(accumulate, qx.scale)


REFERENCE = Kernel(
    name="reference",
    about="plain PyTorch, exact on every device",
    unavailable_because=lambda: None,
    refuses=lambda request: None,
    linear=linear,
)

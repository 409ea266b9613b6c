"""What a kernel is given: one call of one integer linear layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from w8a8.core.affine import QParams, QTensor
from w8a8.core.scheme import PerTensor, PerToken, QuantSpec
from w8a8.core.tokens import quantize_tokens


class LinearRequest(NamedTuple):
    """The operands of one call, in the order of the op's schema; checked by the op before a kernel sees them.

    x: (M, K) float, M > 0, any strides.  The op itself takes (..., K).
    weight: (N, K) int8, row-major, as in the file; or (P, S, 32, g), packed (`w8a8.kernels.native`).
    weight_scale: (1,), (N, 1) or (N, G) float32.
    weight_sum: (N, G) int32, the sums of the codes along K (G = 1 without groups): what the shift to
        unsigned codes and the zero point of an activation are corrected with.
    weight_zero_point: as weight_scale, int32, for an asymmetric weight; else None.
    bias: (N,) any float dtype, or None.
    input_scale, input_zero_point: one element each, for a static activation grid; else None.
    bits, per_token, symmetric: the activation's `QuantSpec`.
    in_features: K.
    """

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bits: int
    per_token: bool
    symmetric: bool
    in_features: int

    @property
    def is_packed(self) -> bool:
        """Whether the weight lies in panels."""
        return self.weight.ndim == 4

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight_sum.shape[0]

    def row_major(self) -> Tensor:
        """The weight as (N, K): itself, or a copy that is made for this call."""
        if not self.is_packed:
            return self.weight
        return unpack(self.weight, self.out_features, self.in_features)

    @property
    def groups(self) -> int:
        """G, 1 where a scale covers the whole of K."""
        return self.weight_sum.shape[1]

    def quantize_input(self) -> QTensor:
        """Codes (M, K) int8, scale (M, 1) and zero point (M, 1) or None of the activation."""
        static = None if self.input_scale is None else QParams(self.input_scale, self.input_zero_point)
        granularity = PerToken() if self.per_token else PerTensor()
        return quantize_tokens(
            self.x, QuantSpec(self.bits, granularity, self.symmetric, dynamic=static is None), static
        )

    def less_weight_zero_point(self, acc: Tensor, g: int, code_sum: Callable[[], Tensor]) -> Tensor:
        """sum_k (qx - zx) (qw - zw) of one group, from the same sum without zw.

        Args:
            acc: (M, N) int32 sums of (qx - zx) qw over the group; overwritten.
            g: The group.
            code_sum: (M, 1) int32 sums of qx - zx over the group; asked for only where the weight is asymmetric.

        Returns:
            acc - zw sum_k (qx - zx).  Products may wrap around int32 on the way: the true sum fits.
        """
        if self.weight_zero_point is None:
            return acc
        zw = self.weight_zero_point if self.weight_zero_point.ndim == 1 else self.weight_zero_point[:, g]
        return acc.addcmul_(code_sum(), zw, value=-1)

    def rescale(self, accumulate: Callable[[int, slice], Tensor], sx: Tensor) -> Tensor:
        """From integer sums to the output, in the order that the contract fixes.

        Args:
            accumulate: The sums (M, N) int32 of group g over the slice of K that is its; overwritten.
            sx: (M, 1) float32.

        Returns:
            (M, N) in the dtype of `x`: each product and sum rounded on its own in float32, one cast.
        """
        size = self.in_features // self.groups
        y: Tensor | None = None
        for g in range(self.groups):
            acc = accumulate(g, slice(g * size, (g + 1) * size))
            sw = self.weight_scale if self.weight_scale.ndim == 1 else self.weight_scale[:, g]
            part = acc.to(torch.float32).mul_(sx).mul_(sw)
            y = part if y is None else y.add_(part)
        assert y is not None, "a layer has at least one group"
        if self.bias is not None:
            y.add_(self.bias.to(y.dtype))
        return y.to(self.x.dtype)


def describe(found: object) -> str:
    """What an operand is, for a message: type, dtype, shape, and what is unusual in its layout or device."""
    if not isinstance(found, Tensor):
        return "missing" if found is None else f"a {type(found).__name__}"
    kind = "" if type(found) is Tensor else f"a {type(found).__name__} of "
    layout = "" if found.layout is torch.strided else f", {str(found.layout).removeprefix('torch.')}"
    device = "" if found.device.type == "cpu" else f", on {found.device}"
    return f"{kind}{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}{layout}{device}"


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """Panels as row-major codes: (P, S, 32, g) -> a new (N, K) int8, on any device."""
    panels, steps, width, group = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(panels * width, steps * group)[:n, :k].contiguous()


@dataclass(frozen=True)
class Kernel:
    """One way to run the op.

    name: What the ledger calls it.
    about: One line for people.
    unavailable_because: Why this machine cannot run it at all, or None; asked once.
    refuses: Why it cannot run this very request, or None; asked at every call, so it is cheap.
    linear: The request's output, (M, N) in the dtype of x.
    """

    name: str
    about: str
    unavailable_because: Callable[[], str | None]
    refuses: Callable[[LinearRequest], str | None]
    linear: Callable[[LinearRequest], Tensor]

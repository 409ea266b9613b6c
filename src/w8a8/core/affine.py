"""Affine quantisation: the one equation this package is built on.

    q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)
    x ~= (q - zero_point) * scale

Symmetric:   scale = absmax / qmax, and no zero point (None, not zeros).
Asymmetric:  the range is widened to hold zero, lo = min(min x, 0), hi = max(max x, 0);
             scale = (hi - lo) / (2**bits - 1); zero_point = clamp(rint(qmin - lo / scale), qmin, qmax).

This is uniform affine quantisation as in Jacob et al. 2018 (arXiv:1712.05877, eq. 1) and Krishnamoorthi
2018 (arXiv:1806.08342, eq. 2-7), with signed codes.  Everything is float32 whatever the input's dtype, and
the division is a true IEEE division: a reciprocal is a little faster and moves codes that lie near a half.

Where there is nothing to scale (all zero, or empty) the scale is 1.  Where absmax / qmax would be
subnormal, it is the smallest normal float32, since subnormals lose bits and some machines flush them.
There is no absolute epsilon, so quantising c * x gives the codes of x for every power of two c.

Ranges are read with `amin` and `amax` in the input's own dtype (exact, and no temporary), and big tensors
are rounded block by block, so that an in-place call never holds a second copy of its tensor.

Shapes: see `w8a8.core.scheme`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import w8a8.forking  # noqa: F401  all that computes is imported above this module
from w8a8.core.scheme import (
    MAX_CODE_BITS,
    Granularity,
    Operand,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
)
from w8a8.errors import NonFiniteError, SchemeError

_TINY = torch.finfo(torch.float32).tiny  # the smallest normal float32
_BLOCK = 1 << 20  # elements rounded at a time: 4 MiB of float32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Described(Protocol):
    """A tensor, or what tells of one that is not there."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def shape(self) -> Sequence[int]:
        """Of all axes."""


@dataclass(frozen=True)
class QParams:
    """A grid: `scale` float32, and `zero_point` int32 of the same shape, or None where symmetric."""

    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class QTensor:
    """A quantised tensor: x ~= (codes - zero_point) * scale.

    Invariants: `codes` is int8 and has the shape of x; `scale` is float32, positive, and either broadcasts
    against `codes` or has G groups, G dividing K, in its last axis; `zero_point` is int32 in the shape of
    `scale`, or None, which means zero.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@torch.no_grad()
def qparams(x: Tensor, spec: QuantSpec, operand: Operand = Operand.WEIGHT, *, smallest_range: float = 0.0) -> QParams:
    """The grid that holds every value of a tensor.

    Args:
        x: (N, K) for a weight, (..., K) for an activation; float32, float16, bfloat16 or float64, any
            strides, may be empty.  Not modified.
        spec: Width, granularity and symmetry.
        operand: Which side of the product `x` is on.
        smallest_range: A range (absmax, or hi - lo) below this is taken to be this.  0 by the contract;
            other people's code often has an epsilon here.

    Returns:
        Scale, and zero point where asymmetric, in the shape that `w8a8.core.scheme` lists.

    Raises:
        SchemeError: the granularity does not fit the operand or the shape; not a float tensor.
        NonFiniteError: a NaN or infinity (the message names the first), or a range over float32's.
    """
    _check(x, spec, operand)
    view = _grouped(x, spec.granularity)
    lo, hi = value_range(view, _reduced_dims(view, spec.granularity, operand))
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise NonFiniteError(describe_non_finite(x))
    params = grid_of_range(lo, hi, spec, smallest_range)
    if not bool(torch.isfinite(params.scale).all()):
        raise NonFiniteError(
            f"the range {lo.min().item():.4g} .. {hi.max().item():.4g} is wider than float32 can hold; "
            "divide the tensor by two, or use a symmetric grid"
        )
    return _ungrouped(params, spec.granularity)


@torch.no_grad()
def quantize(
    x: Tensor, spec: QuantSpec, operand: Operand = Operand.WEIGHT, *, params: QParams | None = None
) -> QTensor:
    """Round a tensor to the nearest codes of a grid.

    Args:
        x: As for `qparams`.  Not modified.
        spec: Width (at most 8 bits: codes are stored as int8), granularity and symmetry.
        operand: Which side of the product `x` is on.
        params: The grid; measured on `x` itself by default.  Values outside it are clamped to its ends.

    Returns:
        int8 codes of the shape of `x`, with their grid.

    Raises:
        SchemeError: more than 8 bits; `params` do not fit; and as `qparams`.
        NonFiniteError: as `qparams`.

    Example:
        >>> w = torch.tensor([[0.0, 1.27], [-2.54, 0.0]])
        >>> quantize(w, QuantSpec(granularity=PerChannel())).codes.tolist()
        [[0, 127], [-127, 0]]
    """
    if spec.bits > MAX_CODE_BITS:
        raise SchemeError(
            f"{spec.bits}-bit codes do not fit int8: use at most {MAX_CODE_BITS} bits, or fake_quantize to simulate"
        )
    params = _own_or_given(x, spec, operand, params)
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    for block, scale, zero_point, out in _blocks(x, params, spec, codes):
        round_to_codes(block, scale, zero_point, spec, out)
    return QTensor(codes, params.scale, params.zero_point)


@torch.no_grad()
def dequantize(q: QTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for: (codes - zero_point) * scale in float32, then one cast.

    Args:
        q: A quantised tensor.  Not modified.
        dtype: Of the result.

    Returns:
        A new tensor of the shape of `q.codes`.
    """
    codes, scale = q.codes, q.scale
    view, zero_point = codes, q.zero_point
    if scale.ndim and scale.shape[-1] not in (1, codes.shape[-1]):
        view = codes.unflatten(-1, (scale.shape[-1], -1))  # (N, G, size)
        scale = scale.unsqueeze(-1)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    values = view.to(torch.float32)
    if zero_point is not None:
        values.sub_(zero_point)
    return values.mul_(scale).reshape(codes.shape).to(dtype)


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    operand: Operand = Operand.WEIGHT,
    *,
    params: QParams | None = None,
    out: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Quantise and dequantise: the values of the grid nearest to a tensor's own.

    Args:
        x: As for `qparams`.  Modified only where `inplace=True` or `out is x`.
        spec: Up to 16 bits.
        operand: Which side of the product `x` is on.
        params: The grid; measured on `x` itself by default.
        out: Where the result goes: the shape, dtype and device of `x`, any strides.
        inplace: Overwrite `x`; the same as `out=x`.

    Returns:
        The result in the dtype of `x`: `out`, `x` itself, or a new tensor.

    Raises:
        SchemeError, NonFiniteError: as `qparams`; then nothing has been written.
    """
    if inplace:
        if out is not None and out is not x:
            raise SchemeError("fake_quantize got both inplace=True and out=: give one of the two")
        out = x
    params = _own_or_given(x, spec, operand, params)
    if out is None:
        out = torch.empty_like(x)
    elif (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise SchemeError(
            f"out= is {described(out)}, the input is {described(x)}: they must agree in shape, dtype and device"
        )
    for block, scale, zero_point, target in _blocks(x, params, spec, out):
        values = round_to_codes(block, scale, zero_point, spec)
        if zero_point is not None:
            values.sub_(zero_point)
        target.copy_(values.mul_(scale))
    return out


def l2_error(x: Tensor, y: Tensor) -> float:
    """The Euclidean distance sqrt(sum (x - y)**2), accumulated in float64.

    Args:
        x, y: Tensors of one shape, any float dtypes.  Not modified.

    Raises:
        SchemeError: the shapes differ.
    """
    if x.shape != y.shape:
        raise SchemeError(f"two tensors of one shape are compared, found {tuple(x.shape)} and {tuple(y.shape)}")
    return float(torch.linalg.vector_norm(x.to(torch.float64) - y.to(torch.float64)))


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal to quantisation noise: `10 log10(sum x**2 / sum (x - y)**2)`, in decibels.

    Args:
        x: The exact values.
        y: Their approximation, of the same shape.

    Returns:
        Decibels; +inf where the two are equal.

    Raises:
        SchemeError: the shapes differ.
    """
    return decibels(float(torch.linalg.vector_norm(x.to(torch.float64))), l2_error(x, y))


def decibels(signal: float, noise: float) -> float:
    """20 log10(signal / noise) of two Euclidean norms; +inf where there is no noise."""
    if noise == 0.0:
        return float("inf")
    return float(20 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64, device="cpu")))


def grid_of_range(lo: Tensor, hi: Tensor, spec: QuantSpec, smallest_range: float = 0.0) -> QParams:
    """The grid that holds float32 ranges lo..hi, in their shape; where a range is NaN the scale is."""
    if spec.symmetric:
        width, steps = torch.maximum(-lo, hi), spec.qmax
    else:
        lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
        width, steps = hi - lo, 2**spec.bits - 1
    if smallest_range:
        width = width.clamp(min=smallest_range)
    scale = (width / steps).clamp(min=_TINY)
    scale = torch.where(width == 0.0, torch.ones_like(scale), scale)
    if spec.symmetric:
        return QParams(scale, None)
    zero_point = torch.round(spec.qmin - lo / scale).clamp(spec.qmin, spec.qmax)
    return QParams(scale, zero_point.nan_to_num(0.0).to(torch.int32))


def round_to_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, out: Tensor | None = None
) -> Tensor:
    """The codes of `x` on a grid that broadcasts against it: new float32, or written into `out`."""
    codes = torch.div(x.to(torch.float32), scale).round_()  # half to even
    if zero_point is not None:
        codes.add_(zero_point)
    codes.clamp_(spec.qmin, spec.qmax)
    return codes if out is None else out.copy_(codes)


def value_range(view: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value over `dims` as float32, kept as axes of 1; zero where there are no values."""
    if any(view.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else n for d, n in enumerate(view.shape)]
        zero = torch.zeros(shape, dtype=torch.float32, device=view.device)
        return zero, zero
    if not dims:  # a scale of its own for each element; amin would take no axes for all axes
        return view.to(torch.float32), view.to(torch.float32)
    lo, hi = view.amin(dims, keepdim=True), view.amax(dims, keepdim=True)
    return lo.to(torch.float32), hi.to(torch.float32)


def _reduced_dims(view: Tensor, granularity: Granularity, operand: Operand) -> tuple[int, ...]:
    """The axes of the (grouped) view along which a scale is shared."""
    last = view.ndim - 1
    match granularity:
        case PerTensor():
            return tuple(range(view.ndim))
        case PerToken() | PerGroup():
            return (last,)
        case PerColumn():
            return tuple(range(last))
        case PerChannel():
            return (last,) if operand is Operand.WEIGHT else tuple(range(last))


def _grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """(N, K) seen as (N, G, size) where there are groups; else as it is."""
    return x.unflatten(-1, (-1, granularity.size)) if isinstance(granularity, PerGroup) else x


def _ungrouped(params: QParams, granularity: Granularity) -> QParams:
    """(N, G, 1) back to (N, G)."""
    if not isinstance(granularity, PerGroup):
        return params
    zero_point = None if params.zero_point is None else params.zero_point.squeeze(-1)
    return QParams(params.scale.squeeze(-1), zero_point)


def _blocks(
    x: Tensor, params: QParams, spec: QuantSpec, out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Views of input, scale, zero point and output, at most about `_BLOCK` elements at a time."""
    view, target = _grouped(x, spec.granularity), _grouped(out, spec.granularity)
    scale, zero_point = params.scale, params.zero_point
    if isinstance(spec.granularity, PerGroup):
        scale = scale.unsqueeze(-1)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    if view.numel() <= _BLOCK:
        yield view, scale, zero_point, target
        return
    dim = max(range(view.ndim), key=lambda d: view.shape[d])
    step = max(1, _BLOCK * view.shape[dim] // view.numel())
    for start in range(0, view.shape[dim], step):
        length = min(step, view.shape[dim] - start)

        def part(t: Tensor, start: int = start, length: int = length) -> Tensor:
            return t if t.shape[dim] == 1 else t.narrow(dim, start, length)

        yield part(view), part(scale), None if zero_point is None else part(zero_point), part(target)


def _own_or_given(x: Tensor, spec: QuantSpec, operand: Operand, params: QParams | None) -> QParams:
    """The grid to use, checked against the tensor."""
    if params is None:
        return qparams(x, spec, operand)
    _check(x, spec, operand)
    view = _grouped(x, spec.granularity)
    dims = _reduced_dims(view, spec.granularity, operand)
    want = torch.Size(1 if d in dims else n for d, n in enumerate(view.shape))
    want = want[:-1] if isinstance(spec.granularity, PerGroup) else want
    if params.scale.shape != want or (params.zero_point is None) != spec.symmetric:
        raise SchemeError(
            f"params with a scale of shape {tuple(params.scale.shape)} "
            f"{'without' if params.zero_point is None else 'with'} a zero point do not fit {spec} on "
            f"{described(x)}: it takes shape {tuple(want)} {'without' if spec.symmetric else 'with'} a zero point"
        )
    if params.zero_point is not None and params.zero_point.shape != want:
        raise SchemeError(f"zero_point has shape {tuple(params.zero_point.shape)}, the scale {tuple(want)}")
    lo, hi = value_range(view, tuple(range(view.ndim)))
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise NonFiniteError(describe_non_finite(x))
    return params


def _check(x: Tensor, spec: QuantSpec, operand: Operand) -> None:
    spec.check(operand)
    if x.dtype not in _DTYPES:
        raise SchemeError(f"expected a float tensor to quantise, found {described(x)}; convert it with .float()")
    if operand is Operand.WEIGHT and x.ndim != 2:
        raise SchemeError(f"a weight is (N, K), found {described(x)}; reshape it to two axes")
    if x.ndim == 0:
        raise SchemeError("an activation is (..., K), found a scalar; reshape it to one axis or more")
    if isinstance(spec.granularity, PerGroup) and x.shape[-1] % spec.granularity.size:
        size, k = spec.granularity.size, x.shape[-1]
        divisors = [d for d in range(1, k + 1) if k % d == 0]
        raise SchemeError(
            f"K={k} does not divide into groups of {size}; the nearest size that does is "
            f"{min(divisors, key=lambda d: abs(d - size))}"
        )


def describe_non_finite(x: Tensor) -> str:
    """The message for a tensor that is not finite in float32."""
    bad = ~torch.isfinite(x.to(torch.float32))
    index = tuple(int(i) for i in bad.nonzero()[0])
    return (
        f"{x[index].item()} at index {index} of {described(x)} ({int(bad.sum())} of {x.numel()} are not finite "
        "in float32); a scale needs finite values: repair the tensor first"
    )


def described(x: Described) -> str:
    """Dtype and shape in words, of what has them."""
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"

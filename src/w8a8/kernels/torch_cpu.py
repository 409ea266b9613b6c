"""oneDNN's integer product through `torch._int_mm`: for what the native kernel has not, and without it.

The weight is passed as `weight.t()`, a view: the row-major (N, K) of the file is what oneDNN likes best
for one row and costs a few per cent in the middle (docs/log.md has the numbers).

On x86 the product wants unsigned activations: the signed codes are shifted by 128 (one `xor`), and
128 * sum_k qw[n, k] is taken off afterwards.  int32 wraps around on the way without harm, as the true sum
fits.

Exactness is probed, not assumed: without VNNI (or its kin on other machines) oneDNN multiplies pairs with
a saturating 16-bit add, and large codes come out wrong.  Where the probe fails, the kernel is unavailable.
What is probed is what is passed: one row, one column, one k, and slices of K.

So is speed: where oneDNN has no product for the processor PyTorch runs a plain loop, which is exact and takes some ten
times as long as the float products of `reference`.
"""

import itertools
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from w8a8.kernels.request import Kernel, LinearRequest

_MOST_TIMES = 4.0


@cache
def _left_dtype() -> torch.dtype | None:
    """uint8 or int8, whichever left side this machine multiplies exactly; None if neither."""
    for dtype in (torch.uint8, torch.int8):
        if _is_exact(dtype):
            return dtype
    return None


def _is_exact(dtype: torch.dtype) -> bool:
    """Whether products come out right: of codes that all differ, and of the largest, which saturate a 16-bit add."""
    info = torch.iinfo(dtype)
    ends = ((info.max, 127), (info.max, -128), (info.min, -128))
    for rows, k, columns in itertools.product(
        (1, 3, 32), (1, 2, 256), (1, 5, 48)
    ):  # few and many take different kernels
        left, right = _mixed(rows, 3 * k, dtype), _mixed(columns, 3 * k, torch.int8)
        third = slice(k, 2 * k)  # a group along K
        operands = [(left[:, :k].contiguous(), right[:, :k].contiguous()), (left[:, third], right[:, third])]
        operands += [(torch.full_like(left, a), torch.full_like(right, b)) for a, b in ends]
        for a, b in operands:
            try:
                acc = _product(a, b)
            except RuntimeError:  # this build has no product for the dtype
                return False
            if not torch.equal(acc, (a[:, None].to(torch.int32) * b[None].to(torch.int32)).sum(2, dtype=torch.int32)):
                return False
    return True


def _mixed(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Codes of the whole range, no row and no column like another."""
    numbers = torch.arange(rows * columns, dtype=torch.int32, device="cpu").view(rows, columns)
    return (numbers * 89 % 251 + torch.iinfo(dtype).min).to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """sum_k a[m, k] * b[n, k], int32, by oneDNN.

    It tells rows from columns by the strides, and an axis of one element leaves open which they are: a weight (N, 1)
    has the strides (1, 1), and its transpose was misread.  So each operand is given strides that say it.
    """
    if a.stride(1) != 1 or a.stride(0) < a.shape[1]:
        a = a.clone(memory_format=torch.contiguous_format)
    if b.shape[1] == 1:
        return torch._int_mm(a, b.contiguous().view(1, -1))
    if b.stride(1) != 1 or b.stride(0) < b.shape[1]:
        b = b.clone(memory_format=torch.contiguous_format)
    return torch._int_mm(a, b.t())


@cache
def _times_float() -> float:
    """How many times as long as a float product an integer product takes: 1 and less, or 10 and more.

    With one thread: several wait for one another, on a busy machine longer than either product takes.
    """
    dtype = _left_dtype()
    assert dtype is not None, "a product that is not exact has no speed"
    left, right = _mixed(16, 256, dtype), _mixed(256, 256, torch.int8)
    floats = left.to(torch.float32), right.to(torch.float32).t()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            return _least_seconds(lambda: _product(left, right)) / _least_seconds(lambda: floats[0] @ floats[1])
    finally:
        torch.set_num_threads(threads)


def _least_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(15):  # whatever else runs here
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _unavailable_because() -> str | None:
    if _left_dtype() is None:
        return "torch._int_mm is not exact here: without VNNI, oneDNN's int8 product saturates pairs of codes"
    if (times := _times_float()) > _MOST_TIMES:
        return (
            f"torch._int_mm is a plain loop here, without VNNI: it takes {times:.0f} times as long as a float product"
        )
    return None


def int8_product(a: Tensor, b: Tensor) -> Tensor | None:
    """sum_k a[m, k] * b[n, k] of codes, exactly: (M, K) and (N, K) int8 -> (M, N) int32; K below 2**31 / 128**2.

    None where `torch._int_mm` is not exact, a plain loop, or does not take them.
    """
    if a.device.type != "cpu" or b.device.type != "cpu" or not a.numel() or not b.numel() or _unavailable_because():
        return None
    if _left_dtype() is torch.int8:
        return _product(a, b)
    acc = _product(a.bitwise_xor(-128).view(torch.uint8), b)  # code + 128
    return acc.sub_(b.sum(1, dtype=torch.int32), alpha=128)


def _refuses(request: LinearRequest) -> str | None:
    if request.x.device.type != "cpu" or request.weight.device.type != "cpu":
        return f"it runs on CPU tensors, the input is on {request.x.device}"
    if request.x.shape[1] == 0 or request.out_features == 0:
        return "oneDNN takes no empty operands"
    return None


def _linear(request: LinearRequest) -> Tensor:
    qx = request.quantize_input()
    left, shift = qx.codes, qx.zero_point
    if _left_dtype() is torch.uint8:
        left = left.bitwise_xor_(-128).view(torch.uint8)  # code + 128
        shift = None if shift is None else shift + 128

    weight = request.row_major()

    def accumulate(g: int, k: slice) -> Tensor:
        acc = _product(left[:, k], weight[:, k])
        wsum = request.weight_sum[:, g]
        if shift is not None:
            acc.addcmul_(shift, wsum, value=-1)
        elif left.dtype is torch.uint8:
            acc.sub_(wsum, alpha=128)
        return request.less_weight_zero_point(acc, g, lambda: code_sum(left[:, k]))

    def code_sum(part: Tensor) -> Tensor:
        total = part.sum(1, keepdim=True, dtype=torch.int32)
        if shift is not None:
            return total.sub_(shift * part.shape[1])
        return total.sub_(128 * part.shape[1]) if part.dtype is torch.uint8 else total

    return request.rescale(accumulate, qx.scale)


TORCH_CPU = Kernel(
    name="torch_cpu",
    about="oneDNN's int8 product through torch._int_mm",
    unavailable_because=_unavailable_because,
    refuses=_refuses,
    linear=_linear,
)

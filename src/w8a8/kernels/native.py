"""The native kernel: C++ that is compiled when the package is installed.

The sources are in csrc/; `csrc/w8a8.h` is the interface and csrc/linear.cpp the design.  One call quantises the
rows, multiplies and rescales, in one of the instruction sets that this CPU has: AMX, AVX-512 VNNI, AVX-VNNI, AVX2, NEON
i8mm or dot product, or plain C++.  Which, by rows and K, says one table (`compiled`); the environment variable W8A8_ISA
forces one by name.  All give the same bits.

The weight is packed: panels of 32 output columns, in which the bytes that one instruction adds up lie side by side.  A
packed weight is a tensor (P, S, 32, g), P = ceil(N / 32), S g >= K, padded with zeros; g and S are the library's, by
architecture (`packed_shape`).  It takes the place of the row-major one, which was slower from four rows up when both
were tried (docs/log.md).

Threads are those of torch's own OpenMP runtime, which is looked up in the process; no second one is loaded.
"""

import math
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

from w8a8.core.scheme import CODE_REACH, MAX_CODE_BITS, QuantSpec, largest_k
from w8a8.errors import KernelError
from w8a8.kernels import compiled
from w8a8.kernels.compiled import DTYPES, is_plain, loaded, unavailable_because
from w8a8.kernels.request import Kernel, LinearRequest, describe

PANEL = 32
_PACKED_AXES = 4  # (P, S, 32, g)
_MATRIX_AXES = 2
_HUGE = 2 << 20  # the size of a large page, and from where on asking for them pays
_TOKEN, _TENSOR, _STATIC = 0, 2, 4  # enum w8a8_mode, the symmetric ones; + 1 is asymmetric


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """(P, S, 32, g), as this machine's library packs a weight (N, K)."""
    functions = loaded()
    group, panels = functions.panel_group(), -(-n // PANEL)
    return panels, functions.packed_bytes(PANEL, k) // (PANEL * group), PANEL, group


def lies_as_here(packed: Tensor, n: int, k: int) -> bool:
    """Whether a packed weight (N, K) is one of this machine's; one in a pickle may be of another architecture."""
    return unavailable_because() is None and tuple(packed.shape) == packed_shape(n, k)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major codes as panels.

    Args:
        weight: (N, K) int8 on the CPU.  Not modified.

    Returns:
        (P, S, 32, g) int8, on large pages where it is big enough to have any; and the sums (N, 1) int32 along K.

    Raises:
        KernelError: it is not such a tensor.
    """
    if not is_plain(weight) or weight.ndim != _MATRIX_AXES or weight.dtype is not torch.int8:
        raise KernelError(f"a weight to pack is int8 of shape (N, K) on the CPU, found {describe(weight)}")
    n, k = weight.shape
    weight = weight.contiguous()
    shape = packed_shape(n, k)
    size = math.prod(shape)
    align = _HUGE if size >= _HUGE else 64
    functions, room = loaded(), _octets(size + align)
    if align == _HUGE:
        functions.advise_huge(room.data_ptr(), room.numel())  # a wish: nothing depends on it
    packed = room[-room.data_ptr() % align :][:size].view(shape)
    sums = torch.empty((n, 1), dtype=torch.int32, device="cpu")
    status = functions.pack(weight.data_ptr(), k, n, k, packed.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    assert status == 0, f"w8a8_pack: {status}"
    return packed, sums


def _octets(size: int) -> Tensor:
    """New memory, (size,) int8; much of it is a mapping of its own, which goes back to the system when it is let go.

    malloc would keep it: the hole that a layer's codes leave behind is a few bytes too small for those of the next,
    once a scale lies in it, and a model of such layers was in memory twice.
    """
    if size < _HUGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.int8, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.int8)


def quantize_rows(x: Tensor, bits: int, *, per_row: bool) -> tuple[Tensor, Tensor] | None:
    """Codes (M, K) int8 and scales (M,) of a matrix on the symmetric grid, or None where the kernel cannot.

    Args:
        x: (M, K).  Not modified.
        bits: Of the grid, 2..8.
        per_row: One scale for each row; else one for all, M times.  NaN for a row (or all) that is not finite.
    """
    functions = compiled.library()
    if isinstance(functions, str) or not is_plain(x) or x.ndim != _MATRIX_AXES or x.dtype not in DTYPES:
        return None
    m, k = x.shape
    if not x.numel() or not 2 <= bits <= MAX_CODE_BITS or (k > 1 and x.stride(1) != 1):
        return None
    codes, scale = _octets(m * k).view(m, k), torch.empty(m, dtype=torch.float32, device="cpu")
    zero_point = torch.empty(m, dtype=torch.int32, device="cpu")
    rows = x.data_ptr(), DTYPES.index(x.dtype), m, k, x.stride(0)
    grid = _TOKEN if per_row else _TENSOR, bits, 0.0, 0, 0
    outputs = codes.data_ptr(), k, scale.data_ptr(), zero_point.data_ptr()
    status = functions.quantize_rows(*rows, *grid, *outputs, torch.get_num_threads())
    assert status == 0, f"w8a8_quantize_rows: {status}"
    return codes, scale


def _refuses(request: LinearRequest) -> str | None:
    if request.x.device.type != "cpu" or request.weight.device.type != "cpu":
        return f"it runs on CPU tensors, the input is on {request.x.device}"
    if request.groups != 1:
        return "it has no groups along K"
    if request.weight_zero_point is not None:
        return "it has no weight zero points"
    if not request.is_packed:
        return "the layer is too large for its sums, or empty"
    if not is_plain(request.x):
        return f"it takes plain tensors, not {describe(request.x)}"
    return None


def takes(weight: Tensor, kernel: str) -> bool:
    """Whether the weight lies packed, and nothing but this kernel was asked for by name."""
    return weight.ndim == _PACKED_AXES and kernel in ("auto", "native")


def can_pack(n: int, k: int, groups: int, activations: QuantSpec) -> bool:
    """Whether the kernel, which does not look for the largest code of a weight, runs a layer of this shape."""
    return n > 0 and groups == 1 and 0 < k <= largest_k(activations.reach, CODE_REACH)


Call = tuple[int, int, int, int, int]
"""What does not change from call to call: N, K, a weight scale per channel (1) or one (0), enum w8a8_mode, bits."""


def call_of(n: int, k: int, *, per_channel: bool, bits: int, per_token: bool, static: bool, symmetric: bool) -> Call:
    """The constants of a layer's calls."""
    mode = _STATIC if static else _TOKEN if per_token else _TENSOR
    return n, k, int(per_channel), mode if symmetric else mode + 1, bits


def direct(x: Tensor, buffers: Mapping[str, Tensor | None], call: Call) -> Tensor | None:
    """Run a packed layer past PyTorch's dispatcher.

    Args:
        x: (..., K).
        buffers: Of the layer, by name; read here and now, so that replacing one has its effect.
        call: From `call_of`.

    Returns:
        (..., N); or None, where the op has to be called: the dispatcher has something to do (a gradient, a mode, a
        subclass, tracing), the layer is not packed, or the input is not one that the kernel takes.
    """
    y: Tensor | None = loaded().linear(x, buffers, *call, True)
    return y


def below(x: Tensor, request: LinearRequest) -> Tensor | None:
    """The same from below the dispatcher, which has seen the call already; `x` stands for the request's own."""
    buffers = {
        "packed_weight": request.weight,
        "weight_scale": request.weight_scale,
        "weight_sum": request.weight_sum,
        "bias": request.bias,
        "input_scale": request.input_scale,
        "input_zero_point": request.input_zero_point,
    }
    call = call_of(
        request.out_features,
        request.in_features,
        per_channel=request.weight_scale.ndim != 1,
        bits=request.bits,
        per_token=request.per_token,
        static=request.input_scale is not None,
        symmetric=request.symmetric,
    )
    y: Tensor | None = loaded().linear(x, buffers, *call, False)
    return y


def _linear(request: LinearRequest) -> Tensor:
    x = request.x if request.x.dtype in DTYPES else request.x.to(torch.float32)  # where the contract begins
    y = below(x if x.stride(1) == 1 else x.contiguous(), request)
    assert y is not None, "what the kernel refuses it refuses before"
    return y.to(request.x.dtype)


NATIVE = Kernel(
    name="native",
    about="C++ in the best instruction set of this CPU, one call per layer",
    unavailable_because=unavailable_because,
    refuses=_refuses,
    linear=_linear,
)

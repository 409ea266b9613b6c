"""The native kernel: C++ that is compiled when the package is installed, called through ctypes.

The sources are in csrc/; `csrc/w8a8.h` is the interface and csrc/linear.cpp the design.  One call quantises the
rows, multiplies and rescales, in the instruction set that is best on this CPU: AVX-512 VNNI, AVX-VNNI, AVX2, NEON
dot product, or plain C++.  The environment variable W8A8_ISA forces one by name.  All give the same bits.

The weight is packed: panels of 32 output columns, in which the four bytes that one instruction adds up lie side by
side.  A packed weight is a tensor (P, S, 32, 4), P = ceil(N / 32), S = ceil(K / 4), padded with zeros; it takes the
place of the row-major one, which was slower from four rows up when both were tried (docs/log.md).

Threads are those of torch's own OpenMP runtime, which is looked up in the process; no second one is loaded.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w8a8.errors import KernelError
from w8a8.kernels.request import Kernel, LinearRequest

PANEL = 32
_ABI = 1  # of csrc/w8a8.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_HUGE = 2 << 20  # the size of a large page, and from where on asking for them pays
_TOKEN, _TENSOR, _STATIC = 0, 2, 4  # enum w8a8_mode, the symmetric ones; + 1 is asymmetric
_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Layer(ctypes.Structure):
    """struct w8a8_layer."""

    _fields_ = (
        ("packed", _P),
        ("scale", _P),
        ("colsum", _P),
        ("bias", _P),
        ("n", _I64),
        ("k", _I64),
        ("scale_stride", _I32),
        ("mode", _I32),
        ("bits", _I32),
        ("x_zero_point", _I32),
        ("x_scale", ctypes.c_float),
    )


class _Library:
    """The compiled functions, with their C types."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))

        def function(name: str, result: object, *arguments: object) -> Any:
            found = getattr(library, f"w8a8_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        self.abi = function("abi", ctypes.c_int)
        self.linear = function("linear", ctypes.c_int, _P, _P, _I32, _I64, _I64, _P, _I64, _I32)
        self.pack = function("pack", ctypes.c_int, _P, _I64, _I64, _I64, _P, _P, _I32)
        self.advise_huge = function("advise_huge", ctypes.c_int, _P, _I64)
        self.isa_name = function("isa_name", ctypes.c_char_p)
        self.isa_count = function("isa_count", ctypes.c_int)
        self.isa_at = function("isa_at", ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
        self.isa_use = function("isa_use", ctypes.c_int, ctypes.c_char_p)
        self.parallel_name = function("parallel_name", ctypes.c_char_p)
        self.peak_ops = function("peak_ops", ctypes.c_double, ctypes.c_double, _I32)
        self.peak_read = function("peak_read", ctypes.c_double, _P, _I64, ctypes.c_double, _I32)


@cache
def _library() -> _Library | str:
    """The compiled kernel, or why it is not there."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return (
            "it was not built when w8a8 was installed; install a C++17 compiler (Debian: apt install g++) and run "
            "pip install --force-reinstall --no-deps --no-cache-dir w8a8 again"
        )
    try:
        library = _Library(built[0])
    except (OSError, AttributeError) as error:  # made for another system, or by another version
        return f"{built[0].name} cannot be loaded: {error}; reinstall w8a8"
    if library.abi() != _ABI:
        return f"{built[0].name} is of another version of w8a8; reinstall w8a8"
    forced = os.environ.get("W8A8_ISA", "")
    if forced and library.isa_name().decode() != forced:
        raise KernelError(
            f"the environment variable W8A8_ISA is {forced!r}, which this CPU cannot run or the kernel does not have; "
            f"it has {_isas(library)}"
        )
    return library


def _loaded() -> _Library:
    library = _library()
    if isinstance(library, str):
        raise KernelError(f"the native kernel is not available: {library}")
    return library


def _isas(library: _Library) -> dict[str, bool]:
    usable = ctypes.c_int()
    found = {}
    for i in range(library.isa_count()):
        name = library.isa_at(i, ctypes.byref(usable)).decode()
        found[name] = bool(usable.value)
    return found


def unavailable_because() -> str | None:
    """Why the kernel cannot run on this machine, or None."""
    library = _library()
    return library if isinstance(library, str) else None


def instruction_sets() -> dict[str, bool]:
    """Every instruction set that was compiled in, best last, and whether this CPU has it."""
    return _isas(_loaded())


def instruction_set() -> str:
    """The instruction set in use."""
    return str(_loaded().isa_name().decode())


def use_instruction_set(name: str | None) -> None:
    """Switch the whole process to an instruction set; None goes back to the best.

    Raises:
        KernelError: the kernel does not have it, or this CPU does not.
    """
    library = _loaded()
    if library.isa_use(None if name is None else name.encode()):
        raise KernelError(f"instruction set {name!r} cannot be used; there are {_isas(library)}")


def threading() -> str:
    """How the loops are run: "openmp" and the runtime that is borrowed, or "threads"."""
    return str(_loaded().parallel_name().decode())


def peak_int8_ops(seconds: float) -> float:
    """The ceiling of products: int8 operations per second in registers, a multiply and an add being two."""
    return float(_loaded().peak_ops(seconds, torch.get_num_threads()))


def peak_read(memory: Tensor, seconds: float = 1e-6) -> float:
    """The ceiling of memory: bytes per second of a plain read of a contiguous tensor; one pass at least."""
    size = memory.numel() * memory.element_size()
    return float(_loaded().peak_read(memory.data_ptr(), size, seconds, torch.get_num_threads()))


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major codes as panels.

    Args:
        weight: (N, K) int8 on the CPU.  Not modified.

    Returns:
        (P, S, 32, 4) int8, on large pages where it is big enough to have any; and the sums (N, 1) int32 along K.
    """
    n, k = weight.shape
    weight = weight.contiguous()
    shape = (-(-n // PANEL), -(-k // 4), PANEL, 4)
    size = shape[0] * shape[1] * PANEL * 4
    align = _HUGE if size >= _HUGE else 64
    room = torch.empty(size + align, dtype=torch.int8)
    library = _loaded()
    if align == _HUGE:
        library.advise_huge(room.data_ptr(), room.numel())  # a wish: nothing depends on it
    packed = room[-room.data_ptr() % align :][:size].view(shape)
    sums = torch.empty((n, 1), dtype=torch.int32)
    status = library.pack(weight.data_ptr(), k, n, k, packed.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    assert status == 0, f"w8a8_pack: {status}"
    return packed, sums


def _refuses(request: LinearRequest) -> str | None:
    if request.x.device.type != "cpu" or request.weight.device.type != "cpu":
        return f"it runs on CPU tensors, the input is on {request.x.device}"
    if request.groups != 1:
        return "it has no groups along K"
    if not request.is_packed:
        return "the layer is too large for its sums, or empty"
    if request.x.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {request.x.dtype}"
    return None


def can_pack(n: int, k: int, groups: int, *, symmetric: bool) -> bool:
    """Whether the kernel runs a layer of this shape, for activations with or without a zero point."""
    reach = 127 if symmetric else 255
    return n > 0 and groups == 1 and 0 < k <= (2**31 - 1) // (reach * 128)


def _linear(request: LinearRequest) -> Tensor:
    library = _loaded()
    x, scale, bias = request.x, request.weight_scale, request.bias
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and bias.dtype is not torch.float32:
        bias = bias.to(torch.float32)
    m, k = x.shape
    n = request.out_features
    static = request.input_scale is not None
    mode = _STATIC if static else _TOKEN if request.per_token else _TENSOR
    layer = _Layer(
        request.weight.data_ptr(),
        scale.data_ptr(),
        request.weight_sum.data_ptr(),
        None if bias is None else bias.data_ptr(),
        n,
        k,
        0 if scale.ndim == 1 else 1,
        mode if request.symmetric else mode + 1,
        request.bits,
        0 if request.input_zero_point is None else int(request.input_zero_point.item()),
        0.0 if request.input_scale is None else request.input_scale.item(),
    )
    y = torch.empty((m, n), dtype=x.dtype)
    status = library.linear(
        ctypes.byref(layer),
        x.data_ptr(),
        _DTYPES[x.dtype],
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        torch.get_num_threads(),
    )
    if status == -3:
        raise MemoryError(f"no memory for the codes of a ({m}, {k}) input")
    assert status == 0, f"w8a8_linear: {status}"
    return y


NATIVE = Kernel(
    name="native",
    about="C++ in the best instruction set of this CPU, one call per layer",
    unavailable_because=unavailable_because,
    refuses=_refuses,
    linear=_linear,
)

"""The native kernel: C++ that is compiled when the package is installed.

The sources are in csrc/; `csrc/w8a8.h` is the interface and csrc/linear.cpp the design.  One call quantises the
rows, multiplies and rescales, in one of the instruction sets that this CPU has: AMX, AVX-512 VNNI, AVX-VNNI, AVX2, NEON
i8mm or dot product, or plain C++.  Which, by rows and K, says one table (`choices`); the environment variable W8A8_ISA
forces one by name.  All give the same bits.  W8A8_NATIVE=0 is a machine where nothing was compiled.

The weight is packed: panels of 32 output columns, in which the bytes that one instruction adds up lie side by side.  A
packed weight is a tensor (P, S, 32, g), P = ceil(N / 32), S g >= K, padded with zeros; g and S are the library's, by
architecture (`packed_shape`).  It takes the place of the row-major one, which was slower from four rows up when both
were tried (docs/log.md).

What runs at every call is one C function that takes tensors (csrc/python.cpp); the rest is called through ctypes.

Threads are those of torch's own OpenMP runtime, which is looked up in the process; no second one is loaded.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from w8a8.errors import KernelError
from w8a8.kernels.request import Kernel, LinearRequest, describe
from w8a8.scheme import CODE_REACH, MAX_CODE_BITS, QuantSpec, largest_k

PANEL = 32
_PACKED_AXES = 4  # (P, S, 32, g)
_MATRIX_AXES = 2
_ABI = 5  # of csrc/w8a8.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # enum w8a8_dtype
_HUGE = 2 << 20  # the size of a large page, and from where on asking for them pays
_TOKEN, _TENSOR, _STATIC = 0, 2, 4  # enum w8a8_mode, the symmetric ones; + 1 is asymmetric
_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Library:
    """The compiled functions: what runs at every call through Python's C interface, the rest through ctypes."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        def function(name: str, result: object, *arguments: object) -> Any:
            found = getattr(library, f"w8a8_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        self.packed_bytes = function("packed_bytes", _I64, _I64, _I64)
        self.panel_group = function("panel_group", _I32)
        self.pack = function("pack", ctypes.c_int, _P, _I64, _I64, _I64, _P, _P, _I32)
        self.quantize_rows = function(
            "quantize_rows",
            ctypes.c_int,
            _P,
            _I32,
            _I64,
            _I64,
            _I64,
            _I32,
            _I32,
            _F32,
            _I32,
            _I32,
            _P,
            _I64,
            _P,
            _P,
            _I32,
        )
        self.advise_huge = function("advise_huge", ctypes.c_int, _P, _I64)
        self.isa_name = function("isa_name", ctypes.c_char_p)
        self.isa_count = function("isa_count", ctypes.c_int)
        self.isa_at = function("isa_at", ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
        self.isa_why_not = function("isa_why_not", ctypes.c_char_p, ctypes.c_int)
        self.isa_runs = function("isa_runs", ctypes.c_uint64, ctypes.c_int)
        self.isa_use = function("isa_use", ctypes.c_int, ctypes.c_char_p)
        self.choice_at = function("choice_at", ctypes.c_char_p, ctypes.c_int, *2 * [ctypes.POINTER(_I64)])
        self.stream_name = function("stream_name", ctypes.c_char_p)
        self.parallel_name = function("parallel_name", ctypes.c_char_p)
        self.peak_ops = function("peak_ops", ctypes.c_double, ctypes.c_double, _I32)
        self.peak_read = function("peak_read", ctypes.c_double, _P, _I64, ctypes.c_double, _I32)
        spec = spec_from_file_location(f"{__package__}._native", path)
        assert spec is not None, "the file ends in .so"
        self._door = module_from_spec(spec)
        self.linear = self._door.linear
        self.prepare(getattr(Tensor, "__dlpack_c_exchange_api__", None))

    def prepare(self, table: object) -> None:
        """Tell the door what torch is: with DLPack's table of functions, which torch has from 2.9 on, or None."""
        self._door.prepare(
            Tensor,
            (*_DTYPES, torch.int8, torch.int32),
            table,
            torch.get_num_threads,
            torch.is_grad_enabled,
            torch._C._len_torch_dispatch_stack,
            torch._C._is_tracing,
            vars(forward_ad),
            _plain_float,
            _refuse,
        )


def _plain_float(name: str, tensor: Tensor) -> Tensor:
    """A buffer of some other float dtype or strides as the kernel reads it; called by the door."""
    if not tensor.is_floating_point():
        _refuse(name, tensor, "float32", tensor.numel())
    return tensor.detach().to(torch.float32).resolve_neg().contiguous()


def _refuse(name: str, found: object, dtype: str, count: int) -> NoReturn:
    """Say which buffer of a layer the kernel cannot read; called by the door."""
    raise KernelError(
        f"the native kernel reads the layer's {name} as {dtype}, {count} values in a row on the CPU, and it is "
        f"{describe(found)}; give the buffer such a tensor, or quantise the float layer anew"
    )


@cache
def _library() -> _Library | str:
    """The compiled kernel, or why it is not there."""
    if os.environ.get("W8A8_NATIVE") == "0":
        return "the environment variable W8A8_NATIVE is 0"
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return (
            "it was not built when w8a8 was installed; install a C++17 compiler (Debian: apt install g++) and run "
            "pip install --force-reinstall --no-deps --no-cache-dir w8a8 again"
        )
    try:
        compiled = ctypes.CDLL(str(built[0]))
        if compiled.w8a8_abi() != _ABI:  # before anything else is looked up or called, which may have changed
            return f"{built[0].name} is of another version of w8a8; reinstall w8a8"
        library = _Library(compiled, built[0])
    except (OSError, ImportError, AttributeError) as error:  # made for another system, or no library of ours
        return f"{built[0].name} cannot be loaded: {error}; reinstall w8a8"
    forced = os.environ.get("W8A8_ISA", "")
    if forced and library.isa_name().decode() != forced:
        raise KernelError(
            f"the environment variable W8A8_ISA is {forced!r}, which this CPU cannot run or the kernel does not have; "
            f"it has {', '.join(_told(library))}"
        )
    return library


def _loaded() -> _Library:
    library = _library()
    if isinstance(library, str):
        raise KernelError(f"the native kernel is not available: {library}")
    return library


def _isas(library: _Library) -> dict[str, str | None]:
    reasons = {}
    for i in range(library.isa_count()):
        reason = library.isa_why_not(i)
        reasons[library.isa_at(i, None).decode()] = None if reason is None else reason.decode()
    return reasons


def _told(library: _Library) -> list[str]:
    return [name if reason is None else f"{name} ({reason})" for name, reason in _isas(library).items()]


def unavailable_because() -> str | None:
    """Why the kernel cannot run on this machine, or None."""
    library = _library()
    return library if isinstance(library, str) else None


def instruction_sets() -> dict[str, str | None]:
    """Every instruction set that was compiled in, best last: None where this CPU has it, else why it cannot be used."""
    return _isas(_loaded())


def instruction_set() -> str:
    """The instruction set that is forced, or else the best that `choices` has."""
    return str(_loaded().isa_name().decode())


@dataclass(frozen=True)
class Choice:
    """A line of the table: what runs a product of at least so many rows and so large a K."""

    instruction_set: str
    rows: int
    k: int


def choices() -> tuple[Choice, ...]:
    """What this CPU runs where nothing is forced: the first line whose least sizes a product reaches."""
    library, rows, k = _loaded(), _I64(), _I64()
    lines: list[Choice] = []
    while (name := library.choice_at(len(lines), ctypes.byref(rows), ctypes.byref(k))) is not None:
        lines.append(Choice(name.decode(), rows.value, k.value))
    return tuple(lines)


def runs() -> dict[str, int]:
    """How many products each instruction set has run in this process."""
    library = _loaded()
    return {name: int(library.isa_runs(i)) for i, name in enumerate(_isas(library))}


def use_instruction_set(name: str | None) -> None:
    """Switch the whole process to an instruction set; None goes back to the table.

    Raises:
        KernelError: the kernel does not have it, or this CPU does not.
    """
    library = _loaded()
    if library.isa_use(None if name is None else name.encode()):
        raise KernelError(f"instruction set {name!r} cannot be used; there are {', '.join(_told(library))}")


def prefetching() -> str:
    """How far ahead the weights of a product of a few rows are prefetched on this processor."""
    return str(_loaded().stream_name().decode())


def threading() -> str:
    """How the loops are run: "openmp" and the runtime that is borrowed, or "threads"."""
    return str(_loaded().parallel_name().decode())


def peak_int8_ops(seconds: float) -> float:
    """The ceiling of products: int8 operations per second in registers, a multiply and an add being two."""
    return float(_loaded().peak_ops(seconds, torch.get_num_threads()))


def peak_read(memory: Tensor, seconds: float = 1e-6) -> float:
    """The ceiling of memory: bytes per second of a plain read of a contiguous tensor; one pass at least.

    Raises:
        KernelError: it is not a contiguous tensor in the CPU's memory.
    """
    if not _is_plain(memory) or not memory.is_contiguous():
        raise KernelError(f"what is read is a contiguous tensor on the CPU, found {describe(memory)}")
    size = memory.numel() * memory.element_size()
    return float(_loaded().peak_read(memory.data_ptr(), size, seconds, torch.get_num_threads()))


def _is_plain(t: Tensor) -> bool:
    """Whether the values lie behind the tensor's address: not those of a subclass, nor of another layout or device."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not (t.is_neg() or t.is_conj())
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and (t.numel() == 0 or t.data_ptr() != 0)  # a storage that was let go
    )


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """(P, S, 32, g), as this machine's library packs a weight (N, K)."""
    library = _loaded()
    group, panels = library.panel_group(), -(-n // PANEL)
    return panels, library.packed_bytes(PANEL, k) // (PANEL * group), PANEL, group


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
    if not _is_plain(weight) or weight.ndim != _MATRIX_AXES or weight.dtype is not torch.int8:
        raise KernelError(f"a weight to pack is int8 of shape (N, K) on the CPU, found {describe(weight)}")
    n, k = weight.shape
    weight = weight.contiguous()
    shape = packed_shape(n, k)
    size = math.prod(shape)
    align = _HUGE if size >= _HUGE else 64
    library, room = _loaded(), _octets(size + align)
    if align == _HUGE:
        library.advise_huge(room.data_ptr(), room.numel())  # a wish: nothing depends on it
    packed = room[-room.data_ptr() % align :][:size].view(shape)
    sums = torch.empty((n, 1), dtype=torch.int32, device="cpu")
    status = library.pack(weight.data_ptr(), k, n, k, packed.data_ptr(), sums.data_ptr(), torch.get_num_threads())
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
    library = _library()
    if isinstance(library, str) or not _is_plain(x) or x.ndim != _MATRIX_AXES or x.dtype not in _DTYPES:
        return None
    m, k = x.shape
    if not x.numel() or not 2 <= bits <= MAX_CODE_BITS or (k > 1 and x.stride(1) != 1):
        return None
    codes, scale = _octets(m * k).view(m, k), torch.empty(m, dtype=torch.float32, device="cpu")
    zero_point = torch.empty(m, dtype=torch.int32, device="cpu")
    rows = x.data_ptr(), _DTYPES.index(x.dtype), m, k, x.stride(0)
    grid = _TOKEN if per_row else _TENSOR, bits, 0.0, 0, 0
    outputs = codes.data_ptr(), k, scale.data_ptr(), zero_point.data_ptr()
    status = library.quantize_rows(*rows, *grid, *outputs, torch.get_num_threads())
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
    if not _is_plain(request.x):
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
    y: Tensor | None = _loaded().linear(x, buffers, *call, True)
    return y


def below(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    per_token: bool,
    symmetric: bool,
) -> Tensor | None:
    """The same from below the dispatcher, which has seen the call already; the operands are those of the op."""
    buffers = {
        "packed_weight": weight,
        "weight_scale": weight_scale,
        "weight_sum": weight_sum,
        "bias": bias,
        "input_scale": input_scale,
        "input_zero_point": input_zero_point,
    }
    call = call_of(
        weight_sum.shape[0],
        x.shape[-1],
        per_channel=weight_scale.ndim != 1,
        bits=bits,
        per_token=per_token,
        static=input_scale is not None,
        symmetric=symmetric,
    )
    y: Tensor | None = _loaded().linear(x, buffers, *call, False)
    return y


def _linear(request: LinearRequest) -> Tensor:
    x = request.x if request.x.dtype in _DTYPES else request.x.to(torch.float32)  # where the contract begins
    y = below(
        x if x.stride(1) == 1 else x.contiguous(),
        request.weight,
        request.weight_scale,
        request.weight_sum,
        request.bias,
        request.input_scale,
        request.input_zero_point,
        request.bits,
        request.per_token,
        request.symmetric,
    )
    assert y is not None, "what the kernel refuses it refuses before"
    return y.to(request.x.dtype)


NATIVE = Kernel(
    name="native",
    about="C++ in the best instruction set of this CPU, one call per layer",
    unavailable_because=unavailable_because,
    refuses=_refuses,
    linear=_linear,
)

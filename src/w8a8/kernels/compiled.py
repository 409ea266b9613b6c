"""The compiled file beside this package: loaded once, held against its version, and asked what it can do here.

`csrc/w8a8.h` is the interface.  What runs at every call is one C function that takes tensors (csrc/python.cpp); the
rest is called through ctypes.  W8A8_NATIVE=0 in the environment is a machine where nothing was compiled.

Which instruction set runs a product, by rows and K, says one table (`choices`); W8A8_ISA forces one by name.
"""

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from w8a8.errors import KernelError
from w8a8.kernels.request import describe

ABI = 10  # of csrc/w8a8.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # enum w8a8_dtype
_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Library:
    """The compiled functions: what runs at every call through Python's C interface, the rest through ctypes."""

    def __init__(self, file: ctypes.CDLL, path: Path) -> None:
        def function(name: str, result: object, *arguments: object) -> Any:
            found = getattr(file, f"w8a8_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        self.packed_bytes = function("packed_bytes", _I64, _I64, _I64)
        self.panel_group = function("panel_group", _I32)
        self.pack = function("pack", ctypes.c_int, _P, _I64, _I64, _I64, _P, _P, _I32)
        rows = (_P, _I32, _I64, _I64, _I64, _I32, _I32, _F32, _I32, _I32, _P, _I64, _P, _P, _I32)
        self.quantize_rows = function("quantize_rows", ctypes.c_int, *rows)
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
        self.fused, self.normalize, self.attend = self._door.fused, self._door.normalize, self._door.attend
        self.cached_append, self.cached_read = self._door.cached_append, self._door.cached_read
        self.cached_attend, self.cached_each = self._door.cached_attend, self._door.cached_each
        self.cached_deal = self._door.cached_deal
        self.run = self._door.run
        self.prepare(getattr(Tensor, "__dlpack_c_exchange_api__", None))

    def prepare(self, table: object) -> None:
        """Tell the door what torch is: with DLPack's table of functions, which torch has from 2.9 on, or None."""
        self._door.prepare(
            Tensor,
            torch.nn.Parameter,
            (*DTYPES, torch.int8, torch.int32, torch.bool),
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
def library() -> Library | str:
    """The compiled kernel, or why it is not there."""
    wanted = os.environ.get("W8A8_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise KernelError(f"the environment variable W8A8_NATIVE is {wanted!r}; set it to 0, to 1, or not at all")
    if wanted == "0":
        return "the environment variable W8A8_NATIVE is 0"
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return (
            "it was not built when w8a8 was installed; install a C++17 compiler (Debian: apt install g++) and run "
            "pip install --force-reinstall --no-deps --no-cache-dir w8a8 again"
        )
    try:
        file = ctypes.CDLL(str(built[0]))
        if file.w8a8_abi() != ABI:  # before anything else is looked up or called, which may have changed
            return f"{built[0].name} is of another version of w8a8; reinstall w8a8"
        functions = Library(file, built[0])
    except (OSError, ImportError, AttributeError) as error:  # made for another system, or no library of ours
        return f"{built[0].name} cannot be loaded: {error}; reinstall w8a8"
    forced = os.environ.get("W8A8_ISA", "")
    if forced and functions.isa_name().decode() != forced:
        raise KernelError(
            f"the environment variable W8A8_ISA is {forced!r}, which this CPU cannot run or the kernel does not have; "
            f"there are {', '.join(_told(functions))}"
        )
    return functions


def loaded() -> Library:
    found = library()
    if isinstance(found, str):
        raise KernelError(f"the native kernel is not available: {found}")
    return found


def _isas(functions: Library) -> dict[str, str | None]:
    reasons = {}
    for i in range(functions.isa_count()):
        reason = functions.isa_why_not(i)
        reasons[functions.isa_at(i, None).decode()] = None if reason is None else reason.decode()
    return reasons


def _told(functions: Library) -> list[str]:
    return [name if reason is None else f"{name} ({reason})" for name, reason in _isas(functions).items()]


def unavailable_because() -> str | None:
    """Why the kernel cannot run on this machine, or None."""
    found = library()
    return found if isinstance(found, str) else None


def instruction_sets() -> dict[str, str | None]:
    """Every instruction set that was compiled in, best last: None where this CPU has it, else why it cannot be used."""
    return _isas(loaded())


def instruction_set() -> str:
    """The instruction set that is forced, or else the best that `choices` has."""
    return str(loaded().isa_name().decode())


def multiplies_and_adds() -> bool:
    """Whether floats are multiplied and added in one instruction, as attention does by the contract of equal bits.

    Where not, each is a call of the C library, and PyTorch's attention is a hundred times as fast.
    """
    return instruction_set() != "portable" or platform.machine() in ("aarch64", "arm64")


@dataclass(frozen=True)
class Choice:
    """A line of the table: what runs a product of at least so many rows and so large a K."""

    instruction_set: str
    rows: int
    k: int


def choices() -> tuple[Choice, ...]:
    """What this CPU runs where nothing is forced: the first line whose least sizes a product reaches."""
    functions, rows, k = loaded(), _I64(), _I64()
    lines: list[Choice] = []
    while (name := functions.choice_at(len(lines), ctypes.byref(rows), ctypes.byref(k))) is not None:
        lines.append(Choice(name.decode(), rows.value, k.value))
    return tuple(lines)


def runs() -> dict[str, int]:
    """How many products each instruction set has run in this process."""
    functions = loaded()
    return {name: int(functions.isa_runs(i)) for i, name in enumerate(_isas(functions))}


def use_instruction_set(name: str | None) -> None:
    """Switch the whole process to an instruction set; None goes back to the table.

    Raises:
        KernelError: the kernel does not have it, or this CPU does not.
    """
    functions = loaded()
    if functions.isa_use(None if name is None else name.encode()):
        raise KernelError(f"instruction set {name!r} cannot be used; there are {', '.join(_told(functions))}")


def prefetching() -> str:
    """How far ahead the weights of a product of a few rows are prefetched on this processor."""
    return str(loaded().stream_name().decode())


def threading() -> str:
    """How the loops are run: "openmp" and the runtime that is borrowed, or "threads"."""
    return str(loaded().parallel_name().decode())


def peak_int8_ops(seconds: float) -> float:
    """The ceiling of products: int8 operations per second in registers, a multiply and an add being two."""
    return float(loaded().peak_ops(seconds, torch.get_num_threads()))


def peak_read(memory: Tensor, seconds: float = 1e-6) -> float:
    """The ceiling of memory: bytes per second of a plain read of a contiguous tensor; one pass at least.

    Raises:
        KernelError: it is not a contiguous tensor in the CPU's memory.
    """
    if not is_plain(memory) or not memory.is_contiguous():
        raise KernelError(f"what is read is a contiguous tensor on the CPU, found {describe(memory)}")
    size = memory.numel() * memory.element_size()
    return float(loaded().peak_read(memory.data_ptr(), size, seconds, torch.get_num_threads()))


def is_plain(t: Tensor) -> bool:
    """Whether the values lie behind the tensor's address: not those of a subclass, nor of another layout or device."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not (t.is_neg() or t.is_conj())
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and (t.numel() == 0 or t.data_ptr() != 0)  # a storage that was let go
    )

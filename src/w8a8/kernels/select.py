"""Which kernel runs: the registry, in order of preference, and the one place where a fallback happens."""

import warnings
from functools import cache

import torch

from w8a8.errors import KernelError, closest
from w8a8.kernels.native import NATIVE
from w8a8.kernels.reference import REFERENCE
from w8a8.kernels.request import Kernel, LinearRequest
from w8a8.kernels.torch_cpu import TORCH_CPU

AUTO = "auto"


def _has_amx() -> bool:
    """Whether this CPU has matrix tiles, which oneDNN's product uses and the native kernel does not."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


_ORDER = (TORCH_CPU, NATIVE, REFERENCE) if _has_amx() else (NATIVE, TORCH_CPU, REFERENCE)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ORDER}


@cache
def unavailable_because(name: str) -> str | None:
    """Why this machine cannot run the kernel at all, or None; found out once."""
    return KERNELS[name].unavailable_because()


def available() -> dict[str, str | None]:
    """Every kernel in order of preference: None where it can run here, else the reason why not."""
    return {name: unavailable_because(name) for name in KERNELS}


def first_choice(name: str) -> str:
    """The kernel that will run as long as it takes the input: the one asked for, or the first one here.

    The first time that the native kernel is missing where it would be the choice, a warning says how to get it.
    """
    if name != AUTO and unavailable_because(name) is None:
        return name
    reason = unavailable_because(NATIVE.name)
    if reason is not None and name in (AUTO, NATIVE.name):
        _warn_once(NATIVE.name, reason)
    return next(kernel for kernel in KERNELS if unavailable_because(kernel) is None)


def check_name(name: str) -> None:
    """Raise `KernelError` for a kernel that does not exist."""
    if name != AUTO and name not in KERNELS:
        raise KernelError(f"unknown kernel {name!r} ({closest(name, KERNELS)}); use {AUTO!r}, {', '.join(KERNELS)}")


def select(name: str, request: LinearRequest, *, strict: bool) -> Kernel:
    """The kernel for a request: the one that was asked for, or the first that can.

    Raises:
        KernelError: `strict`, and the kernel that was asked for cannot run this.
    """
    if name != AUTO:
        reason = unavailable_because(name) or KERNELS[name].refuses(request)
        if reason is None:
            return KERNELS[name]
        if strict:
            raise KernelError(f"kernel {name!r} was asked for with strict=True and cannot run: {reason}")
        _warn_once(name, reason)
    return next(kernel for kernel in _usable() if kernel.refuses(request) is None)


@cache
def _usable() -> tuple[Kernel, ...]:
    return tuple(kernel for name, kernel in KERNELS.items() if unavailable_because(name) is None)


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"kernel {name!r} cannot run ({reason}); another runs instead, see the ledger", stacklevel=2)

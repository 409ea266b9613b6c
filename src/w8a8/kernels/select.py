"""Which kernel runs: the registry, in order of preference, and the one place where a fallback happens.

The order is that of `KERNELS` on every processor.  The environment variable W8A8_KERNEL puts the kernel of that name
first: it is what "auto" then means in this process.  Read once, like W8A8_ISA.
"""

import os
import warnings
from functools import cache

from w8a8.errors import KernelError, closest
from w8a8.kernels.native import NATIVE
from w8a8.kernels.reference import REFERENCE
from w8a8.kernels.request import Kernel, LinearRequest
from w8a8.kernels.torch_cpu import TORCH_CPU

AUTO = "auto"

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (NATIVE, TORCH_CPU, REFERENCE)}


@cache
def preference() -> tuple[str, ...]:
    """The kernels' names, the one that "auto" tries first in front.

    Raises:
        KernelError: W8A8_KERNEL names no kernel.
    """
    first = os.environ.get("W8A8_KERNEL") or AUTO
    if first != AUTO and first not in KERNELS:
        raise KernelError(
            f"the environment variable W8A8_KERNEL is {first!r}, which is no kernel ({closest(first, KERNELS)}); "
            f"set it to {AUTO!r}, {', '.join(KERNELS)}, or not at all"
        )
    return tuple(sorted(KERNELS, key=lambda name: name != first))


@cache
def unavailable_because(name: str) -> str | None:
    """Why this machine cannot run the kernel at all, or None; found out once."""
    return KERNELS[name].unavailable_because()


def available() -> dict[str, str | None]:
    """Every kernel in order of preference: None where it can run here, else the reason why not."""
    return {name: unavailable_because(name) for name in preference()}


def first_choice(name: str) -> str:
    """The kernel that will run as long as it takes the input: the one asked for, or the first one here.

    Where the first that "auto" would take is not here, a warning says why, once; of one that was asked for, `select`
    tells when it is to run.
    """
    wanted = preference()[0] if name == AUTO else name
    reason = unavailable_because(wanted)
    if reason is None:
        return wanted
    if name == AUTO:
        _warn_once(wanted, reason)
    return _usable()[0].name


def that_runs(name: str, request: LinearRequest) -> str:
    """The kernel that such a request gets; for `repr`, which warns of nothing."""
    if name != AUTO and unavailable_because(name) is None and KERNELS[name].refuses(request) is None:
        return name
    return next(kernel for kernel in _usable() if kernel.refuses(request) is None).name


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
    return tuple(KERNELS[name] for name in preference() if unavailable_because(name) is None)


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"kernel {name!r} cannot run ({reason}); another runs instead, see the ledger", stacklevel=2)

"""Kernels: the ways to run one integer linear layer, all equal to the bit.

`available()` says which of them this machine has and why not the others; `int8_linear` is the op.
"""

from w8a8.kernels.ops import calls, check_input, count, forget, int8_linear
from w8a8.kernels.request import Kernel, LinearRequest, unpack
from w8a8.kernels.select import AUTO, KERNELS, available, check_name, first_choice, that_runs

__all__ = [
    "AUTO",
    "KERNELS",
    "Kernel",
    "LinearRequest",
    "available",
    "calls",
    "check_input",
    "check_name",
    "count",
    "first_choice",
    "forget",
    "int8_linear",
    "that_runs",
    "unpack",
]

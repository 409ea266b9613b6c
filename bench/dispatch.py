"""What it costs to get from Python into the kernel: the ways there are, at a layer whose product takes a microsecond.

    python bench/dispatch.py

A 32 x 64 layer, one row, float32.  `forward` is the module's call; `direct` is what it does in eager inference: one C
function that takes tensors apart through Python's own interface.  Beside it: the same call as an op that C++ registers
through torch's stable interface (bench/dispatch_op.cpp, compiled here with torch's headers, which w8a8 itself does not
need); our op through PyTorch's dispatcher, which compiled graphs call; the call behind `torch.library.custom_op`; and
the float layer.  All take turns; the best of the means of 2,000 calls.
"""

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from machine import describe_machine
from w8a8.kernels import compiled, native, ops
from w8a8.layers.linear import QuantLinear

CSRC = Path(compiled.__file__).parent / "csrc"
ROUNDS, CALLS = 15, 2000


def cpp_op(directory: Path) -> Callable[..., Tensor]:
    """Compile the op, and tell it where the installed kernel is."""
    home = Path(torch.__file__).parent
    target = directory / "op.so"
    includes = [home / "include", home / "include/torch/csrc/api/include", CSRC]
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        + [f"-I{path}" for path in includes]
        + [str(Path(__file__).with_name("dispatch_op.cpp")), "-o", str(target), f"-L{home / 'lib'}"]
        + ["-ltorch_cpu", "-ltorch", "-lc10"],
        check=True,
    )
    torch.ops.load_library(str(target))
    kernel = ctypes.CDLL(str(next(Path(compiled.__file__).parent.glob("_native*.so"))))
    address = ctypes.cast(kernel.w8a8_linear, ctypes.c_void_p).value
    ctypes.c_void_p.in_dll(ctypes.CDLL(str(target)), "w8a8_linear_at").value = address
    return torch.ops.w8a8_bench.linear.default


def custom_op(layer: QuantLinear) -> Callable[[Tensor], Tensor]:
    """The call behind torch.library.custom_op, with as few operands as can be."""

    @torch.library.custom_op("w8a8_bench::custom", mutates_args=())
    def custom(x: Tensor, packed: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
        y = native.direct(x, layer._buffers, layer._call)
        assert y is not None
        return y

    buffers = layer._buffers
    return lambda x: custom(x, buffers["packed_weight"], buffers["weight_scale"], buffers["weight_sum"])


def main() -> None:
    if sys.platform != "linux":
        raise SystemExit("this bench compiles for Linux")
    print(describe_machine(), "\n")
    linear, x = nn.Linear(64, 32, bias=False), torch.randn(1, 1, 64)
    layer = QuantLinear.from_float(linear)
    packed, scale, sums = layer.packed_weight, layer.weight_scale, layer.weight_sum
    buffers, call, request = layer._buffers, layer._call, layer._request(x)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        compiled, custom = cpp_op(Path(name)), custom_op(layer)
        ways: dict[str, Callable[[], Tensor]] = {
            "QuantLinear.forward": lambda: layer(x),
            "direct": lambda: native.direct(x, buffers, call),
            "an op that C++ registers": lambda: compiled(x, packed, scale, sums, 32),
            "our op, through the dispatcher": lambda: ops._op(*request, "auto", False, 0),
            "torch.library.custom_op": lambda: custom(x),
            "nn.Linear, float32": lambda: linear(x),
        }
        assert torch.equal(ways["direct"](), compiled(x, packed, scale, sums, 32))
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for way, run in ways.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    run()
                best[way] = min(best[way], (time.perf_counter() - start) / CALLS)
    for way, seconds in best.items():
        print(f"{way:32} {1e6 * seconds:6.2f} us")


if __name__ == "__main__":
    main()

"""How to call `torch._int_mm`, and how to find the range of a row: the choices in kernels/torch_cpu.py and affine.py.

    python bench/int_mm.py             the times
    python bench/int_mm.py --exact     whether the product is exact; try it under ONEDNN_MAX_CPU_ISA=AVX2

Signed or unsigned left side, the row-major weight as a view or as a transposed copy; medians of interleaved calls, in
microseconds.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

from machine import describe_machine

SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096))
ROWS = (1, 16, 64, 256)
REPEATS = 15


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call, all taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def print_row(label: str, medians: Mapping[str, float]) -> None:
    best = min(medians.values())
    print(f"| {label} | " + " | ".join(f"{t:.0f} ({t / best:.2f}x)" for t in medians.values()) + " |")


def print_exactness() -> None:
    """The largest codes, summed 64 times, against what they should give."""
    for dtype, left in ((torch.uint8, 255), (torch.int8, 127)):
        x, w = torch.full((3, 64), left, dtype=dtype), torch.full((5, 64), 127, dtype=torch.int8)
        print(f"{dtype} {left} x 127, 64 times: {torch._int_mm(x, w.t())[0, 0]:,}, exactly {64 * left * 127:,}")


def main() -> None:
    if "--exact" in sys.argv:
        print_exactness()
        return
    print(describe_machine(), "\n")
    print("| N x K x M | s8, view | s8, copy | u8, view | u8, copy |\n|---|---:|---:|---:|---:|")
    for n, k in SHAPES:
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        copy = w.t().contiguous()
        for m in ROWS:
            s8 = torch.randint(-127, 128, (m, k), dtype=torch.int8)
            u8 = s8.bitwise_xor(-128).view(torch.uint8)
            calls: dict[str, Callable[[], object]] = {
                "s8, view": lambda s8=s8, w=w: torch._int_mm(s8, w.t()),
                "s8, copy": lambda s8=s8, copy=copy: torch._int_mm(s8, copy),
                "u8, view": lambda u8=u8, w=w: torch._int_mm(u8, w.t()),
                "u8, copy": lambda u8=u8, copy=copy: torch._int_mm(u8, copy),
            }
            print_row(f"{n} x {k} x {m}", interleaved(calls))
    x = torch.randn(256, 4096)
    inf = float("inf")
    print("\n| 256 x 4096 float32 | amin, amax | aminmax | abs, amax | vector_norm |\n|---|---:|---:|---:|---:|")
    ranges: dict[str, Callable[[], object]] = {
        "amin, amax": lambda: (x.amin(-1), x.amax(-1)),
        "aminmax": lambda: torch.aminmax(x, dim=-1),
        "abs, amax": lambda: x.abs().amax(-1),
        "vector_norm": lambda: torch.linalg.vector_norm(x, ord=inf, dim=-1),
    }
    print_row("range of a row", interleaved(ranges))
    print("\n| 256 x 4096 float32 | to int8 | to uint8 |\n|---|---:|---:|")
    print_row("cast", interleaved({"int8": lambda: x.to(torch.int8), "uint8": lambda: x.to(torch.uint8)}))


if __name__ == "__main__":
    main()

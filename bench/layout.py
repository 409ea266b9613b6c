"""Packed panels against row-major weights, and our tile against oneDNN's product: what kernels/native.py builds on.

    python bench/layout.py [--shapes 768x768,...] [--rows 1,4,16,...] [--seconds 0.4]

A: `w8a8_linear`, which quantises, multiplies packed panels and rescales in one call.  B: `w8a8_quantize_rows`, oneDNN's
product through `torch._int_mm` on the row-major (N, K) weight as a view, `w8a8_finish`: the same C functions at both
ends, so that only the product and its layout differ.  C: oneDNN's product alone.  D: `w8a8_quantize_rows` alone, which
q, k and v, or gate and up, could share, since they read the same tensor.  No row-major kernel of our own exists; where
C alone takes longer than all of A, no better ends could save the row-major layout with this product.

Both get the same conditions: output and sums are allocated before, weights lie on large pages and rotate over enough
copies to leave the caches, calls are interleaved.  Medians in milliseconds.  A and B must return the same bits.

Each instruction set runs in a process of its own, as oneDNN reads ONEDNN_MAX_CPU_ISA only at its start.  Where its
product is not exact (no VNNI), there is nothing to compare.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear import ROTATED, SHAPES
from machine import describe_machine, keep
from w8a8.kernels import compiled, native
from w8a8.kernels.torch_cpu import TORCH_CPU

ROWS = (1, 4, 16, 64, 256, 1024)
FEWEST = 7  # rounds of a cell
# What oneDNN may use beside each of our instruction sets; those that are missing here are the best of their machines.
ONEDNN = {
    "portable": "SSE41",
    "avx2": "AVX2",
    "avxvnni": "AVX2_VNNI",
    "avx512vnni256": "AVX512_CORE_VNNI",
}
OURS, BETWEEN, ALONE = "ours, packed", "oneDNN between our ends", "oneDNN's product alone"
QUANTIZE = "our quantisation alone"
SHIFT = 128  # codes as unsigned bytes


class Layer(ctypes.Structure):
    """struct w8a8_layer of kernels/csrc/w8a8.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("colsum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("scale_stride", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("x_zero_point", ctypes.c_int32),
        ("x_scale", ctypes.c_float),
    )


def _call(name: str, *arguments: Any) -> Callable[[], None]:
    """A C function with its arguments already converted, so that Python takes as little time as it can."""
    (built,) = Path(compiled.__file__).parent.glob("_native*.so")
    function = getattr(ctypes.CDLL(str(built)), f"w8a8_{name}")

    def run() -> None:
        status = function(*arguments)
        assert status == 0, f"w8a8_{name}: {status}"

    return run


def _address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


class Weight:
    """One copy of a weight in both layouts."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.row_major, self.scale = on_large_pages(codes), scale
        self.packed, self.sums = native.pack(codes)
        pointers = self.packed.data_ptr(), scale.data_ptr(), self.sums.data_ptr(), None
        self.layer = Layer(*pointers, *codes.shape, 1, 0, 8, 0, 0.0)  # per channel; W8A8_TOKEN_SYM, 8 bits


class Buffers:
    """What a cell reads and writes, allocated once."""

    def __init__(self, n: int, k: int, m: int) -> None:
        self.x, self.y = torch.randn(m, k), torch.empty(m, n)
        self.codes, self.sums = torch.empty(m, k, dtype=torch.uint8), torch.empty(m, n, dtype=torch.int32)
        self.scale, self.zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)

    def ours(self, weight: Weight) -> Callable[[], None]:
        (m, k), n = self.x.shape, self.y.shape[1]
        f32, threads = ctypes.c_int32(0), ctypes.c_int32(torch.get_num_threads())
        rows = _address(self.x), f32, ctypes.c_int64(m), ctypes.c_int64(k)
        return _call("linear", ctypes.byref(weight.layer), *rows, _address(self.y), ctypes.c_int64(n), threads)

    def alone(self, weight: Weight) -> Callable[[], None]:
        columns = weight.row_major.t()
        return lambda: torch._int_mm(self.codes, columns, out=self.sums)

    def quantize(self) -> Callable[[], None]:
        m64, k64 = (ctypes.c_int64(size) for size in self.x.shape)
        zero, threads = ctypes.c_int32(0), ctypes.c_int32(torch.get_num_threads())
        grid = zero, ctypes.c_int32(8), ctypes.c_float(0.0), zero, ctypes.c_int32(SHIFT)  # W8A8_TOKEN_SYM, 8 bits
        per_row = _address(self.scale), _address(self.zero_point)
        rows = _address(self.x), zero, m64, k64, k64
        return _call("quantize_rows", *rows, *grid, _address(self.codes), k64, *per_row, threads)

    def between(self, weight: Weight) -> Callable[[], None]:
        m64, n64 = (ctypes.c_int64(size) for size in self.y.shape)
        zero, threads = ctypes.c_int32(0), ctypes.c_int32(torch.get_num_threads())
        per_row = _address(self.scale), _address(self.zero_point)
        quantize, product = self.quantize(), self.alone(weight)
        sums = ctypes.byref(weight.layer), _address(self.sums), n64, m64, ctypes.c_int32(SHIFT)
        finish = _call("finish", *sums, *per_row, zero, _address(self.y), n64, threads)

        def run() -> None:
            quantize()
            product()
            finish()

        return run


def on_large_pages(codes: Tensor) -> Tensor:
    """A row-major copy on the pages that `native.pack` asks for."""
    room = torch.empty(codes.numel() + native._HUGE, dtype=torch.int8)
    compiled.loaded().advise_huge(room.data_ptr(), room.numel())
    return room[-room.data_ptr() % native._HUGE :][: codes.numel()].view(codes.shape).copy_(codes)


def cell(n: int, k: int, m: int, weights: list[Weight], seconds: float) -> dict[str, Any]:
    """Measure one shape at one number of rows."""
    buffers = Buffers(n, k, m)
    later = weights[len(weights) // 2 :] + weights[: len(weights) // 2]  # not those that B has just read
    calls = {
        OURS: [buffers.ours(weight) for weight in weights],
        BETWEEN: [buffers.between(weight) for weight in weights],
        ALONE: [buffers.alone(weight) for weight in later],
        QUANTIZE: [buffers.quantize()],
    }
    results = []
    for name in (OURS, BETWEEN):
        buffers.y.fill_(math.nan)
        calls[name][0]()
        results.append(buffers.y.clone())
    assert torch.equal(*results), f"{n} x {k}, {m} rows: the two do not return the same bits"
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < FEWEST or time.perf_counter() - start < seconds:
        for name, copies in calls.items():
            for _ in range(1 if m * n * k > 1e9 else 3):
                call = copies[len(times[name]) % len(copies)]
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        rounds += 1
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {"n": n, "k": k, "m": m, "rounds": rounds, "median_ms": medians}


@torch.inference_mode()
def measure(shapes: list[tuple[int, int]], rows: list[int], seconds: float) -> list[dict[str, Any]]:
    """Every cell, in the instruction set that this process runs."""
    cells = []
    for n, k in shapes:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        scale = torch.rand(n) + 0.5
        copies = max(1, min(96, math.ceil(ROTATED / (n * k))))
        weights = [Weight(codes, scale) for _ in range(copies)]
        for m in rows:
            cells.append(cell(n, k, m, weights, seconds))
            medians = cells[-1]["median_ms"]
            print(
                f"{compiled.instruction_set()}, {n} x {k}, {m} rows: "
                + ", ".join(f"{name} {ms:.4f} ms" for name, ms in medians.items()),
                flush=True,
            )
    return cells


def ratio(record: dict[str, Any], name: str) -> float:
    """How many times as long as our packed layer this takes."""
    return float(record["median_ms"][name] / record["median_ms"][OURS])


def summary(result: dict[str, Any]) -> str:
    """Geometric means over the shapes, by rows, and the number of cells where oneDNN was faster, as Markdown."""
    lines = [
        f"| instruction set | rows | {BETWEEN} | {ALONE} | {QUANTIZE} | cells where oneDNN is ahead by more than 3 % |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for isa, found in result["sets"].items():
        for m in sorted({r["m"] for r in found["cells"]}):
            cells = [r for r in found["cells"] if r["m"] == m]
            means = [
                math.exp(statistics.fmean(math.log(ratio(r, p)) for r in cells)) for p in (BETWEEN, ALONE, QUANTIZE)
            ]
            ahead = [f"{r['n']} x {r['k']} ({ratio(r, BETWEEN):.2f}x)" for r in cells if ratio(r, BETWEEN) < 0.97]
            shown = ", ".join(ahead) or "none"
            lines.append(f"| {isa} | {m} | {means[0]:.2f}x | {means[1]:.2f}x | {100 * means[2]:.1f} % | {shown} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Every cell as Markdown."""
    lines = [
        f"| instruction set | rows | N x K | {OURS}, ms | {BETWEEN}, ms | ratio | {ALONE}, ms |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for isa, found in result["sets"].items():
        for r in sorted(found["cells"], key=lambda r: (r["m"], r["n"] * r["k"], r["n"])):
            ours, between, alone = (r["median_ms"][name] for name in (OURS, BETWEEN, ALONE))
            lines.append(
                f"| {isa} | {r['m']} | {r['n']} x {r['k']} | {ours:.4f} | {between:.4f} | {ratio(r, BETWEEN):.2f}x | "
                f"{alone:.4f} |"
            )
    return "\n".join(lines)


def not_compared(result: dict[str, Any]) -> str:
    """Which instruction sets have no line, and why, as sentences."""
    reasons = {isa: found["not_compared_because"] for isa, found in result["sets"].items()}
    return " ".join(f"{isa}: {reason}." for isa, reason in reasons.items() if reason)


def _one_set(isa: str, options: list[str]) -> dict[str, Any]:
    """Run this script again, in one instruction set."""
    environment = {**os.environ, "W8A8_ISA": isa}
    if isa in ONEDNN:
        environment["ONEDNN_MAX_CPU_ISA"] = ONEDNN[isa]
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "cells.json"
        command = [sys.executable, __file__, *options, "--only", isa, "--output", str(output)]
        subprocess.run(command, check=True, env=environment)
        return dict(json.loads(output.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--seconds", type=float, default=0.4, help="of each cell, at least")
    parser.add_argument("--only", metavar="ISA", help="measure in this very process, which runs this instruction set")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    if arguments.only:
        reason = TORCH_CPU.unavailable_because()
        shapes = [(n, k) for n, k in (map(int, shape.split("x")) for shape in arguments.shapes.split(","))]
        rows = [int(m) for m in arguments.rows.split(",")]
        found = {
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "the best"),
            "not_compared_because": reason,
            "cells": [] if reason else measure(shapes, rows, arguments.seconds),
        }
        arguments.output.write_text(json.dumps(found))
        return
    options = ["--rows", arguments.rows, "--shapes", arguments.shapes, "--seconds", str(arguments.seconds)]
    usable = [isa for isa, reason in compiled.instruction_sets().items() if reason is None]
    result = {"machine": describe_machine(), "sets": {isa: _one_set(isa, options) for isa in usable}}
    keep("layout", result, arguments.output)
    print("\n" + summary(result), not_compared(result), sep="\n\n")


if __name__ == "__main__":
    main()

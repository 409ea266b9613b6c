"""One linear layer, float32 in and float32 out: ours through `QuantLinear.forward` against what PyTorch offers.

    python bench/linear.py [--rows 1,4,16] [--shapes 768x768,4096x4096] [--seconds 1] [--peers float32,bf16,...]

All in one process, interleaved call by call, the weights rotating over enough copies to leave the caches at few rows.
Medians and interquartile ranges per cell go to bench/results/MACHINE/linear.json; the two ceilings (int8 products in
registers, a plain read of memory) are measured in every round beside them.

Peers: float32 and bfloat16 `F.linear`; torch.ao dynamic with the engines x86 and onednn (activations per tensor, so its
work is less than ours); torchao's Int8DynamicActivationInt8Weight (per token), eager, and compiled with freezing and
max-autotune; optimum-quanto with calibrated int8 activations.  `ours` is what a user gets, kernel "auto"; beside it
stand every instruction set of our kernel that this CPU has, and `torch_cpu`, our fallback: all return the same bits,
and `auto` should be no slower than any of them beyond noise.

A frozen graph belongs to one weight and one number of rows, and takes three to seven seconds to make.  So torchao is
compiled once a cell, for exactly its shapes, and the weight rotates below it: a frozen weight is a global of the module
that inductor generated, and every call is preceded by putting the next copy there.  That the calls read it is checked
with a weight of zeros.  The alternative, a graph for each copy, runs the same code on the same memory and takes twenty
minutes more; and where many graphs share a code object, Dynamo's guards search through all of them at each call.
"""

import argparse
import math
import statistics
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from machine import describe_machine, keep, versions
from w8a8.kernels import available, compiled
from w8a8.layers.linear import QuantLinear

SHAPES = (
    (768, 768),
    (3072, 768),
    (768, 3072),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
)
ROWS = (1, 4, 16, 64, 256, 1024, 2048)
ROTATED = 96 << 20  # bytes of int8 weights in rotation: three times the last cache here
FEWEST = 5  # rounds of a cell

Layer = Callable[[Tensor], Tensor]


def _torch_ao(linear: nn.Linear, engine: str) -> Layer:
    import torch.ao.nn.quantized.dynamic as dynamic
    from torch.ao.quantization import per_channel_dynamic_qconfig

    torch.backends.quantized.engine = engine
    linear.qconfig = per_channel_dynamic_qconfig
    quantized = dynamic.Linear.from_float(linear)

    def run(x: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        return quantized(x)

    return run


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(linear).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


@contextmanager
def torchao_compiled(weight: Tensor, m: int, copies: int) -> Iterator[list[Layer]]:
    """torchao compiled for m rows: as many layers as there are copies of the weight, freed on leaving."""
    import torch._inductor.config as inductor
    from torch._inductor.codecache import PyCodeCache

    inductor.freezing = True  # as one of torch.compile's options it would come too late
    model = _torchao(copy_of(weight))

    def forward(x: Tensor) -> Tensor:
        return model(x)

    own_code = types.FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    compiled = torch.compile(own_code, dynamic=False, fullgraph=True, mode="max-autotune")
    x = torch.randn(m, weight.shape[1])
    before = set(map(id, PyCodeCache.modules))
    compiled(x)
    (module,) = [vars(module) for module in PyCodeCache.modules if id(module) not in before]
    frozen = {name: value for name, value in module.items() if isinstance(value, Tensor)}

    def layer(constants: dict[str, Tensor]) -> Layer:
        def run(x: Tensor) -> Tensor:
            module.update(constants)
            return compiled(x)

        return run

    zeros = layer({name: torch.zeros_like(value) for name, value in frozen.items()})
    assert not zeros(x).any(), "the weight is not where it was looked for"
    yield [layer({name: value.clone() for name, value in frozen.items()}) for _ in range(copies)]
    module.update(dict.fromkeys(frozen))
    torch._dynamo.reset()


def _quanto(linear: nn.Linear) -> Layer:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = nn.Sequential(linear).eval()
    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(torch.randn(64, linear.in_features))
    freeze(model)
    return lambda x: model(x).dequantize()


def _bf16(linear: nn.Linear) -> Layer:
    weight = linear.weight.to(torch.bfloat16)
    return lambda x: nn.functional.linear(x.to(torch.bfloat16), weight).to(torch.float32)


def _forced(isa: str, linear: nn.Linear) -> Layer:
    """Our kernel in one instruction set."""
    layer = QuantLinear.from_float(linear, kernel="native", strict=True)

    def run(x: Tensor) -> Tensor:
        compiled.use_instruction_set(isa)
        y = layer(x)
        compiled.use_instruction_set(None)
        return y

    return run


HAS_TORCH_CPU = available()["torch_cpu"] is None
PEERS: dict[str, Callable[[nn.Linear], Layer]] = {
    "ours": QuantLinear.from_float,
    **{f"native {isa}": partial(_forced, isa) for isa, reason in compiled.instruction_sets().items() if reason is None},
    **({"torch_cpu": partial(QuantLinear.from_float, kernel="torch_cpu", strict=True)} if HAS_TORCH_CPU else {}),
    "float32": lambda linear: linear,
    "bf16": _bf16,
    "torch.ao x86": lambda linear: _torch_ao(linear, "x86"),
    "torch.ao onednn": lambda linear: _torch_ao(linear, "onednn"),
    "torchao": _torchao,
    "quanto": _quanto,
}
COMPILED = "torchao compiled"
FLOAT, PER_TENSOR = {"float32", "bf16"}, {"torch.ao x86", "torch.ao onednn", "quanto"}
BYTES = {"float32": 4, "bf16": 2}
SLOW = 12.0  # a peer that takes so many times as long as ours is called a third as often


def is_ours(peer: str) -> bool:
    """Whether this is a path of our own."""
    return peer == "torch_cpu" or peer.startswith("native ")


def copy_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear.eval()


def cell(layers: dict[str, list[Layer]], n: int, k: int, m: int, seconds: float, memory: Tensor) -> dict[str, Any]:
    """Measure one shape at one number of rows."""
    x = torch.randn(m, k)
    times: dict[str, list[float]] = {name: [] for name in layers}
    peak, read = [], []
    for copies in layers.values():
        copies[0](x)
        copies[-1](x)
    start, rounds = time.perf_counter(), 0
    while rounds < FEWEST or time.perf_counter() - start < seconds:
        peak.append(compiled.peak_int8_ops(1e-3))
        read.append(compiled.peak_read(memory))
        turn = rounds % len(layers)  # whoever comes first comes after the ceilings, and each comes after another
        for name, copies in [*layers.items()][turn:] + [*layers.items()][:turn]:
            slow = rounds >= 2 and statistics.median(times[name]) > SLOW * statistics.median(times["ours"])
            if slow and rounds % 3:
                continue
            for _ in range(1 if m * n * k > 1e9 else 3):
                layer = copies[len(times[name]) % len(copies)]
                begin = time.perf_counter()
                layer(x)
                times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {
        "n": n,
        "k": k,
        "m": m,
        "rounds": rounds,
        "peak_int8_gops": statistics.median(peak) / 1e9,
        "read_gb_per_s": statistics.median(read) / 1e9,
        "median_ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "quartiles_ms": {name: [1e3 * q for q in _quartiles(t)] for name, t in times.items()},
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def share_of_ceiling(record: dict[str, Any]) -> str:
    """Of the product's ceiling where there are many rows, of the read's where there are few."""
    ms, n, k, m = record["median_ms"]["ours"], record["n"], record["k"], record["m"]
    if m > 8:
        return f"{100 * 2 * m * n * k / (ms * 1e6) / record['peak_int8_gops']:.0f} % of the product"
    return f"{100 * n * k / (ms * 1e6) / record['read_gb_per_s']:.0f} % of the read"


def table(result: dict[str, Any]) -> str:
    """Every cell as Markdown: our median, and how many times as long each peer takes."""
    peers = [name for name in result["peers"] if name != "ours"]
    lines = [
        "| rows | N x K | ours, ms | ceiling reached | " + " | ".join(peers) + " |",
        "|---:|---|---:|---|" + "---:|" * len(peers),
    ]
    for r in sorted(result["cells"], key=lambda r: (r["m"], r["n"] * r["k"], r["n"])):
        ours = r["median_ms"]["ours"]
        ratios = " | ".join(f"{r['median_ms'][p] / ours:.2f}x" for p in peers)
        lines.append(f"| {r['m']} | {r['n']} x {r['k']} | {ours:.4f} | {share_of_ceiling(r)} | {ratios} |")
    return "\n".join(lines)


def ceiling_ms(record: dict[str, Any]) -> float:
    """What the product alone or a read of the weights alone takes at its ceiling, whichever is longer."""
    weights = record["n"] * record["k"]
    product = 2 * record["m"] * weights / record["peak_int8_gops"]
    return float(max(product, weights / record["read_gb_per_s"])) / 1e6


def summary(result: dict[str, Any]) -> str:
    """Geometric means over the cells, by rows and over all, of peer / ours.

    The last column is what the best int8 peer / ours would be for a kernel at 100 % of the ceiling of every cell.
    """
    peers = [name for name in result["peers"] if name != "ours"]
    int8 = [name for name in peers if name not in FLOAT and not is_ours(name)]
    columns = {p: [p] for p in peers}
    columns |= {
        "best of ours": [name for name in peers if is_ours(name)],
        "best int8 peer": int8,
        "best per token": [name for name in int8 if name not in PER_TENSOR],
    }
    columns = {name: group for name, group in columns.items() if group}
    rows = sorted({r["m"] for r in result["cells"]})
    lines = ["| rows | " + " | ".join([*columns, "at the ceiling"]) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    for label, chosen in [*((str(m), [m]) for m in rows), ("all", rows), ("worst cell", rows)]:
        cells = [r for r in result["cells"] if r["m"] in chosen]
        entries = []
        best = [min((r["median_ms"][p] for p in int8), default=math.inf) / ceiling_ms(r) for r in cells]
        every = [
            [min(r["median_ms"][p] for p in names) / r["median_ms"]["ours"] for r in cells]
            for names in columns.values()
        ]
        for ratios in [*every, best]:
            value = min(ratios) if label == "worst cell" else math.exp(statistics.fmean(map(math.log, ratios)))
            entries.append(f"{value:.2f}x")
        lines.append(f"| {label} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each cell, at least")
    parser.add_argument("--peers", default=",".join([*PEERS, COMPILED]))
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations of the peers
    peers = list(dict.fromkeys(["ours", *arguments.peers.split(",")]))
    if unknown := [name for name in peers if name not in {*PEERS, COMPILED}]:
        raise SystemExit(f"unknown peers: {unknown}; there are {', '.join([*PEERS, COMPILED])}")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    memory = torch.ones(256 << 20, dtype=torch.int8)
    cells = []
    with torch.no_grad():
        for n, k in shapes:
            weight = torch.randn(n, k) * 0.02
            copies = max(1, min(96, math.ceil(ROTATED / (n * k))))
            layers = {
                p: [PEERS[p](copy_of(weight)) for _ in range(max(1, copies // BYTES.get(p, 1)))]
                for p in peers
                if p != COMPILED
            }
            for m in map(int, arguments.rows.split(",")):
                with ExitStack() as stack:
                    begin = time.perf_counter()
                    if COMPILED in peers:
                        layers[COMPILED] = stack.enter_context(torchao_compiled(weight, m, copies))
                    compile_s = time.perf_counter() - begin
                    cells.append({**cell(layers, n, k, m, arguments.seconds, memory), "compile_s": compile_s})
                ours = cells[-1]["median_ms"]["ours"]
                ratios = "  ".join(f"{p} {t / ours:.2f}x" for p, t in cells[-1]["median_ms"].items() if p != "ours")
                print(f"{n} x {k}, {m} rows: {ours:.4f} ms, {share_of_ceiling(cells[-1])}; {ratios}", flush=True)
    result = {
        "machine": describe_machine(),
        "versions": versions("torchao", "optimum-quanto"),
        "peers": peers,
        "cells": cells,
    }
    keep("linear", result, arguments.output)
    print("\n" + summary(result))


if __name__ == "__main__":
    main()

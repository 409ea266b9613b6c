"""What calibrating costs beside the forward passes alone, in time and in memory.

    python bench/calibration.py                     measure, and write bench/results/MACHINE/calibration.json
    python bench/calibration.py --part time         one part anew, and keep the other
    python bench/calibration.py --show              print the table of the results that are there

Time: an OPT of OPT-125m's widths with four of its twelve layers and a small vocabulary, random weights; windows of 512
tokens.  The forward passes alone, and the same passes with each kind of statistic on the input of every linear layer,
take turns, one batch at a time; a ratio is the median over the batches of the ratios to the passes alone.

Memory: a process of its own for each number of batches.  How far the peak of resident memory (VmHWM of Linux, set back
by clear_refs) rises over what the process holds before the first pass.  Two layers, windows of 64 tokens.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from machine import describe_machine, keep, kept, results_of
from w8a8.calibration.calibrate import collect
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import MSE, AbsMax, MinMax, Percentile
from w8a8.calibration.reservoir import Reservoir
from w8a8.core.scheme import PerChannel

LENGTH, MEMORY_LENGTH = 512, 64
BATCHES = (8, 64, 512)

STATISTICS: dict[str, Callable[[], Any]] = {
    "absmax": AbsMax,
    "minmax": MinMax,
    "absmax per channel": lambda: AbsMax(PerChannel()),
    "absmax per channel, 512 tokens kept": lambda: (AbsMax(PerChannel()), Reservoir(512)),
    "percentile": Percentile,
    "mse": MSE,
}
ALONE = "passes alone"
MEASURED = (ALONE, "absmax", "absmax per channel, 512 tokens kept", "percentile")
"""Those whose memory is measured."""


def model(layers: int) -> nn.Module:
    """OPT-125m's widths."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=2048,
        hidden_size=768,
        ffn_dim=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=2048,
        word_embed_proj_dim=768,
    )
    return OPTForCausalLM(config).eval()


def wanted(net: nn.Module, make: Callable[[], Any]) -> dict[str, Any]:
    """Statistics for the input of every linear layer but the head."""
    return {name: make() for name, m in net.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def measure_time(rounds: int) -> dict[str, Any]:
    """Milliseconds of one batch, each kind in turn."""
    net = model(layers=4)
    batches = [Calibration.of([{"input_ids": ids}]) for ids in torch.randint(0, 2048, (rounds + 1, 1, LENGTH)).unbind()]
    kept = {name: wanted(net, make) for name, make in STATISTICS.items()}
    times: dict[str, list[float]] = {name: [] for name in (ALONE, *STATISTICS)}
    for calibration in batches:
        for name, values in times.items():
            start = time.perf_counter()
            if name == ALONE:
                calibration.run(net)
            else:
                collect(net, calibration, kept[name])
            values.append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}  # the first round warms


def resident_mib(field: str) -> float:
    """VmRSS, what the process holds now, or VmHWM, its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure_memory(name: str, count: int) -> float:
    """MiB by which this process rises while it calibrates; run in a process of its own."""
    net = model(layers=2)
    batches = [{"input_ids": ids} for ids in torch.randint(0, 2048, (count, 1, MEMORY_LENGTH)).unbind()]
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    if name == ALONE:
        Calibration.of(batches).run(net)
    else:
        collect(net, Calibration.of(batches), wanted(net, STATISTICS[name]))
    return resident_mib("VmHWM") - before


def in_process(name: str, count: int) -> float:
    """`measure_memory` in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--batches", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(result: dict[str, Any]) -> str:
    """Both measurements as Markdown."""
    times = result["milliseconds"]
    counts = [str(count) for count in result["batches"]]
    lines = [
        "| statistic | ms a batch | passes alone x | "
        + " | ".join(f"peak MiB, {count} batches" for count in counts)
        + " |",
        "|---|---:|---:|" + "---:|" * len(counts),
    ]
    for name, values in times.items():
        ratio = statistics.median([ms / alone for ms, alone in zip(values, times[ALONE], strict=True)])
        peaks = result.get("peak_mib", {}).get(name)
        cells = ["" if peaks is None else f"{peaks[count]:.1f}" for count in counts]
        lines.append(f"| {name} | {statistics.median(values):.1f} | {ratio:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--part", choices=["time", "memory", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=15, help="batches that each kind is timed on")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(measure_memory(arguments.memory_of, arguments.batches))
        return
    if arguments.show:
        print(table(results_of("calibration")[0]))
        return
    result = kept("calibration")
    result |= {"machine": describe_machine(), "batches": list(BATCHES)}
    if arguments.part != "memory":
        result["milliseconds"] = measure_time(arguments.rounds)
    if arguments.part != "time":
        result["peak_mib"] = {name: {str(count): in_process(name, count) for count in BATCHES} for name in MEASURED}
    keep("calibration", result)
    print(table(result))


if __name__ == "__main__":
    main()

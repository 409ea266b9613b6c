"""Going block by block with calibration data, smoothing or not, beside the same in memory.

    python bench/blocks.py                    measure, and write bench/results/MACHINE/blocks.json
    python bench/blocks.py --before PATH      with the sources of another version too (the src of a checkout)
    python bench/blocks.py --show             print the table of the results that are there

A random Llama in bfloat16, static scales, windows of random tokens.  Every job is a process of its own with one
thread; all run in turn, several rounds, and medians count.  `seconds` are those of the wall clock from the call to the
saved result, without imports, `cpu` those of the processor, and `search` what of them went into the search of alpha.
What was predicted is compared with what came after the forecast.  Peaks are of resident memory, mapped files included;
what the imports took is listed beside them.  One job writes to a file system in memory, where there is one: activations
that pass from block to block are synced to the disk, and this bounds what that costs.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, keep, results_of

ROOT = Path(__file__).parents[1]
MEMORY_DISK = Path("/dev/shm")
WINDOW, BATCH, VOCABULARY = 256, 4, 2048
WAYS = ("none", "0.5", "searched")


def make(directory: Path, layers: int, hidden: int) -> None:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def job(kind: str, way: str, source: Path, target: Path, windows: int) -> dict[str, Any]:
    """One job, in this process."""
    import torch

    import w8a8
    from w8a8.calibration.data import Calibration
    from w8a8.checkpoint.opening import open_model
    from w8a8.smoothing import smoother as smoothing

    torch.set_num_threads(1)
    smooth: Any = way if way in ("none", "searched") else float(way)
    ids = torch.randint(3, VOCABULARY, (windows * WINDOW,), generator=torch.Generator().manual_seed(1))
    data = Calibration.of(ids, samples=windows, length=WINDOW, batch_size=BATCH)
    searched, search = [0.0], smoothing.search

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return search(*args, **kwargs)
        finally:
            searched[0] += time.process_time() - start

    smoothing.search = timed
    imported = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    told: dict[str, Any] = {}
    if kind == "memory":
        model = open_model(source).model
        w8a8.quantize(model, "w8a8-static", calibration=data, smooth=smooth)
        w8a8.save(model, target)
    else:
        forecast: list[float] = []

        def before(plan: Any, prediction: Any) -> None:
            forecast.append(time.perf_counter())

        done = w8a8.quantize_directory(source, target, "w8a8-static", calibration=data, smooth=smooth, before=before)
        told = {"predicted": done.prediction.seconds, "after_forecast": time.perf_counter() - forecast[0]}
        told["predicted_peak"] = done.prediction.peak_bytes
    told |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "search": searched[0]}
    return told | {"peak_bytes": _peak(), "imported_bytes": imported}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All jobs, in turn, several rounds."""
    memory_disk = MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    jobs = [(f"{kind} {way}", kind, way, ROOT / "src", None) for way in WAYS for kind in ("blocks", "memory")]
    if arguments.before is not None:
        jobs += [(f"before {way}", "blocks", way, arguments.before, None) for way in WAYS]
    if memory_disk is not None:
        jobs += [("blocks none, files in memory", "blocks", "none", ROOT / "src", memory_disk)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in jobs}
    with tempfile.TemporaryDirectory(dir=arguments.place) as temporary:
        source = Path(temporary) / "source"
        make(source, arguments.layers, arguments.hidden)
        results: dict[str, bytes] = {}
        for number in range(arguments.rounds):
            for name, kind, way, sources, place in jobs if number % 2 == 0 else jobs[::-1]:
                with tempfile.TemporaryDirectory(dir=place or temporary) as there:
                    target = Path(there) / "out"
                    runs[name].append(_in_a_process(kind, way, source, target, arguments.windows, sources))
                    results[name] = _tensors(target)
                print(name, {k: round(v, 2) for k, v in runs[name][-1].items() if "bytes" not in k}, flush=True)
    return {
        "machine": describe_machine(),
        "layers": arguments.layers,
        "hidden": arguments.hidden,
        "windows": arguments.windows,
        "rounds": arguments.rounds,
        "equal_to_memory": {way: results[f"blocks {way}"] == results[f"memory {way}"] for way in WAYS},
        "runs": {name: _median(told) for name, told in runs.items()},
    }


def _in_a_process(kind: str, way: str, source: Path, target: Path, windows: int, sources: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", kind, way, str(source), str(target), str(windows)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _tensors(directory: Path) -> bytes:
    """A digest of all tensors by name, however they are spread over files."""
    import torch
    from safetensors.torch import load_file

    found = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    whole = hashlib.sha256()
    for name in sorted(found):
        data: Any = found[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(f"{name} {found[name].dtype} {tuple(found[name].shape)} ".encode() + data.tobytes())
    return whole.digest()


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def table(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    runs = result["runs"]
    lines = [
        f"{result['layers']} blocks {result['hidden']} wide, {result['windows']} windows of {WINDOW} tokens, bfloat16, "
        f"w8a8-static, one thread, medians of {result['rounds']}:",
        "",
        "| job | seconds | CPU s | of them search | predicted / measured | peak MB | imports MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        ratio = f"{run['predicted'] / run['after_forecast']:.2f}" if "predicted" in run else ""
        lines.append(
            f"| {name} | {run['seconds']:.1f} | {run['cpu']:.1f} | {run['search']:.1f} | {ratio} | "
            f"{run['peak_bytes'] / 1e6:.0f} | {run['imported_bytes'] / 1e6:.0f} |"
        )
    plain = runs["blocks none"]["cpu"]
    for way in WAYS[1:]:
        rest = runs[f"blocks {way}"]["cpu"] - runs[f"blocks {way}"]["search"]
        lines.append(f"\nWithout its search, {way} takes {rest / plain:.2f} times the CPU time of no smoothing.")
    lines.append(f"\nTensors equal to those made in memory: {result['equal_to_memory']}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="the src of another version")
    parser.add_argument("--place", type=Path, help="where the files lie meanwhile; the default is the system's")
    arguments = parser.parse_args()
    if arguments.job is not None:
        kind, way, source, target, windows = arguments.job
        print(json.dumps(job(kind, way, Path(source), Path(target), int(windows))))
        return
    if arguments.show:
        result = results_of("blocks")[0]
    else:
        result = measure(arguments)
        keep("blocks", result)
    print(table(result))


if __name__ == "__main__":
    main()

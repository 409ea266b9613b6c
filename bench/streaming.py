"""A 7B-shaped checkpoint quantised from files to files, beside a plain copy and llm-compressor's model-free path.

    python bench/streaming.py                       measure, and write bench/results/MACHINE/streaming.json
    python bench/streaming.py --layers 2            a smaller model, to try
    python bench/streaming.py --peer-python PATH    with llm-compressor, in the environment of that interpreter
    python bench/streaming.py --show                print the table of the results that are there

The checkpoint is random, in the shapes of Llama-2-7B, bfloat16, in shards of 5 GB; it and what is made of it are
deleted at the end.  Every run is a process tree of its own, started with a cold page cache where the system lets us
drop it, and ended when its files are on the disk (fsync).  Memory is read from /proc every 50 ms, summed over the tree:
anonymous pages (RssAnon) are the process's own, file pages (RssFile) are libraries and mappings, shared and given up
under pressure.

Three baselines tell what is possible: a plain copy that reads the source and writes as many bytes as the result has;
the copy of the source to itself; and the arithmetic alone, on tensors in memory.  The efficiency is
(copy + arithmetic) / ours.  All but the peer run in turn, three times.

llm-compressor's `model_free_ptq` takes the scheme "INT8": weights per channel and symmetric, activations per token.  It
writes to its directory without fsync; the sync is counted in, as for the others.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from machine import describe_machine, keep, results_of

ROOT = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
_SHARD = 5_000_000_000
_CHUNK = 8 << 20
COPY = "plain copy, as many bytes written"
_PAGES = Path("/proc/sys/vm/drop_caches")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of the files."""
    h, i, v = HIDDEN, INTERMEDIATE, VOCABULARY
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        found |= {f"{layer}.self_attn.{p}_proj.weight": (h, h) for p in "qkvo"}
        found |= {f"{layer}.mlp.{p}_proj.weight": (i, h) for p in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (h, i)
        found |= {f"{layer}.{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


def make(directory: Path, layers: int) -> int:
    """Write the checkpoint; its bytes.  The values repeat after 64 Mi, which no run knows."""
    import torch
    from transformers import LlamaConfig

    from w8a8.checkpoint.files import INDEX
    from w8a8.checkpoint.headers import header_of

    torch.manual_seed(0)
    pool = (torch.randn(64 << 20) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(layers).items():
        count = 2 * torch.Size(shape).numel()
        if size + count > _SHARD:
            groups.append([])
            size = 0
        groups[-1].append((name, torch.bfloat16, shape))
        size += count
    files = {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}
    total, position = 0, 0
    for file, group in files.items():
        text, entries = header_of(group)
        with (directory / file).open("wb") as out:
            out.write(text)
            for entry in entries.values():
                left = entry.bytes
                while left:
                    part = memoryview(pool)[position : position + left]
                    out.write(part)
                    left -= len(part)
                    position = (position + len(part)) % len(pool)
            os.fsync(out.fileno())
        total += (directory / file).stat().st_size
    weight_map = {name: file for file, group in files.items() for name, _, _ in group}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def copy(source: Path, target: Path, most: int) -> None:
    """Read every byte of the source, and write the first `most` of them."""
    target.mkdir()
    left = most
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as out:
            while data := file.read(_CHUNK):
                out.write(data[:left])
                left -= min(left, len(data))
            os.fsync(out.fileno())


def arithmetic(layers: int) -> float:
    """Seconds of quantising the weights of so many layers, one layer's being in memory."""
    import torch

    from w8a8.core.scheme import Scheme
    from w8a8.layers.weights import quantize_weight

    spec = Scheme.of("w8a8").weights
    names = [(name, shape) for name, shape in shapes(1).items() if "_proj" in name]
    weights = [(torch.randn(shape) * 0.02).to(torch.bfloat16) for _, shape in names]
    for weight in weights:
        quantize_weight(weight, spec)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for weight in weights:
            quantize_weight(weight, spec)
        times.append(time.perf_counter() - start)
    return layers * sorted(times)[1]


def llmcompressor(source: str, target: str) -> None:
    """The peer, in its own environment."""
    from llmcompressor import model_free_ptq

    model_free_ptq(model_stub=source, save_directory=target, scheme="INT8", ignore=["lm_head"], device="cpu")
    for path in Path(target).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def tree(root: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def resident(processes: list[int]) -> dict[str, int]:
    """Bytes of anonymous and of file pages, summed over processes."""
    total = {"RssAnon": 0, "RssFile": 0}
    for process in processes:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        for kind in total:
            if told := re.search(rf"{kind}:\s+(\d+) kB", status):
                total[kind] += int(told[1]) * 1024
    return total


@contextmanager
def emptied(*directories: Path) -> Iterator[None]:
    """Start cold, and remove what was made."""
    subprocess.run(["sync"], check=True)
    if os.access(_PAGES, os.W_OK):
        _PAGES.write_text("1")
    try:
        yield
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def run(command: list[str], target: Path) -> dict[str, Any]:
    """Seconds, peak memory and bytes written of a command that fills a directory."""
    with emptied(target), tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=told, stderr=told, cwd=ROOT)
        peak = {"RssAnon": 0, "RssFile": 0, "Rss": 0}
        looks = 0
        while process.poll() is None:
            if looks % 10 == 0:  # looking for new processes takes longer than looking at those that are known
                known = tree(process.pid)
            looks += 1
            now = resident(known)
            now["Rss"] = now["RssAnon"] + now["RssFile"]
            peak = {kind: max(peak[kind], now[kind]) for kind in peak}
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"{command[:6]} failed:\n{told.read().decode()[-3000:]}")
        written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {
        "seconds": seconds,
        "written_bytes": written,
        "peak_bytes": peak["Rss"],
        "peak_anonymous_bytes": peak["RssAnon"],
        "peak_file_bytes": peak["RssFile"],
    }


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, with the times and the highest peaks of all."""
    middle = dict(sorted(runs, key=lambda told: told["seconds"])[(len(runs) - 1) // 2])
    middle |= {key: max(told[key] for told in runs) for key in middle if key.startswith("peak")}
    return {**middle, "all_seconds": [told["seconds"] for told in runs]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after the other."""
    python, script = sys.executable, str(Path(__file__))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        source, target = Path(place, "source"), Path(place, "target")
        source.mkdir()
        size = make(source, arguments.layers)
        quantize = ["-m", "w8a8", "quantize", str(source), "-o", str(target), "--json"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        result_bytes = run([python, *quantize], target)["written_bytes"]  # not counted: it warms up
        mine = [python, script, "--child", "copy", str(source), str(target)]
        commands = {
            "ours, 1 process": [python, *quantize],
            COPY: [*mine, str(result_bytes)],
            "ours, 2 processes": [python, *torchrun, *quantize],
            "plain copy of the source": [*mine, str(size)],
        }
        rounds = [{name: run(command, target) for name, command in commands.items()} for _ in range(arguments.rounds)]
        runs = {name: median([told[name] for told in rounds]) for name in commands}
        versions = {}
        if arguments.peer_python:
            peer = [arguments.peer_python, script, "--child", "llmcompressor", str(source), str(target), "0"]
            runs["llm-compressor model_free_ptq"] = median([run(peer, target)])
            versions = peer_versions(arguments.peer_python)
        alone = arithmetic(arguments.layers)
        start = run([python, "-c", "import torch, transformers, w8a8.streaming"], target)["seconds"]
    return {
        "machine": describe_machine(),
        "versions": versions,
        "layers": arguments.layers,
        "source_bytes": size,
        "largest_tensor_bytes": 2 * VOCABULARY * HIDDEN,
        "cold": os.access(_PAGES, os.W_OK),
        "arithmetic_seconds": alone,
        "import_seconds": start,
        "runs": runs,
    }


def peer_versions(python: str) -> dict[str, str]:
    """The versions in the peer's environment."""
    code = "from importlib.metadata import version; print(version('llmcompressor'), version('compressed-tensors'))"
    told = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("llm-compressor", "compressed-tensors"), told, strict=True))


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    runs, size = result["runs"], result["source_bytes"]
    bound = runs[COPY]["seconds"] + result["arithmetic_seconds"]
    lines = [
        "| run | seconds | all rounds | GB of the source per second | (copy + arithmetic) / run | peak memory "
        "| of it anonymous | of it files | GB written |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, told in runs.items():
        share = "" if "copy" in name else f"{bound / told['seconds']:.0%}"
        cells = (
            f"{told['seconds']:.1f}",
            ", ".join(f"{seconds:.1f}" for seconds in told["all_seconds"]),
            f"{size / told['seconds'] / 1e9:.2f}",
            share,
            *(f"{told[key] / 1e6:,.0f} MB" for key in ("peak_bytes", "peak_anonymous_bytes", "peak_file_bytes")),
            f"{told['written_bytes'] / 1e9:.2f}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(result: dict[str, Any]) -> str:
    """What stands before the table."""
    largest, size = result["largest_tensor_bytes"], result["source_bytes"]
    return (
        f"A random checkpoint in the shapes of Llama-2-7B, {result['layers']} layers, {size / 1e9:.1f} GB of bfloat16; "
        f"each run goes from a {'cold' if result['cold'] else 'warm'} page cache to files that are synced. The "
        f"arithmetic alone takes {result['arithmetic_seconds']:.1f} s; imports, {result['import_seconds']:.1f} s, are "
        "in every run of ours. Times are medians of rounds in turn; the peer ran once. Peaks are sums over the "
        "processes of a run, each kind's own, the highest of all rounds; the largest tensor has "
        f"{largest / 1e6:.0f} MB, so that the bound is {(3 * largest + 500e6) / 1e6:,.0f} MB for each process."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the table of the results that are there")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where the checkpoint is made; needs 35 GB for the whole")
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor")
    parser.add_argument("--child", nargs=4, metavar=("RUN", "SOURCE", "TARGET", "BYTES"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    if arguments.child:
        name, source, target, most = arguments.child
        children: dict[str, Callable[[], None]] = {
            "copy": lambda: copy(Path(source), Path(target), int(most)),
            "llmcompressor": lambda: llmcompressor(source, target),
        }
        children[name]()
        return
    if arguments.show:
        result = results_of("streaming")[0]
    else:
        result = measure(arguments)
        keep("streaming", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

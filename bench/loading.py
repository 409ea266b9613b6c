"""How fast a W8A8 directory is opened, or a float one quantised, and what it takes in memory.

    python bench/loading.py [--rounds 3] [--layers 22] [--directory DIR]

A Llama of TinyLlama's shape with random weights is quantised and written; then processes take turns: a plain read of
the same bytes into one buffer, as much new memory filled on small pages and on large ones, ours with the native
kernel (packs while loading, onto large pages, which decoding wants), the same on small pages, ours with torch_cpu
(weights stay the files' pages), and transformers with compressed-tensors, which decompresses at the first forward.
Of the float directory, in bfloat16, three ways to a model that has made its first forward: as it is, quantised while
transformers loads it, and quantised after that.  Where a hypervisor takes idle memory back, new large pages are what
costs: the row of large pages filled is the bound of packing.  The files are in the page cache.  Memory is the peak
resident size over that after the imports; pages of mapped files count as long as they are mapped, though processes
share them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import w8a8
from machine import describe_machine, keep
from w8a8.kernels import compiled

WAYS = {
    "a plain read": "plain",
    "new memory, filled": "fresh",
    "new memory on large pages, filled": "fresh_large",
    "ours, native: packs while loading": "native",
    "ours, native, on small pages": "native_small",
    "ours, torch_cpu: mapped": "torch_cpu",
    "transformers, decompressed to float": "transformers",
}
FLOAT_WAYS = {
    "transformers, bfloat16 as it is": "float",
    "ours: from_pretrained(..., quantization_config=W8A8Config())": "while_loading",
    "ours: from_pretrained, then w8a8.quantize": "after_loading",
}
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def write(directory: Path, layers: int) -> None:
    """The random model in bfloat16, sharded as large models are, in `float`, and quantised in `int8`."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": layers}
    config = transformers.LlamaConfig(**shape, dtype="bfloat16", tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory / "float", max_shard_size="500MB")
    w8a8.save(w8a8.quantize(model.eval()).model, directory / "int8")


def resident() -> int:
    """Bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def resident_peak() -> int:
    """Bytes at most since `clear_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def clear_peak() -> None:
    """Have the peak be what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


@torch.inference_mode()
def open_once(way: str, directory: Path) -> dict[str, float]:
    """Open the directory, and tell seconds and bytes at the peak over those before."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    w8a8.kernels.available()
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 8})
    )  # imports
    clear_peak()
    before, start = resident(), time.perf_counter()
    if way == "plain":
        for path in sorted(directory.glob("*.safetensors")):
            buffer = bytearray(64 << 20)
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    elif way == "transformers":
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        model(ids)
    elif way in FLOAT_WAYS.values():
        quantization = {"quantization_config": w8a8.W8A8Config("w8a8")} if way == "while_loading" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, **quantization)
        if way == "after_loading":
            w8a8.quantize(model, "w8a8")
        model(ids)
    elif way in ("fresh", "fresh_large"):
        room = torch.empty(sum(path.stat().st_size for path in directory.glob("*.safetensors")), dtype=torch.int8)
        if way == "fresh_large":
            compiled.loaded().advise_huge(room.data_ptr(), room.numel())
        room.fill_(1)
    else:
        if way == "native_small":
            compiled.loaded().advise_huge = lambda *_: 0
        w8a8.load(directory, kernel=way.removesuffix("_small"), strict=True)
    return {"seconds": time.perf_counter() - start, "peak_bytes": resident_peak() - before}


def in_a_process(way: str, directory: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", way, "--directory", str(directory)]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def size_of(directory: Path) -> int:
    """Bytes of its weights."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    return _rows(result["ways"], result["bytes"])


def quantising_table(result: dict[str, Any]) -> str:
    """Markdown, of the float directory."""
    return _rows(result["float_ways"], result["float_bytes"])


def _rows(ways: dict[str, list[dict[str, float]]], size: int) -> str:
    lines = ["| | seconds | GB/s | peak memory, times the files |", "|---|---|---|---|"]
    for way, runs in ways.items():
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        peak = statistics.median(run["peak_bytes"] for run in runs)
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        lines.append(f"| {way} | {middle:.2f} ({spread}) | {size / middle / 1e9:.2f} | {peak / size:.2f} |")
    return "\n".join(lines)


def in_turn(ways: dict[str, str], directory: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every way in every round."""
    in_a_process("plain", directory)  # into the page cache
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(in_a_process(way, directory))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="Where the model is, or is made; a temporary one by default.")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="Fewer are only a trial.")
    parser.add_argument("--child", choices=[*WAYS.values(), *FLOAT_WAYS.values()], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(open_once(arguments.child, arguments.directory)))
        return
    with tempfile.TemporaryDirectory() as room:
        directory = arguments.directory or Path(room) / "model"
        if not directory.exists():
            write(directory, arguments.layers)
        result = {
            "machine": describe_machine(),
            "bytes": size_of(directory / "int8"),
            "ways": in_turn(WAYS, directory / "int8", arguments.rounds),
            "float_bytes": size_of(directory / "float"),
            "float_ways": in_turn(FLOAT_WAYS, directory / "float", arguments.rounds),
        }
    if arguments.layers == SHAPE["num_hidden_layers"]:
        keep("loading", result)
    print(table(result), quantising_table(result), sep="\n\n")


if __name__ == "__main__":
    main()

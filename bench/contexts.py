"""Decoding after short and long contexts with each cache, beside llama.cpp, and what share of memory's rate that is.

    python bench/contexts.py [--models opt-125m,tinyllama-1.1b] [--jobs 1x256,8x256,1x4096] [--seconds 12]

A job is a batch and a context: so many sequences write one token after another, greedy, after so many tokens each.  Our
contexts are random keys and values; llama.cpp (`gguf_peer`) reads random tokens.  All are in memory together and take
turns of eight tokens; after 64 each goes back to the end of its context.  Ours have the head in int8 and differ in the
cache: transformers' own, blocks, int8 with attention that reads it.

What is read for a token are the codes of all layers, once for all sequences, and keys and values: float32, int8 with
scales, or llama.cpp's float16; a share is that over what a plain read of memory by as many threads takes, which is
measured between the turns.  Results go to bench/results/MACHINE/contexts.json, and from there to docs/performance.md.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

import gguf_peer
import w8a8
from machine import describe_machine, keep, versions
from model import LLAMA_CPP, MODELS, TURN, WINDOW, Eager, Variant
from w8a8.decoding.attention import NAME
from w8a8.kernels import compiled
from w8a8.layers.linear import quant_linears

CACHES: dict[str, tuple[type[Cache], str]] = {
    "ours, dynamic": (DynamicCache, "sdpa"),
    "ours, block": (w8a8.BlockCache, "sdpa"),
    "ours, int8": (w8a8.Int8Cache, NAME),
}
BYTES = {"ours, dynamic": 4.0, "ours, block": 4.0, "ours, int8": 1.0, LLAMA_CPP: 2.0}  # of a key's or value's element
MEMORY = 1 << 30  # bytes that are read to see how fast that is


class After(Eager):
    """A model that writes after random keys and values, with one of the caches."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model)
        self._kind, self._attention = CACHES[name]

    def start(self, ids: Tensor, room: int) -> None:
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (*ids.shape[:1], heads, ids.shape[1], config.hidden_size // config.num_attention_heads)
        self.cache = self._kind(config=config)
        for layer in range(config.num_hidden_layers):
            self.cache.update(torch.randn(shape), torch.randn(shape), layer)
        self.prompt = self.position = ids.shape[1]
        self.next = ids[:, -1:]
        self.tokens(3)  # a cache in int8 sees which attention there is
        self.rewind()

    def tokens(self, count: int) -> list[float]:
        self.model.set_attn_implementation(self._attention)
        return super().tokens(count)


def bytes_read(model: Any, name: str, batch: int, context: int) -> float:
    """What a step of all sequences reads at least."""
    config = model.config
    codes = sum(layer.out_features * layer.in_features for _, layer in quant_linears(model))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    scales = 4 if name == "ours, int8" else 0
    kept = 2 * config.num_hidden_layers * heads * context * (width * BYTES[name] + scales)
    return (codes * (1 + 2 / 32) if name == LLAMA_CPP else codes) + batch * kept


@torch.inference_mode()
def decode(
    variants: dict[str, Variant], ids: Tensor, seconds: float, read: Callable[[], float]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step of each variant, and the rates of reading."""
    for variant in variants.values():
        variant.start(ids, ids.shape[1] + WINDOW)
    times: dict[str, list[float]] = {name: [] for name in variants}
    rates: list[float] = []
    start, turns = time.perf_counter(), 0
    while turns < WINDOW // TURN or time.perf_counter() - start < seconds:
        rates.append(read())
        for name, variant in variants.items():
            times[name] += variant.tokens(TURN)
        turns += 1
        if turns % (WINDOW // TURN) == 0:
            for variant in variants.values():
                variant.rewind()
    for variant in variants.values():
        variant.stop()
    return times, rates


def measured(name: str, jobs: list[tuple[int, int]], seconds: float, peer: bool) -> list[dict[str, Any]]:
    """One model, job by job."""
    torch.manual_seed(0)
    model = MODELS[name](max(context for _, context in jobs) + 2 * WINDOW).eval()
    config = model.config
    w8a8.quantize(model, head="int8")
    memory = torch.zeros(MEMORY, dtype=torch.int8)
    found = []
    with ExitStack() as stack:
        variants: dict[str, Variant] = {cache: After(model, cache) for cache in CACHES}
        if peer:
            variants[LLAMA_CPP] = stack.enter_context(gguf_peer.llama_cpp(config, torch.get_num_threads()))
        for batch, context in jobs:
            ids = torch.randint(0, config.vocab_size, (batch, context))
            times, rates = decode(variants, ids, seconds, lambda: compiled.peak_read(memory))
            rate = statistics.median(rates)
            step = {each: statistics.median(values) for each, values in times.items()}
            row = {
                "model": name,
                "batch": batch,
                "context": context,
                "read_gb_per_s": rate / 1e9,
                "tok_per_s": {each: batch / value for each, value in step.items()},
                "share_of_read": {
                    each: bytes_read(model, each, batch, context) / value / rate for each, value in step.items()
                },
                "seconds": times,
            }
            print({key: value for key, value in row.items() if key != "seconds"}, flush=True)
            found.append(row)
    return found


def table(result: dict[str, Any]) -> str:
    """Tokens per second, and in brackets the share of memory's rate, as Markdown."""
    names = list(result["rows"][0]["tok_per_s"])
    ours = [name for name in names if name != LLAMA_CPP]
    peer = LLAMA_CPP in names
    lines = [
        "| model | batch | context | " + " | ".join(names) + " | memory, GB/s |" + " best of ours |" * peer,
        "|---|---:|---:|" + "---:|" * (len(names) + 1 + peer),
    ]
    for row in result["rows"]:
        cells = [f"{row['tok_per_s'][name]:.1f} ({100 * row['share_of_read'][name]:.0f} %)" for name in names]
        cells.append(f"{row['read_gb_per_s']:.1f}")
        if peer:
            best = max(row["tok_per_s"][name] for name in ours)
            cells.append(f"{best / row['tok_per_s'][LLAMA_CPP]:.2f}x")
        lines.append(f"| {row['model']} | {row['batch']} | {row['context']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--jobs", default="1x256,8x256,1x4096", help="batch x context, with commas between them")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each job, at least")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    jobs = [(int(batch), int(context)) for batch, context in (job.split("x") for job in arguments.jobs.split(","))]
    reason = gguf_peer.unavailable_because()
    if reason:
        print(f"{LLAMA_CPP} is left out: {reason}")
    rows = []
    for name in arguments.models.split(","):
        rows += measured(name, jobs, arguments.seconds, peer=not reason)
        gc.collect()
        result = {"machine": describe_machine(), "versions": versions("llama-cpp-python"), "rows": rows}
        keep("contexts", result, arguments.output)  # after each model: a run that is cut leaves what it has
    print("\n" + table(result))


if __name__ == "__main__":
    main()

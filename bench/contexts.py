"""Decoding after short and long contexts with each cache, beside llama.cpp, and what share of memory's rate that is.

    python bench/contexts.py [--models opt-125m,tinyllama-1.1b] [--jobs 1x256,8x256,1x4096] [--seconds 12]
                             [--layers 4 --compiled "ours, compiled;compiled, sdpa"]

A job is a batch and a context: so many sequences write one token after another, greedy, after so many tokens each.  Our
contexts are random keys and values; llama.cpp (`gguf_peer`) reads random tokens.  All are in memory together and take
turns of eight tokens; after 64 each goes back to the end of its context.  Ours have the head in int8 and differ in the
cache: transformers' own, blocks, int8 with attention that reads it.  What is compiled is
`torch.compile(model.forward, dynamic=False, fullgraph=True)` with transformers' StaticCache, which has room for those
64 tokens and is attended to in all of it, masked: with attention "w8a8", and, of several sequences and heads that share
keys, with transformers' "sdpa".  A graph of all layers takes minutes on a busy machine, so it is measured of a few.

What is read for a token are the codes of all layers, once for all sequences, and keys and values: float32, int8 with
scales, or llama.cpp's float16; a share is that over what a plain read of memory by as many threads takes, which is
measured between the turns.  With one thread every clock is that of processor time.  Rows take the place of those of the
same job in bench/results/MACHINE/contexts.json, and go from there to docs/performance.md.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import gguf_peer
import w8a8
from machine import describe_machine, keep, kept, versions
from model import LLAMA_CPP, MODELS, TURN, WINDOW, Eager, Variant
from together import shortened
from w8a8.decoding.attention import NAME
from w8a8.kernels import compiled, native
from w8a8.layers.linear import quant_linears

CACHES: dict[str, tuple[type[Cache], str]] = {
    "ours, dynamic": (DynamicCache, "sdpa"),
    "ours, block": (w8a8.BlockCache, "sdpa"),
    "ours, int8": (w8a8.Int8Cache, NAME),
}
COMPILED = {"ours, compiled": NAME, "compiled, sdpa": "sdpa"}
BYTES = {"ours, int8": 1.0, LLAMA_CPP: 2.0}  # of a key's or value's element; of others four
MEMORY = 1 << 30  # bytes that are read to see how fast that is


def clock() -> Callable[[], float]:
    """Of processor time with one thread, which does not run while another process has the core; else of the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def rate_of(memory: Tensor) -> float:
    """Bytes per second of a plain read."""
    if torch.get_num_threads() > 1:
        return compiled.peak_read(memory)
    begin = time.process_time()
    compiled.peak_read(memory)
    return memory.numel() / (time.process_time() - begin)


class After(Eager):
    """A model that writes after random keys and values, with one of the caches."""

    def __init__(self, model: Any, kind: type[Cache], attention: str) -> None:
        super().__init__(model)
        self._kind, self._attention = kind, attention

    def _empty_cache(self, room: int) -> Any:
        return self._kind(config=self.model.config)

    def start(self, ids: Tensor, room: int) -> None:
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (*ids.shape[:1], heads, ids.shape[1], config.hidden_size // config.num_attention_heads)
        self.cache = self._empty_cache(room)
        for layer in range(config.num_hidden_layers):
            self.cache.update(torch.randn(shape), torch.randn(shape), layer)
        self.prompt = self.position = ids.shape[1]
        self.next = ids[:, -1:]
        self.tokens(3)  # a cache in int8 sees which attention there is
        self.rewind()

    def tokens(self, count: int) -> list[float]:
        self.model.set_attn_implementation(self._attention)
        now, seconds = clock(), []
        for _ in range(count):
            begin = now()
            self.next = self._step(self._decode, self.next)
            seconds.append(now() - begin)
        return seconds


class Static(After):
    """And compiled, with a cache of fixed size."""

    def __init__(self, model: Any, attention: str) -> None:
        super().__init__(model, StaticCache, attention)
        self._compiled: Callable[..., Any] | None = None

    def _empty_cache(self, room: int) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=room)

    @property
    def _decode(self) -> Callable[..., Any]:
        if self._compiled is None:
            self._compiled = torch.compile(self.model.forward, dynamic=False, fullgraph=True)
        return self._compiled

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
        self.position = self.prompt

    def stop(self) -> None:
        super().stop()
        self._compiled = None
        torch._dynamo.reset()


def bytes_read(model: Any, name: str, batch: int, context: int) -> float:
    """What a step of all sequences reads at least."""
    config = model.config
    codes = sum(layer.out_features * layer.in_features for _, layer in quant_linears(model))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    scales = 4 if name == "ours, int8" else 0
    kept = 2 * config.num_hidden_layers * heads * context * (width * BYTES.get(name, 4.0) + scales)
    return (codes * (1 + 2 / 32) if name == LLAMA_CPP else codes) + batch * kept


@torch.inference_mode()
def decode(
    variants: dict[str, Variant], ids: Tensor, seconds: float, read: Callable[[], float]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step of each variant, and the rates of reading."""
    for name, variant in variants.items():
        begin = time.perf_counter()
        variant.start(ids, ids.shape[1] + WINDOW)
        print(f"{name}: ready in {time.perf_counter() - begin:.0f} s", flush=True)
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


def measured(
    name: str, layers: int, jobs: list[tuple[int, int]], compiled_ones: list[str], seconds: float, peer: bool
) -> Iterator[dict[str, Any]]:
    """One model, job by job."""
    torch.manual_seed(0)
    model = MODELS[name](max(context for _, context in jobs) + 2 * WINDOW).eval()
    if layers:
        model = shortened(model, layers)
    config = model.config
    w8a8.quantize(model, head="int8")
    memory = native.pack(torch.ones((MEMORY // 4096, 4096), dtype=torch.int8))[0].view(-1)  # on large pages, as weights
    with ExitStack() as stack:
        variants: dict[str, Variant] = {way: After(model, *how) for way, how in CACHES.items()}
        if peer:
            variants[LLAMA_CPP] = stack.enter_context(gguf_peer.llama_cpp(config, torch.get_num_threads()))
        for batch, context in jobs:
            ids = torch.randint(0, config.vocab_size, (batch, context))
            shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
            ways = [way for way in compiled_ones if COMPILED[way] == NAME or (batch > 1 and shared)]
            graphs: dict[str, Variant] = {way: Static(model, COMPILED[way]) for way in ways}
            times, rates = decode(variants | graphs, ids, seconds, lambda: rate_of(memory))
            rate = statistics.median(rates)
            step = {each: statistics.median(values) for each, values in times.items()}
            row = {
                "model": name,
                "layers": config.num_hidden_layers,
                "threads": torch.get_num_threads(),
                "batch": batch,
                "context": context,
                "read_gb_per_s": rate / 1e9,
                "tok_per_s": {each: batch / value for each, value in step.items()},
                "share_of_read": {
                    each: bytes_read(model, each, batch, context) / value / rate for each, value in step.items()
                },
                "quartiles_ms": {
                    each: [1e3 * value for value in statistics.quantiles(values, n=4)[::2]]
                    for each, values in times.items()
                },
            }
            print({key: value for key, value in row.items() if key != "quartiles_ms"}, flush=True)
            yield row


def job_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is the result of."""
    return row["model"], -row["layers"], row["threads"], row["context"], row["batch"]


def table(result: dict[str, Any]) -> str:
    """Tokens per second, and in brackets the share of memory's rate, as Markdown."""
    there = {name for row in result["rows"] for name in row["tok_per_s"]}
    names = [name for name in (*CACHES, *COMPILED, LLAMA_CPP) if name in there]
    peer = LLAMA_CPP in names
    lines = [
        "| model | layers | threads | batch | context | "
        + " | ".join(names)
        + " | memory, GB/s |"
        + " best of ours |" * peer,
        "|---|---:|---:|---:|---:|" + "---:|" * (len(names) + 1 + peer),
    ]
    for row in result["rows"]:
        rates, shares = row["tok_per_s"], row.get("share_of_read", {})
        told = {
            name: f"{rate:.1f}" + (f" ({100 * shares[name]:.0f} %)" if name in shares else "")
            for name, rate in rates.items()
        }
        cells = [told.get(name, "") for name in names]
        cells.append(f"{row['read_gb_per_s']:.1f}" if shares else "")
        if peer:
            best = max(rate for name, rate in rates.items() if name != LLAMA_CPP)
            cells.append(f"{best / rates[LLAMA_CPP]:.2f}x" if LLAMA_CPP in rates else "")
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['threads']} | {row['batch']} | {row['context']:,} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--jobs", default="1x256,8x256,1x4096", help="batch x context, with commas between them")
    parser.add_argument("--layers", type=int, default=0, help="the first so many of each model; all by default")
    parser.add_argument("--compiled", default="", help=f"with semicolons between them: {';'.join(COMPILED)}")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each job, at least")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    jobs = [(int(batch), int(context)) for batch, context in (job.split("x") for job in arguments.jobs.split(","))]
    reason = gguf_peer.unavailable_because()
    if reason:
        print(f"{LLAMA_CPP} is left out: {reason}")
    compiled_ones = [way for way in arguments.compiled.split(";") if way]
    rows: list[dict[str, Any]] = kept("contexts").get("rows", [])
    result = {"machine": describe_machine(), "versions": versions("llama-cpp-python"), "rows": rows}
    for name in arguments.models.split(","):
        for row in measured(name, arguments.layers, jobs, compiled_ones, arguments.seconds, peer=not reason):
            rows[:] = sorted([other for other in rows if job_of(other) != job_of(row)] + [row], key=job_of)
            keep("contexts", result, arguments.output)  # after each job: a run that is cut leaves what it has
        gc.collect()
    print("\n" + table(result))


if __name__ == "__main__":
    main()

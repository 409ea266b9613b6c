"""Where the time of a token goes, so that it adds up: linear layers, attention, cache, norms, and the rest.

    python bench/account.py [--models opt-125m,tinyllama-1.1b] [--contexts 256,4096] [--tokens 12]

Decoding, batch 1, head in int8, after a context of random keys and values, with each cache: transformers' own and
blocks, both with PyTorch's attention; int8 with PyTorch's attention over what is dequantised at each token; int8 with
attention that reads it.  All are in memory together and take turns of one token.

Each turn is two tokens, now in this order and now in the other: a plain one, and one with a clock around every linear
layer, norm, update of the cache and call of attention.  Time inside another clock belongs to that one.  What no clock
has is the rest: Python, residual sums, rotation, views, the mask.  It is the watched token's own, so the parts add up
to the watched token; what they add up to beside the plain token (`sum_by_plain`) says how far a watch changes what it
measures, and is within 5 % where the account holds.

Medians of milliseconds.  With one thread the clock is that of the thread's processor time, which does not run while
another process has the core; with more it is that of the wall.  Results go to bench/results/MACHINE/account.json, and
from there to docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache

import w8a8
from machine import describe_machine, keep
from model import MODELS
from w8a8.decoding.attention import NAME
from w8a8.layers.linear import QuantLinear

ROOM = 256  # tokens that may be written after a context
LINEAR, ATTENTION, CACHE, NORMS, REST = "linear layers", "attention", "cache", "norms", "Python and small operators"
WAYS: dict[str, tuple[type[Cache], str]] = {
    "dynamic": (DynamicCache, "sdpa"),
    "block": (w8a8.BlockCache, "sdpa"),
    "int8, dequantised": (w8a8.Int8Cache, "sdpa"),
    "int8": (w8a8.Int8Cache, NAME),
}


class Watch:
    """Clocks around functions, which run while it is on; each second is that of the innermost."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.on = clock, False
        self.spent: dict[str, float] = {}
        self._inner = 0.0

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            before, self._inner = self._inner, 0.0
            began = self.clock()
            found = function(*args, **kwargs)
            whole = self.clock() - began
            self.spent[part] = self.spent.get(part, 0.0) + whole - self._inner
            self._inner = before + whole
            return found

        return timed


def watch(model: nn.Module, clock: Callable[[], float]) -> Watch:
    """Clocks around what a token consists of.  The process is done with this model afterwards: they stay."""
    found = Watch(clock)
    for module in model.modules():
        part = LINEAR if isinstance(module, QuantLinear) else NORMS if "Norm" in type(module).__name__ else None
        if part is not None:
            vars(module)["forward"] = found.around(module.forward, part)
    for name in ("sdpa", NAME):
        AttentionInterface.register(name, found.around(AttentionInterface()[name], ATTENTION))
    return found


def filled(kind: type[Cache], model: Any, context: int, clocks: Watch) -> Any:
    """A cache of random keys and values."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (1, heads, context, config.hidden_size // config.num_attention_heads)
    cache = kind(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    cache.update = clocks.around(cache.update, CACHE)  # type: ignore[method-assign]
    return cache


class Writer:
    """A model that writes with one of the caches."""

    def __init__(self, model: Any, way: str, context: int, clocks: Watch) -> None:
        kind, self._attention = WAYS[way]
        self._model, self._clocks = model, clocks
        self._cache = filled(kind, model, context, clocks)
        self._next = torch.zeros((1, 1), dtype=torch.long)

    def token(self, *, watched: bool) -> tuple[float, dict[str, float]]:
        """Seconds of a token, and of its parts."""
        self._model.set_attn_implementation(self._attention)
        clocks = self._clocks
        clocks.on, clocks.spent = watched, {}
        began = clocks.clock()
        logits = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True).logits
        self._next = logits[:, -1:].argmax(-1)
        whole = clocks.clock() - began
        clocks.on = False
        return whole, {**clocks.spent, REST: whole - sum(clocks.spent.values())}


def account(plain: list[float], watched: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    """Medians, in milliseconds, and how they add up."""
    parts = {
        part: 1e3 * statistics.median(found.get(part, 0.0) for _, found in watched)
        for part in (LINEAR, ATTENTION, CACHE, NORMS, REST)
    }
    token = 1e3 * statistics.median(plain)
    return {"token_ms": token, "parts_ms": parts, "sum_by_plain": sum(parts.values()) / token}


@torch.inference_mode()
def accounts(name: str, contexts: list[int], tokens: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Of one model, after each context, with each cache."""
    torch.manual_seed(0)
    model = MODELS[name](max(contexts) + ROOM).eval()
    w8a8.quantize(model, head="int8")
    clocks = watch(model, clock)
    found = []
    for context in contexts:
        writers = {way: Writer(model, way, context, clocks) for way in WAYS}
        plain: dict[str, list[float]] = {way: [] for way in WAYS}
        watched: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in WAYS}
        for turn in range(tokens + 2):  # two to warm up: a cache in int8 sees which attention there is
            for way, writer in writers.items():
                both = {on: writer.token(watched=on) for on in ((False, True) if turn % 2 else (True, False))}
                if turn > 1:
                    plain[way].append(both[False][0])
                    watched[way].append(both[True])
        for way in WAYS:
            row = {"model": name, "context": context, "cache": way, **account(plain[way], watched[way])}
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            found.append(row)
    return found


def table(result: dict[str, Any]) -> str:
    """Milliseconds of a token and its parts as Markdown."""
    parts = list(result["rows"][0]["parts_ms"])
    lines = [
        "| model | context | cache | a token, ms | " + " | ".join(parts) + " | they add up to |",
        "|---|---:|---|" + "---:|" * (len(parts) + 2),
    ]
    for row in result["rows"]:
        cells = " | ".join(f"{row['parts_ms'][part]:.2f}" for part in parts)
        lines.append(
            f"| {row['model']} | {row['context']:,} | {row['cache']} | {row['token_ms']:.2f} | {cells} "
            f"| {100 * row['sum_by_plain']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contexts", default="256,4096")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    one = torch.get_num_threads() == 1
    clock = time.thread_time if one else time.perf_counter
    contexts = [int(context) for context in arguments.contexts.split(",")]
    rows = [row for name in arguments.models.split(",") for row in accounts(name, contexts, arguments.tokens, clock)]
    result = {"machine": describe_machine(), "clock": "processor" if one else "wall", "rows": rows}
    keep("account", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

"""What one call for layers that read the same tensor would gain in decoding: q/k/v, and gate and up.

    python bench/together.py [--models opt-125m,tinyllama-1.1b] [--layers 6] [--threads 1] [--rounds 60]

Decoding, batch 1, head in int8, after 256 tokens in blocks, with the first few layers of a shape, whose weights are
still far larger than the caches.  Who reads the same tensor is seen in a call.  Of such layers the first to be called
computes for all, in one call of the native kernel that quantises the input once, and the others give what was
computed, with no check at all: the least that it could cost.  Beside it norms do nothing, which bounds what fusing
them could gain.

The ways take turns of five tokens, of which the first two warm up; a ratio is the median over tokens of the time beside
the model as it is.  With one thread the clock is that of the thread's processor time.  Results go to
bench/results/MACHINE/together.json, and from there to docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import w8a8
from machine import describe_machine, keep
from model import MODELS
from w8a8.kernels import fused
from w8a8.layers.linear import QuantLinear, quant_linears

CONTEXT, TURN, WARM = 256, 5, 2
AS_IT_IS, TOGETHER, NO_NORMS = "as it is", "in one call", "no norms"


def readers(model: Any) -> list[list[QuantLinear]]:
    """Layers that read the same tensor, seen in a call."""
    seen: list[tuple[Tensor, QuantLinear]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append((args[0], layer)))
        for _, layer in quant_linears(model)
    ]
    model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: dict[int, list[QuantLinear]] = {}
    for x, layer in seen:  # all of them are alive, so that no two have one id
        groups.setdefault(id(x), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


class Group:
    """Layers of which the first computes for all."""

    def __init__(self, layers: list[QuantLinear]) -> None:
        self._native = tuple(fused.layer_of(layer._buffers, layer._call, "identity") for layer in layers)
        self._found: tuple[Any, ...] = ()
        vars(layers[0])["forward"] = self._first
        for place, layer in enumerate(layers[1:], start=3):
            vars(layer)["forward"] = self._later(place)

    def _first(self, x: Tensor) -> Any:
        found = fused.linears(x, self._native)
        assert found is not None, "the kernel takes them"
        self._found = found
        return found[2]

    def _later(self, place: int) -> Callable[[Tensor], Any]:
        return lambda x: self._found[place]


def undo(model: nn.Module) -> None:
    """Every module runs its class's forward."""
    for module in model.modules():
        vars(module).pop("forward", None)


def without_norms(model: nn.Module) -> None:
    """Norms give what they are given."""
    for module in model.modules():
        if "Norm" in type(module).__name__:
            vars(module)["forward"] = lambda x: x


def shortened(model: Any, layers: int) -> Any:
    """The model with its first few layers."""
    whole = model.config.num_hidden_layers
    lists = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == whole
    ]
    for module, name, child in lists:
        setattr(module, name, child[:layers])
    model.config.num_hidden_layers = layers
    return model


def kept(config: Any) -> w8a8.BlockCache:
    """A cache of random keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (1, heads, CONTEXT, config.hidden_size // config.num_attention_heads)
    cache = w8a8.BlockCache(config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


@torch.inference_mode()
def measured(name: str, layers: int, threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """One model: milliseconds of a token by ways and threads."""
    torch.manual_seed(0)
    model = shortened(MODELS[name]().eval(), layers)
    config = model.config
    w8a8.quantize(model, head="int8")
    groups = readers(model)
    ways: dict[str, Callable[[], object]] = {
        AS_IT_IS: lambda: None,
        TOGETHER: lambda: [Group(group) for group in groups],
        NO_NORMS: lambda: without_norms(model),
    }
    found = []
    for count in threads:
        torch.set_num_threads(count)
        clock = time.thread_time if count == 1 else time.perf_counter
        caches = {way: kept(config) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, change in ways.items():
                change()
                for turn in range(TURN):
                    began = clock()
                    model(input_ids=torch.zeros((1, 1), dtype=torch.long), past_key_values=caches[way], use_cache=True)
                    if turn >= WARM:
                        times[way].append(clock() - began)
                undo(model)
        row = {
            "model": name,
            "layers": layers,
            "threads": count,
            "groups": [len(group) for group in groups],
            "token_ms": {way: 1e3 * statistics.median(values) for way, values in times.items()},
            "ratio": {
                way: statistics.median(a / b for a, b in zip(values, times[AS_IT_IS], strict=True))
                for way, values in times.items()
            },
        }
        print(row, flush=True)
        found.append(row)
    return found


def table(result: dict[str, Any]) -> str:
    """Milliseconds of a token and the ratios, as Markdown."""
    lines = [
        f"| model | layers | threads | a token, ms | {TOGETHER} | {NO_NORMS} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratios = " | ".join(f"{row['ratio'][way]:.3f}x" for way in (TOGETHER, NO_NORMS))
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['threads']} | {row['token_ms'][AS_IT_IS]:.2f} | {ratios} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    threads = [int(count) for count in arguments.threads.split(",")]
    rows = [
        row
        for name in arguments.models.split(",")
        for row in measured(name, arguments.layers, threads, arguments.rounds)
    ]
    result = {"machine": describe_machine(), "rows": rows}
    keep("together", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

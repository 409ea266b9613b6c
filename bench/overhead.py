"""Where the time of a small call and of a token goes.

    python bench/overhead.py [--models opt-125m,tinyllama-1.1b] [--tokens 60]

First the cost of a call: a 32 x 64 layer at one row, whose product takes a microsecond, through `QuantLinear.forward`,
through PyTorch's dispatcher, and float.

Then decoding, batch 1, prompt 256, head in int8, cache and positions as in bench/model.py.  Three runs of the same
tokens, since a watch changes what it measures:

- plain: the whole token;
- timed: a clock around every linear layer, which gives the time inside them; the rest is the time outside;
- stubs: linear layers that only make zeros: what would remain with an infinitely fast kernel.

What the rest consists of comes from torch.profiler's self times in a run with stubs, by groups of operators, as medians
over tokens: a single stall would otherwise be spread over all.  Whatever of the same run without the profiler no
operator accounts for is Python; it is understated, since an operator's time holds what the profiler adds to it.
Milliseconds go to bench/results/MACHINE/overhead.json, and from there to docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import w8a8
from machine import describe_machine, keep
from model import MODELS, PROMPT, Eager
from w8a8.kernels import ops
from w8a8.layers.linear import QuantLinear, quant_linears

# Operators by what they are for in these two models; the first group with a matching prefix has it.
GROUPS = {
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash_attention", "aten::bmm"),
    "cache": ("aten::cat", "aten::index_copy"),
    "norms": ("aten::layer_norm", "aten::native_layer_norm", "aten::pow", "aten::mean", "aten::rsqrt"),
    "elementwise (residuals, rotation, activation)": (
        "aten::add",
        "aten::mul",
        "aten::neg",
        "aten::silu",
        "aten::relu",
        "aten::sub",
    ),
    "views and copies": (
        "aten::view",
        "aten::reshape",
        "aten::transpose",
        "aten::slice",
        "aten::as_strided",
        "aten::unsqueeze",
        "aten::expand",
        "aten::contiguous",
        "aten::clone",
        "aten::copy_",
        "aten::to",
        "aten::_to_copy",
        "aten::empty",
        "aten::narrow",
        "aten::alias",
        "aten::select",
    ),
}
OTHER, PYTHON = "other operators", "Python"


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The best of five means of 5,000 calls."""
    means = []
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5000):
                call(x)
            means.append((time.perf_counter() - start) / 5000)
    return 1e6 * min(means)


def calls() -> dict[str, float]:
    """Microseconds of a call whose product is next to nothing."""
    linear, x = nn.Linear(64, 32), torch.randn(1, 1, 64)
    layer = QuantLinear.from_float(linear)
    request = layer._request(x)
    return {
        "QuantLinear.forward": microseconds(layer, x),
        "the op through the dispatcher": microseconds(lambda x: ops._op(*request, "auto", False, 0), x),
        "the op directly": microseconds(lambda x: ops._int8_linear(request, "auto", False, 0), x),
        "nn.Linear, float32": microseconds(linear, x),
    }


@contextmanager
def forward(replacement: Callable[[QuantLinear, Tensor], Tensor]) -> Iterator[None]:
    """Every `QuantLinear` runs this instead, for a while."""
    original = QuantLinear.forward
    QuantLinear.forward = replacement  # type: ignore[method-assign]
    try:
        yield
    finally:
        QuantLinear.forward = original  # type: ignore[method-assign]


def milliseconds_per_token(model: nn.Module, ids: Tensor, tokens: int) -> float:
    """The median token after the prompt."""
    decoder = Eager(model)
    decoder.start(ids, PROMPT + tokens)
    return 1e3 * statistics.median(decoder.tokens(tokens)[5:])


def inside(model: nn.Module, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Milliseconds a token, by medians, inside the linear layers and outside, in one run."""
    original, spent = QuantLinear.forward, [0.0]

    def timed(self: QuantLinear, x: Tensor) -> Tensor:
        begin = time.perf_counter()
        y = original(self, x)
        spent[0] += time.perf_counter() - begin
        return y

    pairs = []
    with forward(timed):
        decoder = Eager(model)
        decoder.start(ids, PROMPT + tokens)
        for _ in range(tokens):
            spent[0] = 0.0
            (whole,) = decoder.tokens(1)
            pairs.append((spent[0], whole - spent[0]))
    linears, rest = zip(*pairs[5:], strict=True)
    return 1e3 * statistics.median(linears), 1e3 * statistics.median(rest)


def _stub(self: QuantLinear, x: Tensor) -> Tensor:
    return x.new_zeros((*x.shape[:-1], self.out_features))


def group_of(operator: str) -> str:
    """The group an operator's time is entered under."""
    return next((group for group, prefixes in GROUPS.items() if operator.startswith(prefixes)), OTHER)


def outside(model: nn.Module, ids: Tensor, tokens: int) -> dict[str, float]:
    """Milliseconds of a token without its linear layers, by groups of operators, from a profile."""
    with forward(_stub):
        plain = milliseconds_per_token(model, ids, tokens)
        decoder = Eager(model)
        decoder.start(ids, PROMPT + tokens)
        decoder.tokens(5)
        profiles: list[dict[str, float]] = []
        for _ in range(tokens - 5):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                decoder.tokens(1)
            operators = dict.fromkeys([*GROUPS, OTHER], 0.0)
            for event in profiled.key_averages():
                operators[group_of(event.key)] += event.self_cpu_time_total / 1e3
            profiles.append(operators)
    medians = {group: statistics.median(operators[group] for operators in profiles) for group in profiles[0]}
    return medians | {PYTHON: plain - sum(medians.values())}  # below zero: the run was disturbed


@torch.inference_mode()
def token(name: str, tokens: int) -> dict[str, Any]:
    """All of it for one model."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    float32 = milliseconds_per_token(model, ids, tokens)
    quantized = w8a8.quantize(model, head="int8").model
    layers = [layer for _, layer in quant_linears(quantized)]
    linears, rest = inside(quantized, ids, tokens)
    parts = outside(quantized, ids, tokens)
    return {
        "model": name,
        "linear_layers": len(layers),
        "code_mb": sum(layer.in_features * layer.out_features for layer in layers) / 1e6,
        "float32_ms": float32,
        "token_ms": milliseconds_per_token(quantized, ids, tokens),
        "inside_ms": linears,
        "outside_ms": rest,
        "stubs_ms": sum(parts.values()),
        "parts_ms": parts,
    }


def table(result: dict[str, Any]) -> str:
    """A token's time as Markdown, a column for each model."""
    models = result["models"]
    rows: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("float32, the whole token", lambda r: r["float32_ms"]),
        ("ours, the whole token", lambda r: r["token_ms"]),
        ("inside the linear layers", lambda r: r["inside_ms"]),
        ("outside them", lambda r: r["outside_ms"]),
        ("with stubs for linear layers", lambda r: r["stubs_ms"]),
        *((f"of that: {part}", lambda r, part=part: r["parts_ms"][part]) for part in models[0]["parts_ms"]),
    ]
    lines = ["| ms a token | " + " | ".join(r["model"] for r in models) + " |", "|---|" + "---:|" * len(models)]
    lines += [f"| {label} | " + " | ".join(f"{value(r):.2f}" for r in models) + " |" for label, value in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    result = {"machine": describe_machine(), "calls_us": calls()}
    for name, us in result["calls_us"].items():
        print(f"{name:30} {us:6.1f} us a call")
    result["models"] = [token(name, arguments.tokens) for name in arguments.models.split(",")]
    keep("overhead", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

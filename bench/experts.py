"""One mixture-of-experts layer: the experts' int8 layers, called one by one, against transformers' float ones.

    python bench/experts.py [--shapes mixtral-like,qwen3-30b-a3b] [--tokens 1,8,64,512] [--seconds 5]

The layer is transformers' own, router and experts, with random weights.  `float32 eager` and `bf16 eager` are its loop
over the experts that are hit, `grouped` transformers' default, one grouped product over sorted tokens.  `ours` is the
layer after `w8a8.quantize` of the model that holds it.  Every call has other random tokens, which choose other experts,
so that in decoding the weights come from memory.  The variants take turns; medians, in tokens per second.

The shape of qwen3-30b-a3b has 48 of its 128 experts, so that float32, bfloat16 and int8 fit into memory together; 8 are
chosen for each token, as there.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import w8a8
from machine import describe_machine, keep

INPUTS = 32  # of each job, taken in turn

_ONE_LAYER = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}


def mixtral_like() -> Any:
    """A quarter of Mixtral-8x7B's widths: 8 experts of 1024 x 3584, 2 for each token."""
    config = {**_ONE_LAYER, "hidden_size": 1024, "intermediate_size": 3584}
    return MixtralForCausalLM(MixtralConfig(**config, num_local_experts=8, num_experts_per_tok=2))


def qwen3_30b_a3b() -> Any:
    """Experts of 2048 x 768, 8 for each token."""
    config = {**_ONE_LAYER, "hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, num_experts=48, num_experts_per_tok=8))


SHAPES: dict[str, Callable[[], Any]] = {"mixtral-like": mixtral_like, "qwen3-30b-a3b": qwen3_30b_a3b}


def variants_of(model: Any) -> dict[str, Any]:
    """Layers with the weights of a float32 model, by what they are; those of a dtype share their memory."""
    made = {}
    for name, source in (("float32", model), ("bf16", copy.deepcopy(model).to(torch.bfloat16))):
        for label, implementation in (("eager", "eager"), ("grouped", "grouped_mm")):
            layer = copy.copy(source.model.layers[0].mlp)
            layer._modules = {**layer._modules, "experts": copy.copy(layer.experts)}
            layer.experts.config = copy.copy(layer.experts.config)
            layer.experts.config._experts_implementation = implementation
            made[f"{name} {label}"] = layer
    made["ours"] = w8a8.quantize(copy.deepcopy(model)).model.model.layers[0].mlp
    return made


@torch.inference_mode()
def measure(layers: dict[str, Any], tokens: int, hidden: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per token of each layer."""
    inputs = torch.randn(INPUTS, 1, tokens, hidden)
    cast: dict[torch.dtype, Tensor] = {dtype: inputs.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    begin, turn = time.perf_counter(), 0
    while turn < 8 or time.perf_counter() - begin < seconds:
        for name, layer in layers.items():
            x = cast[layer.gate.weight.dtype][turn % INPUTS]
            start = time.perf_counter()
            layer(x)
            times[name].append((time.perf_counter() - start) / tokens)
        turn += 1
    return {name: values[2:] for name, values in times.items()}  # the first calls make what later ones find


def table(result: dict[str, Any]) -> str:
    """Tokens per second, and how many times as many ours makes, as Markdown."""
    variants = [*result["rows"][0]["tok_per_s"]]
    peers = [name for name in variants if name != "ours"]
    lines = [
        "| experts | tokens | " + " | ".join(variants) + " | " + " | ".join(f"ours / {name}" for name in peers) + " |",
        "|---|---:|" + "---:|" * (len(variants) + len(peers)),
    ]
    for row in result["rows"]:
        rates = row["tok_per_s"]
        shown = [f"{rates[name]:.0f}" for name in variants] + [f"{rates['ours'] / rates[name]:.2f}x" for name in peers]
        lines.append(f"| {row['shape']} | {row['tokens']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each job, at least")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes.split(","):
        torch.manual_seed(0)
        model = SHAPES[shape]().eval()
        hidden = model.config.hidden_size
        layers = variants_of(model)
        for tokens in map(int, arguments.tokens.split(",")):
            times = measure(layers, tokens, hidden, arguments.seconds)
            rates = {name: 1 / statistics.median(values) for name, values in times.items()}
            rows.append({"shape": shape, "tokens": tokens, "tok_per_s": rates, "seconds": times})
            print(shape, tokens, {name: round(rate) for name, rate in rates.items()}, flush=True)
        del layers, model
        gc.collect()
    result = {"machine": describe_machine(), "rows": rows}
    keep("experts", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

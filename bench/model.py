"""A whole language model in transformers, eager: decoding and reading a prompt, with random weights.

    python bench/model.py [--models opt-125m,tinyllama-1.1b] [--batch 1,8] [--seconds 20]

Decode: one new token per sequence after a prompt of 256, greedy, with the model's own cache.  Prefill: 512 tokens, the
logits of the last.  The variants are in memory together and take turns of eight tokens; medians, in tokens per second.
`ours` keeps the output head float, as the files have it; `ours, int8 head` is head="int8".  torch.ao is
`quantize_dynamic` over every linear layer, the head too, with activations per tensor.  The shapes are those of
facebook/opt-125m and TinyLlama-1.1B.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import w8a8
from machine import describe_machine

RESULT = Path(__file__).parent / "results" / "model.json"
PROMPT, PREFILL = 256, 512
TURN = 8  # tokens that a variant writes before the next one: the others' weights and code have left the caches by then


def opt_125m() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50272,
            hidden_size=768,
            ffn_dim=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
            word_embed_proj_dim=768,
        )
    )


def tinyllama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {"opt-125m": opt_125m, "tinyllama-1.1b": tinyllama}


def _torch_ao(model: Any) -> Any:
    torch.backends.quantized.engine = "x86"
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _torchao(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: type(m) is torch.nn.Linear)
    return model


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model,
    "bf16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "torch.ao x86": _torch_ao,
    "torchao": lambda model: _torchao(copy.deepcopy(model)),
    "ours": lambda model: w8a8.quantize(copy.deepcopy(model)).model,
    "ours, int8 head": lambda model: w8a8.quantize(copy.deepcopy(model), head="int8").model,
}


class Decoder:
    """One variant in the middle of writing."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.next = self._step(ids)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def token(self) -> float:
        """Write one token; returns the seconds it took."""
        start = time.perf_counter()
        self.next = self._step(self.next)
        return time.perf_counter() - start


@torch.inference_mode()
def decode(variants: dict[str, Any], batch: int, vocabulary: int, seconds: float) -> dict[str, list[float]]:
    ids = torch.randint(0, vocabulary, (batch, PROMPT))
    decoders = {name: Decoder(model, ids) for name, model in variants.items()}
    for decoder in decoders.values():
        decoder.token()
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while len(times["ours"]) < 8 or time.perf_counter() - start < seconds:
        for name, decoder in decoders.items():
            times[name] += [decoder.token() / batch for _ in range(TURN)]
    return times


@torch.inference_mode()
def prefill(variants: dict[str, Any], vocabulary: int, seconds: float) -> dict[str, list[float]]:
    ids = torch.randint(0, vocabulary, (1, PREFILL))
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while len(times["ours"]) < 4 or time.perf_counter() - start < seconds:
        for name, model in variants.items():
            begin = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            times[name].append((time.perf_counter() - begin) / PREFILL)
    return {name: values[1:] for name, values in times.items()}  # the first one warms


def table(result: dict[str, Any]) -> str:
    """Tokens per second of every variant as Markdown."""
    variants = result["variants"]
    lines = ["| model | job | " + " | ".join(variants) + " |", "|---|---|" + "---:|" * len(variants)]
    for row in result["rows"]:
        rates = " | ".join(f"{row['tok_per_s'][name]:.1f}" for name in variants)
        lines.append(f"| {row['model']} | {row['job']} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--variants", default="")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each job, at least")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations of the peers
    chosen = arguments.variants.split(";") if arguments.variants else list(VARIANTS)
    rows = []
    for model_name in arguments.models.split(","):
        torch.manual_seed(0)
        model = MODELS[model_name]().eval()
        vocabulary = model.config.vocab_size
        variants = {name: VARIANTS[name](model).eval() for name in chosen}
        jobs = {}
        for batch in map(int, arguments.batch.split(",")):
            jobs[f"decode, batch {batch}"] = decode(variants, batch, vocabulary, arguments.seconds)
        jobs[f"prefill {PREFILL}"] = prefill(variants, vocabulary, arguments.seconds)
        for job, times in jobs.items():
            rates = {name: 1 / statistics.median(values) for name, values in times.items()}
            rows.append({"model": model_name, "job": job, "tok_per_s": rates, "seconds": times})
            print(model_name, job, {name: round(rate, 1) for name, rate in rates.items()}, flush=True)
        del variants, model
    result = {"machine": describe_machine(), "variants": chosen, "rows": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()

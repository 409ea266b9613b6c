"""A whole language model in transformers: decoding and reading a prompt, with random weights.

    python bench/model.py [--models opt-125m,tinyllama-1.1b] [--batch 1,8] [--variants "float32;ours"] [--seconds 20]

Decode: one new token per sequence, greedy, after a prompt of 256; after 64 tokens each variant goes back to the end of
its prompt, so that all attend to as many tokens at any time.  Prefill: 512 tokens, the logits of the last.  The
variants are in memory together and take turns of eight tokens; medians, in tokens per second.  The shapes are those of
facebook/opt-125m and TinyLlama-1.1B.

Eager variants use the model's own growing cache.  `ours` keeps the output head float, as the files have it; `ours, int8
head` is head="int8", and with `int8 cache` also `w8a8.set_cache(model, "int8")`.  torch.ao is `quantize_dynamic` over
every linear layer, the head too, with activations per tensor; torchao is Int8DynamicActivationInt8Weight, likewise.

Compiled variants are `torch.compile(model.forward, fullgraph=True)` with freezing and max-autotune, and decode with
transformers' StaticCache of 320 tokens, which a graph of fixed shapes needs: they attend to all of it, masked.  Their
prompt before decoding is read without the compiler.  A graph takes one to three minutes, and there are three of them
for each model: batch 1, batch 8, prefill.

llama.cpp's Q8_0, the head too, runs in a process of its own (gguf_peer.py); where it is not installed it is left out.
"""

import argparse
import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, StaticCache

import gguf_peer
import w8a8
from machine import describe_machine, keep, versions
from w8a8.decoding.attention import NAME as ATTENTION

PROMPT, WINDOW, PREFILL = 256, 64, 512
TURN = 8  # tokens that a variant writes before the next one: the others' weights and code have left the caches by then


def opt_125m(positions: int = 2048) -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50272,
            hidden_size=768,
            ffn_dim=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=positions,
            word_embed_proj_dim=768,
        )
    )


def tinyllama(positions: int = 2048) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=positions,
        )
    )


MODELS: dict[str, Callable[..., Any]] = {"opt-125m": opt_125m, "tinyllama-1.1b": tinyllama}


def _torch_ao(model: Any) -> Any:
    torch.backends.quantized.engine = "x86"
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _torchao(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, name: type(m) is torch.nn.Linear)
    return model


class Variant(Protocol):
    """A model that can write tokens and read a prompt.  What a job needs is made in its first call."""

    def start(self, ids: Tensor, room: int) -> None:
        """Read the prompts (B, T), with room for so many tokens in each, and write a token."""

    def tokens(self, count: int) -> list[float]:
        """Write tokens; returns the seconds that each took."""

    def rewind(self) -> None:
        """Back to the end of the prompt."""

    def prefill(self, ids: Tensor) -> float:
        """Seconds to read a prompt (1, T) to the logits of its last token."""

    def stop(self) -> None:
        """Free what the last job needed."""


class Eager:
    """The model as it is, with the cache that transformers would give it."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model.eval(), None

    def start(self, ids: Tensor, room: int) -> None:
        self.cache = self._empty_cache(room)
        self.prompt, self.position = ids.shape[1], 0
        self.next = self._step(self.model, ids)
        self.tokens(1)
        self.rewind()

    def _empty_cache(self, room: int) -> Any:
        return DynamicCache(config=self.model.config)

    def _step(self, forward: Callable[..., Any], ids: Tensor) -> Tensor:
        positions = torch.arange(self.position, self.position + ids.shape[1]).expand(ids.shape)
        self.position += ids.shape[1]
        out = forward(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1:].argmax(-1)

    def tokens(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.next = self._step(self._decode, self.next)
            seconds.append(time.perf_counter() - begin)
        return seconds

    @property
    def _decode(self) -> Callable[..., Any]:
        return self.model

    def rewind(self) -> None:
        self.cache.crop(self.prompt - self.position)
        self.position = self.prompt

    def prefill(self, ids: Tensor) -> float:
        begin = time.perf_counter()
        self._decode(input_ids=ids, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - begin

    def stop(self) -> None:
        self.cache = None


class Cached(Eager):
    """The model with keys and values in int8, and attention that reads them so."""

    def _empty_cache(self, room: int) -> Any:
        return w8a8.Int8Cache(config=self.model.config)

    def tokens(self, count: int) -> list[float]:
        before = self.model.config._attn_implementation  # the weights are shared with a variant that has another
        self.model.set_attn_implementation(ATTENTION)
        seconds = super().tokens(count)
        self.model.set_attn_implementation(before)
        return seconds


class Compiled(Eager):
    """The model's forward through torch.compile, and a cache of fixed size."""

    compiled: Callable[..., Any] | None = None

    def _empty_cache(self, room: int) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=room)

    @property
    def _decode(self) -> Callable[..., Any]:
        if self.compiled is None:
            import torch._inductor.config as inductor

            inductor.freezing = True  # as one of torch.compile's options it would come too late
            self.compiled = torch.compile(self.model.forward, dynamic=False, fullgraph=True, mode="max-autotune")
        return self.compiled

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
        self.position = self.prompt

    def stop(self) -> None:
        super().stop()
        self.compiled = None
        torch._dynamo.reset()


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model,
    "bf16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "torch.ao x86": _torch_ao,
    "torchao": lambda model: _torchao(copy.deepcopy(model)),
    "ours": lambda model: w8a8.quantize(copy.deepcopy(model)).model,
    "ours, int8 head": lambda model: w8a8.quantize(copy.deepcopy(model), head="int8").model,
}
# and of which model others are made
CACHED = {"ours, int8 head, int8 cache": "ours, int8 head"}
COMPILED = {"torchao compiled": "torchao", "ours, int8 head, compiled": "ours, int8 head"}
LLAMA_CPP = "llama.cpp Q8_0"
ALL = (*VARIANTS, *CACHED, *COMPILED, LLAMA_CPP)


def variants_of(model: Any, chosen: list[str], stack: ExitStack) -> dict[str, Variant]:
    """The chosen variants of a float32 model; those with another cache or compiled share the weights of others."""
    made_of = CACHED | COMPILED
    needed = [name for name in VARIANTS if name in chosen or name in [made_of.get(c) for c in chosen]]
    models = {name: VARIANTS[name](model) for name in needed}
    made: dict[str, Variant] = {}
    for name in chosen:
        if name == LLAMA_CPP:
            made[name] = stack.enter_context(gguf_peer.llama_cpp(model.config, torch.get_num_threads()))
        else:
            kind = Cached if name in CACHED else Compiled if name in COMPILED else Eager
            made[name] = kind(models[made_of.get(name, name)])
    return made


@torch.inference_mode()
def decode(variants: dict[str, Variant], batch: int, vocabulary: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per token of each variant, its sequences counted together."""
    ids = torch.randint(0, vocabulary, (batch, PROMPT))
    for name, variant in variants.items():
        begin = time.perf_counter()
        variant.start(ids, PROMPT + WINDOW)
        _tell(name, begin)
    times: dict[str, list[float]] = {name: [] for name in variants}
    start, turns = time.perf_counter(), 0
    while turns < WINDOW // TURN or time.perf_counter() - start < seconds:
        for name, variant in variants.items():
            times[name] += [t / batch for t in variant.tokens(TURN)]
        turns += 1
        if turns % (WINDOW // TURN) == 0:
            for variant in variants.values():
                variant.rewind()
    for variant in variants.values():
        variant.stop()
    return times


@torch.inference_mode()
def prefill(variants: dict[str, Variant], vocabulary: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per token of a prompt."""
    ids = torch.randint(0, vocabulary, (1, PREFILL))
    for name, variant in variants.items():
        begin = time.perf_counter()
        variant.prefill(ids)
        _tell(name, begin)
    times: dict[str, list[float]] = {name: [] for name in variants}
    start, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - start < seconds:
        for name, variant in variants.items():
            times[name].append(variant.prefill(ids) / PREFILL)
        rounds += 1
    for variant in variants.values():
        variant.stop()
    return times


def _tell(name: str, begin: float) -> None:
    """Progress, where a graph has been compiled."""
    if name in COMPILED:
        print(f"{name}: ready in {time.perf_counter() - begin:.0f} s", flush=True)


def table(result: dict[str, Any]) -> str:
    """Tokens per second of every variant as Markdown."""
    variants = result["variants"]
    lines = ["| model | job | " + " | ".join(variants) + " |", "|---|---|" + "---:|" * len(variants)]
    for row in result["rows"]:
        rates = " | ".join(f"{row['tok_per_s'][name]:.1f}" for name in variants)
        lines.append(f"| {row['model']} | {row['job']} | {rates} |")
    return "\n".join(lines)


def ratios(result: dict[str, Any], ours: str) -> str:
    """How many times as many tokens as each other variant this one of ours makes in a second, as Markdown."""
    peers = [name for name in result["variants"] if name != ours]
    lines = ["| model | job | " + " | ".join(peers) + " |", "|---|---|" + "---:|" * len(peers)]
    for row in result["rows"]:
        rates = row["tok_per_s"]
        entries = " | ".join(f"{rates[ours] / rates[name]:.2f}x" for name in peers)
        lines.append(f"| {row['model']} | {row['job']} | {entries} |")
    return "\n".join(lines)


def chosen_variants(asked: str) -> list[str]:
    """The names that were asked for, split at semicolons, or all; without llama.cpp where it cannot run."""
    chosen = asked.split(";") if asked else list(ALL)
    if unknown := [name for name in chosen if name not in ALL]:
        raise SystemExit(f"unknown variants: {unknown}; there are {'; '.join(ALL)}")
    if LLAMA_CPP in chosen and (reason := gguf_peer.unavailable_because()):
        print(f"{LLAMA_CPP} is left out: {reason}")
        chosen.remove(LLAMA_CPP)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--variants", default="", help="names with semicolons between them; all, where empty")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each job, at least")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations of the peers
    chosen = chosen_variants(arguments.variants)
    rows = []
    for model_name in arguments.models.split(","):
        torch.manual_seed(0)
        model = MODELS[model_name]().eval()
        vocabulary = model.config.vocab_size
        with ExitStack() as stack:
            variants = variants_of(model, chosen, stack)
            jobs = {}
            for batch in map(int, arguments.batch.split(",")):
                jobs[f"decode, batch {batch}"] = decode(variants, batch, vocabulary, arguments.seconds)
            jobs[f"prefill {PREFILL}"] = prefill(variants, vocabulary, arguments.seconds)
        for job, times in jobs.items():
            rates = {name: 1 / statistics.median(values) for name, values in times.items()}
            rows.append({"model": model_name, "job": job, "tok_per_s": rates, "seconds": times})
            print(model_name, job, {name: round(rate, 1) for name, rate in rates.items()}, flush=True)
        del variants, model
        gc.collect()
    result = {
        "machine": describe_machine(),
        "versions": versions("torchao", "llama-cpp-python"),
        "variants": chosen,
        "rows": rows,
    }
    keep("model", result, arguments.output)
    print("\n" + table(result))


if __name__ == "__main__":
    main()

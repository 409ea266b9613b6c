"""What keeping keys and values in blocks or in int8 changes: what a model says, and how fast it writes on.

    python bench/cache.py [MODEL TEXT]... [--tokens 16384] [--new 4000]

What it says: perplexity, KL and the most likely token beside the same model with transformers' own cache, window by
window, with weights in float32 and in w8a8 (`w8a8.evaluation.compare`, intervals paired).  The shipped OPT on held-out
docstrings, and each MODEL, a directory of a float model, on its TEXT, a file.  A window is read in one pass, in which
attention is given what the cache holds.

Where it comes from, as floats in blocks that were rounded, each token and head by itself: values alone; keys alone as
they come, on a grid that has a zero point, rotated, and as `int8` has them, rotated and with the best of 16 scales.

How fast: a Llama of four layers, random weights in w8a8, writes with each cache from one token on, drawn from what it
predicts with the same random numbers: a bit that differs ends in another text.  The caches take turns of one token; a
ratio is the median over 500 tokens of the time beside transformers' cache for the same token.  With one thread the
clock is that of the thread's processor time.

Results go to bench/results/MACHINE/cache.json, and from there to docs/performance.md and docs/howto/long-contexts.md.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import w8a8
from machine import describe_machine, keep
from w8a8.checkpoint.opening import OpenedModel, open_model
from w8a8.core.plain import plain
from w8a8.core.scheme import PerToken, QuantSpec
from w8a8.core.tokens import fake_quantize_tokens
from w8a8.decoding.models import CACHES, new_cache, set_cache
from w8a8.demo import corpus
from w8a8.demo.run import demo_model
from w8a8.evaluation import Text, compare, context_length, encode
from w8a8.kernels import cached
from w8a8.kernels.cached import TILE, block_of, rotated

KINDS = ("block", "int8")
SYMMETRIC, ASYMMETRIC = (QuantSpec(granularity=PerToken(), symmetric=way) for way in (True, False))


def rounded(x: Tensor, grid: QuantSpec = SYMMETRIC) -> Tensor:
    """Each token and head, (B, H, T, D), on a grid of its own."""
    return fake_quantize_tokens(x.reshape(-1, x.shape[-1]), grid, None).view(x.shape)


def turned(x: Tensor) -> Tensor:
    """Rounded after a rotation."""
    return rotated(rounded(rotated(x))) / block_of(x.shape[-1])


def as_int8(x: Tensor) -> Tensor:
    """Rounded as `int8` rounds keys."""
    codes = cached.empty(*x.shape[:2], -(-x.shape[2] // TILE) * TILE, x.shape[3], 1, x.device)
    cached.append(codes, x, x[..., :1], 0)
    return cached.keys_of(codes, 0, x.shape[2], x.dtype)


def as_they_came(x: Tensor) -> Tensor:
    """Not rounded."""
    return x


ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "values alone": (as_they_came, rounded),
    "keys as they come": (rounded, as_they_came),
    "keys with a zero point": (lambda x: rounded(x, ASYMMETRIC), as_they_came),
    "keys rotated": (turned, as_they_came),
    "keys alone": (as_int8, as_they_came),
}
"""How keys and values are rounded in floats."""

STRETCH = 500
SHOWN = 512  # tokens in a window, at most


class Rounded(w8a8.BlockCache):
    """Keys and values that were rounded, as floats."""

    ways: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """As any cache; with what was rounded."""
        assert not self.get_seq_length(layer_idx), "all of a window comes at once"
        keys, values = (way(x) for way, x in zip(self.ways, (key_states, value_states), strict=True))
        return super().update(keys, values, layer_idx, *args)


def exactness(name: str, opened: OpenedModel, text: Text) -> list[dict[str, Any]]:
    """One model on one text, with each weight and each cache beside transformers' own."""
    found = []
    length = min(SHOWN, context_length(opened.model) or SHOWN)
    for weights in ("float32", "w8a8"):
        reference = copy.deepcopy(opened.model).to(torch.float32)
        if weights != "float32":
            w8a8.quantize(reference, weights)
        CACHES.update({way: type("Rounded", (Rounded,), {"ways": ways}) for way, ways in ROUNDED.items()})
        for kind in (*KINDS, *ROUNDED):
            model = copy.deepcopy(reference)
            set_cache(model, kind)
            measured = compare(model, reference, text, seq_len=length)
            row = {
                "model": name,
                "weights": weights,
                "cache": kind,
                "tokens": measured.model.tokens,
                "window": length,
                "perplexity_ratio": plain(measured.perplexity_ratio),
                "kl_nats": plain(measured.kl_nats),
                "top1_agreement": plain(measured.top1_agreement),
            }
            print(row, flush=True)
            found.append(row)
    return found


class Writer:
    """A model with one of the caches, and what it has written."""

    def __init__(self, model: Any, kind: str, clock: Callable[[], float]) -> None:
        self._model, self._clock = copy.deepcopy(model), clock
        set_cache(self._model, kind)
        self._cache = new_cache(self._model) or DynamicCache(config=model.config)
        self._random = torch.Generator().manual_seed(0)
        self.text = [1]

    def token(self) -> float:
        """Seconds of the forward; the token is drawn beside the clock."""
        ids = torch.tensor([self.text[-1:]])
        began = self._clock()
        logits: Tensor = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
        seconds = self._clock() - began
        drawn = torch.multinomial(logits[0, -1].softmax(-1), 1, generator=self._random)
        self.text.append(int(drawn))
        return seconds


@torch.inference_mode()
def writing(new: int, clock: Callable[[], float]) -> dict[str, Any]:
    """How long each token takes with each cache, by stretches, and up to where the texts are one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=new + 1,
    )
    model = LlamaForCausalLM(config).eval()
    w8a8.quantize(model, head="int8")
    writers = {kind: Writer(model, kind, clock) for kind in ("dynamic", *KINDS)}
    seconds: dict[str, list[float]] = {kind: [] for kind in writers}
    order = list(writers)
    for turn in range(new):
        for kind in order[turn % 3 :] + order[: turn % 3]:
            seconds[kind].append(writers[kind].token())
    texts = {kind: writer.text for kind, writer in writers.items()}
    pairs = {kind: [a == b for a, b in zip(texts[kind], texts["dynamic"], strict=True)] for kind in KINDS}
    stretches = []
    for first in range(0, new, STRETCH):
        here = {kind: values[first : first + STRETCH] for kind, values in seconds.items()}
        row = {
            "first": first,
            "dynamic_ms": 1e3 * statistics.median(here["dynamic"]),
            "ratio": {
                kind: statistics.median(a / b for a, b in zip(here[kind], here["dynamic"], strict=True))
                for kind in KINDS
            },
        }
        print(row, flush=True)
        stretches.append(row)
    return {
        "new": new,
        "same_tokens": {kind: same.index(False) if False in same else len(same) - 1 for kind, same in pairs.items()},
        "stretches": stretches,
    }


def table(result: dict[str, Any], *, every: bool = False) -> str:
    """What a cache changes of what a model says, as Markdown; with where that comes from, or without."""
    lines = [
        "| model | weights | cache | tokens | perplexity beside `dynamic` | KL, nats a token | same top token |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in result["exactness"] if every else [row for row in result["exactness"] if row["cache"] in KINDS]:
        ratio, kl, same = row["perplexity_ratio"], row["kl_nats"], row["top1_agreement"]
        lines.append(
            f"| {row['model']} | {row['weights']} | {row['cache']} | {row['tokens']:,} "
            f"| x {ratio['mean']:.5f} ({ratio['low']:.5f} .. {ratio['high']:.5f}) "
            f"| {kl['mean']:.1e} ({kl['low']:.1e} .. {kl['high']:.1e}) | {100 * same['mean']:.2f} % |"
        )
    return "\n".join(lines)


def speeds(result: dict[str, Any]) -> str:
    """How long a token takes by where it stands, as Markdown."""
    lines = [
        "| tokens before it | " + " | ".join(("dynamic, ms", *KINDS)) + " |",
        "|---|" + "---:|" * (1 + len(KINDS)),
    ]
    for row in result["writing"]["stretches"]:
        cells = " | ".join(f"{row['ratio'][kind]:.2f}x" for kind in KINDS)
        lines.append(f"| from {row['first']:,} | {row['dynamic_ms']:.2f} | {cells} |")
    return "\n".join(lines)


def text(result: dict[str, Any]) -> str:
    """What came of writing, as a sentence."""
    written = result["writing"]
    same = [
        f"with `{kind}` the first {count:,} of {written['new']:,} drawn tokens are the same"
        for kind, count in written["same_tokens"].items()
    ]
    return "; ".join(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", nargs="*", metavar="MODEL TEXT", help="more models, and what they are scored on")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--new", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    if len(arguments.others) % 2:
        parser.error("after each MODEL comes its TEXT")
    one = torch.get_num_threads() == 1
    written = writing(arguments.new, time.thread_time if one else time.perf_counter)
    shipped = demo_model()
    rows = exactness(
        "the shipped OPT", shipped, encode(shipped.tokenizer, corpus.held_out_text()).first(arguments.tokens)
    )
    for name, file in zip(arguments.others[::2], arguments.others[1::2], strict=True):
        opened = open_model(name)
        text = encode(opened.tokenizer, Path(file).read_text()).first(arguments.tokens)
        rows += exactness(Path(name).name, opened, text)
    result = {
        "machine": describe_machine(),
        "clock": "processor" if one else "wall",
        "exactness": rows,
        "writing": written,
    }
    keep("cache", result, arguments.output)
    print("\n" + table(result, every=True) + "\n\n" + speeds(result))


if __name__ == "__main__":
    main()

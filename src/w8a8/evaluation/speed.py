"""How fast models read and write, side by side.

One round lets each model in turn read a prompt and write on from it, so that what disturbs the machine meets all of
them; one round is thrown away first.  Of the rounds, medians and quartiles.

    reading    tokens of the prompts / seconds of the forward that fills the cache, all logits made
    writing    tokens / seconds of the forwards of one token per sequence that follow, greedy

The tokens are random: what a dense model does takes as long for any text (a mixture of experts does not quite).
`generate` is not timed, since its own bookkeeping is a large share of a small model's token, and the same for all.
"""

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from w8a8.core.progress import Progress, tell
from w8a8.errors import ModelError
from w8a8.model.kinds import Asked, context_length
from w8a8.model.pretrained import Pretrained

ASKED = Asked("reading and writing tokens")
PROMPT, NEW = 512, 32
_ROUNDS = 3  # at least


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median of the rounds, and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model's rates.  `rounds` were timed."""

    reading: Rate
    writing: Rate
    rounds: int


def measure_speed(
    models: Mapping[str, Pretrained],
    *,
    prompt: int | None = None,
    new: int = NEW,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Time causal language models against each other.

    Args:
        models: By the name that they are told by; all in memory, on their devices.  Not modified.
        prompt: Tokens that are read; by default 512, or as many as the context has room for.
        new: Tokens that are then written, each by a forward of its own.
        batch: Sequences at once.
        seconds: Of measuring for each model; three rounds are made however long they take.
        seed: Of the tokens.
        progress: Called as progress(done, total, name); done and total are seconds.

    Raises:
        ModelError: no room in a model's context; it is no causal language model, or keeps no cache.
    """
    for model in models.values():
        ASKED.check_model(model)
    length = _length(models, prompt, new)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for name, model in models.items():
        _once(name, model, length, new, batch, seed)
    total, spent = seconds * len(models), 0.0
    while spent < total or min(map(len, rates.values())) < _ROUNDS:
        for name, model in models.items():
            read, wrote = _once(name, model, length, new, batch, seed)
            rates[name].append((batch * length / read, batch * new / wrote))
            spent += read + wrote
            tell(progress, round(min(spent, total)), round(total), name)
    return {
        name: Speed(_rate([read for read, _ in found]), _rate([wrote for _, wrote in found]), len(found))
        for name, found in rates.items()
    }


def _length(models: Mapping[str, Pretrained], prompt: int | None, new: int) -> int:
    """Of the prompt, where it and what is written fit into every context."""
    limits = {name: limit for name, model in models.items() if (limit := context_length(model)) is not None}
    room = min(limits.values(), default=PROMPT + new) - new
    length = max(1, min(PROMPT, room)) if prompt is None else prompt
    if not 1 <= length <= room or new < 1:
        shortest = min(limits, key=lambda name: limits[name]) if limits else next(iter(models))
        raise ModelError(
            f"a prompt of {length} tokens and {new} new ones were asked for, and {shortest} has a context of "
            f"{limits.get(shortest, room + new)}; ask for fewer (--prompt, --new), at least one of each"
        )
    return length


@torch.inference_mode()
def _once(name: str, model: Pretrained, length: int, new: int, batch: int, seed: int) -> tuple[float, float]:
    """Seconds of reading and of writing."""
    vocabulary, drawn = (
        cast(nn.Embedding, model.get_input_embeddings()).num_embeddings,
        torch.Generator().manual_seed(seed),
    )
    ids = torch.randint(vocabulary, (batch, length), generator=drawn, dtype=torch.int64, device="cpu").to(model.device)
    # what transformers calls it from 5.24 on, and before
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    began = _now(model)
    out = model(input_ids=ids, use_cache=True)
    read = _now(model) - began
    if getattr(out, "logits", None) is None or getattr(out, cache, None) is None:
        raise ModelError(
            f"{name} ({type(model).__name__}) gives no logits, or keeps no cache of what it read: only a causal "
            "language model can be timed"
        )
    began = _now(model)
    for _ in range(new):
        out = model(input_ids=_best(out.logits), use_cache=True, **{cache: getattr(out, cache)})
    return read, _now(model) - began


def _best(logits: Tensor) -> Tensor:
    """The most likely next token of each sequence: (B, T, V) -> (B, 1)."""
    return logits[:, -1:].argmax(-1)


def _now(model: Pretrained) -> float:
    """The time when all that was asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _rate(found: list[float]) -> Rate:
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return Rate(statistics.median(found), low, high)

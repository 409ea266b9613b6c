"""How fast models read and write, side by side.

One round lets each model in turn read a prompt and write on from it, so that what disturbs the machine meets all of
them; one round is thrown away first.  Of the rounds, medians and quartiles.

    reading    tokens of the prompts / seconds of the forward that fills the cache, all logits made
    writing    tokens / seconds of the forwards of one token per sequence that follow, greedy

What is written may come after another number of tokens than are read (`context`): these are read once, before the
rounds, and what was kept of them is copied in each.

The tokens are random: what a dense model does takes as long for any text (a mixture of experts does not quite).
An encoder writes nothing: it is timed reading alone, by one forward; of pictures or sound in these a second.
`generate` is not timed, since its own bookkeeping is a large share of a small model's token, and the same for all.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from w8a8.core.progress import Progress, tell
from w8a8.decoding.models import cache_argument, new_cache
from w8a8.errors import ModelError
from w8a8.evaluation.samples import UNITS, random_inputs, unit_of
from w8a8.model.kinds import READS_TEXT, Asked, Kind, context_length, kind_of_model
from w8a8.model.pretrained import Pretrained

ASKED = Asked("a measurement of speed", READS_TEXT | UNITS.keys())
PROMPT, NEW = 512, 32
_ROUNDS = 3  # at least
_PART = 512  # tokens of a context that are read at once


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median of the rounds, and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model's rates.  `rounds` were timed.

    writing: None of an encoder.
    unit: What is read: "tokens", "pictures" or "sounds".
    fused: What of an encoder was fused, or why nothing was; None where nobody asked.
    kv: How the model kept keys and values; None where nobody told.
    """

    reading: Rate
    writing: Rate | None
    rounds: int
    unit: str = "tokens"
    fused: str | None = None
    kv: str | None = None


def measure_speed(
    models: Mapping[str, Pretrained],
    *,
    prompt: int | None = None,
    context: int | None = None,
    new: int = NEW,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Time causal language models against each other, or encoders of one kind of input.

    Args:
        models: By the name that they are told by; all in memory, on their devices, with the caches that are set for
            them (`w8a8.set_cache`).  Not modified.
        prompt: Tokens that are read; by default 512, or as many as the context has room for.
        context: Tokens that writing comes after; by default those of the prompt.
        new: Tokens that are then written, each by a forward of its own.
        batch: Sequences at once.
        seconds: Of measuring for each model; three rounds are made however long they take.
        seed: Of the tokens.
        progress: Called as progress(done, total, name); done and total are seconds.

    Raises:
        ModelError: no room in a model's context; it is of another kind, or keeps no cache; some of them are encoders
            and some are not, or they read different things; a context is asked of encoders, or tokens of pictures.
    """
    for model in models.values():
        ASKED.check_model(model)
    encoders = [name for name, model in models.items() if only_reads(model)]
    if encoders and (len(encoders) < len(models) or context is not None):
        other = next((name for name in models if name not in encoders), "a context to write after")
        raise ModelError(
            f"{encoders[0]} reads and writes nothing, and was to be timed with {other}: time encoders with encoders, "
            "and without --context"
        )
    units = {name: unit_of(model) for name, model in models.items()}
    unit = next(iter(units.values()))
    if len(set(units.values())) > 1 or (unit != "tokens" and prompt is not None):
        told = ", ".join(f"{name} reads {read}" for name, read in units.items())
        raise ModelError(f"{told}: time models that read the same, and without --prompt where that is no text")
    length = _length(models, prompt, 0 if encoders else new, least=0 if encoders else 1) if unit == "tokens" else 1
    if context is not None:
        _length(models, context, new, "--context")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    turns: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, model in models.items():
        if unit != "tokens":
            turns[name] = partial(_read, model, random_inputs(model, batch, seed))
        elif encoders:
            ids = _ids(model, batch, length, seed)
            turns[name] = partial(_read, model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        else:
            turn = _Turn(name, model, new, _ids(model, batch, length, seed))
            turns[name] = turn.once
        turns[name]()
        if context is not None:  # which no encoder has
            turn.read(_ids(model, batch, context, seed + 1))
    total, spent = seconds * len(models), 0.0
    while spent < total or min(map(len, rates.values())) < _ROUNDS:
        for name in models:
            read, wrote = turns[name]()
            rates[name].append((batch * length / read, 0.0 if encoders else batch * new / wrote))
            spent += read + wrote
            tell(progress, round(min(spent, total)), round(total), name)
    return {
        name: Speed(
            _rate([read for read, _ in found]),
            None if encoders else _rate([wrote for _, wrote in found]),
            len(found),
            unit,
        )
        for name, found in rates.items()
    }


def only_reads(model: nn.Module) -> bool:
    """Whether it is an encoder: of text, of pictures or of sound."""
    return kind_of_model(model) in {Kind.MASKED, Kind.TEXT, *UNITS}


def _length(
    models: Mapping[str, Pretrained], prompt: int | None, new: int, option: str = "--prompt", *, least: int = 1
) -> int:
    """Of the prompt, where it and what is written fit into every context."""
    limits = {name: limit for name, model in models.items() if (limit := context_length(model)) is not None}
    room = min(limits.values(), default=PROMPT + new) - new
    length = max(1, min(PROMPT, room)) if prompt is None else prompt
    if not 1 <= length <= room or new < least:
        shortest = min(limits, key=lambda name: limits[name]) if limits else next(iter(models))
        raise ModelError(
            f"a prompt of {length} tokens and {new} new ones were asked for, and {shortest} has a context of "
            f"{limits.get(shortest, room + new)}; ask for fewer ({option}, --new), at least one of each"
        )
    return length


def _ids(model: Pretrained, batch: int, length: int, seed: int) -> Tensor:
    """Random tokens, (B, T)."""
    words = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(words, (batch, length), generator=drawn, dtype=torch.int64, device="cpu").to(model.device)


@torch.inference_mode()
def _read(model: Pretrained, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """What an encoder does in each round: seconds of reading, and none of writing."""
    began = _now(model)
    model(**inputs)
    return _now(model) - began, 0.0


class _Turn:
    """What a model does in each round.

    filled: What it kept of a context; None where it goes on from its prompt.
    """

    def __init__(self, name: str, model: Pretrained, new: int, ids: Tensor) -> None:
        self._name, self._model, self._new, self._ids = name, model, new, ids
        self._cache = cache_argument(model)
        self._filled: Any = None

    def _forward(self, ids: Tensor, kept: Any) -> tuple[Tensor, Any]:
        """Logits, and what is kept."""
        out = self._model(input_ids=ids, use_cache=True, **({} if kept is None else {self._cache: kept}))
        logits, kept = getattr(out, "logits", None), getattr(out, self._cache, None)
        if logits is None or kept is None:
            raise ModelError(
                f"{self._name} ({type(self._model).__name__}) gives no logits, or keeps no cache of what it read: only "
                "a causal language model can be timed"
            )
        return logits, kept

    @torch.inference_mode()
    def read(self, ids: Tensor) -> None:
        """Read a context, to write after it from now on."""
        kept = new_cache(self._model)
        for part in ids.split(_PART, 1):
            _, kept = self._forward(part, kept)
        self._filled = kept

    @torch.inference_mode()
    def once(self) -> tuple[float, float]:
        """Seconds of reading and of writing."""
        kept = new_cache(self._model)
        began = _now(self._model)
        logits, kept = self._forward(self._ids, kept)
        read = _now(self._model) - began
        if self._filled is not None:
            kept = copy.deepcopy(self._filled)
        began = _now(self._model)
        for _ in range(self._new):
            logits, kept = self._forward(logits[:, -1:].argmax(-1), kept)  # (B, 1), the most likely token of each
        return read, _now(self._model) - began


def _now(model: Pretrained) -> float:
    """The time when all that was asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _rate(found: list[float]) -> Rate:
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return Rate(statistics.median(found), low, high)

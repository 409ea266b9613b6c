"""The next token of each sequence, by what its own request asks for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_COLDEST = 1e-6
"""A temperature below which float32 divides by nothing; the most likely token has everything long before."""


@dataclass(frozen=True)
class Sampling:
    """How a request has its tokens chosen.

    temperature: 0 takes the most likely token.
    top_k: Only so many of the most likely; 0 for all.
    top_p: Only the most likely that together have this much of the probability.
    min_p: Only those with at least this share of the most likely one's probability.
    repetition_penalty: Logits of tokens that were read or written are divided by it, multiplied where negative
        (Keskar et al. 2019).
    presence_penalty, frequency_penalty: Taken from the logits of tokens that were written: once, and for each time.
    bias: Added to logits, by token.
    seed: Of the drawing; None takes torch's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken as it stands."""
        changes = self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty, self.bias
        return self.temperature == 0 and not any(changes)


class Chooser:
    """Chooses the tokens of one sequence."""

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.sampling = sampling
        self._prompt = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._written = Counter[int]()
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: (vocabulary,) in float32; may be changed.
        """
        asked = self.sampling
        self._penalise(logits)
        if asked.temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()) / max(asked.temperature, _COLDEST)
        order: Tensor | None = None
        if asked.top_k:
            logits, order = logits.topk(min(asked.top_k, len(logits)))
        elif asked.top_p < 1:
            logits, order = logits.sort(descending=True)
        shares = logits.softmax(-1)
        if asked.top_p < 1:  # in order: whatever lies behind those that have it together
            rest = shares.cumsum(-1) - shares >= asked.top_p
            rest[0] = False
            shares = shares.masked_fill(rest, 0)
        if asked.min_p:
            shares = shares.masked_fill(shares < asked.min_p * shares.max(), 0)
        drawn = int(torch.multinomial(shares, 1, generator=self._generator))
        return drawn if order is None else int(order[drawn])

    def wrote(self, token: int) -> None:
        """Take note of a token that was chosen."""
        self._written[token] += 1

    def _penalise(self, logits: Tensor) -> None:
        asked = self.sampling
        if asked.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | set(self._written)), dtype=torch.long, device=logits.device)
            found = logits[seen]
            by = asked.repetition_penalty
            logits[seen] = torch.where(found > 0, found / by, found * by)
        if self._written and (asked.presence_penalty or asked.frequency_penalty):
            tokens, counts = (
                torch.tensor(list(numbers), dtype=torch.long, device=logits.device)
                for numbers in (self._written, self._written.values())
            )
            logits[tokens] -= asked.presence_penalty + asked.frequency_penalty * counts
        if asked.bias:
            tokens = torch.tensor(list(asked.bias), dtype=torch.long, device=logits.device)
            logits[tokens] += torch.tensor(list(asked.bias.values()), dtype=logits.dtype, device=logits.device)


def chosen(choosers: list[Chooser], logits: Tensor) -> list[int | None]:
    """The next token of each sequence; None where its logits have a NaN, or nothing but minus infinity."""
    values, largest = logits.max(-1)  # a NaN is larger than anything
    found: list[int | None] = []
    for place, chooser in enumerate(choosers):
        if not bool(values[place].isfinite()):
            found.append(None)
        elif chooser.sampling.plain:
            found.append(int(largest[place]))
        else:
            found.append(chooser.choose(logits[place].float().clone()))
    return found

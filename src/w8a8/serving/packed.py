"""Several sequences in one forward pass: their new tokens side by side, and attention that keeps them apart.

A step has one row of tokens, (1, T): one of each sequence that is being written, and pieces of prompts that are being
read.  Every layer but attention treats tokens alike, so that the integer products see all T rows at once, which is
where batching gains; attention is handed its `Step` and works sequence by sequence, over the keys and values in
`Places`: those that have one new token in one call of the native kernel (`kernels.each`), pieces by PyTorch's.

transformers lets a model be called with an attention of others by name (`AttentionInterface`).  That is all that is
used here: no cache of transformers takes part.  Some models do not hand on to their attention what else they are called
with, so it finds the step that is `taken`.

transformers' own continuous batching, by its source in 5.23, multiplies the queries of all with the keys of all where
it runs on a CPU and masks the products, 64 times what is needed with 64 clients; its sampling is that of the first
request.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from w8a8.decoding.attention import plain
from w8a8.errors import ModelError
from w8a8.kernels.cached import Asked
from w8a8.kernels.each import attend_each, ranges_of
from w8a8.serving.places import Places

NAME = "w8a8_packed"
"""Of the attention, as `model.set_attn_implementation` takes it."""


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence: rows `start` to `start + count` of a step, at positions from `before` on."""

    place: int
    start: int
    count: int
    before: int

    @property
    def end(self) -> int:
        """Tokens of the sequence after the step."""
        return self.before + self.count


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass over several sequences.

    store: Where keys and values are.
    where: (T, 2) int32, place and position of each new token.
    singles: The first sequences, which have one new token each.
    pieces: The others.
    windows: What each layer's attention was told of how far a token sees.
    """

    store: Places
    where: Tensor
    singles: Sequence[Piece]
    pieces: Sequence[Piece]
    windows: dict[int, int | None] = field(default_factory=dict)
    _made: dict[object, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Places, pieces: Sequence[Piece], device: torch.device) -> "Step":
        """The step that has these pieces, in the order of their rows."""
        where = [(p.place, p.before + i) for p in pieces for i in range(p.count)]
        singles = list(takewhile(lambda piece: piece.count == 1, pieces))
        return cls(store, torch.tensor(where, dtype=torch.int32, device=device), singles, pieces[len(singles) :])

    def ranges(self, window: int | None) -> Tensor:
        """What each of the singles sees, as `attend_each` takes it."""
        if window not in self._made:
            seen = [(p.place, _first(p.end, window), p.end) for p in self.singles]
            self._made[window] = ranges_of(seen, self.where.device)
        return self._made[window]

    def mask(self, piece: Piece, start: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, count, tokens from `start` on), causal: 0 for what a token sees and -inf for the rest."""
        key = (piece.start, window, dtype)
        if key not in self._made:
            device = self.where.device
            rows = torch.arange(piece.before, piece.end, dtype=torch.long, device=device)[:, None]
            columns = torch.arange(start, piece.end, dtype=torch.long, device=device)
            seen = columns <= rows
            if window is not None:
                seen &= columns > rows - window
            zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
            self._made[key] = zeros.masked_fill_(~seen, -torch.inf)[None, None]
        return self._made[key]


_TAKEN: ContextVar[tuple[Step, frozenset[int]]] = ContextVar("w8a8_step")


@contextlib.contextmanager
def taken(step: Step, model: nn.Module) -> Iterator[None]:
    """While this model, and no other that it may call, is called with the rows of this step."""
    token = _TAKEN.set((step, frozenset(map(id, model.modules()))))
    try:
        yield
    finally:
        _TAKEN.reset(token)


def _first(end: int, window: int | None) -> int:
    """The first position that the token before `end` sees."""
    return 0 if window is None else max(end - window, 0)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention of a layer over the sequences of the step that is taken; as transformers calls it.

    Args:
        module: The layer, whose `layer_idx` says which.
        query: (1, heads, T, width).
        key, value: (1, fewer heads, T, width).
        attention_mask: None: what a token sees follows from the step.
        scaling: Of the products; by default the root of the width.
        sliding_window: How far back a token sees, itself included.
        softcap: What the scores are bent to stay below.
        s_aux: (heads,) scores of a key without a value, the sinks.

    Raises:
        ModelError: the model asks for more than is known here, or no step is taken.
    """
    step, modules = _TAKEN.get((None, frozenset()))
    if step is None or id(module) not in modules:
        raise ModelError("this attention is the server's: it is there while several sequences are written together")
    if attention_mask is not None:
        raise ModelError("its attention takes more than queries, keys, values and a window")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sinks = None if s_aux is None else s_aux.detach().to(torch.float32).contiguous()
    step.windows[module.layer_idx] = sliding_window
    kept = step.store.written(module.layer_idx, key, value, step.where)
    pieces, found = list(step.pieces), []
    if step.singles:
        rows = query[0, :, : len(step.singles)].transpose(0, 1).unsqueeze(2)  # (sequences, heads, 1, width)
        out = attend_each(rows, kept.held, step.ranges(sliding_window), scale, softcap, sinks)
        if out is None:
            pieces = [*step.singles, *pieces]
        else:
            found.append(out)
    for piece in pieces:
        rows = query[:, :, piece.start : piece.start + piece.count]
        start = _first(piece.before + 1, sliding_window)
        k, v = kept.read(piece.place, start, piece.end)
        causal = piece.before == start and (sliding_window is None or piece.count <= sliding_window)
        mask = None if causal or piece.count == 1 else step.mask(piece, start, sliding_window, query.dtype)
        if softcap is None and sinks is None:
            out = scaled_dot_product_attention(
                rows, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=rows.shape[1] != k.shape[1]
            )
            found.append(out[0].transpose(0, 1))
        else:
            mask = None if mask is None else mask.to(torch.float32)
            found.append(plain(rows, k, v, Asked(scale, mask, causal, softcap, sinks))[0])
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


AttentionInterface.register(NAME, attend)

"""Several sequences in one forward pass: their new tokens side by side, and attention that keeps them apart.

A step has one row of tokens, (1, T): one of each sequence that is being written, and pieces of prompts that are being
read.  Every layer but attention treats tokens alike, so that the integer products see all T rows at once, which is
where batching gains; attention is handed its `Step` and works sequence by sequence.

transformers lets a model be called with an attention of others by name (`AttentionInterface`), and hands it whatever
else the model was called with.  That is all that is used here: no cache of transformers takes part.  The keys and
values lie in `Places`: for each layer (places, heads, tokens, width), a place for each sequence.  What is not touched
takes no memory, and the lowest free place is taken first, so that a quiet server stays small.

transformers' own continuous batching, by its source in 5.23, multiplies the queries of all with the keys of all where
it runs on a CPU and masks the products, 64 times what is needed with 64 clients; its sampling is that of the first
request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from w8a8.errors import ModelError

NAME = "w8a8_packed"
"""Of the attention, as `model.set_attn_implementation` takes it."""

WASTE = 2.0
"""How many times its tokens a product may go through, so that sequences of several lengths are one."""


class Places:
    """Keys and values of sequences, a place for each."""

    def __init__(self, count: int, tokens: int) -> None:
        self.count, self.tokens = count, tokens
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def layers(self) -> int:
        """How many layers have been written."""
        return len(self._keys)

    def bytes_per_token(self) -> int:
        """Of all layers, known after a first step."""
        kept = [*self._keys.values(), *self._values.values()]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in kept)

    def written(self, layer: int, step: "Step", keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of a step where they belong.

        Args:
            keys, values: (1, heads, T, width); widths may differ.

        Returns:
            Those of all places, (places, heads, tokens, width).
        """
        for kept, new in ((self._keys, keys), (self._values, values)):
            if layer not in kept:
                _, heads, _, width = new.shape
                kept[layer] = _untouched(torch.Size((self.count, heads, self.tokens, width)), new)
            kept[layer][step.places, :, step.positions] = new[0].transpose(0, 1)  # (T, heads, width)
        return self._keys[layer], self._values[layer]

    def clear(self, place: int) -> None:
        """Zero what a place holds: what is masked is multiplied with nothing, which is a NaN for what is no number."""
        for kept in (*self._keys.values(), *self._values.values()):
            kept[place] = 0.0


def _untouched(shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros that take no memory until they are written, on a CPU; `torch.zeros` writes them itself."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    zeros = np.zeros(shape.numel() * like.element_size(), np.uint8)
    return torch.from_numpy(zeros).view(like.dtype).view(shape)


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence: rows `start` to `start + count` of a step, at positions from `before` on."""

    place: int
    start: int
    count: int
    before: int


@dataclass(frozen=True)
class Range:
    """Neighbouring places whose one new token is attended in one product.

    low, high: The places.
    rows: Of the step, one for each place; -1 where a place has none.
    longest: Tokens that are gone through.
    """

    low: int
    high: int
    rows: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass over several sequences.

    store: Where keys and values are.
    places, positions: (T,) of each new token.
    ranges: The sequences that have one new token.
    pieces: Those that have several.
    lengths: (places,) tokens of each after this step, 1 where there is none.
    """

    store: Places
    places: Tensor
    positions: Tensor
    ranges: Sequence[Range]
    pieces: Sequence[Piece]
    lengths: Tensor
    masks: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Places, pieces: Sequence[Piece], device: torch.device) -> "Step":
        """The step that has these pieces, in the order of their rows."""
        places = torch.tensor([p.place for p in pieces for _ in range(p.count)], dtype=torch.long, device=device)
        positions = torch.tensor(
            [p.before + i for p in pieces for i in range(p.count)], dtype=torch.long, device=device
        )
        lengths = torch.ones(store.count, dtype=torch.long, device="cpu")
        for piece in pieces:
            lengths[piece.place] = piece.before + piece.count
        singles = {piece.place: piece.start for piece in pieces if piece.count == 1}
        ranges = [
            Range(
                low,
                high,
                torch.tensor([singles.get(p, -1) for p in range(low, high)], dtype=torch.long, device=device),
                longest,
            )
            for low, high, longest in _ranges(sorted(singles), lengths.tolist())
        ]
        return cls(store, places, positions, ranges, [p for p in pieces if p.count > 1], lengths.to(device))

    def mask_of_range(self, part: Range, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(high - low, 1, 1, longest), 0 for what a token sees and -inf for the rest; None where all see all."""
        key = (part.low, window, dtype)
        if key not in self.masks:
            ends = self.lengths[part.low : part.high, None]
            places = torch.arange(part.longest, dtype=torch.long, device=ends.device)
            seen = places < ends
            if window is not None:
                seen &= places >= ends - window
            self.masks[key] = None if bool(seen.all()) else _added(seen, dtype)[:, None, None]
        return self.masks[key]

    def mask_of_piece(self, piece: Piece, window: int | None, dtype: torch.dtype) -> Tensor:
        """(count, tokens before and new), causal."""
        key = (piece.start, piece.count, window, dtype)
        if key not in self.masks:
            device = self.lengths.device
            rows = torch.arange(piece.before, piece.before + piece.count, dtype=torch.long, device=device)[:, None]
            columns = torch.arange(piece.before + piece.count, dtype=torch.long, device=device)
            seen = columns <= rows
            if window is not None:
                seen &= columns > rows - window
            self.masks[key] = _added(seen, dtype)
        found = self.masks[key]
        assert found is not None
        return found


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _ranges(places: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Cut places into ranges of neighbours, each with its longest, by `WASTE`."""
    if not places:
        return []
    longest = max(lengths[place] for place in places)
    low, high = places[0], places[-1] + 1
    if len(places) == 1 or (high - low) * longest <= WASTE * sum(lengths[place] for place in places):
        return [(low, high, longest)]
    middle = len(places) // 2
    return _ranges(places[:middle], lengths) + _ranges(places[middle:], lengths)


_KNOWN = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions"}
"""What attention is handed beside its operands and may be passed over: what a `Step` says, or what is off."""


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
    w8a8_step: Step | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention of a layer over the sequences of a step; as transformers calls it.

    Args:
        module: The layer, whose `layer_idx` says which.
        query: (1, heads, T, width).
        key, value: (1, fewer heads, T, width).
        attention_mask: None: what a token sees follows from the step.
        scaling: Of the products; by default the root of the width.
        sliding_window: How far back a token sees, itself included.
        softcap, s_aux: Of some models, and not known here.

    Raises:
        ModelError: the model asks for more than is known here.
    """
    if w8a8_step is None or attention_mask is not None or softcap is not None or s_aux is not None:
        raise ModelError("its attention takes more than queries, keys, values and a window")
    keys, values = w8a8_step.store.written(module.layer_idx, w8a8_step, key, value)
    heads, groups = query.shape[1], keys.shape[1]
    found = query.new_empty(query.shape[2], heads, values.shape[3])  # (T, heads, width)
    for part in w8a8_step.ranges:
        there = part.rows >= 0
        rows = query[0, :, part.rows.clamp(min=0)].transpose(0, 1)  # (places, heads, width)
        grouped = rows.reshape(len(rows), groups, heads // groups, -1)  # the heads that share keys, as rows
        k, v = (t[part.low : part.high, :, : part.longest] for t in (keys, values))
        mask = w8a8_step.mask_of_range(part, sliding_window, query.dtype)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
        found[part.rows[there]] = out.reshape(len(rows), heads, -1)[there]
    for piece in w8a8_step.pieces:
        rows = query[:, :, piece.start : piece.start + piece.count]
        k, v = (t[piece.place, None, :, : piece.before + piece.count] for t in (keys, values))
        plain = piece.before == 0 and (sliding_window is None or piece.count <= sliding_window)
        mask = None if plain else w8a8_step.mask_of_piece(piece, sliding_window, query.dtype)
        out = scaled_dot_product_attention(
            rows, k, v, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=heads != groups
        )
        found[piece.start : piece.start + piece.count] = out[0].transpose(0, 1)
    return found[None], None


AttentionInterface.register(NAME, attend)

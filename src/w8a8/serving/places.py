"""Keys and values of many sequences, a place for each, as they came or in int8.

Nothing is read that was not written: attention goes over the tokens of each sequence and no further.  So memory that is
not touched takes none, and the lowest free place is taken first, that a quiet server stays small.
"""

from typing import TypeAlias

from torch import Tensor

from w8a8.kernels import cached
from w8a8.kernels.each import deal


class Floats:
    """Those of one layer, as they came.

    Args:
        count, tokens: Places, and what each has room for.
        keys, values: Such as are kept.

    held: As `w8a8.kernels.each.attend_each` reads them.
    """

    def __init__(self, count: int, tokens: int, keys: Tensor, values: Tensor) -> None:
        keys, values = (t.new_empty((count, t.shape[1], tokens, t.shape[3])) for t in (keys, values))
        self.held = keys, values

    def write(self, keys: Tensor, values: Tensor, where: Tensor) -> None:
        """Put tokens, (1, heads, T, width), where they belong: (T, 2), of each its place and its position."""
        places, positions = where.unbind(1)
        for kept, new in zip(self.held, (keys, values), strict=True):
            kept[places, :, positions] = new[0].transpose(0, 1)  # (T, heads, width)

    def read(self, place: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some positions of a place, (1, heads, tokens, width)."""
        keys, values = (kept[place, None, :, start:end] for kept in self.held)
        return keys, values

    @property
    def token_bytes(self) -> int:
        """What a token takes."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in self.held)


class Codes:
    """The same in int8 (`w8a8.kernels.cached`).  What is read is dequantised into new memory.

    Args:
        count, tokens: Places, and what each has room for.
        keys, values: Such as are kept.
    """

    def __init__(self, count: int, tokens: int, keys: Tensor, values: Tensor) -> None:
        room = -(-tokens // cached.TILE) * cached.TILE
        self.held = cached.empty(count, keys.shape[1], room, keys.shape[3], values.shape[3], keys.device)
        self._dtypes = keys.dtype, values.dtype

    def write(self, keys: Tensor, values: Tensor, where: Tensor) -> None:
        deal(self.held, keys, values, where)

    def read(self, place: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        own = cached.chosen(self.held, slice(place, place + 1))
        return cached.keys_of(own, start, end, self._dtypes[0]), cached.values_of(own, start, end, self._dtypes[1])

    @property
    def token_bytes(self) -> int:
        room = self.held.key_scale.shape[0] * self.held.room
        return sum(t.numel() * t.element_size() for t in self.held[:4]) // room


Kept: TypeAlias = Floats | Codes

KINDS: dict[str, type[Kept]] = {"float": Floats, "int8": Codes}
"""Ways of keeping them."""


class Places:
    """Keys and values of sequences, a place for each.

    Args:
        count: Places.
        tokens: That one has room for.
        kind: Of `KINDS`.
    """

    def __init__(self, count: int, tokens: int, kind: str = "float") -> None:
        self.count, self.tokens, self.kind = count, tokens, kind
        self._kept: dict[int, Kept] = {}

    def emptied(self) -> "Places":
        """New ones like these."""
        return Places(self.count, self.tokens, self.kind)

    def layers(self) -> int:
        """How many layers have been written."""
        return len(self._kept)

    def bytes_per_token(self) -> int:
        """Of all layers, known after a first step."""
        return sum(kept.token_bytes for kept in self._kept.values())

    def written(self, layer: int, keys: Tensor, values: Tensor, where: Tensor) -> Kept:
        """Put keys and values of a layer where they belong; what is kept of it."""
        if layer not in self._kept:
            self._kept[layer] = KINDS[self.kind](self.count, self.tokens, keys, values)
        kept = self._kept[layer]
        kept.write(keys, values, where)
        return kept

"""Where the keys and values of one layer lie: room for more tokens than there are, written to in place.

Two kinds with one interface: float, as the model computes them, and int8 (`w8a8.kernels.cached`).  A token is written
once and not moved until the room is used up; then all that is still needed is copied into `BLOCK` tokens more.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from w8a8.kernels import cached

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

BLOCK = 256
"""By how many tokens room grows, a multiple of `cached.TILE`: what was copied to make room is so one token in 256 of
what attention reads, and what lies unused at 8,192 tokens at most 3 %."""


class Store(Protocol):
    """The tokens of one layer, each in a place that is counted from the front."""

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, room: int) -> "Self":
        """Room for so many tokens of such keys and values, (B, H, T, D)."""

    @property
    def room(self) -> int:
        """How many places there are."""

    @property
    def batch(self) -> int:
        """How many sequences there are."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sequences, heads, dims of keys, dims of values."""

    def write(self, keys: Tensor, values: Tensor, at: int) -> None:
        """Put tokens into their places."""

    def keys(self, start: int, end: int) -> Tensor:
        """Those of some places, (B, H, T, D) in the dtype that they came in."""

    def values(self, start: int, end: int) -> Tensor:
        """Those of some places, (B, H, T, D) in the dtype that they came in."""

    def moved(self, start: int, end: int, room: int) -> "Self":
        """The tokens of some places at the front of new room; start is a multiple of `cached.TILE`."""

    def chosen(self, sequences: Tensor) -> "Self":
        """Some of the sequences, each as often as it is named: indices, or which of them."""


class FloatStore(Store):
    """As they came.  What is read is a view of what is held."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, room: int) -> "Self":
        return cls(*(x.new_empty((*x.shape[:2], room, x.shape[3])) for x in (keys, values)))

    @property
    def room(self) -> int:
        return self._keys.shape[2]

    @property
    def batch(self) -> int:
        return self._keys.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, heads, _, key_dims = self._keys.shape
        return batch, heads, key_dims, self._values.shape[3]

    def write(self, keys: Tensor, values: Tensor, at: int) -> None:
        end = at + keys.shape[2]
        self._keys[:, :, at:end] = keys
        self._values[:, :, at:end] = values

    def keys(self, start: int, end: int) -> Tensor:
        return self._keys[:, :, start:end]

    def values(self, start: int, end: int) -> Tensor:
        return self._values[:, :, start:end]

    def moved(self, start: int, end: int, room: int) -> "Self":
        found = self.like(self._keys, self._values, room)
        found.write(self.keys(start, end), self.values(start, end), 0)
        return found

    def chosen(self, sequences: Tensor) -> "Self":
        return type(self)(self._keys[sequences], self._values[sequences])


class Int8Store(Store):
    """In int8.  What is read is dequantised into new memory."""

    def __init__(self, codes: cached.Codes, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        self.codes, self.dtypes = codes, dtypes

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, room: int) -> "Self":
        (batch, heads, _, key_dims), value_dims = keys.shape, values.shape[3]
        return cls(cached.empty(batch, heads, room, key_dims, value_dims, keys.device), (keys.dtype, values.dtype))

    @property
    def room(self) -> int:
        return self.codes.room

    @property
    def batch(self) -> int:
        return self.codes.key_scale.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, heads, _ = self.codes.key_scale.shape
        return batch, heads, self.codes.key_dims, self.codes.value_dims

    def write(self, keys: Tensor, values: Tensor, at: int) -> None:
        cached.append(self.codes, keys, values, at)

    def keys(self, start: int, end: int) -> Tensor:
        return cached.keys_of(self.codes, start, end, self.dtypes[0])

    def values(self, start: int, end: int) -> Tensor:
        return cached.values_of(self.codes, start, end, self.dtypes[1])

    def moved(self, start: int, end: int, room: int) -> "Self":
        return type(self)(cached.copied(self.codes, start, end, room), self.dtypes)

    def chosen(self, sequences: Tensor) -> "Self":
        return type(self)(cached.chosen(self.codes, sequences), self.dtypes)

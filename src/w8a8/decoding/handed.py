"""What a cache hands on to attention: keys and values as floats, or that they lie there as codes.

A model asks its cache for keys and values, and calls attention with what it gets.  Attention that reads codes needs no
floats, so making them would be for nothing, and they are most of what a long context costs.  But whether a model hands
on what it got, and to which attention, is the model's affair.  So it is observed, layer by layer:

1. What a layer gives first are floats with a tag.  Attention that finds the tag on keys and on values says so to the
   layer (`Kept.seen`): nothing stands between them.
2. From then on the layer gives tensors of the right shape, dtype and device without content, that carry the tag.  Their
   one element is NaN, so that whoever computes with them all the same computes nothing that looks right; and the layer
   refuses its next token where attention did not ask for the codes (`Kept.seen`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.kernels.cached import Codes, keys_of, values_of


@dataclass(eq=False)
class Kept:
    """Where what a layer gave lies.

    codes: All of the layer's.
    start, end: Which of them.
    dtypes: Of keys and values as the model computes them.
    only: Whether no floats were made.
    seen: Called when it came to attention as it was given.
    """

    codes: Codes
    start: int
    end: int
    dtypes: tuple[torch.dtype, torch.dtype]
    only: bool
    seen: Callable[[], None]

    def floats(self) -> tuple[Tensor, Tensor]:
        """Keys and values, dequantised: (B, H, T, D)."""
        return (
            keys_of(self.codes, self.start, self.end, self.dtypes[0]),
            values_of(self.codes, self.start, self.end, self.dtypes[1]),
        )

    def given(self) -> tuple[Tensor, Tensor]:
        """What the model gets: the floats, or tensors without content, tagged."""
        keys, values = self._empty() if self.only else self.floats()
        vars(keys)["w8a8_keys"], vars(values)["w8a8_values"] = self, self
        return keys, values

    def _empty(self) -> tuple[Tensor, Tensor]:
        codes, dtypes = self.codes, self.dtypes
        batch, heads, _ = codes.key_scale.shape
        nothing = codes.key_scale.new_full((), torch.nan, dtype=dtypes[0], device=codes.key_scale.device)
        length = self.end - self.start
        return (
            nothing.expand(batch, heads, length, codes.key_dims),
            nothing.to(dtypes[1]).expand(batch, heads, length, codes.value_dims),
        )


def kept_of(keys: Tensor, values: Tensor) -> Kept | None:
    """Where keys and values lie that came as they were given; None for others."""
    found = getattr(keys, "w8a8_keys", None)
    return found if isinstance(found, Kept) and found is getattr(values, "w8a8_values", None) else None

"""The layers of a cache as transformers calls them, over a store: all of the past, or a window of it.

transformers' own concatenate all of the past with each token.  Here a layer knows from which place to which its tokens
lie (`start`, `end`), and that alone changes when some are cropped or leave the window.

What `crop` is told changed: before transformers 5.14 how many tokens shall be left, if that is not negative, and since
how many are to go, as a negative number.  Which of the two this one means says the name of the argument.
"""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from w8a8.decoding.attention import ROWS
from w8a8.decoding.handed import Kept
from w8a8.decoding.stores import BLOCK, FloatStore, Int8Store, Store
from w8a8.errors import ModelError
from w8a8.kernels.cached import TILE
from w8a8.kernels.fused import dispatcher_is_needed

_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
_AXES = 4


class BlockLayer(DynamicLayer):
    """All of the past.

    Attributes:
        store: Where it lies; None before the first token.
        start, end: The places of its first token, and behind its last.
    """

    of: ClassVar[type[FloatStore | Int8Store]] = FloatStore
    store: Store | None = None
    start = end = 0
    declared_heads: int | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        check_states(key_states, value_states, self.declared_heads)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.store = self.of.like(key_states, value_states, _rounded(key_states.shape[2]))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write tokens behind the last."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.store is not None
        check_alike(keys, values, self.store.sizes)
        needed = self.end + keys.shape[2]
        if needed > self.store.room:
            first = self.start // TILE * TILE
            self.store = self.store.moved(first, self.end, _rounded(needed - first))
            self.start, self.end = self.start - first, self.end - first
        self.store.write(keys, values, self.end)
        self.end += keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write tokens behind the last, and give what they may see."""
        start = self.take(key_states, value_states)
        assert self.store is not None
        return self.store.keys(start, self.end), self.store.values(start, self.end)

    def take(self, keys: Tensor, values: Tensor) -> int:
        """Write tokens behind the last; the place of the first that they may see."""
        self.append(keys, values)
        return self.start

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D), as models read them whose keys do not change, those of an encoder."""
        return None if self.store is None else self.store.keys(self.start, self.end)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._only_none(value)

    @property
    def values(self) -> Tensor | None:
        """(B, H, T, D)."""
        return None if self.store is None else self.store.values(self.start, self.end)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._only_none(value)

    def _only_none(self, value: Tensor | None) -> None:
        if value is not None:
            raise ModelError(
                f"keys or values of {type(self).__name__} were replaced, and they lie in blocks that belong to it; "
                "call update, crop, reorder_cache or reset, or use transformers' DynamicCache"
            )

    def get_seq_length(self) -> int:
        return self.end - self.start

    def crop(self, tokens_to_remove: int) -> None:
        """Let go of the last tokens; in transformers' own words for how many."""
        length = self.end - self.start
        left = _left(tokens_to_remove, length)
        self.end = self.start + min(max(left, 0), length)

    def reset(self) -> None:
        self.store, self.start, self.end, self.is_initialized = None, 0, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam go on from another; where all go on from themselves nothing is moved."""
        if self.store is None:
            return
        if not torch.equal(beam_idx, torch.arange(self.store.batch, dtype=beam_idx.dtype, device=beam_idx.device)):
            self.store = self.store.chosen(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            batch = torch.arange(self.store.batch, dtype=torch.long, device=self.device)
            self.store = self.store.chosen(batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store = self.store.chosen(indices.to(self.device))


class SlidingBlockLayer(BlockLayer, DynamicSlidingWindowLayer):
    """The last `sliding_window - 1` tokens, which the next one sees beside itself.

    `record_past`: tokens that left the window stay until the next `crop`, which may bring them back.
    """

    record_past = False

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window, **kwargs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        BlockLayer.lazy_initialization(self, key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def take(self, keys: Tensor, values: Tensor) -> int:
        self.append(keys, values)
        self.cumulative_length += keys.shape[2]
        if self.record_past:
            return max(self.start, self.end - (self.sliding_window - 1 + keys.shape[2]))
        start = self.start
        self._slide()
        return start

    def _slide(self) -> None:
        self.start = max(self.start, self.end - (self.sliding_window - 1))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return DynamicSlidingWindowLayer.get_mask_sizes(self, query_length)

    def get_max_length(self) -> int:
        return int(self.sliding_window)

    def crop(self, tokens_to_remove: int) -> None:
        """Let go of the last tokens; those that were before the window come back, if the past was recorded."""
        if self.cumulative_length < self.sliding_window:
            BlockLayer.crop(self, tokens_to_remove)
            self.cumulative_length = self.end - self.start
            return
        left = _left(tokens_to_remove, self.cumulative_length)
        gone = self.cumulative_length - min(left, self.cumulative_length)
        if not self.record_past and gone:
            raise RuntimeError(  # of the kind that transformers' own layer raises
                f"crop({tokens_to_remove}) was asked for, and tokens before the window of {self.sliding_window} are "
                "gone; call activate_past_recording() first, or use a cache without windows"
            )
        self.end -= gone
        self.cumulative_length -= gone
        self._slide()

    def reset(self) -> None:
        BlockLayer.reset(self)
        self.cumulative_length = 0


class _Int8(BlockLayer):
    """What is kept in int8, and handed on so where attention takes it (`w8a8.decoding.handed`).

    Attributes:
        attended: Whether what was given came to attention that reads codes, as it was given.
        awaited: Whether codes were handed on that attention did not ask for yet.
    """

    of = Int8Store
    attended = awaited = False

    def take(self, keys: Tensor, values: Tensor) -> int:
        if self.awaited:
            self.awaited = False
            raise ModelError(
                f"{type(self).__name__} handed on the codes of keys and values, as attention 'w8a8' asked it to, and "
                "then something else read them, so what the model computed last is NaN; use one attention with one "
                'cache: model.set_attn_implementation("w8a8"), or begin with a new cache'
            )
        return super().take(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.take(key_states, value_states)
        store = self.store
        assert isinstance(store, Int8Store)
        if dispatcher_is_needed():  # a graph is made, or somebody looks on: floats, and nothing beside them
            return store.keys(start, self.end), store.values(start, self.end)
        self.awaited = (
            self.attended and key_states.shape[2] <= ROWS and not (key_states.requires_grad and torch.is_grad_enabled())
        )
        return Kept(store.codes, start, self.end, store.dtypes, self.awaited, self._seen).given()

    def _seen(self) -> None:
        self.attended, self.awaited = True, False

    def reset(self) -> None:
        super().reset()
        self.attended = self.awaited = False


class Int8Layer(_Int8):
    """All of the past, in int8."""


class SlidingInt8Layer(_Int8, SlidingBlockLayer):
    """The window, in int8."""


def check_states(keys: Tensor, values: Tensor, heads: int | None) -> None:
    """Raise `ModelError` where a model keeps something else than the keys and values of its heads."""
    where = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
    if keys.ndim != _AXES or values.ndim != _AXES or keys.shape[:3] != values.shape[:3]:
        raise ModelError(
            f"a cache in blocks was asked for, and the model keeps {where}, which are not (batch, heads, tokens, "
            "dims) of the same heads and tokens; use transformers' DynamicCache"
        )
    if keys.shape[1] != (heads or keys.shape[1]) and keys.shape[3] != values.shape[3]:
        raise ModelError(
            f"a cache in blocks was asked for, and the model keeps {where} of {heads} heads: latents that heads are "
            "made of, which a rounding of keys and values says nothing about; use transformers' DynamicCache"
        )
    if not (keys.is_floating_point() and values.is_floating_point()):
        raise ModelError(
            f"a cache in blocks was asked for, and the model keeps {keys.dtype} and {values.dtype}, which are no "
            "floats; use transformers' DynamicCache"
        )


def check_alike(keys: Tensor, values: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """Raise `ModelError` where tokens are of other sequences or heads than those that are kept.

    One sequence would be spread over all of them when it is written, and what comes then fails far from here.

    Args:
        sizes: (batch, heads, dims of keys, dims of values) of what is kept.
    """
    batch, heads, key_dims, value_dims = sizes
    tokens = keys.shape[2:3]
    wanted = (batch, heads, *tokens, key_dims), (batch, heads, *tokens, value_dims)
    if (tuple(keys.shape), tuple(values.shape)) != wanted:
        raise ModelError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} were to be added to a cache of {batch} "
            f"sequences of {heads} heads with keys of {key_dims} and values of {value_dims} dims; go on "
            "with the batch that it was begun with, or begin with a new cache, or reset() it"
        )


def _rounded(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def _left(argument: int, length: int) -> int:
    """How many tokens are left of so many after `crop` was called with this argument."""
    if argument < 0:
        return length + argument
    return argument if argument or _CROPS_TO_LENGTH else length

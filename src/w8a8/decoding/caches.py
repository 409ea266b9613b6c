"""Caches for `generate(past_key_values=...)`: keys and values in blocks, as they came or in int8.

    model.generate(**inputs, past_key_values=w8a8.Int8Cache(model.config))

Which layers there are, with which windows, is transformers' own answer for the config; each of its layers is replaced
by one over blocks.  One that is of another kind, the state of a state-space model, is refused: what is kept there is
not appended to, but rewritten with each token, and a rounding would stay in it for good.
"""

from typing import Any, ClassVar

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from w8a8.decoding.layers import BlockLayer, Int8Layer, SlidingBlockLayer, SlidingInt8Layer
from w8a8.errors import ModelError


class BlockCache(DynamicCache):
    """Keys and values as they came, in room that grows by blocks: the bits of `DynamicCache`.

    Args:
        config: Of the model, or of its decoder.

    Raises:
        ModelError: The model keeps something else than keys and values of each token.
    """

    _full: ClassVar[type[BlockLayer]] = BlockLayer
    _sliding: ClassVar[type[SlidingBlockLayer]] = SlidingBlockLayer

    def __init__(self, config: Any) -> None:
        if not hasattr(config, "get_text_config"):
            raise ModelError(
                f"{type(self).__name__} takes the config of a model, found {type(config).__name__}; pass model.config"
            )
        super().__init__(config=config)
        self.layer_class_to_replicate = None  # transformers' way with a config of no layers
        decoder = config.get_text_config(decoder=True)
        heads = getattr(decoder, "num_key_value_heads", None)
        self.layers = [
            self._replaced(place, layer, heads if isinstance(heads, int) else None)
            for place, layer in enumerate(self.layers)
        ]

    def _replaced(self, place: int, layer: Any, heads: int | None) -> Any:
        kind = type(layer)
        if kind is DynamicLayer:
            found: BlockLayer = self._full()
        elif kind is DynamicSlidingWindowLayer:
            found = self._sliding(layer.sliding_window)
        elif getattr(layer, "is_initialized", False):  # it keeps nothing: its block reads what another's keeps, or none
            return layer
        else:
            raise ModelError(
                f"{type(self).__name__} keeps keys and values of each token, and layer {place} of the model keeps "
                f"something else (transformers' {kind.__name__}); use transformers' DynamicCache"
            )
        found.declared_heads = heads
        return found


class Int8Cache(BlockCache):
    """Keys and values in int8, with a float32 scale for each token and head: a quarter of float32.

    Args:
        config: Of the model, or of its decoder.

    Raises:
        ModelError: The model keeps something else than keys and values of each token.

    Example:
        >>> from transformers import LlamaConfig
        >>> w8a8.Int8Cache(LlamaConfig(num_hidden_layers=2)).layers
        [Int8Layer, Int8Layer]
    """

    _full = Int8Layer
    _sliding = SlidingInt8Layer

"""Caches for `generate(past_key_values=...)`: keys and values in blocks, as they came or in int8.

    model.generate(**inputs, past_key_values=w8a8.Int8Cache(model.config))

Which layers there are, with which windows, is transformers' own answer for the config; each of its layers is replaced
by one over blocks.  One that is of another kind, the state of a state-space model, is refused: what is kept there is
not appended to, but rewritten with each token, and a rounding would stay in it for good.
"""

from typing import Any, ClassVar

from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from w8a8.decoding.layers import BlockLayer, Int8Layer, SlidingBlockLayer, SlidingInt8Layer
from w8a8.errors import ModelError
from w8a8.model.pretrained import Config


class BlockCache(DynamicCache):
    """Keys and values as they came, in room that grows by blocks: the bits of `DynamicCache`.

    Args:
        config: Of the model, or of its decoder.

    Raises:
        ModelError: This is no config; the model keeps nothing, or something else than keys and values of each token.
    """

    _full: ClassVar[type[BlockLayer]] = BlockLayer
    _sliding: ClassVar[type[SlidingBlockLayer]] = SlidingBlockLayer

    def __init__(self, config: Config) -> None:
        name = type(self).__name__
        if isinstance(config, type) or not hasattr(config, "get_text_config"):
            found = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
            raise ModelError(f"{name} takes the config of a model, found {found}; pass model.config")
        try:
            decoder = config.get_text_config(decoder=True)
            super().__init__(config=config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # it has no layers, or of an unknown kind
            raise ModelError(
                f"{name} was asked for, and transformers has no cache for a {type(config).__name__} "
                f"({type(error).__name__}: {error}); pass the config of a model that generates"
            ) from error
        why = _keeps_nothing(config, decoder)
        if why is not None:
            raise ModelError(
                f"{name} was asked for, and a model of this {type(decoder).__name__} keeps no keys and values: {why}; "
                "pass the config of a model that generates"
            )
        self.layer_class_to_replicate = None  # transformers' way with a config of no layers
        heads = _heads(decoder, len(self.layers))
        self.layers = [self._replaced(place, layer, heads[place]) for place, layer in enumerate(self.layers)]

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
        ModelError: This is no config; the model keeps nothing, or something else than keys and values of each token.

    Example:
        >>> from transformers import LlamaConfig
        >>> w8a8.Int8Cache(LlamaConfig(num_hidden_layers=2)).layers
        [Int8Layer, Int8Layer]
    """

    _full = Int8Layer
    _sliding = SlidingInt8Layer


def _keeps_nothing(config: Config, decoder: Config) -> str | None:
    """Why nothing is kept in a cache, as the config tells it; None where something is, or where it does not tell.

    Families of encoders whose models also decode say in `is_decoder` which they are; for others it means nothing.  A
    config from outside transformers need not say `use_cache`, so its silence tells nothing.
    """
    decodes = getattr(decoder, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if not decodes and type(decoder) in MODEL_FOR_MASKED_LM_MAPPING:
        return "it is an encoder, whose tokens see those after them (is_decoder is not set)"
    told = any(hasattr(each, name) for each in (config, decoder) for name in ("use_cache", "layer_types"))
    if not told and type(decoder).__module__.startswith("transformers."):
        return "it has neither use_cache nor layer_types"
    return None


def _heads(decoder: Config, layers: int) -> list[int | None]:
    """How many heads have keys in each layer, where the config says it: for all of them, or for each."""
    each = list(getattr(decoder, "per_layer_config", None) or [decoder] * layers)
    found = [getattr(layer, "num_key_value_heads", None) for layer in each[:layers]]
    found += [None] * (layers - len(found))
    return [heads if isinstance(heads, int) else None for heads in found]

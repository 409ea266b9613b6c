"""A model that generates with a cache of ours: made so, and undone.

    w8a8.set_cache(model, "int8")
    model.generate(**inputs)        # keys and values in int8, and attention that reads them there

`generate` makes its cache itself, of the kinds that transformers has, where it is given none.  So the model's own
`generate` is called with one; what a call asks for itself (`past_key_values`, `cache_implementation`,
`use_cache=False`) it gets.  Keys and values of an encoder, which are written once, stay as they came.

What a model keeps is not in its config: one may have heads of keys and values in it and keep latents of which they are
made.  So before anything is changed the model is run on one token with such a cache, and what comes there is judged.
"""

import functools
import inspect
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from w8a8.decoding.attention import NAME
from w8a8.decoding.caches import BlockCache, Int8Cache
from w8a8.decoding.layers import BlockLayer
from w8a8.decoding.likeness import apart, most_apart, read, texts_for
from w8a8.defaults import usual_defaults
from w8a8.errors import ModelError, closest
from w8a8.model.experts import OTHER_KIND

CACHES: dict[str, type[BlockCache] | None] = {"dynamic": None, "block": BlockCache, "int8": Int8Cache}
"""By the name that they are asked for: transformers' own, as the model has it; in blocks; in int8."""


@dataclass(frozen=True)
class _Set:
    """What was set, and what was there before."""

    kind: str
    attention: str | dict[str, str]
    implementation: str | None


def set_cache(model: PreTrainedModel, kind: str = "int8") -> None:
    """Have a model generate with a cache of this kind, in place, until it is set to another.

    Args:
        model: One of transformers that generates.
        kind: "int8": keys and values in int8 (`Int8Cache`), with attention that reads them so, where the model's can be
            exchanged; where it cannot a warning says why, and they are dequantised for it at each token.
            "block": as they came, in blocks (`BlockCache`), which changes no bit. "dynamic": transformers' own; the
            model is as it was.  Until then `model.generation_config` names no cache of transformers', also where it is
            saved by itself; `model.save_pretrained` writes the one that it had.

    Raises:
        ModelError: no such kind; the model does not generate, or keeps nothing, or something else than keys and values,
            by its config or by what one token brings.  A model with an encoder is not run, and a token that it cannot
            be called with by itself tells nothing: it is then refused at the first token of `generate`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
        >>> w8a8.set_cache(model, "int8")
        >>> model.config._attn_implementation
        'w8a8'
    """
    _check_module(model, kind)
    check_cache(type(model), getattr(model, "config", None), kind)  # before anything is changed
    before = _setting(model)
    if before is None and "generate" in vars(model):
        raise ModelError(
            f"a cache of kind {kind!r} was to be set for {type(model).__name__}, and this model has a `generate` of "
            "its own beside its class's; pass past_key_values=w8a8.Int8Cache(model.config) to it"
        )
    made = CACHES[kind]
    if made is not None:
        _check_kept(model, made)
    if before is not None:
        _undo(model, before)
    if made is None:
        return
    attention, config = _attention(model), model.generation_config
    vars(model)["_w8a8_cache"] = _Set(kind, attention, config.cache_implementation)
    vars(model)["generate"] = types.MethodType(_generate, model)
    if config.cache_implementation is not None and "save_pretrained" not in vars(model):
        vars(model)["save_pretrained"] = types.MethodType(_save_pretrained, model)
    config.cache_implementation = None
    if made is Int8Cache:
        why = _attend_to_codes(model)
        if why is not None:
            model.set_attn_implementation(attention)
            warnings.warn(
                f"{type(model).__name__} keeps its own attention ({why}): keys and values in int8 are dequantised for "
                "it at each token",
                stacklevel=2,
            )


def set_usual_cache(model: PreTrainedModel) -> str | None:
    """Have a causal model generate with keys and values in blocks, where that is seen to change no bit of a few tokens.

    Args:
        model: In evaluation mode.  Run five times.

    Returns:
        Why it keeps transformers' own cache; None where it is set to blocks.
    """
    try:
        check_cache(type(model), model.config, "block")
        if model.config.is_encoder_decoder:
            return "it reads with an encoder"
        own = _read_and_written(model, None)
        found = _read_and_written(model, BlockCache(model.config))
    except ModelError as error:
        return str(error)
    except OTHER_KIND as error:  # its code wants to be called in another way, or another cache
        return f"it does not go on from a few tokens: {_told(error)}"
    if not torch.equal(own, found):
        return "its logits are others with keys and values in blocks"
    set_cache(model, "block")
    return None


def cache_argument(model: torch.nn.Module) -> str:
    """What a model's forward calls its cache: transformers before 5.24 has another name than since."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def _read_and_written(model: Any, cache: BlockCache | None) -> torch.Tensor:
    """Logits of a few tokens, and of one that comes after them."""
    words = int(model.config.get_text_config(decoder=True).vocab_size)
    name = cache_argument(model)
    with usual_defaults():
        ids = torch.tensor([[1 % words, 5 % words, 2 % words, 3 % words]], dtype=torch.long, device=model.device)
        first = model(input_ids=ids[:, :3], use_cache=True, **({} if cache is None else {name: cache}))
        then = model(input_ids=ids[:, 3:], use_cache=True, **{name: getattr(first, name)})
    return torch.cat([first.logits, then.logits], 1)


def _check_module(model: object, kind: object) -> None:
    if not isinstance(model, torch.nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ModelError(f"a cache of kind {kind!r} was to be set for a model, found {found}; pass the model itself")


def check_cache(model: type, config: Any, kind: str, *, beside: tuple[str, ...] = ()) -> None:
    """Raise `ModelError` where models of this class and config cannot generate with a cache of this kind.

    Args:
        beside: Kinds that the caller knows beside these.
    """
    known = (*CACHES, *beside)
    if not isinstance(kind, str):
        raise ModelError(f"a kind of cache is a name, found {kind!r}; use one of {', '.join(known)}")
    if kind not in CACHES:
        raise ModelError(f"unknown kind of cache {kind!r} ({closest(kind, known)}); use one of {', '.join(known)}")
    made = CACHES[kind]
    if made is None:
        return
    if not issubclass(model, PreTrainedModel) or not issubclass(model, GenerationMixin):
        raise ModelError(
            f"a cache of kind {kind!r} was to be set for {model.__name__}, which is no model of transformers that "
            "generates; set it for one that does"
        )
    made(config)


def _check_kept(model: Any, made: type[BlockCache]) -> None:
    """Raise `ModelError` where a token brings something else to such a cache than keys and values, or nothing."""
    if model.config.is_encoder_decoder:
        return
    cache = made(model.config)
    why = _refused(model, cache)
    if why is None:
        if model.training or any(isinstance(layer, BlockLayer) and layer.end for layer in cache.layers):
            return
        why = "it puts no keys and values into the cache that it is given"
    elif _refused(model, None) is not None:  # not for the cache's sake
        return
    raise ModelError(
        f"{made.__name__} was to be set for {type(model).__name__}, which does not take it: {why}; leave it with "
        "transformers' own"
    )


@torch.inference_mode()
def _refused(model: Any, cache: BlockCache | None) -> str | None:
    """What a model says to a token with a cache, or without one, where it cannot be called so."""
    given = {} if cache is None else {cache_argument(model): cache}
    try:
        with usual_defaults():
            token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
            model(input_ids=token, use_cache=cache is not None, **given)
    except ModelError:
        raise
    except OTHER_KIND as error:
        return _told(error)
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def new_cache(model: PreTrainedModel) -> BlockCache | EncoderDecoderCache | None:
    """A cache of the kind that is set for a model, empty; None where nothing is set, and transformers makes its own."""
    found = _setting(model)
    if found is None:
        return None
    made = CACHES[found.kind]
    assert made is not None
    cache = made(model.config)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    return cache


def _setting(model: PreTrainedModel) -> _Set | None:
    found = vars(model).get("_w8a8_cache")
    assert found is None or isinstance(found, _Set)
    return found


def _undo(model: PreTrainedModel, before: _Set) -> None:
    del vars(model)["_w8a8_cache"], vars(model)["generate"]
    saves = vars(model).get("save_pretrained")
    if getattr(saves, "__func__", None) is _save_pretrained:
        del vars(model)["save_pretrained"]
    model.generation_config.cache_implementation = before.implementation
    model.set_attn_implementation(before.attention)


def _attention(model: PreTrainedModel) -> str | dict[str, str]:
    """Which attention a model has, as `set_attn_implementation` takes it."""
    own = {"": model.config._attn_implementation}
    for key in model.config.sub_configs:
        config = getattr(model.config, key, None)
        if config is not None and config._attn_implementation is not None:  # which cannot be set
            own[key] = config._attn_implementation
    return own if len(own) > 1 else own[""]


def _attend_to_codes(model: PreTrainedModel) -> str | None:
    """Give a model attention that reads codes; why that is not what it computes, where it is not."""
    if not model._can_set_attn_implementation():
        return "transformers cannot exchange it"
    if model.config.is_encoder_decoder and not model._supports_sdpa:
        return "what it is told beside queries, keys and values is not known"
    if model.config.is_encoder_decoder or model.training:  # what PyTorch's attention is told is all, and ours is too
        model.set_attn_implementation(NAME)
        return None
    texts = texts_for(model)
    with usual_defaults(), torch.inference_mode():
        try:
            wanted = [read(model, ids) for ids in texts]
        except OTHER_KIND:  # it wants more than tokens
            model.set_attn_implementation(NAME)
            return None
        most = most_apart(model, texts, wanted)
        model.set_attn_implementation(NAME)
        found = max(apart(read(model, ids), logits) for ids, logits in zip(texts, wanted, strict=True))
    if found <= most:
        return None
    return f"logits by the other are {found:.1g} apart, where {most:.1g} is allowed"  # NaN too


@functools.wraps(GenerationMixin.generate)
def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or self.generation_config
    own = kwargs.get("past_key_values") is not None or any(
        each.get("cache_implementation") is not None or each.get("use_cache") is False
        for each in (kwargs, vars(config))
    )
    if not own:
        kwargs["past_key_values"] = new_cache(self)
    return type(self).generate(self, *args, **kwargs)


@functools.wraps(PreTrainedModel.save_pretrained)
def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As the class's own, with what `generate` is not to see, and the file is to hold: the kind of cache it had."""
    before, config = _setting(self), self.generation_config
    assert before is not None
    if config.cache_implementation is not None:  # set since
        return type(self).save_pretrained(self, *args, **kwargs)
    config.cache_implementation = before.implementation
    try:
        return type(self).save_pretrained(self, *args, **kwargs)
    finally:
        config.cache_implementation = None

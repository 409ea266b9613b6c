"""One call of a model: what it is called with, and the state in which it is called to be observed."""

import contextlib
import copy
import enum
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from w8a8.errors import CalibrationError, W8A8Error, few
from w8a8.model.kinds import context_length, input_config

ModelInputs: TypeAlias = Mapping[str, Any] | Tensor | tuple[Any, ...]
"""One call of a model: keyword arguments, one positional argument, or several."""

_NOT_TAKEN = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
"""What the forward of a model raises that is given too little, or something else than it takes."""


def as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> ModelInputs:
    """What a loop called the model with, as one batch."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return kwargs
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}


def call(model: nn.Module, inputs: ModelInputs) -> Any:
    """Call a model with one batch, moved to the device of its first parameter.

    What keeps state among the inputs, a cache of keys and values, is copied: the batch is the same for the next call.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = copied(inputs, lambda t: t.to(device))
    try:
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)
    except W8A8Error:
        raise
    except _NOT_TAKEN as error:
        said = str(error).strip().splitlines()[:1]
        raise CalibrationError(
            f"{type(model).__name__} cannot be called with a batch of the calibration data ({_in_words(inputs)}): "
            f"{': '.join([type(error).__name__, *said])}; give batches that it takes: a list of mappings of its "
            "forward's arguments"
        ) from error


def copied(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nest of inputs with every tensor changed, and what can keep state in it copied.

    Args:
        value: Tensors, tuples, lists, mappings and objects with attributes (caches), in one another.  Not modified.
            Modules, classes, functions and plain values are taken as they are.
        change: Gives another tensor for a tensor.  One that it returns itself is copied where it lies in an object,
            which may write to it.
    """
    return _copied(value, change, {}, inside=False)


def _copied(value: Any, change: Callable[[Tensor], Tensor], seen: dict[int, Any], *, inside: bool) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        changed = change(value)
        seen[id(value)] = changed.clone() if inside and changed is value else changed
        return seen[id(value)]
    if isinstance(value, tuple):
        parts = (_copied(part, change, seen, inside=inside) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list | MutableMapping):
        new = seen[id(value)] = copy.copy(value)
        for key in range(len(value)) if isinstance(value, list) else list(value):
            new[key] = _copied(value[key], change, seen, inside=inside)
        return new
    stateless = isinstance(value, nn.Module | type | enum.Enum | types.ModuleType) or callable(value)
    if stateless or not hasattr(value, "__dict__"):
        return value
    new = seen[id(value)] = copy.copy(value)
    for name, part in vars(value).items():
        new.__dict__[name] = _copied(part, change, seen, inside=True)
    return new


def _in_words(inputs: ModelInputs) -> str:
    """What a batch holds."""

    def told(value: object) -> str:
        return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    if isinstance(inputs, Mapping):
        return few(f"{name} {told(value)}" for name, value in inputs.items())
    return few(map(told, inputs)) if isinstance(inputs, tuple) else told(inputs)


@contextlib.contextmanager
def watched(model: nn.Module, names: Iterable[str], see: Callable[..., object], *, after: bool) -> Iterator[None]:
    """Call `see(name, args, kwargs)` before each call of some modules for the length of a `with` block.

    Args:
        after: Behind each instead, and with what it returned as the fourth argument.
    """
    with contextlib.ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            register = module.register_forward_hook if after else module.register_forward_pre_hook
            hooks.enter_context(register(lambda _, *given, name=name: see(name, *given), with_kwargs=True))
        yield


@contextlib.contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """One state of the random generators that a model may draw from as it runs, for the length of a `with` block."""
    others = [p.device for p in itertools.islice(model.parameters(), 1) if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=others):
        torch.default_generator.manual_seed(0)
        for other in others:
            with torch.cuda.device(other):
                torch.cuda.manual_seed(0)
        yield


def check_inputs(model: nn.Module, inputs: ModelInputs) -> None:
    """Refuse ids and lengths that a language model does not know, which it would answer with an index error."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    config = getattr(model, "config", None)
    if not isinstance(ids, Tensor) or config is None or not ids.numel():
        return
    vocabulary, largest = getattr(input_config(config), "vocab_size", None), int(ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationError(
            f"the calibration data has the token id {largest}, {type(model).__name__} knows 0..{vocabulary - 1}: "
            "it was encoded with the tokenizer of another model"
        )
    limit = context_length(model)
    if limit is not None and ids.shape[-1] > limit:
        raise CalibrationError(
            f"the calibration data has a window of {ids.shape[-1]} tokens, {type(model).__name__} has places for "
            f"{limit}: give Calibration.of a length of at most {limit}"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of keys and values, for the length of a `with` block."""
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if use_cache is not None:
            config.use_cache = use_cache


def tensors_in(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in an output or in inputs: tuples, lists, mappings.

    Args:
        seen: Where given, also in sets and in the attributes of objects, save in those that were looked into.
    """
    if isinstance(value, Tensor):
        yield value
        return
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    if seen is not None:
        if id(value) in seen or isinstance(value, nn.Module | type):
            return
        seen.add(id(value))
        parts = (*(value if isinstance(value, set) else parts), *getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from tensors_in(part, seen)

"""One call of a model: what it is called with, and the state in which it is called to be observed."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from w8a8.errors import CalibrationError
from w8a8.evaluation import context_length

ModelInputs: TypeAlias = Mapping[str, Any] | Tensor | tuple[Any, ...]
"""One call of a model: keyword arguments, one positional argument, or several."""


def as_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelInputs:
    """What a loop called the model with, as one batch."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return kwargs
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}


def call(model: nn.Module, inputs: ModelInputs) -> Any:
    """Call a model with one batch, moved to the device of its first parameter."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return model(**{key: _moved(value, device) for key, value in inputs.items()})
    if isinstance(inputs, tuple):
        return model(*(_moved(value, device) for value in inputs))
    return model(_moved(inputs, device))


def check_inputs(model: nn.Module, inputs: ModelInputs) -> None:
    """Refuse ids and lengths that a language model does not know, which it would answer with an index error."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    config = getattr(model, "config", None)
    if not isinstance(ids, Tensor) or config is None or not ids.numel():
        return
    vocabulary, largest = getattr(config, "vocab_size", None), int(ids.max())
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


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

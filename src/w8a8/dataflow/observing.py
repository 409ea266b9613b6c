"""One forward of a model, run under watch, and what it showed (`groups`).

The model runs in evaluation mode, without a cache, and without gradients; not in inference mode, which would hide what
composite operations do.  Whatever still holds a tagged tensor when the forward is over, an output, a cache or a hook,
blocks the channels of that tensor.
"""

import contextlib
import gc
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.dataflow.commuting import RULES
from w8a8.dataflow.groups import Dataflow, conclude
from w8a8.dataflow.products import blocked
from w8a8.dataflow.tracing import Trace, Watch
from w8a8.errors import ModelError
from w8a8.layers.linear import check_materialised
from w8a8.model.inputs import evaluating, tensors_in
from w8a8.model.kinds import context_length, input_config, output_config


def observe(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Dataflow:
    """Run the model once and see what could be folded into what.

    Args:
        model: Of any class, with its weights.  Run in evaluation mode and without a cache where it has one; its
            parameters, training flags and hooks are afterwards what they were.
        inputs: Keyword arguments of its forward, or the one positional argument.  A few dozen tokens are enough,
            save for experts that are separate modules, each of which needs some.

    Returns:
        Groups and refusals.

    Raises:
        ModelError: not a module; weights on the meta device or without a shape; inputs that are neither mapping nor
            tensor.
    """
    _check(model, inputs)
    trace = Trace(model)
    modes = (torch.inference_mode(False), torch.no_grad())
    with contextlib.ExitStack() as stack:
        for mode in (evaluating(model), _following(model, trace), *modes, Watch(trace, RULES, blocked)):
            stack.enter_context(mode)
        out = _run(model, inputs)
    for tags in map(trace.tags, tensors_in(out, set())):
        trace.block(tags, "it is an output of the model")
    del out
    if trace.live_bytes():
        gc.collect()  # what still lives may only be waiting for it
    for tags in trace.alive():
        trace.block(tags, "it outlives the forward, in a cache or a hook of the model")
    return conclude(model, trace)


def probe(model: nn.Module, *, tokens: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs to observe a transformers model with, where there are no real ones.

    Args:
        model: With a `config` and a `main_input_name` ("input_ids", "pixel_values", "input_features").
        tokens: Length of a sequence of ids, cut to the model's context.
        seed: Of the ids.

    Returns:
        (2, tokens) int64 ids for each input the forward needs.

    Raises:
        ModelError: not such a model, or its input is not token ids.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    vocabulary = getattr(input_config(config), "vocab_size", None)
    if main != "input_ids" or not isinstance(vocabulary, int):
        raise ModelError(
            f"a probe of random tokens was asked for, but {type(model).__name__} takes "
            f"{main or 'an unknown input'}: call w8a8.dataflow.observe(model, inputs) with inputs of your own"
        )
    longest = context_length(model) or tokens
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (2, min(tokens, longest)), generator=generator, dtype=torch.int64, device="cpu")
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        written = getattr(output_config(config), "vocab_size", vocabulary)
        inputs["decoder_input_ids"] = (ids.flip(0) % written).to(device)
    return inputs


def _check(model: nn.Module, inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module to observe, found {type(model).__name__}: load the model first")
    if not isinstance(inputs, Mapping | Tensor):
        raise ModelError(
            f"expected a mapping of the forward's arguments or a tensor, found {type(inputs).__name__}: "
            "give {'input_ids': ids}"
        )
    check_materialised(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelError(
            f"the model is to be run, but {len(empty)} parameters are on the meta device, {empty[0]} first: "
            "load their weights"
        )


def _run(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> object:
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        named.setdefault("use_cache", False)
    return model(**named) if isinstance(inputs, Mapping) else model(inputs, **named)


@contextlib.contextmanager
def _following(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Have the trace know which module is running."""
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda _, __, name=name: trace.enter(name)))
            hooks.enter_context(module.register_forward_hook(lambda _, __, ___: trace.leave(), always_call=True))
        yield

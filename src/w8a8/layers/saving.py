"""A quantised layer knows when transformers' `save_pretrained` saves it, whatever model it is then a part of.

`save_pretrained` writes config.json first and asks for the state dict afterwards, and has no place for a third party in
between; the model that it saves may be one that never heard of this package, around a part that was quantised.  So the
first layer that is asked for its tensors looks who asks: the frame of `save_pretrained` has the model and the
directory, and config.json is put right before there are weights.  Nothing of transformers is replaced.  Not taken: to
describe the model when a part of it is quantised.  A module does not know what it is in, nor what it will be put into.

Where `save_pretrained` is given a state dict no layer is asked for tensors; but each is asked what it ties
(`_tied_weights_keys`), whatever is saved, and the state dict that is given has to hold what the layers do.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from w8a8.core.affine import described
from w8a8.errors import ModelError

Describe: TypeAlias = Callable[[Any, str], None]
"""Called with the model that is being saved and the directory, in which config.json is."""


def _undescribed(model: nn.Module, directory: str) -> None:
    raise ModelError(
        f"{type(model).__name__} holds quantised layers that its config does not tell of, so {directory} would be read "
        "as float weights: save it with w8a8.save(model, directory)"
    )


class Saving:
    """What is done when a model with quantised layers is saved; `w8a8.checkpoint` puts its own `describe` here."""

    describe: Describe = staticmethod(_undescribed)


def tell(destination: Any) -> None:
    """Have the model described that is being saved, once, while modules fill its state dict.

    Raises:
        ModelError: it cannot be described.
        SchemeError: the file format has no word for a layer's scheme.
    """
    if hasattr(destination, "_w8a8_told"):
        return
    asked = _saved()
    destination._w8a8_told = asked is not None
    if asked is not None:
        Saving.describe(asked["self"], str(asked["save_directory"]))


def check_given(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Have the model described that is being saved, where its state dict was given; asked of each of its layers.

    Args:
        layer: Who asks; nothing is done but for the first of the model.
        kind: Of all such layers.

    Raises:
        ModelError: the state dict holds other tensors than the layers; the model cannot be described.
        SchemeError: as `tell`.
    """
    asked = _saved()
    given = None if asked is None else asked.get("state_dict")
    if asked is None or given is None or getattr(given, "_w8a8_told", False):
        return
    model = asked["self"]
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, kind))
    for number, (name, each) in enumerate(layers):
        if number == 0 and each is not layer:
            return
        _check_tensors(type(model).__name__, f"{name}." if name else "", each, given)
    Saving.describe(model, str(asked["save_directory"]))


def _check_tensors(model: str, prefix: str, layer: nn.Module, given: Mapping[str, Tensor]) -> None:
    """All tensors of a layer are given as it holds them, or none: a state dict may be a part."""
    held = {prefix + key: tensor for key, tensor in layer.state_dict().items()}
    if not any(name.startswith(prefix) for name in given):
        return
    for name in sorted(held.keys() | {name for name in given if name.startswith(prefix)}):
        want, found = (None if tensor is None else described(tensor) for tensor in (held.get(name), given.get(name)))
        if want != found:
            raise ModelError(
                f"{model} is to be saved with a state dict that was given, in which {name} is {found or 'missing'}, "
                f"and the quantised layer holds {want or 'none'}: give the state dict of the quantised model, or none"
            )


def _saved() -> Mapping[str, Any] | None:
    """The variables of the `save_pretrained` of transformers that runs now, if one does."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "save_pretrained" and frame.f_globals.get("__name__") == "transformers.modeling_utils":
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None

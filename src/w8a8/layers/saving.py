"""A quantised layer knows when transformers' `save_pretrained` saves it, whatever model it is then a part of.

`save_pretrained` writes config.json first and asks for the state dict afterwards, and has no place for a third party in
between; the model that it saves may be one that never heard of this package, around a part that was quantised.  So the
first layer that is asked for its tensors looks who asks: the frame of `save_pretrained` has the model and the
directory, and config.json is put right before there are weights.  Nothing of transformers is replaced.  Not taken: to
describe the model when a part of it is quantised.  A module does not know what it is in, nor what it will be put into.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from w8a8.errors import ModelError

Describe: TypeAlias = Callable[[Any, str], None]
"""Called with the model that is being saved and the directory, in which config.json is."""


def _undescribed(model: Any, directory: str) -> None:
    raise ModelError(
        f"{type(model).__name__} holds quantised layers that its config does not tell of, so {directory} would be read "
        "as float weights: save it with w8a8.save(model, directory)"
    )


class Saving:
    """What is done when a model with quantised layers is saved; `w8a8.checkpoint` puts its own `describe` here."""

    describe: Describe = staticmethod(_undescribed)


def tell(destination: Any) -> None:
    """Have the model described that is being saved, once.

    Args:
        destination: Of its state dict, as modules fill it.

    Raises:
        ModelError: it cannot be described.
        SchemeError: the file format has no word for a layer's scheme.
    """
    if getattr(destination, "_w8a8_told", False):
        return
    destination._w8a8_told = True
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "save_pretrained" and frame.f_globals.get("__name__") == "transformers.modeling_utils":
            Saving.describe(frame.f_locals["self"], str(frame.f_locals["save_directory"]))
            return
        frame = frame.f_back  # type: ignore[assignment]

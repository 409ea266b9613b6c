"""Random inputs to time an encoder with: of the sizes that its config names, and that it takes.

What a model of pictures or of sound is called with is named by its class (`main_input_name`), and how large that is by
fields of its config, which differ from class to class.  So there are a few ways to read it, and the first that the
model takes is used.  The alternative, the directory's own processor, needs libraries for pictures that are not among
the requirements, and gives the same shapes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.errors import CalibrationError, ModelError
from w8a8.model.inputs import call
from w8a8.model.kinds import Kind, kind_of_model
from w8a8.model.pretrained import Pretrained

UNITS = {Kind.VISION: "pictures", Kind.SOUND: "sounds"}
"""What is counted of what such a model reads; of all others, tokens."""


def unit_of(model: nn.Module) -> str:
    """What is counted of what a model reads."""
    kind = kind_of_model(model)
    return "tokens" if kind is None else UNITS.get(kind, "tokens")


_SECOND = 16000  # samples, at the rate that models of speech are made for


def random_inputs(model: Pretrained, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """What a model of pictures or of sound is called with.

    Args:
        model: On its device.
        batch: Pictures or sounds.
        seed: Of the values.

    Raises:
        ModelError: it takes none of the sizes that were tried.
    """
    kind, name = kind_of_model(model), model.main_input_name
    assert kind in UNITS, "asked before"
    drawn, tried = torch.Generator().manual_seed(seed), []
    for shape in (_pictures if kind is Kind.VISION else _sounds)(model.config):
        values = torch.randn((batch, *shape), generator=drawn, dtype=torch.float32, device="cpu")
        inputs = {name: values.to(model.device, model.dtype)}
        try:
            with torch.inference_mode():
                call(model, inputs)
        except CalibrationError:
            tried.append(str(list(values.shape)))
            continue
        return inputs
    raise ModelError(
        f"{type(model).__name__} was to be timed with {UNITS[kind]}, and takes no {name} of "
        f"{', '.join(tried) or 'a size that its config names'}; time it in Python with inputs of your own"
    )


def _pictures(config: Any) -> Iterator[tuple[int, ...]]:
    """(channels, height, width)."""
    channels = getattr(config, "num_channels", 3)
    for size in (getattr(config, "image_size", None), 224):
        if isinstance(size, int):
            yield channels, size, size
        elif isinstance(size, tuple | list):
            yield channels, *size


def _sounds(config: Any) -> Iterator[tuple[int, ...]]:
    """(mel bands, frames), (frames, mel bands), or samples."""
    bands = getattr(config, "num_mel_bins", None)
    places = getattr(config, "max_source_positions", None)
    if bands and places:  # of Whisper, whose convolutions halve the frames
        yield bands, 2 * places
    if bands:
        yield getattr(config, "max_length", None) or 1024, bands
    # a window that the strides of convolutions divide, and a second at least
    stride = math.prod(getattr(config, "conv_stride", (1,)))
    yield (math.ceil(_SECOND / stride) * stride,)

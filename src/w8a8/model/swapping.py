"""Swapping: new layers are made from a model's, and take their places.

Every new layer is made before the first old one is replaced, so that a failure half-way leaves the model as it was;
`swapped` puts the old layers back at its end.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from w8a8.core.affine import QParams
from w8a8.core.progress import Progress, tell
from w8a8.core.scheme import Scheme
from w8a8.errors import noted
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.embedding import QuantEmbedding
from w8a8.layers.linear import QuantLinear
from w8a8.model.places import places


def build(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    *,
    input_params: Mapping[str, QParams] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, QuantLinear]:
    """Make the new layers.  The model is not modified.

    Args:
        input_params: The grid of the input of each of them whose scheme has static activations.
        progress: Called after each layer.
        options: simulated, kernel and strict, as for `QuantLinear`.

    Raises:
        W8A8Error: as `QuantLinear.from_float`, with a note that names the layer.
    """
    layers = {}
    for done, (name, scheme) in enumerate(schemes.items(), start=1):
        params = None if input_params is None else input_params.get(name)
        with noted(f"while quantising {name}"):
            layers[name] = QuantLinear.from_float(model.get_submodule(name), scheme, input_params=params, **options)
        tell(progress, done, len(schemes), name)
    return layers


def empty_layer(model: nn.Module, name: str, scheme: Scheme, **options: Any) -> QuantLayer:
    """The layer, or table, that is to take the place of one of the model's, which is not modified, without values.

    Options and errors are those of `QuantLinear`; a note names the layer.
    """
    with noted(f"while quantising {name}"):
        if isinstance(model.get_submodule(name), nn.Embedding):
            return QuantEmbedding.in_place_of(model.get_submodule(name), scheme)
        return QuantLinear.in_place_of(model.get_submodule(name), scheme, **options)


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put the layers in the places of those of the same names; the model is changed.

    A module that is reached by several names, or held in a list or an attribute too, is replaced in all these places.

    Returns:
        The old modules under the same names: `swap` them to undo.
    """
    old = {name: model.get_submodule(name) for name in layers}
    replacement = {id(old[name]): layers[name] for name in layers}
    for place in list(places(model)):
        if id(place.module) in replacement and place.container is not None:
            place.container[place.key] = replacement[id(place.module)]
    return old


@contextlib.contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`swap` for the length of a `with` block."""
    old = swap(model, layers)
    try:
        yield
    finally:
        swap(model, old)

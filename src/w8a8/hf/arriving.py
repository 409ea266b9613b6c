"""What files hold of quantised layers, kept as it lies there while transformers reads it, and checked when all came."""

from collections.abc import Mapping

import torch
from torch import nn

from w8a8.checkpoint.files import mapped
from w8a8.checkpoint.headers import Entry
from w8a8.checkpoint.names import FileNames
from w8a8.checkpoint.reader import QUANTIZED, check_superfluous, place_tensor, stored_keys
from w8a8.core.packed import SHAPE
from w8a8.errors import CheckpointError
from w8a8.layers.buffers import QuantLayer, quant_layers
from w8a8.model.pretrained import initialised


class Arriving:
    """A layer of a file while transformers fills it: what the file holds of it is held by the layer as it lies there.

    Otherwise transformers would fill in what is missing, convert dtypes without a word, and refuse shapes and words
    that `load` takes.

    Args:
        layer: Empty; changed until `take`.
    """

    def __init__(self, layer: QuantLayer, found: Mapping[str, Entry], *, packed: bool) -> None:
        self.layer, self.packed = layer, packed
        self._where = {key: entry.where for key, entry in sorted(found.items())}
        layer.as_stored(
            {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in found.items()}
        )
        if packed:  # GPT-2 initialises anew what it finds under that name, where a tied head is missing in the files
            layer.__dict__["weight"] = initialised()

    def take(self) -> None:
        """Check what came, and pack it for the kernel; `CheckpointError` where it is not what the layer holds."""
        self.layer.__dict__.pop("weight", None)
        came = self.layer.arrived()
        for key, where in self._where.items():
            place_tensor(self.layer, key, came.pop(key), where, packed=self.packed)


def arriving_of(model: nn.Module, stored: Mapping[str, Entry], packed: set[str]) -> list[Arriving]:
    """Every layer of the model, whose tensors are all in the files, once, which hold nothing else of it.

    Nor do they hold scales of a layer that is not quantised.

    Raises:
        CheckpointError: that is not so.
    """
    if not stored:
        raise CheckpointError(
            "quantised layers are filled from safetensors files, and none are given: load a directory"
        )
    names = FileNames(model)
    found = names.placed(stored)
    arriving, taken = [], set()
    for name, layer in quant_layers(model):
        keys = stored_keys(layer, packed=name in packed)
        missing = [f"{name}.{key}" for key in sorted(keys - {SHAPE}) if f"{name}.{key}" not in found]
        if missing:
            folder = next(iter(stored.values())).file.parent
            raise CheckpointError(f"{folder}: {missing[0]} is missing; copy the model again")
        taken |= {f"{name}.{key}" for key in keys}
        here = {key: found[f"{name}.{key}"] for key in keys if f"{name}.{key}" in found}
        arriving.append(Arriving(layer, here, packed=name in packed))
    modules = dict(model.named_modules())
    for name in found.keys() - taken:
        prefix, _, key = name.rpartition(".")
        module = modules.get(prefix)
        unasked = isinstance(module, QuantLayer) and (key != "bias" or module.bias is None)
        if module is not None and (key in QUANTIZED or unasked):
            check_superfluous(names, module, name, mapped(found[name]), found[name].where)
    return arriving

"""How the files of a model call its tensors, where that differs from the model's own names.

transformers 5 gives mixtures of experts other modules than the files on the hub were written for, and renames while it
loads and saves: Mixtral's `mlp.experts` are `block_sparse_moe.experts` in files, which is what vLLM reads.  A model
whose experts have layers of their own (`w8a8.model.experts`) is written under the files' names, by transformers' own
renamings; its conversions, which stack and split, are not needed then.  Every other model is written under its
own names.

What is read may be named otherwise: by an older version, by the task model of which this is the base, or the other way
round.  Then a tensor is found where transformers would put it: by all its renamings, unless the name is the model's
own already, and with the model's `base_model_prefix` taken off or put on.  What transformers leaves out without an
error is left out here too (`ignored`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from w8a8.checkpoint.headers import Entry, each_once
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import is_linear
from w8a8.model.experts import holds_experts, stack_names
from w8a8.model.pretrained import Conversion, conversions, renames, stacks_experts

_REMADE = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Tables that old files hold and models make themselves: what such a buffer ends with, and what is then left out."""


class FileNames:
    """The names of a model's tensors and layers, in the model and in its files.

    Args:
        model: With `Experts` in their places, or none.  Not modified.

    model: The name of the model's class.
    renamings: What is undone when the model is written; none where that cannot be undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = type(model).__name__
        known = conversions(model, legacy=True)
        apart = holds_experts(model)
        self._reading = [each for each in known if renames(each)]
        self._converting = [each for each in known if not (renames(each) or (apart and stacks_experts(each)))]
        self.renamings = _renamings(model) if apart else []
        self._back = _reversed(self.renamings)
        self._tensors = set(_stored(model))
        kinds = QuantLayer | nn.Embedding
        self._layers = {name for name, m in model.named_modules() if is_linear(m) or isinstance(m, kinds)}
        self._prefix = f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) else ""
        self._unwanted = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        buffers = [name for name, _ in model.named_buffers()]
        self._remade = [
            re.compile(pattern) for end, pattern in _REMADE.items() if any(name.endswith(end) for name in buffers)
        ]
        if self.renamings and any(_renamed(self.in_file(name), self.renamings) != name for name in self._tensors):
            self.renamings, self._back = [], []

    def in_model(self, name: str) -> str:
        """Of a tensor of the files; a name that the model does not have where there is no place for it."""
        renamed = _renamed(name, self._reading)
        if not self._has(renamed) and self._has(name):
            renamed = name
        if self._prefix and renamed.startswith(self._prefix) and self._has(renamed.removeprefix(self._prefix)):
            return renamed.removeprefix(self._prefix)
        if self._prefix and self._has(self._prefix + renamed):
            return self._prefix + renamed
        return renamed

    def placed(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Tensors of the files by their names in the model, in order; `CheckpointError` where two have one there."""
        return each_once((self.in_model(name), entry) for name, entry in entries.items())

    def in_file(self, name: str) -> str:
        """Of a tensor of the model."""
        return _renamed(name, self._back)

    def of_layer(self, name: str) -> str:
        """How the files call a layer of the model."""
        return self.in_file(f"{name}.weight").removesuffix(".weight")

    def layers_of(self, stored: Iterable[str]) -> dict[str, str]:
        """How these files call the model's linear layers and tables of which they hold a tensor."""
        found = {}
        for name in stored:
            layer = self.in_model(name).rpartition(".")[0]
            if layer in self._layers:
                found[layer] = name.rpartition(".")[0]
        return found

    def converted(self, name: str) -> bool:
        """Whether transformers makes something else of a tensor of the files than itself."""
        renamed = _renamed(name, self._reading)
        return any(each.rename_source_key(renamed)[1] is not None for each in self._converting)

    def ignored(self, name: str) -> bool:
        """Whether transformers leaves out a tensor, by its name from `in_model`, that has no place in the model."""
        return self.unwanted(name) or any(pattern.search(name) for pattern in self._remade)

    def unwanted(self, name: str) -> bool:
        """Whether the model's class says that it does without a tensor (of `in_model`), though that may be a weight."""
        return not self._has(name) and any(pattern.search(name) for pattern in self._unwanted)

    def _has(self, name: str) -> bool:
        return name in self._tensors or name.rpartition(".")[0] in self._layers


def renamed_stacks(model: nn.Module) -> list[str]:
    """The experts that lie stacked in a model, and that files on the hub call otherwise; ours do not."""
    back = _reversed(_renamings(model))
    return [name for name in stack_names(model) if _renamed(f"{name}.", back) != f"{name}."]


def _renamings(model: nn.Module) -> list[Conversion]:
    """Of the files' names, those that are undone in what is written."""
    return [each for each in conversions(model) if renames(each, prefix=False)]


def _stored(model: nn.Module) -> Iterator[str]:
    """The names of the state dict, save for those of packed layers, which would unpack their codes for it."""
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        for key in (*module._parameters, *buffers):
            if getattr(module, key) is not None:
                yield f"{path}.{key}" if path else key


def _reversed(renamings: list[Conversion]) -> list[Conversion]:
    return [renaming.reverse_transform() for renaming in reversed(renamings)]


def remember(model: Any) -> None:
    """Have transformers' `save_pretrained` write a quantised model under these names, and convert nothing.

    It would split stacked experts that stayed float, and then not load them again with compressed-tensors ("Ckpt
    contains: 0", transformers 5.23).

    Args:
        model: A transformers model; what it remembers of the conversions it was loaded with is replaced.
    """
    model._weight_conversions = FileNames(model).renamings


def _renamed(name: str, renamings: Iterable[Conversion]) -> str:
    """By each renaming in turn, as transformers does; its own function for it came with 5.21."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name

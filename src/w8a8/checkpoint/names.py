"""How the files of a model call its tensors, where that differs from the model's own names.

transformers 5 gives mixtures of experts other modules than the files on the hub were written for, and renames while it
loads and saves: Mixtral's `mlp.experts` are `block_sparse_moe.experts` in files, which is what vLLM reads.  A model
whose experts have layers of their own (`w8a8.experts`) is written under the files' names, by transformers' own
renamings; its conversions, which stack and split, are not needed then.  Every other model is written under its
own names.
"""

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from w8a8.experts import holds_experts, stacks


class FileNames:
    """The names of a model's tensors and layers, in the model and in its files.

    Args:
        model: With `Experts` in their places, or none.  Not modified.

    renamings: What transformers does from the files' names to the model's; none where that cannot be taken back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.renamings = _renamings(model) if holds_experts(model) else []
        self._back = _reversed(self.renamings)
        # not the state dict, for which packed layers unpack their codes: a second copy of the model
        tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
        if self.renamings and any(self.in_model(self.in_file(name)) != name for name, _ in tensors):
            self.renamings, self._back = [], []

    def in_model(self, name: str) -> str:
        """Of a tensor of the files."""
        return _renamed(name, self.renamings)

    def in_file(self, name: str) -> str:
        """Of a tensor of the model."""
        return _renamed(name, self._back)

    def of_layer(self, name: str) -> str:
        """How the files call a layer of the model."""
        return self.in_file(f"{name}.weight").removesuffix(".weight")


def renamed_stacks(model: nn.Module) -> list[str]:
    """The experts that lie stacked in a model, and that files on the hub call otherwise; ours do not."""
    back = _reversed(_renamings(model))
    return [name for kind in stacks(model) for name in kind if _renamed(f"{name}.", back) != f"{name}."]


def _renamings(model: nn.Module) -> list[WeightRenaming]:
    """Of the files' names, when transformers loads the model."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [
        transform
        for transform in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(transform, WeightRenaming) and not isinstance(transform, PrefixChange)
    ]


def _reversed(renamings: list[WeightRenaming]) -> list[Any]:
    return [renaming.reverse_transform() for renaming in reversed(renamings)]


def remember(model: Any) -> None:
    """Have transformers' `save_pretrained` write a quantised model under these names, and convert nothing.

    It would split stacked experts that stayed float, and then not load them again with compressed-tensors ("Ckpt
    contains: 0", transformers 5.23).

    Args:
        model: A transformers model; what it remembers of the conversions it was loaded with is replaced.
    """
    model._weight_conversions = FileNames(model).renamings


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    """By each renaming in turn, as transformers does; its own function for it came with 5.21."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name

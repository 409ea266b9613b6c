"""What is asked of transformers' own models, with transformers imported by whoever made one: where nobody has, none is.

A model of plain PyTorch is quantised in an environment without transformers, and without waiting for it.
"""

import sys
from typing import Any

from torch import nn


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a `PreTrainedModel`."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def conversions(model: nn.Module, *, legacy: bool = False) -> list[Any]:
    """What transformers does with the files' tensors while it loads a model, with or without values.

    Args:
        model: Of any class; nothing where it is none of transformers'.
        legacy: With what is done for files of older versions.
    """
    if not is_pretrained(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    pretrained: Any = model
    return list(get_model_conversion_mapping(pretrained, add_legacy=legacy))


def renames(conversion: Any, *, prefix: bool = True) -> bool:
    """Whether one of the conversions gives a tensor another name only; also by a prefix, or not so."""
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    return isinstance(conversion, WeightRenaming) and (prefix or not isinstance(conversion, PrefixChange))


def stacks_experts(conversion: Any) -> bool:
    """Whether one of the conversions makes a stack of the files' expert layers."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [type(operation) for operation in getattr(conversion, "operations", ())]
    return kinds in ([MergeModulelist, Concatenate], [MergeModulelist])

"""What is asked of transformers' own models, with transformers imported by whoever made one: where nobody has, none is.

A model of plain PyTorch is quantised in an environment without transformers, and without waiting for it.
"""

import sys
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import transformers
    from transformers.core_model_loading import WeightTransform

    Pretrained: TypeAlias = transformers.PreTrainedModel
    Config: TypeAlias = transformers.PreTrainedConfig
    Tokenizer: TypeAlias = transformers.PreTrainedTokenizerBase
    Conversion: TypeAlias = WeightTransform
else:  # to annotate with: where nobody has transformers, nobody has one of these
    Pretrained, Config, Tokenizer, Conversion = nn.Module, object, object, object


def is_pretrained(module: nn.Module) -> TypeGuard[Pretrained]:
    """Whether a module is a `PreTrainedModel`."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def initialised() -> Tensor:
    """What stands under a name that transformers fills or initialises: it takes it to be done."""
    tensor = torch.empty(0, dtype=torch.float32, device="cpu")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def conversions(model: nn.Module, *, legacy: bool = False) -> list[Conversion]:
    """What transformers does with the files' tensors while it loads a model, with or without values.

    Args:
        model: Of any class; nothing where it is none of transformers'.
        legacy: With what is done for files of older versions.
    """
    if not is_pretrained(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=legacy))


def renames(conversion: Conversion, *, prefix: bool = True) -> bool:
    """Whether one of the conversions gives a tensor another name only; also by a prefix, or not so."""
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    return isinstance(conversion, WeightRenaming) and (prefix or not isinstance(conversion, PrefixChange))


def stacks_experts(conversion: Conversion) -> bool:
    """Whether one of the conversions makes a stack of the files' expert layers."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [type(operation) for operation in getattr(conversion, "operations", ())]
    return kinds in ([MergeModulelist, Concatenate], [MergeModulelist])

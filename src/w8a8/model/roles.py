"""What some linear layers are for: heads, routers, adapters, what follows a model.  By default they stay float."""

import enum
from collections import Counter
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from torch import nn

from w8a8.errors import ModelError
from w8a8.layers.linear import QuantLinear, is_linear, shape_of
from w8a8.model.experts import Experts, expert_counts
from w8a8.model.pretrained import is_pretrained

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

ROUTERS = ("gate", "router", "shared_expert_gate")
"""What models call the layers that weigh experts."""


class _Kept(str, enum.Enum):
    """What a part of a model is to be that stays float by default."""

    @classmethod
    def of(cls, asked: str) -> "Self":
        """The one that is written so; `ModelError` where there is none."""
        try:
            return cls(asked)
        except ValueError:
            raise ModelError(f"{cls.__name__.lower()}={asked!r} is unknown; use 'float' or 'int8'") from None


class Head(_Kept):
    """What an output head is to be."""

    FLOAT = "float"
    INT8 = "int8"


class Embeddings(_Kept):
    """What lookup tables are to be."""

    FLOAT = "float"
    INT8 = "int8"


def heads(model: nn.Module, *, quantized: bool = False) -> list[str]:
    """The output heads, float or `quantized` too: `lm_head`, or what the model calls its output embedding."""
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or (quantized and isinstance(module, QuantLinear)))
        and (module is head or name.rpartition(".")[2] == "lm_head")
    ]


def routers_of(model: nn.Module, linears: Mapping[str, nn.Module], choosing: Mapping[str, str]) -> dict[str, str]:
    """The layers that say which experts run, or how much they count, and how that is known.

    The model's code chooses by what they return, and they have as many outputs as there are experts beside them;
    or they are called as in `ROUTERS` beside experts, or lie in a module of that name.

    Args:
        model: With experts in their places, stacked or not.  Not modified.
        choosing: Those by whose output the model's code chooses, and how.
    """
    beside = set()
    for module in model.modules():
        if any(isinstance(child, Experts) for child in module.children()):
            for router in (child for name, child in module.named_children() if name in ROUTERS):
                beside |= {id(inner) for inner in router.modules()}
    found = {name: "it lies beside experts" for name, linear in linears.items() if id(linear) in beside}
    counts = expert_counts(model)
    for name, how in choosing.items():
        parents = name.split(".")[:-1]
        near = [".".join(parents[:depth]) for depth in (len(parents), len(parents) - 1) if depth >= 0]
        outputs = shape_of(linears[name])[0] if name in linears else 0
        if any(_has_experts(model.get_submodule(parent), outputs, counts) for parent in near):
            found[name] = how
    return found


def _has_experts(module: nn.Module, number: int, counts: Set[int]) -> bool:
    """Whether a module holds that many experts: as modules of one class, stacked, or one under the other."""
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList | nn.ModuleDict | Experts):
            alike = Counter(type(child) for child in inner.children())
            if number > 1 and max(alike.values(), default=0) == number:
                return True
        for parameter in inner.parameters(recurse=False) if not is_linear(inner) else ():
            stacked = parameter.ndim == 3 and parameter.shape[0] == number > 1
            below = parameter.ndim == 2 and number in counts and parameter.shape[0] % number == 0
            if stacked or (below and parameter.shape[0] > number):
                return True
    return False


def adapters_of(model: nn.Module) -> set[str]:
    """The layers that peft, or a wrapper made in its way, says belong to adapters (LoRA's A and B)."""
    found = set()
    for module in model.modules():
        parts = getattr(module, "adapter_layer_names", None)
        if isinstance(parts, tuple | list):
            inside = [getattr(module, part, None) for part in parts if isinstance(part, str)]
            modules = (inner for each in inside if isinstance(each, nn.Module) for inner in each.modules())
            found |= {id(module) for module in modules}
    return {name for name, module in model.named_modules() if id(module) in found}


def beside_models(model: nn.Module) -> set[str]:
    """The layers and tables outside of transformers' models in what saves itself around such, as `SentenceTransformer`.

    Each such module is written into a folder of its own, of which no config.json tells that it is quantised.
    """
    inside = {id(m) for part in model.modules() if is_pretrained(part) for m in part.modules()}
    if not inside or id(model) in inside or not hasattr(model, "save_pretrained"):
        return set()
    kinds = (name for name, module in model.named_modules() if is_linear(module) or isinstance(module, nn.Embedding))
    return {name for name in kinds if id(model.get_submodule(name)) not in inside}

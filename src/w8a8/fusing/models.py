"""A model whose blocks run fused: made so, undone, and told what came of it."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from w8a8.checkpoint.describe import transformers_models
from w8a8.errors import OTHERS_ERRORS, ModelError
from w8a8.fusing.blocks import Fused
from w8a8.fusing.families import families
from w8a8.kernels.compiled import unavailable_because
from w8a8.layers.linear import Mode, QuantLinear, check_module
from w8a8.model.kinds import input_config
from w8a8.model.pretrained import is_pretrained


@dataclass(frozen=True)
class Fusions:
    """What is fused in a model so far: graphs are made at the first call of each kind.

    blocks: How many blocks have one.
    waiting: How many were not called yet.
    unfused: How many run as they are.
    whole: What is one graph, with all of the blocks in it, by name: "" is the model itself.
    fused: What was fused, and how often, over all graphs.
    left: What was not, and how often.
    refused: Why blocks, or what is around them, run as they are, by name.
    """

    blocks: int
    waiting: int
    unfused: int
    whole: tuple[str, ...]
    fused: dict[str, int]
    left: dict[str, int]
    refused: dict[str, str]

    @property
    def line(self) -> str:
        """In a line."""
        return f"{self.blocks} blocks run fused" + (f", {self.unfused} as they are" if self.unfused else "")

    def __str__(self) -> str:
        lines = [f"{self.blocks} blocks run fused" + (f", {self.waiting} were not called yet" if self.waiting else "")]
        lines += [f"  {times} x {what}" for what, times in self.fused.items()]
        lines += [f"  left, {times} x {what}" for what, times in self.left.items()]
        lines += [f"  {name or 'the model'} is one graph with all of them" for name in self.whole]
        lines += [f"  {name or 'the model'} runs as it is: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def optimize(model: nn.Module) -> Fusions:
    """Run what lies between the integer layers of a model in fewer passes, in place.

    What each block of the model computes is looked at when it is first called, and its norms, residual sums,
    activations and attention then run in the native kernel, in the same pass as the products beside them where that can
    be; layers that read the same tensor quantise it once.  The codes are those of the tensors that the model computes,
    by the contract; the float operations between agree with PyTorch's to about a millionth, which moves a code now and
    then.  `model.state_dict()` and the model's classes stay as they are.  `restore` undoes it.

    Args:
        model: With integer layers (`w8a8.quantize`, `w8a8.load`).  Called again, it forgets the graphs and makes them
            anew.

    Returns:
        What is fused so far, which is nothing until the model is called: ask `fusions` again then.

    Raises:
        ModelError: not a module; the model has no integer layers, no block of its own has any, or there is no native
            kernel.
    """
    check_module(model)
    layers = {name for name, module in model.named_modules() if _is_integer(module)}
    if not layers:
        raise ModelError("the model was to be optimised and has no integer layers; quantise it first: w8a8.quantize")
    blocks = check_fusible(model, layers)
    restore(model)
    for block, family in families(blocks):
        vars(block)["forward"] = Fused(block, family)
    roots = _roots(model)
    drops = _goes_by_the_mask(model, roots)
    for root in roots:
        for part in _around(root, blocks):
            vars(part)["forward"] = Fused(part, whole=True, outermost=drops and part is root)
    return fusions(model)


def optimize_where_possible(model: nn.Module) -> str | None:
    """`optimize` a model; what cannot be fused stays as it is.

    Returns:
        Why nothing is fused; None where something may be, of which `fusions` tells after a first call.
    """
    if not any(_is_integer(module) for module in model.modules()):
        return "it has no integer layers"
    try:
        optimize(model)
    except ModelError as error:
        return str(error)
    return None


def fusions_in_words(model: nn.Module, why_not: str | None) -> str:
    """What is fused, in a line, after a first call.

    Args:
        why_not: What `optimize_where_possible` gave.
    """
    return fusions(model).line if why_not is None else f"not fused: {why_not}"


def _roots(model: nn.Module) -> list[nn.Module]:
    """What holds the blocks: the model; of one of sentence-transformers those of transformers in it."""
    theirs = any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__)
    return list(transformers_models(model)) if theirs else [model]


def _goes_by_the_mask(model: nn.Module, roots: list[nn.Module]) -> bool:
    """Whether nothing around the roots reads padding, as seen on random states: a convolution over tokens does."""
    if roots == [model]:
        return True
    if not isinstance(model, nn.Sequential) or len(roots) != 1 or not is_pretrained(roots[0]):
        return False
    inner = roots[0]
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], dtype=torch.long, device="cpu")
    if getattr(getattr(model, "tokenizer", None), "padding_side", "right") == "left":
        mask = mask.flip(1)
    shape, draw = (*mask.shape, int(input_config(inner.config).hidden_size)), torch.Generator("cpu").manual_seed(0)
    states = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(inner.device, inner.dtype)
    mask = mask.to(inner.device)
    found = []
    try:
        with torch.no_grad():
            for tokens in (states, states * mask[..., None]):  # zeros as padding are what a fused model returns
                given = {"token_embeddings": tokens.clone(), "attention_mask": mask, "input_ids": mask}
                for module in list(model)[1:]:
                    given = module(given)
                found.append(given.get("sentence_embedding", mask))
    except OTHERS_ERRORS:  # of a module that wants something else
        return False
    return torch.equal(found[0], found[1])


def _around(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """What has all of the blocks in it, and no forward but its class's own: the model, its encoder and the like."""
    found = []
    for module in model.modules():
        within = {id(inner) for inner in module.modules()}
        if module in blocks or isinstance(module, nn.ModuleList | nn.Sequential) or "forward" in vars(module):
            continue
        if all(id(block) in within for block in blocks):
            found.append(module)
    return found


def check_fusible(model: nn.Module, layers: Collection[str]) -> list[nn.Module]:
    """The blocks of a model that `optimize` takes: the outermost elements of lists that hold such layers.

    Args:
        model: Float or quantised.
        layers: The names of its layers that are or will be integer layers.

    Raises:
        ModelError: there is none, or no native kernel.
    """
    why = unavailable_because()
    if why is not None:
        raise ModelError(f"the model was to be optimised, which the native kernel does, and it is not there: {why}")
    found: list[nn.Module] = []
    taken: list[str] = []
    inside = {id(module) for root in _roots(model) for module in root.modules() if module is not root}
    for name, block in model.named_modules():  # parents come before children
        above = model.get_submodule(name.rpartition(".")[0]) if name else None
        if not isinstance(above, nn.ModuleList | nn.Sequential) or isinstance(block, nn.ModuleList | nn.Sequential):
            continue
        if id(block) not in inside:
            continue
        own = vars(block).get("forward")
        if any(name.startswith(f"{outer}.") for outer in taken) or not (own is None or isinstance(own, Fused)):
            continue
        if any(layer.startswith(f"{name}.") for layer in layers):
            found.append(block)
            taken.append(name)
    if not found:
        raise ModelError(
            "the model was to be optimised, and none of its integer layers is in a block of an nn.ModuleList or "
            "nn.Sequential whose forward is its class's own; run it without"
        )
    return found


def restore(model: nn.Module) -> None:
    """Undo `optimize`: every block runs its own forward again."""
    for _, block in list(_fused(model)):
        del vars(block)["forward"]


def fusions(model: nn.Module) -> Fusions:
    """What is fused in a model, and what is not."""
    made, left, refused = Counter[str](), Counter[str](), {}
    count = waiting = unfused = 0
    parts = [(name, vars(part)["forward"]) for name, part in _fused(model)]
    whole = tuple(name for name, forward in parts if forward.whole and forward.told)
    for name, forward in parts:
        if not forward.whole:
            count += bool(forward.told or whole)
            waiting += not forward.told and not forward.refused and not whole
            unfused += not forward.told and bool(forward.refused) and not whole
        for told in forward.told:
            made += told.fused
            left += told.left
        if forward.refused:
            refused[name] = "; ".join(forward.refused)
    return Fusions(count, waiting, unfused, whole, dict(made), dict(left), refused)


def _is_integer(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) and module.mode is Mode.INTEGER


def _fused(model: nn.Module) -> list[tuple[str, nn.Module]]:
    check_module(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Fused)]

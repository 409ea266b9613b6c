"""The experts of a mixture as linear layers of their own, in the place of stacked parameters.

transformers 5 keeps the experts of a layer in two parameters,

    gate_up_proj (E, 2 I, H), down_proj (E, H, I):    y_e = down_e (act(gate_e x) * up_e x),    E experts
    up_proj (E, I, H), down_proj (E, H, I):           y_e = down_e act(up_e x),                 Nemotron-H's, no gate

or the first two transposed (Aria's), which no walk over linear layers finds.  `Experts` has the same weights as 3 E or
2 E `nn.Linear`, views of the stack, under the names that a model's files have (`experts.3.gate_proj`, Mixtral's
`experts.3.w1`): these come from transformers' own conversion mapping.  Whatever works by a layer's name then works for
experts.

A stack is taken by what it is and does, not by a list of models: it has two such parameters, and an activation or a
gate of its class's own (DeepSeek-V4 clamps in it), which is then called as it is; and the forward of its class, run on
a small random instance, gives what `Experts` gives with the same weights.  Biases and interleaved stacks do not, and
stay as they are with that reason.

Not taken: one int8 product over a stack of codes.  It would need a second kind of layer in each place that knows
linear ones, and files that nobody else reads; the price is a call per expert that is hit.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.defaults import usual_defaults
from w8a8.layers.linear import has_hooks, quant_linears
from w8a8.model.pretrained import Conversion, conversions, initialised, stacks_experts

NAMES = ("gate_proj", "up_proj", "down_proj")
"""Of an expert's layers, where transformers has no conversion that says how the files call them; without a gate, the
last two."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATED, _PLAIN = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
_BOUND = 1e-5
"""Of a token's output, relative norm in float32: sums of few terms in another order."""
OTHER_KIND = (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What the forward of a class raises that is called in another way than ours, or wants more than a small copy has."""


class Experts(nn.Module):
    """The experts of one layer.

    Args:
        stack: What it is to take the place of, with or without values.  Its weights are shared, not copied.
        names: Of each expert's gate, up and down layer, or of the last two where it has no gate; None: `NAMES`.

    Children are the experts by number, each with its layers, and the activation.

    stacked: The names of the two parameters: of what reads a token, and of what writes.
    arriving: Set while transformers fills the model: some of its models initialise the stack's parameters by their
        names where they do not know the parent to be initialised (Qwen3-Omni's), and find them done.
    """

    arriving = False

    def __init__(self, stack: nn.Module, names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.stacked = _stacked(stack)
        names = names or usual_names(self.stacked)
        reading, writing = _upright(*(stack.get_parameter(parameter) for parameter in self.stacked))
        self.num_experts, self.hidden_dim, self.intermediate_dim = writing.shape
        self.names = names
        self.act_fn = getattr(stack, "act_fn", None)
        self.own_gate = _own_gate(stack)
        for number in range(self.num_experts):
            expert = nn.Module()
            weights = (*reading[number].split(self.intermediate_dim), writing[number])
            for name, weight in zip(names, weights, strict=True):
                expert.add_module(name, _linear(weight.detach(), requires_grad=writing.requires_grad))
            self.add_module(str(number), expert)
        self.train(stack.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts that each token is sent to.

        Args:
            hidden_states: (M, H).
            top_k_index: Integers, (M, k): the experts of each token; num_experts and above is none.
            top_k_weights: (M, k).

        Returns:
            (M, H) in the dtype of `hidden_states`; each token's experts are added in ascending order.
        """
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)  # (M k,) by expert, and in each by token
        tokens = order.div(top_k_index.shape[-1], rounding_mode="floor")
        x = hidden_states[tokens]
        outputs, begin = [], 0
        for number, count in enumerate(torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()):
            if count:
                outputs.append(self._expert(number, x[begin : begin + count]))
                begin += count
        result = torch.zeros_like(hidden_states)
        if outputs:
            weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order[:begin], None]
            result.index_add_(0, tokens[:begin], weighted.to(result.dtype))
        return result

    def _expert(self, number: int, x: Tensor) -> Tensor:
        *inner, down = (self._modules[str(number)]._modules[name] for name in self.names)  # type: ignore[union-attr]
        if self.own_gate is not None:
            return down(self.own_gate(torch.cat([layer(x) for layer in inner], -1)))  # type: ignore[misc, no-any-return]
        active = self.act_fn(inner[0](x))  # type: ignore[misc]
        return down(active * inner[1](x) if len(inner) > 1 else active)  # type: ignore[misc, no-any-return]

    def __getattr__(self, name: str) -> Any:
        if self.arriving and name in self.stacked:
            return initialised()
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


def expert_counts(model: nn.Module) -> set[int]:
    """How many experts a model's config says that it has: the numbers whose keys end in "experts"."""
    config: Any = getattr(model, "config", None)
    found: set[int] = set()
    pending = [config.to_dict()] if hasattr(config, "to_dict") else []
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif type(value) is int and value > 1 and str(key).endswith("experts") and "shared" not in str(key):
                found.add(value)
    return found


def stack_names(model: nn.Module) -> list[str]:
    """The modules that have a matrix for each expert in one parameter.

    Not every parameter of three dimensions is such a stack: positions, class tokens and the heads of an attention are
    not.  Of a stack the first dimension is a number of experts that the model's config tells, or its forward is told
    which experts to use.
    """
    counts = expert_counts(model)
    found = []
    for name, module in model.named_modules():
        shapes = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
        if not name or not shapes or isinstance(module, CONVOLUTIONS):
            continue
        alike = len({shape[0] for shape in shapes}) == 1
        if all(min(shape) > 1 for shape in shapes) and ((alike and shapes[0][0] in counts) or _is_told(module)):
            found.append(name)
    return found


def _is_told(module: nn.Module) -> bool:
    """Whether a forward has arguments for the experts of each token and their weights."""
    arguments = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    return sum("top_k" in name or "expert" in name for name in arguments) > 1


def stacks(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The stacked experts of a model that `unstacked` takes apart, and why others are left, by name.

    Takes no time and no memory for each expert.
    """
    found, reasons = {}, {}
    for name in stack_names(model):
        module = model.get_submodule(name)
        reason = _why_not(module, dict(module.named_parameters(recurse=False)))
        if reason is None:
            found[name] = module
        else:
            reasons[name] = f"stacked experts that are not taken apart: {reason}"
    return found, reasons


def unstacked(model: nn.Module, *, at_most: int | None = None) -> tuple[dict[str, Experts], dict[str, str]]:
    """What can take the places of a model's stacked experts (`swap` puts it there), and why others stay.

    Args:
        model: With or without values.  Not modified; the linear layers are views of its parameters.
        at_most: Leave stacks of more experts than that: a file cannot have more than it has tensors.

    Returns:
        The new modules, and the reasons why other modules with stacked parameters are left, each by name.
    """
    stacking = [each for each in conversions(model) if stacks_experts(each)]
    found, reasons = stacks(model)
    fitting = {n: m for n, m in found.items() if at_most is None or len(m.get_parameter("down_proj")) <= at_most}
    return {n: Experts(m, _names(n, _stacked(m), stacking)) for n, m in fitting.items()}, reasons


def own_weights(experts: Experts) -> None:
    """Have what is float beside quantised layers hold its own values, so that the stack's memory goes; changes it."""
    if not any(quant_linears(experts)):
        return
    for module in experts.modules():
        if isinstance(module, nn.Linear):
            own = module.weight.detach().clone(memory_format=torch.contiguous_format)
            module.weight = nn.Parameter(own, requires_grad=module.weight.requires_grad)


def holds_experts(model: nn.Module) -> bool:
    """Whether a model has experts with layers of their own."""
    return any(isinstance(module, Experts) for module in model.modules())


def mark_arriving(model: nn.Module, *, arriving: bool) -> None:
    """Set `arriving` of all experts of a model."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.arriving = arriving


def usual_names(stacked: tuple[str, str]) -> tuple[str, ...]:
    """What an expert's layers are called where nothing else is said."""
    return NAMES if stacked == _GATED else NAMES[1:]


def _stacked(stack: nn.Module) -> tuple[str, str]:
    """The names of the parameters of a stack that is known."""
    return _GATED if _GATED[0] in stack._parameters else _PLAIN


def _upright(reading: Tensor, writing: Tensor) -> tuple[Tensor, Tensor]:
    """The two parameters as (E, N, K), views where they lie transposed: what reads a token has N = 2 I with a gate."""
    (_, n, k), (_, n2, k2) = reading.shape, writing.shape
    lies_so = n == 2 * k2 and k == n2
    return (reading, writing) if lies_so or (k, n) != (2 * n2, k2) else (reading.mT, writing.mT)


def _own_gate(stack: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What the class of a stack makes of (M, 2 I), the outputs of gate and up, where it says so itself.

    It is called with the stack's numbers and activation, and without its parameters.
    """
    gate = getattr(type(stack), "_apply_gate", None)
    if gate is None or gate.__name__ == "_default_apply_gate":  # transformers gives each class that has none this one
        return None
    bare = copy.copy(stack)
    bare._parameters = {}
    return functools.partial(gate, bare)


def _linear(weight: Tensor, *, requires_grad: bool) -> nn.Linear:
    """Around a weight, which is not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return linear


def _why_not(stack: nn.Module, own: dict[str, nn.Parameter]) -> str | None:
    if set(own) not in (set(_GATED), set(_PLAIN)):
        known = " or ".join(", ".join(sorted(names)) for names in (_GATED, _PLAIN))
        return f"its parameters are {', '.join(sorted(own))}, known are {known}"
    stacked = _stacked(stack)
    shapes = [tuple(own[name].shape) for name in stacked]
    times, told = (2, "2 I") if stacked == _GATED else (1, "I")
    matrices = _upright(*(own[name] for name in stacked)) if all(len(shape) == 3 for shape in shapes) else ()
    (e, inner, h), (e2, h2, i) = (each.shape for each in matrices) if matrices else ((0,) * 3, (1,) * 3)
    if (e, inner, h) != (e2, times * i, h2):
        return f"{stacked[0]} {shapes[0]} and down_proj {shapes[1]} are not (E, {told}, H) and (E, H, I)"
    act = getattr(stack, "act_fn", None)
    beside = [name for name, child in stack.named_children() if child is not act]
    beside += [name for name, buffer in stack._buffers.items() if buffer is not None]
    if beside:
        return f"it also has {', '.join(beside)}, which would be dropped"
    if not callable(act) and _own_gate(stack) is None:
        return "it has neither an act_fn nor a gate"
    if not all(parameter.is_floating_point() for parameter in own.values()):
        return f"its weights are {own['down_proj'].dtype}"
    if has_hooks(stack):
        return "it has hooks, which would be dropped; remove them first"
    with usual_defaults():  # a caller may be making models on the meta device
        return _difference(stack, {e: 4, h: 12, i: 8})


@torch.no_grad()
def _difference(stack: nn.Module, sizes: dict[int, int]) -> str | None:
    """How the class's forward differs from ours, on a small instance with random weights.

    Args:
        stack: Not modified, its values not looked at.
        sizes: Of the instance, by those of the stack: E, H and I.
    """
    first, second = _stacked(stack)
    reading, writing = (stack.get_parameter(name) for name in (first, second))
    upright = _upright(reading, writing)[1]
    e, h, i = (sizes[size] for size in upright.shape)
    draw = torch.Generator().manual_seed(0)
    small = copy.copy(stack)
    for key, value in stack.__dict__.items():
        if type(value) is int and value in sizes:
            small.__dict__[key] = sizes[value]
    shapes = {first: (e, 2 * i if first == _GATED[0] else i, h), second: (e, h, i)}
    drawn = {
        name: torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") for name, shape in shapes.items()
    }
    lies_so = upright is writing
    small._parameters = {name: nn.Parameter(each if lies_so else each.mT) for name, each in drawn.items()}
    sizes_of_x = torch.logspace(-2, 2, 7, dtype=torch.float32, device="cpu")[:, None]  # a gate that clamps shows it
    x = torch.randn(7, h, generator=draw, dtype=torch.float32, device="cpu") * sizes_of_x
    weights = torch.rand(7, 2, generator=draw, dtype=torch.float32, device="cpu")
    index = torch.stack([torch.randperm(e, generator=draw, dtype=torch.int64, device="cpu")[:2] for _ in range(7)])
    eager = inspect.unwrap(type(stack).forward)  # transformers wraps it to choose among implementations
    try:
        want = eager(small, x, index, weights)
        error = float(((Experts(small)(x, index, weights) - want).norm(dim=-1) / want.norm(dim=-1)).max())
    except OTHER_KIND as failure:
        told = str(failure).partition("\n")[0]
        return f"{type(stack).__name__} cannot be called as experts are ({type(failure).__name__}: {told})"
    if error <= _BOUND:
        return None
    return f"{type(stack).__name__} computes something else (relative difference {error:.1e} on random weights)"


def _names(stack: str, stacked: tuple[str, str], stacking: list[Conversion]) -> tuple[str, ...]:
    """How the files call the layers of each expert of a stack."""
    usual = usual_names(stacked)
    found: list[list[str]] = []
    for parameter in stacked:
        for conversion in stacking:
            back = conversion.reverse_transform()
            if back.rename_source_key(f"{stack}.{parameter}")[1] is not None:
                found.append([pattern.removesuffix(".weight").rpartition(".")[2] for pattern in back.target_patterns])
                break
    names = tuple(itertools.chain.from_iterable(found))
    return names if [len(each) for each in found] == [len(usual) - 1, 1] else usual

"""One call of a block as a graph of operations with sizes as symbols, and for which other calls that graph stands.

The block's code runs once on tensors without values (`make_fx`, before autograd and decompositions), so that what is
found is what it computes, whatever it is called.  Code that asks for a value ends the attempt, and so does code that
compares sizes in ways that `Argument` cannot tell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from w8a8.errors import ModelError
from w8a8.layers.linear import QuantLinear
from w8a8.model.experts import OTHER_KIND


@dataclass(frozen=True)
class Argument:
    """What a tensor among the arguments has to be like."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]  # a number, or the name of a size of at least 2
    whole: bool  # whether the graph is for a contiguous one: a copy stands for another


@dataclass(frozen=True)
class Captured:
    """A block's call as a graph, in which nothing of the block itself is left: what it holds is named.

    graph: Placeholders are the tensors among the arguments, in order.  A get_attr node has in its meta, as "place",
        what it stands for; the op of a quantised layer has, as "layer", the path of the layer.
    arguments: What those tensors have to be like.
    bounds: The least and the greatest that a size may be, by its name, where its code asks.
    outputs: How the outputs are nested.
    """

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    bounds: dict[str, tuple[int, float]]
    outputs: pytree.TreeSpec


def capture(block: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Captured:
    """Run the block's code once, without values.

    Raises:
        ModelError: it cannot be a graph, or holds only for sizes in ways that are not told here.
    """
    # what is needed here alone takes longer to import than the rest of the package, and brings sympy
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    outputs: list[pytree.TreeSpec] = []

    def run(*tensors: Tensor) -> list[object]:
        now = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            now[place] = tensor
        again, named = pytree.tree_unflatten(now, structure)
        before = pytree.tree_leaves((again, named))
        flat, spec = pytree.tree_flatten(type(block).forward(block, *again, **named))
        after = pytree.tree_leaves((again, named))
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise ModelError("its code changes what it is called with")
        if odd := [value for value in flat if not isinstance(value, Tensor | None)]:
            raise ModelError(f"it returns a {type(odd[0]).__name__}, not tensors alone")
        outputs[:] = [spec]
        return flat

    tensors = [leaves[i].detach().contiguous() for i in places]
    shapes = ShapeEnv(duck_shape=False)  # sizes that happen to be equal are not one size
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    trace = make_fx(run, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        module = trace(*(fake.from_tensor(tensor, static_shapes=False) for tensor in tensors))
    except OTHER_KIND as error:  # the code of somebody else's block, on tensors without values
        said = str(error).partition("\n")[0]
        raise ModelError(f"it does not run on tensors without values: {type(error).__name__}: {said}") from error
    graph = module.graph
    graph.eliminate_dead_code()
    arguments = []
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(inputs, tensors, strict=True):
        arguments.append(Argument(tensor.dtype, tuple(map(_size, node.meta["val"].shape)), not _only_masks(node)))
    if any(isinstance(size, str) and not size.isidentifier() for each in arguments for size in each.shape):
        raise ModelError("the sizes of its arguments depend on one another")
    names = {size for argument in arguments for size in argument.shape if isinstance(size, str)}
    bounds: dict[str, tuple[int, float]] = {}
    for guard in shapes.guards:
        left = shapes.replace(guard.expr)
        if left.free_symbols and not _bounds(left, names, bounds):
            raise ModelError(f"its code asks whether {left}")
    _name(block, module)
    return Captured(graph, tuple(arguments), bounds, outputs[0])


def _bounds(asked: Any, names: set[str], bounds: dict[str, tuple[int, float]]) -> bool:
    """Take what is true of a size into its bounds; False where it is more than that it is beyond a number."""
    if getattr(asked, "rel_op", None) not in ("<", "<=", ">", ">="):
        return False
    name, limit = str(asked.lhs), asked.rhs
    if name not in names or not limit.is_Integer:
        return False
    least, most = bounds.get(name, (0, math.inf))
    limit = int(limit)
    if asked.rel_op in ("<", "<="):
        most = min(most, limit - (asked.rel_op == "<"))
    else:
        least = max(least, limit + (asked.rel_op == ">"))
    bounds[name] = least, most
    return True


def _name(block: nn.Module, module: fx.GraphModule) -> None:
    """Exchange what the block holds for where it is."""
    held = {
        id(tensor): (path, kind, name)
        for path, inner in block.named_modules()
        for kind in ("_parameters", "_buffers")
        for name, tensor in getattr(inner, kind).items()
        if tensor is not None
    }
    layers = {inner._number: path for path, inner in block.named_modules() if isinstance(inner, QuantLinear)}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            place = held.get(id(getattr(module, node.target)))
            if place is None:
                raise ModelError("its code reads a tensor that is not among its parameters and buffers")
            node.meta["place"] = place
            node.meta["dtype"] = getattr(module, node.target).dtype
        elif node.target is torch.ops.w8a8.int8_linear.default:
            path = layers.get(node.args[-1])  # the op's last operand is the layer's number
            if path is None:
                raise ModelError("its code calls a quantised layer that is not in it")
            node.meta["layer"] = path
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise ModelError(f"its code writes into a tensor: {node.target}")


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def _only_masks(node: fx.Node) -> bool:
    """Whether a tensor is read as the mask of attention and by nothing else: of that, strides do not matter."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return all(user.target is attention and mask_of(user) is node and node not in user.args[:3] for user in node.users)


def mask_of(attention: fx.Node) -> fx.Node | None:
    """What an attention is given as its mask."""
    found = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return found if isinstance(found, fx.Node) else None


def is_float32(node: object) -> TypeGuard[fx.Node]:
    """Whether this is a node that makes such a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype is torch.float32


def sizes_of(node: object) -> tuple[str, ...]:
    """Of the tensor that a node makes: numbers, or names of sizes."""
    return tuple(str(size) for size in operand(node).meta["val"].shape)


def operand(value: object) -> fx.Node:
    """What an operation reads, where by its schema it is a tensor."""
    assert isinstance(value, fx.Node)
    return value


def exchanged(transpose: fx.Node) -> set[int]:
    """The axes that a transpose exchanges, from the front."""
    return {axis % len(sizes_of(transpose)) for axis in transpose.args[1:] if isinstance(axis, int)}


def fits(arguments: tuple[Argument, ...], bounds: dict[str, tuple[int, float]], tensors: list[Tensor]) -> bool:
    """Whether a graph stands for a call with these tensors."""
    sizes: dict[str, int] = {}
    for argument, tensor in zip(arguments, tensors, strict=True):
        shape = tensor.shape
        if tensor.dtype is not argument.dtype or len(shape) != len(argument.shape):
            return False
        for wanted, size in zip(argument.shape, shape, strict=True):
            if type(wanted) is int:
                if wanted != size:
                    return False
            elif size < 2 or sizes.setdefault(wanted, size) != size:  # type: ignore[arg-type]
                return False
    return all(least <= sizes[name] <= most for name, (least, most) in bounds.items())


def made_whole(arguments: tuple[Argument, ...], tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as the graph is for them: copies of those that have to be contiguous and are not."""
    pairs = zip(arguments, tensors, strict=True)
    return [tensor.contiguous() if argument.whole else tensor for argument, tensor in pairs]

"""What each expression in a class's code can stand for.  Nothing is run.

The values are modules, parameters and outputs of modules, by their paths below the module whose code is read
(`Value`).  They are followed through names, attributes, subscripts and branches: both, save where numbers and flags of
the module decide (BLOOM's `pretraining_tp > 1`).  Nothing is followed through what is only known at run time: `getattr`
with a computed name, a module that a method returns.  Statements and calls are `w8a8.model.reading`'s.
"""

import ast
import functools
import operator
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.core.scheme import Scheme
from w8a8.layers.linear import QuantLinear, is_linear
from w8a8.layers.weight import Weight
from w8a8.model import sources

Path = tuple[str, ...]
"""Attributes from a module down to what is meant: ("layers", "0", "proj")."""

_SHOWN = frozenset(dir(Weight((1, 1), torch.float32, torch.device("cpu")))) - frozenset(dir(object))
"""What a quantised layer's `weight` tells as the float one would."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Value:
    """What an expression may stand for.

    kind: "module"; "parameter", or what was made of one; "output", what was computed from the module's; or "method" of
        the module, by `name`.
    """

    kind: str
    path: Path
    name: str = ""


Values = frozenset[Value]
NOTHING: Values = frozenset()


@dataclass
class Uses:
    """What the code of one module does with what is below it.

    read: Linear layers and tables of which more is read than a quantised one has: what, and where.
    chosen_by: Linear layers from whose output a choice is made: by what, and where.
    multiplied: Parameters that a product of matrices takes.
    returned: The linear layers from whose outputs the forward's result is made.
    consulted: Numbers and flags of the module that decided a branch.
    """

    read: dict[Path, str] = field(default_factory=dict)
    chosen_by: dict[Path, str] = field(default_factory=dict)
    multiplied: set[Path] = field(default_factory=set)
    returned: set[Path] = field(default_factory=set)
    consulted: dict[Path, object] = field(default_factory=dict)


def locate(module: object, path: Path) -> Any:
    """What lies at a path, without running a property; None where nothing does."""
    for name in path:
        if isinstance(module, nn.Module):
            own = (module._modules, module._parameters, module._buffers, module.__dict__)
            module = next((each[name] for each in own if name in each), None)
        else:
            module = getattr(module, "__dict__", {}).get(name)
    return module


@dataclass
class Frame:
    """A function while it is read: whose `self`, of which class, and what its names may stand for."""

    function: types.FunctionType
    owner: type | None
    names: dict[str, Values]
    returned: set[Value] = field(default_factory=set)


class Following(ABC):
    """Of the expressions in one module's code."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.found = module, Uses()
        self.asked: dict[Path, str] = {}
        self.in_forward = False

    @abstractmethod
    def _run(
        self, function: types.FunctionType, owner: type | None, args: list[Values], kwargs: Mapping[str, Values]
    ) -> Values:
        """Read a function with what its arguments may stand for; what it may return."""

    @abstractmethod
    def _call(self, node: ast.Call, frame: Frame) -> Values:
        """What a call may give."""

    def _eval(self, node: ast.expr, frame: Frame) -> Values:
        """What an expression may stand for; what it does on the way is noted."""
        match node:
            case ast.Name(id=name):
                return frame.names.get(name, NOTHING)
            case ast.Attribute(value=ast.Attribute(attr="weight") as inner, attr=attr) if attr in _SHOWN:
                self._eval(inner.value, frame)  # what a quantised layer's weight tells as the float one does
                return NOTHING
            case ast.Attribute():
                return self._attribute(node, frame)
            case ast.Call():
                return self._call(node, frame)
            case ast.Subscript(value=inner, slice=index):
                self._eval(index, frame)
                return self._elements(self._eval(inner, frame), index)
            case ast.BinOp(left=left, op=op, right=right):
                sides = [self._eval(left, frame), self._eval(right, frame)]
                if isinstance(op, ast.MatMult):
                    return self._product(sides[0] | sides[1])
                return mixed(zip(sides, (left, right), strict=True))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()]):
                if isinstance(left, ast.Attribute):
                    self._eval(left.value, frame)
                return NOTHING
            case ast.Compare(left=left, comparators=others):
                for part in (left, *others):
                    self._eval(part, frame)
                return NOTHING
            case ast.IfExp(test=test, body=body, orelse=other):
                self._eval(test, frame)
                decided = self._decided(test, frame)
                parts = [part for part, dead in ((body, False), (other, True)) if decided is not dead]
                return NOTHING.union(*(self._eval(part, frame) for part in parts))
            case ast.NamedExpr(target=target, value=value):
                values = self._eval(value, frame)
                self._assign(target, values, frame)
                return values
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self._comprehension(node.generators, [node.elt], frame)
            case ast.DictComp():
                return self._comprehension(node.generators, [node.key, node.value], frame)
            case ast.Lambda(body=body):
                return self._eval(body, frame)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return mixed([(self._eval(part, frame), part) for part in parts])
            case _:
                parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                return NOTHING.union(*(self._eval(part, frame) for part in parts))

    def _comprehension(self, generators: list[ast.comprehension], parts: list[ast.expr], frame: Frame) -> Values:
        for each in generators:
            self._assign(each.target, self._elements(self._eval(each.iter, frame)), frame)
            for test in each.ifs:
                self._eval(test, frame)
        return NOTHING.union(*(self._eval(part, frame) for part in parts))

    def _assign(self, target: ast.expr, values: Values, frame: Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = frame.names.get(name, NOTHING) | values
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._assign(part, values, frame)
            case ast.Starred(value=inner):
                self._assign(inner, values, frame)
            case ast.Attribute(value=inner, attr=attr):
                for value in self._eval(inner, frame):
                    if value.kind == "module" and may_be_replaced(locate(self.module, value.path)):
                        self._reads(value.path, f"sets its {attr}", frame.function)
            case ast.Subscript(value=inner):
                self._eval(inner, frame)
                if isinstance(inner, ast.Name):  # a list or a dict that is filled
                    kept = {value for value in values if value.kind != "parameter"}
                    frame.names[inner.id] = frame.names.get(inner.id, NOTHING) | kept

    def _attribute(self, node: ast.Attribute, frame: Frame) -> Values:
        found: set[Value] = set()
        for value in self._eval(node.value, frame):
            match value.kind:
                case "module":
                    found |= self._member(value.path, node.attr, frame)
                case "parameter" | "output" if node.attr not in _SHOWN:  # not a shape or a dtype
                    found.add(value)
        return frozenset(found)

    def _member(self, path: Path, attr: str, frame: Frame) -> set[Value]:
        """What `attr` of the module at `path` is."""
        module, here = locate(self.module, path), (*path, attr)
        if not isinstance(module, nn.Module):
            return set()
        if is_linear(module):
            if attr == "weight":
                self._reads(path, "reads its weight", frame.function)
            elif hasattr(module, attr) and attr not in _known_of_layers():
                self._reads(path, f"reads its {attr}", frame.function)
            return {Value("method", path, attr)}
        inside = locate(module, (attr,))
        if isinstance(inside, nn.Module):
            return {Value("module", here)}
        if isinstance(inside, Tensor):
            if path and isinstance(module, nn.Embedding):  # by another's code
                self._reads(path, f"reads its {attr}", frame.function)
            return {Value("parameter", here)}
        if isinstance(inside, list | tuple | set | dict):
            return {Value("module", p) for p in self._held(inside, module, path)}
        if attr in ("parameters", "named_parameters"):
            self._asks_for_parameters(module, path, frame)
        if attr in ("state_dict", "get_parameter") and self.in_forward:
            self._uses_below(module, path, attr, frame)
        found = sources.method(module, attr)
        if found is not None and found[2]:
            return set(self._run(found[0], found[1], [frozenset({Value("module", path)})], {}))
        return {Value("method", path, attr)}

    def _asks_for_parameters(self, module: nn.Module, path: Path, frame: Frame) -> None:
        """Of a module with linear layers and tables only: one of them, a table first, must keep parameters."""
        owners = [(name, m) for name, m in module.named_modules() if any(p is not None for p in m._parameters.values())]
        if owners and all(may_be_replaced(owner) for _, owner in owners):
            first = next((name for name, owner in owners if isinstance(owner, nn.Embedding)), owners[0][0])
            layer = (*path, *first.split("."))
            self.asked[layer] = f"{frame.function.__qualname__} takes a parameter of it"

    def _uses_below(self, module: nn.Module, path: Path, how: str, frame: Frame) -> None:
        """A forward takes tensors by their names: of every layer below, as a quantised one's would be its codes."""
        for name, layer in module.named_modules():
            if may_be_replaced(layer):
                self._reads((*path, *name.split(".")), f"may read its weight by {how}", frame.function)

    def _held(self, inside: Collection[object], module: nn.Module, path: Path) -> Iterator[Path]:
        """The modules in a container that is no module, by their names below the module that has it."""
        named = {id(m): (*path, *name.split(".")) for name, m in module.named_modules() if name}
        for each in inside.values() if isinstance(inside, dict) else inside:
            if id(each) in named:
                yield named[id(each)]
            elif isinstance(each, list | tuple):
                yield from self._held(each, module, path)

    def _elements(self, values: Values, index: ast.expr | None = None) -> Values:
        """What iteration, or a subscript, may give."""
        found: set[Value] = set()
        for value in values:
            module = locate(self.module, value.path) if value.kind == "module" else None
            if not isinstance(module, _CONTAINERS):
                found.add(value)  # of a list of it, perhaps
                continue
            keys = list(module._modules)
            if isinstance(index, ast.Constant) and isinstance(index.value, int | str):
                at = index.value
                keys = [key for i, key in enumerate(keys) if at in (i, i - len(keys), key)]
            found |= {Value("module", (*value.path, key)) for key in keys if module._modules[key] is not None}
        return frozenset(found)

    def _product(self, values: Values) -> Values:
        self.found.multiplied |= {value.path for value in values if value.kind == "parameter"}
        return frozenset(value for value in values if value.kind == "output")

    def _reads(self, path: Path, what: str, function: types.FunctionType) -> None:
        self.found.read.setdefault(path, f"{function.__qualname__} {what}")

    # -- branches

    def _decided(self, test: ast.expr, frame: Frame) -> bool | None:
        """Whether a condition holds, where constants and the module's own numbers and flags say so."""
        match test:
            case ast.BoolOp(op=op, values=parts):
                known = [self._decided(part, frame) for part in parts]
                deciding = isinstance(op, ast.Or)
                return deciding if deciding in known else None if None in known else not deciding
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                known_inner = self._decided(inner, frame)
                return None if known_inner is None else not known_inner
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
                one, other = self._constant(left, frame), self._constant(right, frame)
                try:
                    return None if one is None or other is None else bool(_COMPARED[type(op)](one[0], other[0]))
                except TypeError:  # not to be compared
                    return None
            case _:
                constant = self._constant(test, frame)
                return None if constant is None else bool(constant[0])

    def _constant(self, node: ast.expr, frame: Frame) -> tuple[Any] | None:
        if isinstance(node, ast.Constant):
            return (node.value,)
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        values = frame.names.get(node.id, NOTHING) if isinstance(node, ast.Name) else NOTHING
        if not names or names[-1] == "training" or len(values) != 1:
            return None
        (value,) = values
        path = (*value.path, *names)
        found = locate(self.module, path)
        if value.kind != "module" or not isinstance(found, bool | int | float | str):
            return None
        self.found.consulted[path] = found
        return (found,)


def mixed(parts: Iterable[tuple[Values, ast.expr | None]]) -> Values:
    """What is made of several: no parameter where not all of them are such, or constants."""
    parts = list(parts)
    alone = all(
        all(v.kind == "parameter" for v in values) if values else isinstance(node, ast.Constant)
        for values, node in parts
    )
    return frozenset(v for values, _ in parts for v in values if alone or v.kind != "parameter")


_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def may_be_replaced(module: object) -> bool:
    """Whether a module is such as a quantised one may take the place of: a linear layer or a table."""
    return isinstance(module, nn.Module) and (is_linear(module) or isinstance(module, nn.Embedding))


@functools.cache
def _known_of_layers() -> frozenset[str]:
    """The attributes of a linear layer that a quantised one has too, with the same meaning."""
    layer = QuantLinear(8, 8, Scheme.of("w8a8"), bias=torch.float32, device="meta")
    return frozenset(dir(layer)) - {"parameters", "named_parameters", "get_parameter", "_parameters", "state_dict"}

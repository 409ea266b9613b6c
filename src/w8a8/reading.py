"""One class's code, read: what each expression in it can stand for, and what is done with it.  Nothing is run.

The values are modules, parameters and outputs of modules, by their paths below the module whose code is read
(`Value`).  They are followed through names, loops, subscripts, calls of methods and of functions, each function being
read anew for what it is given.  Branches are taken both, save where numbers and flags of the module decide (BLOOM's
`pretraining_tp > 1`).  Nothing is followed through what is only known at run time: `getattr` with a computed name, a
module that a method returns.  Where a function's source is not there, the names in its compiled code are taken for the
worst that they could mean.
"""

import ast
import functools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from w8a8 import sources
from w8a8.linear import QuantLinear, is_linear
from w8a8.scheme import Scheme
from w8a8.weight import Weight

Path = tuple[str, ...]
"""Attributes from a module down to what is meant: ("layers", "0", "proj")."""

CHOOSING = frozenset({"topk", "argmax", "argsort", "multinomial", "one_hot", "gumbel_softmax"})
"""Operations whose result says which of several is taken."""

PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "tensordot", "dot", "mv", "bilinear"}
    | {"multi_head_attention_forward", "_grouped_mm", "grouped_mm"}
)
"""Operations that multiply matrices."""

_DESCENDING = frozenset({"children", "named_children", "modules", "named_modules", "values", "items"})
_DEPTH = 6
"""Calls into one another that are followed."""
_NEAR = 2
"""Names between the module that chooses and the layer by whose output; losses look at all from afar."""
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
_NONE: Values = frozenset()


@dataclass
class Uses:
    """What the code of one module does with what is below it.

    read: Linear layers of which more is read than a quantised layer has: what, and where.
    chosen_by: Linear layers from whose output a choice is made: by what, and where.
    multiplied: Parameters that a product of matrices takes.
    returned: The linear layers from whose outputs the forward's result is made.
    consulted: Numbers and flags of the module that decided a branch.
    """

    read: dict[Path, str] = field(default_factory=dict)
    chosen_by: dict[Path, str] = field(default_factory=dict)
    multiplied: set[Path] = field(default_factory=set)
    returned: set[Path] = field(default_factory=set)
    consulted: dict[Path, Any] = field(default_factory=dict)


def locate(module: Any, path: Path) -> Any:
    """What lies at a path, without running a property; None where nothing does."""
    for name in path:
        if isinstance(module, nn.Module):
            own = (module._modules, module._parameters, module._buffers, module.__dict__)
            module = next((each[name] for each in own if name in each), None)
        else:
            module = getattr(module, "__dict__", {}).get(name)
    return module


@dataclass
class _Frame:
    """A function while it is read: whose `self`, of which class, and what its names may stand for."""

    function: types.FunctionType
    owner: type | None
    names: dict[str, Values]
    returned: set[Value] = field(default_factory=set)


class Reading:
    """Of one module's code.

    Args:
        module: Not modified.
        inside: What is known of a module that lies below it.
        making: Names of methods that make modules.
    """

    def __init__(self, module: nn.Module, inside: Callable[[nn.Module], Uses], making: Set[str]) -> None:
        self.module, self.inside, self.making, self.found = module, inside, making, Uses()
        self.asked: dict[Path, str] = {}
        self._stack: list[_Frame] = []
        self._done: dict[Any, Values] = {}

    def read(self) -> Uses:
        """What the code does."""
        for name in sources.entries(self.module, self.making):
            found = sources.method(self.module, name)
            if found is None:
                continue
            returned = self._run(found[0], found[1], [frozenset({Value("module", ())})], {})
            if name == "forward":
                self.found.returned |= {v.path for v in returned if v.kind == "output"}
        kept, self.found = (
            self.found,
            Uses(),
        )  # of what makes a module only this counts: it runs again when one is loaded
        for name in sorted(self.making - sources.MAKING):
            found = sources.method(self.module, name)
            if found is not None and not found[2]:
                self._run(found[0], found[1], [frozenset({Value("module", ())})], {})
        self.found = kept
        self.found.read = self.asked | self.found.read
        return self.found

    # -- functions

    def _run(
        self, function: types.FunctionType, owner: type | None, args: list[Values], kwargs: Mapping[str, Values]
    ) -> Values:
        """Read a function with what its arguments may stand for; what it may return."""
        key = (function, tuple(args), tuple(sorted(kwargs.items(), key=lambda item: item[0])))
        if key in self._done or len(self._stack) >= _DEPTH:
            return self._done.get(key, _NONE)
        self._done[key] = _NONE
        code = sources.tree(function)
        if code is None:
            self._compiled(function, args)
            return _NONE
        parameters = [*code.args.posonlyargs, *code.args.args]
        names = {p.arg: v for p, v in zip(parameters, args, strict=False)}
        names |= {name: value for name, value in kwargs.items() if name}
        if code.args.vararg is not None:
            names[code.args.vararg.arg] = frozenset().union(*args[len(parameters) :])
        frame = _Frame(function, owner, names)
        self._stack.append(frame)
        body = [ast.Return(code.body)] if isinstance(code, ast.Lambda) else code.body
        for _ in range(2):  # what a loop assigns at its end is read at its beginning
            self._block(body, frame)
        self._stack.pop()
        self._done[key] = frozenset(frame.returned)
        return self._done[key]

    def _compiled(self, function: types.FunctionType, args: list[Values]) -> None:
        """Without source: every linear layer that is named is read where "weight" is."""
        named = sources.names(function.__code__)
        if "weight" not in named:
            return
        for value in args[0] if args else ():
            owner = locate(self.module, value.path)
            for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
                if is_linear(module) and named.issuperset(name.split(".")[:1]):
                    self._reads(
                        (*value.path, *name.split(".")), "may read its weight (no source to look into)", function
                    )

    def _block(self, body: Iterable[ast.stmt], frame: _Frame) -> None:
        for statement in body:
            self._statement(statement, frame)

    def _statement(self, node: ast.stmt, frame: _Frame) -> None:
        match node:
            case ast.If(test=test):
                self._eval(test, frame)
                decided = self._decided(test, frame)
                if decided is not False:
                    self._block(node.body, frame)
                if decided is not True:
                    self._block(node.orelse, frame)
            case ast.For(target=target) | ast.AsyncFor(target=target):
                self._assign(target, self._elements(self._eval(node.iter, frame)), frame)
                self._block([*node.body, *node.orelse], frame)
            case ast.Assign(targets=targets):
                for target in targets:
                    self._bind(target, node.value, frame)
            case ast.AnnAssign(value=value) if value is not None:
                self._bind(node.target, value, frame)
            case ast.AugAssign():
                values = self._eval(ast.BinOp(node.target, node.op, node.value), frame)
                self._assign(node.target, values, frame)
            case ast.Return(value=value):
                if value is not None:
                    frame.returned |= self._eval(value, frame)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self._block(node.body, frame)
            case _:
                for child in ast.iter_child_nodes(node):
                    self._any(child, frame)

    def _any(self, node: ast.AST, frame: _Frame) -> None:
        """A part of a statement that has no rule of its own."""
        match node:
            case ast.stmt():
                self._statement(node, frame)
            case ast.expr():
                self._eval(node, frame)
            case ast.withitem(context_expr=context, optional_vars=target):
                values = self._eval(context, frame)
                if target is not None:
                    self._assign(target, values, frame)
            case ast.ExceptHandler(body=body) | ast.match_case(body=body):
                self._block(body, frame)

    def _bind(self, target: ast.expr, value: ast.expr, frame: _Frame) -> None:
        """An assignment, element by element where both sides are written so."""
        match target, value:
            case (ast.Tuple(elts=left), ast.Tuple(elts=right)) if len(left) == len(right):
                for one, other in zip(left, right, strict=True):
                    self._bind(one, other, frame)
            case _:
                self._assign(target, self._eval(value, frame), frame)

    def _assign(self, target: ast.expr, values: Values, frame: _Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = frame.names.get(name, _NONE) | values
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._assign(part, values, frame)
            case ast.Starred(value=inner):
                self._assign(inner, values, frame)
            case ast.Attribute(value=inner, attr=attr):
                for value in self._eval(inner, frame):
                    if value.kind == "module" and is_linear(locate(self.module, value.path)):
                        self._reads(value.path, f"sets its {attr}", frame.function)
            case ast.Subscript(value=inner):
                self._eval(inner, frame)
                if isinstance(inner, ast.Name):  # a list or a dict that is filled
                    kept = {value for value in values if value.kind != "parameter"}
                    frame.names[inner.id] = frame.names.get(inner.id, _NONE) | kept

    # -- expressions

    def _eval(self, node: ast.expr, frame: _Frame) -> Values:
        """What an expression may stand for; what it does on the way is noted."""
        match node:
            case ast.Name(id=name):
                return frame.names.get(name, _NONE)
            case ast.Attribute(value=ast.Attribute(attr="weight") as inner, attr=attr) if attr in _SHOWN:
                self._eval(inner.value, frame)  # what a quantised layer's weight tells as the float one does
                return _NONE
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
                return _mixed(zip(sides, (left, right), strict=True))
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()]):
                if isinstance(left, ast.Attribute):
                    self._eval(left.value, frame)
                return _NONE
            case ast.Compare(left=left, comparators=others):
                for part in (left, *others):
                    self._eval(part, frame)
                return _NONE
            case ast.IfExp(test=test, body=body, orelse=other):
                self._eval(test, frame)
                decided = self._decided(test, frame)
                parts = [part for part, dead in ((body, False), (other, True)) if decided is not dead]
                return _NONE.union(*(self._eval(part, frame) for part in parts))
            case ast.NamedExpr(target=target, value=value):
                values = self._eval(value, frame)
                self._assign(target, values, frame)
                return values
            case ast.ListComp(generators=generators) | ast.SetComp(generators=generators):
                return self._comprehension(generators, [node.elt], frame)
            case ast.GeneratorExp(generators=generators):
                return self._comprehension(generators, [node.elt], frame)
            case ast.DictComp(generators=generators):
                return self._comprehension(generators, [node.key, node.value], frame)
            case ast.Lambda(body=body):
                return self._eval(body, frame)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return _mixed([(self._eval(part, frame), part) for part in parts])
            case _:
                parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                return _NONE.union(*(self._eval(part, frame) for part in parts))

    def _comprehension(self, generators: list[ast.comprehension], parts: list[ast.expr], frame: _Frame) -> Values:
        for each in generators:
            self._assign(each.target, self._elements(self._eval(each.iter, frame)), frame)
            for test in each.ifs:
                self._eval(test, frame)
        return _NONE.union(*(self._eval(part, frame) for part in parts))

    def _attribute(self, node: ast.Attribute, frame: _Frame) -> Values:
        found: set[Value] = set()
        for value in self._eval(node.value, frame):
            match value.kind:
                case "module":
                    found |= self._member(value.path, node.attr, frame)
                case "parameter" | "output" if node.attr not in _SHOWN:  # not a shape or a dtype
                    found.add(value)
        return frozenset(found)

    def _member(self, path: Path, attr: str, frame: _Frame) -> set[Value]:
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
            return {Value("parameter", here)}
        if isinstance(inside, list | tuple | set | dict):
            return {Value("module", p) for p in self._held(inside, module, path)}
        if attr in ("parameters", "named_parameters"):
            self._asks_for_parameters(module, path, frame)
        found = sources.method(module, attr)
        if found is not None and found[2]:
            return set(self._run(found[0], found[1], [frozenset({Value("module", path)})], {}))
        return {Value("method", path, attr)}

    def _asks_for_parameters(self, module: nn.Module, path: Path, frame: _Frame) -> None:
        """Of a module with linear layers only: one of them must keep parameters."""
        owners = [(name, m) for name, m in module.named_modules() if any(p is not None for p in m._parameters.values())]
        if owners and all(is_linear(owner) for _, owner in owners):
            layer = (*path, *owners[0][0].split("."))
            self.asked[layer] = f"{frame.function.__qualname__} takes a parameter of it"

    def _held(self, inside: Any, module: nn.Module, path: Path) -> Iterator[Path]:
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
            found |= {Value("module", (*value.path, key)) for key in keys}
        return frozenset(found)

    def _call(self, node: ast.Call, frame: _Frame) -> Values:
        func = node.func
        name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
        if isinstance(func, ast.Name) and node.args:
            match name, node.args:
                case "hasattr" | "isinstance", [ast.Attribute(value=inner), *_]:
                    self._eval(inner, frame)
                    return _NONE
                case "getattr", [inner, ast.Constant(value=str(attr)), *_]:
                    return self._eval(ast.Attribute(inner, attr, ast.Load()), frame)
        args = [self._eval(arg, frame) for arg in node.args]
        kwargs = {keyword.arg or "": self._eval(keyword.value, frame) for keyword in node.keywords}
        given = _NONE.union(*args, *kwargs.values())
        match func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                return self._super(name, args, kwargs, frame)
            case ast.Attribute(value=ast.Name(id=filled)) if name in ("append", "extend", "add", "insert"):
                frame.names[filled] = frame.names.get(filled, _NONE) | given
        callees = self._eval(func, frame)
        if name in CHOOSING:
            for value in callees | given:
                if value.kind == "output" and len(value.path) <= _NEAR:
                    self.found.chosen_by.setdefault(value.path, f"{name} in {frame.function.__qualname__}")
        if name in PRODUCTS:
            return self._product(callees | given)
        found: set[Value] = set()
        for value in callees:
            match value.kind:
                case "module":
                    found |= self._called(value.path, args, kwargs, given)
                case "method":
                    found |= self._method(value, args, kwargs, given)
                case _:
                    found |= {value, *(v for v in given if v.kind == "output")}
        if not callees:
            target = sources.resolve(frame.function, func)
            function = None if isinstance(target, type) else sources.function_of(target)
            if function is None or function.__module__.partition(".")[0] == "torch":
                return _mixed([*zip(args, node.args, strict=True), *((v, None) for v in kwargs.values() if v)])
            if given:
                found |= {v for v in self._run(function, None, args, kwargs) if v.kind != "module"}
        return frozenset(found)

    def _super(self, name: str, args: list[Values], kwargs: Mapping[str, Values], frame: _Frame) -> Values:
        for value in self._self(frame):
            module = locate(self.module, value.path)
            found = None if frame.owner is None else sources.method(module, name, after=frame.owner)
            if found is not None:
                return self._run(found[0], found[1], [frozenset({value}), *args], kwargs)
        return _NONE

    def _self(self, frame: _Frame) -> Values:
        return frame.names.get(next(iter(frame.names), ""), _NONE)

    def _method(self, value: Value, args: list[Values], kwargs: Mapping[str, Values], given: Values) -> set[Value]:
        """A method of a module is called."""
        itself = Value("module", value.path)
        if value.name in _DESCENDING:
            return {itself}
        module = locate(self.module, value.path)
        if is_linear(module):
            return {Value("output", value.path)} if value.name in ("forward", "__call__") else {itself}
        found = sources.method(module, value.name)
        if found is None:  # nn.Module's own, which may be the module again
            return {v for v in given if v.kind == "output"}
        bound = [] if isinstance(vars(found[1]).get(value.name), staticmethod) else [frozenset({itself})]
        return {v for v in self._run(found[0], found[1], [*bound, *args], kwargs) if v.kind != "module"}

    def _called(self, path: Path, args: list[Values], kwargs: Mapping[str, Values], given: Values) -> set[Value]:
        """A module is called."""
        module = locate(self.module, path)
        if is_linear(module):
            return {Value("output", path)}
        if any(value.kind in ("module", "parameter") for value in given):
            found = sources.method(module, "forward")
            if found is not None:
                self._run(found[0], found[1], [frozenset({Value("module", path)}), *args], kwargs)
        made = {Value("output", (*path, *inner)) for inner in self.inside(module).returned}
        return made or {value for value in given if value.kind == "output"}

    def _product(self, values: Values) -> Values:
        self.found.multiplied |= {value.path for value in values if value.kind == "parameter"}
        return frozenset(value for value in values if value.kind == "output")

    def _reads(self, path: Path, what: str, function: types.FunctionType) -> None:
        self.found.read.setdefault(path, f"{function.__qualname__} {what}")

    # -- branches

    def _decided(self, test: ast.expr, frame: _Frame) -> bool | None:
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

    def _constant(self, node: ast.expr, frame: _Frame) -> tuple[Any] | None:
        if isinstance(node, ast.Constant):
            return (node.value,)
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        values = frame.names.get(node.id, _NONE) if isinstance(node, ast.Name) else _NONE
        if not names or names[-1] == "training" or len(values) != 1:
            return None
        (value,) = values
        path = (*value.path, *names)
        found = locate(self.module, path)
        if value.kind != "module" or not isinstance(found, bool | int | float | str):
            return None
        self.found.consulted[path] = found
        return (found,)


def _mixed(parts: Iterable[tuple[Values, ast.expr | None]]) -> Values:
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


@functools.cache
def _known_of_layers() -> frozenset[str]:
    """The attributes of a linear layer that a quantised one has too, with the same meaning."""
    layer = QuantLinear(8, 8, Scheme.of("w8a8"), bias=torch.float32, device="meta")
    return frozenset(dir(layer)) - {"parameters", "named_parameters", "get_parameter", "_parameters", "state_dict"}

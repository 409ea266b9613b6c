"""One class's code, read: its statements and calls, and what is done in them with what is below the module.

Each function is read anew for what it is given (`w8a8.model.following` says what expressions stand for).  Where a
function's source is not there, the names in its compiled code are taken for the worst that they could mean.
"""

import ast
import types
from collections.abc import Callable, Iterable, Mapping, Set

from torch import nn

from w8a8.layers.linear import is_linear
from w8a8.model import sources
from w8a8.model.following import (
    NOTHING,
    Following,
    Frame,
    Path,
    Uses,
    Value,
    Values,
    locate,
    may_be_replaced,
    mixed,
)

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


class Reading(Following):
    """Of one module's code.

    Args:
        inside: What is known of a module that lies below it.
        making: Names of methods that make modules.
    """

    def __init__(self, module: nn.Module, inside: Callable[[nn.Module], Uses], making: Set[str]) -> None:
        super().__init__(module)
        self.inside, self.making = inside, making
        self._stack: list[Frame] = []
        self._done: dict[tuple[object, ...], Values] = {}

    def read(self) -> Uses:
        """What the code does."""
        for name in sources.entries(self.module, self.making):
            found = sources.method(self.module, name)
            if found is None:
                continue
            self.in_forward = name in ("forward", "__call__")
            returned = self._run(found[0], found[1], [frozenset({Value("module", ())})], {})
            if name == "forward":
                self.found.returned |= {v.path for v in returned if v.kind == "output"}
        kept, self.found, self.in_forward = self.found, Uses(), False
        # of what makes a module only what it asks for counts: it runs again when one is loaded
        for name in sorted(self.making - sources.MAKING):
            found = sources.method(self.module, name)
            if found is not None and not found[2] and found[1].__module__ != sources.GENERAL:
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
            return self._done.get(key, NOTHING)
        self._done[key] = NOTHING
        code = sources.tree(function)
        if code is None:
            self._compiled(function, args)
            return NOTHING
        parameters = [*code.args.posonlyargs, *code.args.args]
        names = {p.arg: v for p, v in zip(parameters, args, strict=False)}
        names |= {name: value for name, value in kwargs.items() if name}
        if code.args.vararg is not None:
            names[code.args.vararg.arg] = frozenset().union(*args[len(parameters) :])
        frame = Frame(function, owner, names)
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
                if may_be_replaced(module) and named.issuperset(name.split(".")[:1]):
                    self._reads(
                        (*value.path, *name.split(".")), "may read its weight (no source to look into)", function
                    )

    # -- statements

    def _block(self, body: Iterable[ast.stmt], frame: Frame) -> None:
        for statement in body:
            self._statement(statement, frame)

    def _statement(self, node: ast.stmt, frame: Frame) -> None:
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

    def _any(self, node: ast.AST, frame: Frame) -> None:
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

    def _bind(self, target: ast.expr, value: ast.expr, frame: Frame) -> None:
        """An assignment, element by element where both sides are written so."""
        match target, value:
            case (ast.Tuple(elts=left), ast.Tuple(elts=right)) if len(left) == len(right):
                for one, other in zip(left, right, strict=True):
                    self._bind(one, other, frame)
            case _:
                self._assign(target, self._eval(value, frame), frame)

    # -- calls

    def _call(self, node: ast.Call, frame: Frame) -> Values:
        func = node.func
        name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
        if isinstance(func, ast.Name) and node.args:
            match name, node.args:
                case "hasattr" | "isinstance", [ast.Attribute(value=inner), *_]:
                    self._eval(inner, frame)
                    return NOTHING
                case "getattr", [inner, ast.Constant(value=str(attr)), *_]:
                    return self._eval(ast.Attribute(inner, attr, ast.Load()), frame)
        match func, node.args:
            case ast.Attribute(value=inner, attr="get_parameter"), [ast.Constant(value=str(dotted))]:
                return self._parameter(self._eval(inner, frame), dotted, frame)
        args = [self._eval(arg, frame) for arg in node.args]
        kwargs = {keyword.arg or "": self._eval(keyword.value, frame) for keyword in node.keywords}
        given = NOTHING.union(*args, *kwargs.values())
        match func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                return self._super(name, args, kwargs, frame)
            case ast.Attribute(value=ast.Name(id=filled)) if name in ("append", "extend", "add", "insert"):
                frame.names[filled] = frame.names.get(filled, NOTHING) | given
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
                return mixed([*zip(args, node.args, strict=True), *((v, None) for v in kwargs.values() if v)])
            if given:
                found |= {v for v in self._run(function, None, args, kwargs) if v.kind != "module"}
        return frozenset(found)

    def _parameter(self, owners: Values, dotted: str, frame: Frame) -> Values:
        """One tensor is taken by its name."""
        paths = {(*value.path, *dotted.split(".")) for value in owners if value.kind in ("module", "method")}
        for path in paths:
            if may_be_replaced(locate(self.module, path[:-1])):
                self._reads(path[:-1], f"reads its {path[-1]}", frame.function)
        return frozenset(Value("parameter", path) for path in paths)

    def _super(self, name: str, args: list[Values], kwargs: Mapping[str, Values], frame: Frame) -> Values:
        for value in frame.names.get(next(iter(frame.names), ""), NOTHING):
            module = locate(self.module, value.path)
            found = None if frame.owner is None else sources.method(module, name, after=frame.owner)
            if found is not None and (found[1].__module__ != sources.GENERAL or name not in self.making):
                return self._run(found[0], found[1], [frozenset({value}), *args], kwargs)
        return NOTHING

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
        # a table's own forward reads its weight, and is looked at where that matters (`obstacles`)
        if not isinstance(module, nn.Embedding) and any(value.kind in ("module", "parameter") for value in given):
            found = sources.method(module, "forward")
            if found is not None:
                self._run(found[0], found[1], [frozenset({Value("module", path)}), *args], kwargs)
        made = {Value("output", (*path, *inner)) for inner in self.inside(module).returned}
        return made or {value for value in given if value.kind == "output"}

"""Where the code of a module is: its functions, what they close over, and their syntax trees.  Nothing is run."""

import ast
import builtins
import functools
import inspect
import linecache
import types
from collections.abc import Iterator, Set

from torch import nn

Code = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

MAKING = frozenset(
    {
        *("__init__", "_init_weights", "init_weights", "_reset_parameters", "reset_parameters", "_apply"),
        *("__setstate__", "_load_from_state_dict", "_save_to_state_dict", "__repr__", "extra_repr"),
    }
)
"""Methods that make, fill, move or show a module: torch's names, and transformers', for what is not computing."""

GENERAL = "transformers.modeling_utils"
"""What all of transformers' models have, which goes by no name of a layer, and is made for quantised ones too."""


def function_of(found: object) -> types.FunctionType | None:
    """The Python function in a method, a property, a partial or a wrapper that says what it wraps; else None."""
    for _ in range(8):
        match found:
            case staticmethod() | classmethod() | types.MethodType():
                found = found.__func__
            case property():
                found = found.fget
            case functools.cached_property() | functools.partial() | functools.partialmethod():
                found = found.func
            case types.FunctionType():
                inner = inspect.unwrap(found)
                return inner if isinstance(inner, types.FunctionType) else found
            case _:
                return None
    return None


def method(module: nn.Module, name: str, after: type | None = None) -> tuple[types.FunctionType, type, bool] | None:
    """A function that a module's class has under a name, or that was set on the module itself.

    Args:
        after: Look behind this class in the order of resolution, as `super()` does.

    Returns:
        The function, the class that has it, and whether it is a property; None where it has none but `nn.Module`'s own.
    """
    kinds = type(module).__mro__
    if after is None and name in module.__dict__:
        own = function_of(module.__dict__[name])
        return None if own is None else (own, type(module), False)
    for kind in kinds[kinds.index(after) + 1 :] if after in kinds else kinds:
        if name in vars(kind):
            if kind is nn.Module or kind is object:
                return None  # behind them are transformers' mixins, which have `dtype` and `device`
            found = vars(kind)[name]
            function = function_of(found)
            shown = isinstance(found, property | functools.cached_property)
            return None if function is None else (function, kind, shown)
    return None


def entries(module: nn.Module, made: Set[str]) -> list[str]:
    """The methods by which a module is used: its forward, and what its class offers that is not `made` to make it."""
    offered = {
        name
        for kind in type(module).__mro__
        if issubclass(kind, nn.Module) and kind is not nn.Module and kind.__module__ != GENERAL
        for name, found in vars(kind).items()
        if not name.startswith("_") and isinstance(found, types.FunctionType)
    }
    return ["forward", "__call__", *sorted(offered - made - {"forward"})]


def called(code: ast.AST) -> Iterator[str]:
    """The names of everything that a piece of code calls."""
    for node in ast.walk(code):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node.func.id


def tree(function: types.FunctionType) -> Code | None:
    """The syntax of a function; None where its source is not there."""
    code = function.__code__
    return _functions(code.co_filename).get(code.co_firstlineno)


@functools.lru_cache(maxsize=512)
def _functions(file: str) -> dict[int, Code]:
    """The functions of a file by their first line, that of their first decorator."""
    lines = linecache.getlines(file)
    try:
        parsed = ast.parse("".join(lines))
    except (SyntaxError, ValueError):  # not Python, or not text
        return {}
    found: dict[int, Code] = {}
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[min([node.lineno, *(each.lineno for each in node.decorator_list)])] = node
        elif isinstance(node, ast.Lambda):
            found.setdefault(node.lineno, node)
    return found


def names(code: types.CodeType) -> set[str]:
    """Every attribute and global that compiled code names, with the functions inside of it."""
    inner = (names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def closed_over(function: types.FunctionType) -> dict[str, object]:
    """What a function has from the functions around it, by name; without what is not bound yet."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _is_bound(cell)}


def _is_bound(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def resolve(function: types.FunctionType, node: ast.expr) -> object:
    """What a name, or attributes of one, stand for outside of the function: a module, a class, a function; or None."""
    match node:
        case ast.Name(id=name):
            inner = closed_over(function)
            if name in inner:
                return inner[name]
            return function.__globals__.get(name, getattr(builtins, name, None))
        case ast.Attribute(value=inner, attr=name):
            outer = resolve(function, inner)
            return getattr(outer, name, None) if isinstance(outer, types.ModuleType | type) else None
    return None

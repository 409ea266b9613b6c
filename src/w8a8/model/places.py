"""Where a model holds its modules: as children, and in lists, dictionaries and attributes of its own beside them.

A parent may keep a layer twice, once as a child and once in a plain list that its forward goes through.  A swap that
changes the children only would leave the float layer in use.  So whatever a module keeps is looked through, to any
depth: containers, methods bound to a layer, partial applications, what functions close over.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from w8a8.model import sources

_DEPTH = 5
_HOLDS_NOTHING = (Tensor, type, types.ModuleType, str, bytes, int, float, types.NoneType)
_OWN = frozenset(nn.Module().__dict__)
"""What each module has: its parameters, its children, its hooks."""


class Place(NamedTuple):
    """Where a module is held.

    container, key: `container[key]` is the module, and may be another; None where nothing can be put there.
    module: The module.
    name: Of the place, "layer.heads[2]".
    """

    container: Any
    key: Any
    module: nn.Module
    name: str


def places(model: nn.Module) -> Iterator[Place]:
    """Every place below a module in which a module is held."""
    seen: set[int] = set()  # of what is looked through, each once
    for name, module in model.named_modules():
        yield from _of_module(module, name, seen)


def _of_module(module: nn.Module, name: str, seen: set[int]) -> Iterator[Place]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for key, child in module._modules.items():
        if child is not None:
            yield Place(module._modules, key, child, f"{name}.{key}".strip("."))
    for key, value in module.__dict__.items():
        if key not in _OWN:
            yield from _inside(value, module.__dict__, key, f"{name}.{key}".strip("."), seen, _DEPTH)


def _inside(value: object, container: Any, key: Any, name: str, seen: set[int], depth: int) -> Iterator[Place]:
    """The places in what is held at `container[key]`."""
    if isinstance(value, nn.Module):
        yield Place(container, key, value, name)
        yield from _of_module(value, name, seen)  # it may be no child of anything
        return
    if depth == 0 or isinstance(value, _HOLDS_NOTHING):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for inner, where, at, label in _parts(value):
        yield from _inside(inner, where, at, f"{name}{label}", seen, depth - 1)


def _parts(value: object) -> Iterator[tuple[object, Any, Any, str]]:
    """What something holds: each part, the container and the key where another can be put in its place, a label."""
    match value:
        case dict():
            yield from ((inner, value, key, f"[{key!r}]") for key, inner in value.items())
        case list():
            yield from ((inner, value, at, f"[{at}]") for at, inner in enumerate(value))
        case tuple() | set() | frozenset():
            yield from ((inner, None, None, f" (a {type(value).__name__})") for inner in value)
        case types.MethodType():
            yield value.__self__, None, None, " (a bound method)"
        case functools.partial():
            yield from ((inner, None, None, " (a partial)") for inner in (value.func, *value.args))
            yield from ((inner, None, None, " (a partial)") for inner in value.keywords.values())
        case types.FunctionType():
            yield from ((inner, None, None, " (a closure)") for inner in sources.closed_over(value).values())
        case _ if isinstance(getattr(value, "__dict__", None), dict):
            yield from ((inner, value.__dict__, key, f".{key}") for key, inner in value.__dict__.items())

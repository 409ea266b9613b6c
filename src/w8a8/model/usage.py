"""What a model's own code does with its linear layers and tables, beside calling them: read in the source, never run.

A layer may be replaced where its parents only call it.  Some do more: they multiply by `self.proj.weight` themselves,
hand it to a fused function, or choose among experts by what the layer returns.  None of this shows in the tree of
modules, and a forward to watch is not always there: a model on the meta device has none, and one forward takes one
path.  So the code of each module's class is read (`w8a8.model.reading`), once for modules of one class with children
of the same classes and names, and `look` puts names to what was found.

What is missed is not silent: the weight of a quantised layer is no tensor (`w8a8.layers.weight`), so whatever takes
it for one stops with an error.  Not taken: hooks that watch parameters in a forward, which see the path that was gone
only, and need values.
"""

from collections.abc import ValuesView
from dataclasses import dataclass

from torch import nn

from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import is_linear
from w8a8.model import sources
from w8a8.model.following import Uses, locate
from w8a8.model.reading import Reading


@dataclass(frozen=True)
class Usage:
    """What a model's code does with its linear layers and matrices, by the names of the modules.

    read: Of which layers and tables more is read than a quantised one has, and where.
    choosing: From the output of which layers a choice is made, by what, and where.
    multiplied: The matrices that a module of no known kind multiplies by, by their names.
    """

    read: dict[str, str]
    choosing: dict[str, str]
    multiplied: dict[str, frozenset[str]]


def look(model: nn.Module) -> Usage:
    """Read the code of all modules of a model."""
    reader = _Reader(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = Usage({}, {}, {})
    for module in model.modules():
        if is_linear(module) or isinstance(module, QuantLayer):
            continue
        uses = reader.uses(module)
        for paths, told in ((uses.read, found.read), (uses.chosen_by, found.choosing)):
            for path, what in paths.items():
                layer = names.get(id(locate(module, path)))
                if layer is not None:
                    told.setdefault(layer, what)
        for path in uses.multiplied:
            parameter, owner = locate(module, path), names.get(id(locate(module, path[:-1])))
            if isinstance(parameter, nn.Parameter) and parameter.ndim > 1 and owner is not None:
                found.multiplied[owner] = found.multiplied.get(owner, frozenset()) | {path[-1]}
    return found


_NUMBERS: dict[tuple[object, ...], int] = {}
_KNOWN: dict[tuple[int, frozenset[str]], list[Uses]] = {}
"""What was read in this process: a model is looked at several times, and reading takes longer than all else of that."""


class _Reader:
    """Reads the code of a model's modules, each kind once in a process."""

    def __init__(self, model: nn.Module) -> None:
        self._signatures: dict[int, int] = {}
        self._own: dict[tuple[object, ...], int] = {}  # of modules that are not kept
        self._own_known: dict[tuple[int, frozenset[str]], list[Uses]] = {}
        self._reading: set[int] = set()
        making = set(sources.MAKING)
        for kind in {kind for module in model.modules() for kind in type(module).__mro__ if kind is not nn.Module}:
            for name in sources.MAKING & vars(kind).keys():
                function = sources.function_of(vars(kind)[name])
                code = None if function is None else sources.tree(function)
                making.update(() if code is None else sources.called(code))
        self.making = frozenset(making)

    def uses(self, module: nn.Module) -> Uses:
        """What the code of a module's class does with what is below the module."""
        key = self._signature(module)
        store = _KNOWN if key > 0 else self._own_known
        for known in store.get((key, self.making), ()):
            if all(locate(module, path) == value for path, value in known.consulted.items()):
                return known
        if key in self._reading:  # it lies below itself
            return Uses()
        self._reading.add(key)
        found = Reading(module, self.uses, self.making).read()
        self._reading.discard(key)
        store.setdefault((key, self.making), []).append(found)
        return found

    def _signature(self, module: nn.Module) -> int:
        """The same number for modules whose code, children and parameters are of the same kind and name.

        It is negative, and good for one model, where a forward was set on the module itself, or it holds modules that
        are not its children, or one below it does.
        """
        if id(module) not in self._signatures:
            self._signatures[id(module)] = 0  # a cycle
            forward = module.__dict__.get("forward")
            inside = tuple((name, self._signature(m)) for name, m in module._modules.items() if m is not None)
            parameters = tuple(name for name, p in module._parameters.items() if p is not None)
            kind = type(module)
            held = id(module) if _holds_modules(module) else 0
            own = (kind, kind.forward, forward, held, parameters, inside)
            if forward is None and not held and all(number > 0 for _, number in inside):
                number = _NUMBERS.setdefault(own, len(_NUMBERS) + 1)
            else:
                number = self._own.setdefault(own, -1 - len(self._own))
            self._signatures[id(module)] = number
        return self._signatures[id(module)]


def _holds_modules(module: nn.Module) -> bool:
    """Whether an attribute is a module, or a container with one, that is not among the children."""
    for value in module.__dict__.values():
        held = value.values() if isinstance(value, dict) and value is not module._modules else value
        several = isinstance(held, list | tuple | set | ValuesView)
        if isinstance(held, nn.Module) or (several and any(isinstance(each, nn.Module) for each in held)):
            return True
    return False

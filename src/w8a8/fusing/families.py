"""Blocks that are alike share the graphs that are made of one of them.

Alike are blocks of one class whose modules, layers, parameters and attributes are.  A plain value that differs, the
number of a block for one, is exchanged for `Unread` in the copy of its modules that the graph is made of, which can be
used for nothing: a graph that is made all the same does not depend on it.
"""

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor, nn

from w8a8.errors import ModelError
from w8a8.fusing.capture import Captured, capture
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import Mode, QuantLinear

_PLAIN = (int, float, bool, str, tuple, type(None))
_OWN = frozenset(vars(nn.Module()))  # what every module has


class Unread:
    """Stands for a value that differs between blocks, and must not matter."""

    def _used(self, *_: object, **__: object) -> NoReturn:
        raise ModelError("its code reads a value that other blocks of its kind have otherwise")

    __eq__ = __ne__ = _used
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _used
    __call__ = __getitem__ = __getattr__ = __iter__ = __len__ = __contains__ = _used
    __hash__ = _used


class Family:
    """Blocks that are alike, and their graphs.

    Args:
        differing: Path and name of the attributes in which they differ.
    """

    def __init__(self, differing: tuple[tuple[str, str], ...] = ()) -> None:
        self.differing = differing
        self.graphs: dict[tuple[object, ...], list[Captured]] = {}

    def capture(self, block: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Captured:
        """The graph of a call of one of them.

        Raises:
            ModelError: it cannot be one.
        """
        twin = _twin(block, {})
        for path, name in self.differing:
            vars(twin.get_submodule(path))[name] = Unread()
        return capture(twin, args, kwargs)


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """The same tensors and layers in modules of their own: another thread may be calling those of the model."""
    if isinstance(module, QuantLayer):
        return module
    if id(module) not in known:
        twin = known[id(module)] = type(module).__new__(type(module))
        # without the fused forward of a block in it: what it computes is looked at, not how
        twin.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"}
        children = module._modules.items()
        twin._modules = {name: None if each is None else _twin(each, known) for name, each in children}
    return known[id(module)]


def families(blocks: list[nn.Module]) -> list[tuple[nn.Module, Family]]:
    """Each block with those that it shares graphs with."""
    alike: dict[tuple[object, ...], list[nn.Module]] = {}
    for block in blocks:
        alike.setdefault(_shape_of(block), []).append(block)
    found = []
    for group in alike.values():
        differing = _differing(group)
        shared = None if differing is None else Family(differing)
        found += [(block, shared or Family()) for block in group]
    return found


def _shape_of(block: nn.Module) -> tuple[object, ...]:
    return tuple(
        (
            path,
            type(module),
            _tensors(module._parameters) + _tensors(module._buffers),
            _call_of(module) if isinstance(module, QuantLinear) else None,
        )
        for path, module in block.named_modules()
    )


def _call_of(layer: QuantLinear) -> tuple[object, ...]:
    """How a layer is run: one that holds integers for memory alone, or simulates them, has no call of a kernel."""
    return layer.mode, layer.scheme, layer._call if layer.mode is Mode.INTEGER else None


def _tensors(held: Mapping[str, Tensor | None]) -> tuple[object, ...]:
    return tuple((name, None if t is None else (t.dtype, tuple(t.shape))) for name, t in held.items())


def _differing(group: list[nn.Module]) -> tuple[tuple[str, str], ...] | None:
    """In which attributes blocks differ, path and name; None where one of them is no plain value."""
    found = []
    for path, module in group[0].named_modules():
        if isinstance(module, QuantLayer):
            continue
        others = [block.get_submodule(path) for block in group[1:]]
        for name, value in vars(module).items():
            if name in _OWN or (not path and name == "forward"):
                continue
            if any(name not in vars(other) for other in others):
                return None
            theirs = [vars(other)[name] for other in others]
            if all(each is value for each in theirs):
                continue
            if not all(type(each) is type(value) and isinstance(each, _PLAIN) for each in theirs):
                return None
            if any(each != value for each in theirs):
                found.append((path, name))
    return tuple(found)

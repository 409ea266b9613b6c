"""A block whose forward is a fused graph, as long as nothing about the block or the call asks for anything else.

A graph is made at the first call of each kind, from what the block then computes.  At every call it is looked whether
the block is as it was: no child was exchanged, none has hooks or another forward, none is in training; whether the
dispatcher of PyTorch has something to do; and whether the tensors are such as the graph is for.  If not, the block's
own forward runs.  Plain attributes that its code reads, an epsilon or a flag, are part of the graph: who changes one
calls `w8a8.optimize` again.
"""

import threading
import types
from collections.abc import Callable, Collection, Mapping, Sized
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from w8a8.errors import ModelError
from w8a8.fusing.capture import Captured, fits, made_whole
from w8a8.fusing.families import Family
from w8a8.fusing.matching import fuse
from w8a8.fusing.steps import Run, Told
from w8a8.kernels.fused import dispatcher_is_needed

_KINDS = 4  # graphs for calls that differ in nothing but sizes: one row or many, one token or many
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)

Key: TypeAlias = tuple[object, ...]
Shaped: TypeAlias = Callable[[list[Tensor | None]], object]

_TRACING = threading.Lock()
"""What PyTorch traces with is the process's: one thread makes a graph, and calls in others run as they are meanwhile.

Nobody waits for it, so that a child of a fork, in which the thread that holds it does not exist, goes on too.
"""


class Fused:
    """Takes the place of a block's `forward`.

    Args:
        block: Keeps its code, its layers and its state dict.
        family: Whom it shares graphs with.
        whole: Whether it is a model or a part of one with all of the blocks in it, which have a forward of this kind
            too: what is called inside of a call that is a graph does not exist.
        outermost: Whether nothing of the model lies around it.  Only there does the graph show all that is read of the
            rows of padding: what is around a part may read them.
    """

    def __init__(
        self, block: nn.Module, family: Family | None = None, *, whole: bool = False, outermost: bool = False
    ) -> None:
        self.block, self.whole, self.outermost = block, whole, outermost
        self.family = family or Family()
        self._renewed = 0
        self.told: list[Told] = []
        self.refused: list[str] = []
        self._graphs: dict[Key, list[tuple[Captured, Run, Shaped]]] = {}
        self._tried: dict[Key, int] = {}
        # at the first call: a copy is not whole before
        self._inner: list[tuple[Mapping[str, object], Sized, Sized]] | None = None

    @property
    def __code__(self) -> types.CodeType:  # torch.export reads the names of arguments there
        code: types.CodeType = type(self.block).forward.__code__
        return code

    def __getstate__(self) -> dict[str, object]:  # a copy, or what a pickle makes, finds its graphs anew
        return {"block": self.block, "whole": self.whole, "outermost": self.outermost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("block"), **state)  # type: ignore[misc]

    def _watch(self) -> None:
        inner = [module for module in self.block.modules() if module is not self.block]
        self._children = [
            (module._modules, tuple(module._modules.values())) for module in self.block.modules() if module._modules
        ]
        configs = {id(now): now for module in self.block.modules() if (now := vars(module).get("config")) is not None}
        self._configs = [(vars(now), dict(vars(now))) for now in configs.values() if hasattr(now, "__dict__")]
        # last: it tells other threads that all of it is there
        self._inner = [(vars(module), module._forward_hooks, module._forward_pre_hooks) for module in inner]

    def _changed(self) -> str | None:
        """What keeps the graphs from standing for the block now."""
        if self._inner is None:
            self._watch()
        assert self._inner is not None, "it was made just now"
        if torch_module._has_any_global_hook():
            return "every module has hooks"
        for held, hooks, pre_hooks in self._inner:
            if hooks or pre_hooks:
                return "a module in it has hooks"
            if held["training"]:
                return "a module in it is in training"
            if "forward" in held and type(held["forward"]) is not Fused:
                return "a module in it has a forward of its own"
        if any(tuple(now.values()) != before for now, before in self._children):
            return "a module in it was exchanged"
        if any(now != before for now, before in self._configs):
            if self._renewed >= _KINDS:
                return "its config is changed again and again"
            self._renew()
        return "it is in training" if self.block.training else None

    def _renew(self) -> None:
        """Forget the graphs, which are of another config: saving writes into it too."""
        self._renewed += 1
        self.family = Family(self.family.differing)
        self.told, self._graphs, self._tried = [], {}, {}
        self._watch()

    def __call__(self, *args: object, **kwargs: object) -> object:
        found = self._graph(args, kwargs)
        if found is None:
            return type(self.block).forward(self.block, *args, **kwargs)
        run, shaped, tensors = found
        return shaped(run(*tensors))

    def _graph(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Run, Shaped, list[Tensor]] | None:
        if dispatcher_is_needed():
            return None
        tensors: list[Tensor] = []
        key: list[object] = []
        if not _flatten(args, tensors, key) or not _flatten(kwargs, tensors, key):
            self._refuse("an argument is neither a tensor nor a plain value")
            return None
        changed = self._changed()
        if changed is not None:
            self._refuse(changed)
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.block.parameters())):
            return None
        kind = tuple(key)
        for captured, run, shaped in self._graphs.get(kind, ()):
            if fits(captured.arguments, captured.bounds, tensors):
                return run, shaped, made_whole(captured.arguments, tensors)
        if not _TRACING.acquire(blocking=False):
            return None
        try:
            return self._made(kind, args, kwargs, tensors)
        finally:
            _TRACING.release()

    def _made(
        self, kind: Key, args: tuple[object, ...], kwargs: dict[str, object], tensors: list[Tensor]
    ) -> tuple[Run, Shaped, list[Tensor]] | None:
        """The function of a graph for this call, kept; a family's graphs are one thread's at a time, too."""
        captured = self._captured(kind, args, kwargs, tensors)
        if captured is None:
            return None
        run, told = fuse(self.block, captured, padding_is_read=not self.outermost)
        self.told.append(told)
        shaped = _shape_of(captured.outputs)
        self._graphs.setdefault(kind, []).append((captured, run, shaped))
        return run, shaped, made_whole(captured.arguments, tensors)

    def _captured(
        self, kind: Key, args: tuple[object, ...], kwargs: dict[str, object], tensors: list[Tensor]
    ) -> Captured | None:
        """A graph for this call: one of the family's, or a new one."""
        known = self.family.graphs.setdefault(kind, [])
        for captured in known:
            if fits(captured.arguments, captured.bounds, tensors):
                return captured
        if self._tried.get(kind, 0) >= _KINDS:
            return None
        self._tried[kind] = self._tried.get(kind, 0) + 1
        try:
            captured = self.family.capture(self.block, args, kwargs)
        except ModelError as error:
            if self.family.differing:  # it may be that which differs
                self.family = Family()
                return self._captured(kind, args, kwargs, tensors)
            self._refuse(str(error))
            if self.whole:  # it takes a second or more, and the blocks are tried next
                self._tried[kind] = _KINDS
            return None
        known.append(captured)
        return captured if fits(captured.arguments, captured.bounds, tensors) else None

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)


def _flatten(values: Collection[object], tensors: list[Tensor], key: list[object]) -> bool:
    """Take a call's tensors out of it, in pytree's order; what is left is a key.  False where something is neither."""
    key.append(len(values))
    if isinstance(values, dict):
        key.extend(values)
        values = values.values()
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor) and (kind is Tensor or kind is nn.Parameter):
            tensors.append(value)
            key.append(Tensor)
        elif kind in _PLAIN:
            key += (kind, value)
        elif isinstance(value, tuple | list | dict) and kind in (tuple, list, dict):
            key.append(kind)
            if not _flatten(value, tensors, key):
                return False
        else:
            return False
    return True


def _shape_of(spec: pytree.TreeSpec) -> Shaped:
    """How a call's outputs are put together again."""
    if spec.is_leaf():
        return lambda flat: flat[0]
    if spec.type is tuple and all(child.is_leaf() for child in spec.children()):
        return tuple
    return lambda flat: pytree.tree_unflatten(flat, spec)

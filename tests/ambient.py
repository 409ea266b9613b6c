"""What a process may have set for all of PyTorch, set while the package's code runs and not while a test's does.

A test makes its models with `nn.Linear` and its inputs with `torch.randn`: what these are is what the test is about,
and must not change when the suite runs under another default.  So where the environment variable W8A8_TEST_DEFAULT
names a setting, every function of the package is entered with it and left without it, however it is called: by a
test, from a registry, as a hook.  The forward of a module that the package calls is not the package's, and runs as the
test would have run it; a layer of the package's inside of it is the package's again.  Other code of a test's that the
package calls (a loop of calibration) has the setting, and names what its tensors are.

Functions are wrapped where they are compiled, by a loader that puts a decorator on every `def` and `lambda` of the
source, so that no reference to one that is not wrapped can exist.  Not taken: to wrap what modules export, which misses
hooks, methods and registries; `sys.setprofile`, which sees it all and slows every call of every library down.

What somebody else has set holds: neither what transformers sets while it builds a model, nor what the package sets for
itself, is replaced.  Only the main thread changes anything: the dtype is the process's, device and modes are a thread's
own, and new threads begin without.  Processes that a test starts run as usual.
"""

import ast
import contextlib
import functools
import importlib.machinery
import inspect
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

VARIABLE = "W8A8_TEST_DEFAULT"
_ENTERED = "__entered__"  # no name of a class's own, which Python would mangle


@dataclass(frozen=True)
class Setting:
    """How something is set for the code that is called next, and how it is taken back for what that calls.

    Without `unset` it goes on to hold there.  What is called back does not set it again: the package may have ended it.
    """

    set: Callable[[], contextlib.AbstractContextManager[Any]]
    unset: Callable[[], contextlib.AbstractContextManager[Any]] | None = None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _dtype(dtype: torch.dtype) -> Setting:
    usual = torch.float32

    def instead_of(here: torch.dtype, there: torch.dtype) -> contextlib.AbstractContextManager[Any]:
        return default_dtype(there) if torch.get_default_dtype() is here else contextlib.nullcontext()

    return Setting(lambda: instead_of(usual, dtype), lambda: instead_of(dtype, usual))


def _device(device: str) -> Setting:
    def instead_of(here: str, there: str) -> contextlib.AbstractContextManager[Any]:
        # the context that `torch.set_default_device` enters too; contexts can be left in turn
        return torch.device(there) if torch.get_default_device().type == here else contextlib.nullcontext()

    return Setting(lambda: instead_of("cpu", device), lambda: instead_of(device, "cpu"))


SETTINGS = {
    "bfloat16": _dtype(torch.bfloat16),
    "float16": _dtype(torch.float16),
    "float64": _dtype(torch.float64),
    "meta": _device("meta"),
    # a model may run under these, too: they change no value
    "deterministic": Setting(deterministic),
    "inference": Setting(torch.inference_mode),
}


class Border:
    """Where a package's code begins and ends, and the setting that holds inside.

    Args:
        package: Its name.
        setting: What holds in it.
    """

    def __init__(self, package: str, setting: Setting) -> None:
        self.package = package
        self._setting = setting
        self._inside = False
        self._entries = 0  # how often the package is being run, one within the other
        self._thread = threading.get_ident()

    def crossed(self, *, inwards: bool) -> contextlib.AbstractContextManager[Any]:
        """The context for code on this side of the border; it changes nothing where that is the side already."""
        if self._inside is inwards or threading.get_ident() != self._thread or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        return self._cross(inwards)

    @contextlib.contextmanager
    def _cross(self, inwards: bool) -> Iterator[None]:
        change = self._setting.set if inwards else self._setting.unset
        if change is None or (inwards and self._entries and self._setting.unset is None):
            change = contextlib.nullcontext
        with change():
            self._inside = inwards
            self._entries += inwards
            try:
                yield
            finally:
                self._inside = not inwards
                self._entries -= inwards

    def entered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run inside; a generator is inside while it runs and not while it waits."""
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def resumed(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                return (yield from _Resumed(self, function(*args, **kwargs)))

            return resumed

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._inside or torch.compiler.is_compiling():  # the most, without a context
                return function(*args, **kwargs)
            with self.crossed(inwards=True):
                return function(*args, **kwargs)

        return called

    def owns(self, module: str) -> bool:
        """Whether a module of this name is in the package."""
        return module == self.package or module.startswith(self.package + ".")


class _Resumed(Generator[Any, Any, Any]):
    """A generator, each step of which is inside."""

    def __init__(self, border: Border, generator: Generator[Any, Any, Any]) -> None:
        self._border, self._generator = border, generator

    def send(self, value: Any) -> Any:
        with self._border.crossed(inwards=True):
            return self._generator.send(value)

    def throw(self, *error: Any) -> Any:
        with self._border.crossed(inwards=True):
            return self._generator.throw(*error)

    def close(self) -> None:
        with self._border.crossed(inwards=True):
            self._generator.close()


_MODES = ("torch.inference_mode", "torch.no_grad")


class _Wrapping(ast.NodeTransformer):
    """Every function of a module handed to the border, before any decorator sees it but those that set a mode."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        place = len(node.decorator_list)
        while place and ast.unparse(node.decorator_list[place - 1]).startswith(_MODES):
            place -= 1
        node.decorator_list.insert(place, ast.copy_location(ast.Name(_ENTERED, ast.Load()), node))
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.generic_visit(node)
        call = ast.Call(ast.Name(_ENTERED, ast.Load()), [node], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with its functions wrapped, and keeps nothing of it on the disk."""

    border: Border

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return compile(_Wrapping().visit(ast.parse(self.get_data(path), path)), path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        vars(module)[_ENTERED] = self.border.entered
        with self.border.crossed(inwards=True):  # constants are made, too
            super().exec_module(module)


class _Finder:
    """Finds the package's modules as Python does, for the loader above."""

    def __init__(self, border: Border) -> None:
        self._border = border

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not self._border.owns(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
            spec.loader.border = self._border
        return spec


@contextlib.contextmanager
def held(package: str, setting: Setting) -> Iterator[None]:
    """The setting holds in all of a package that is imported from here on; the calls of other modules end it."""
    assert package not in sys.modules, f"{package} has been imported without it"
    border = Border(package, setting)
    before = nn.Module.__call__

    @functools.wraps(before)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or border.owns(type(module).__module__):
            return before(module, *args, **kwargs)
        with border.crossed(inwards=False):
            return before(module, *args, **kwargs)

    finder = _Finder(border)
    sys.meta_path.insert(0, finder)
    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = before  # type: ignore[method-assign]
        sys.meta_path.remove(finder)


def leave_out(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked `not_under` the setting of this run, with the reason that stands there."""
    for item in items:
        for mark in item.iter_markers("not_under"):
            unknown = set(mark.args) - set(SETTINGS)
            assert not unknown, f"{item.nodeid} is marked not_under {unknown}; there are {list(SETTINGS)}"
            if os.environ.get(VARIABLE) in mark.args:
                item.add_marker(pytest.mark.skip(reason=mark.kwargs["reason"]))


if VARIABLE in os.environ:  # imported by conftest, before anything of the package is
    _HELD = contextlib.ExitStack()
    _HELD.enter_context(held("w8a8", SETTINGS[os.environ[VARIABLE]]))

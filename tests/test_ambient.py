"""A setting holds while a package's code runs, and not while a test's or a model's does."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import ambient

pytestmark = pytest.mark.not_under(*ambient.SETTINGS, reason="it is about the way in which the suite is run so")

SOURCE = '''
import contextlib
import torch
from torch import nn

AT_IMPORT = torch.tensor(1.0).dtype


class Layer(nn.Module):
    def forward(self, x):
        return torch.ones(1).dtype, x()


class Thing:
    def method(self):
        return torch.ones(1).dtype

    @property
    def told(self):
        return torch.ones(1).dtype

    @classmethod
    def made(cls):
        return torch.ones(1).dtype


def plain():
    return torch.ones(1).dtype


FOUND = {"plain": plain, "anonymous": lambda: torch.ones(1).dtype}


def run(function, *given):
    """From inside."""
    before = torch.ones(1).dtype
    return before, function(*given), torch.ones(1).dtype


def fail():
    raise ValueError("as asked")


def hooked(module, seen):
    def hook(*_):
        seen.append(torch.ones(1).dtype)

    module.register_forward_hook(hook)


def steps():
    got = yield torch.ones(1).dtype
    try:
        yield got, torch.ones(1).dtype
    except ValueError:
        yield torch.ones(1).dtype
    return torch.ones(1).dtype


@contextlib.contextmanager
def around():
    yield torch.ones(1).dtype


def its_own(function):
    torch.set_default_dtype(torch.float16)
    try:
        return function()
    finally:
        torch.set_default_dtype(torch.bfloat16)
'''
USUAL, SET = torch.float32, torch.bfloat16


def dtype():
    return torch.ones(1).dtype


class Model(nn.Module):
    """A model of the caller's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self):
        return dtype(), self.inner(dtype), dtype()


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "under_test").mkdir()
    (tmp_path / "under_test" / "__init__.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with ambient.held("under_test", ambient.SETTINGS["bfloat16"]):
        yield importlib.import_module("under_test")
    del sys.modules["under_test"]


@pytest.mark.usefixtures("package")
def test_a_test_has_the_usual_default():
    assert dtype() is USUAL


def test_every_kind_of_function_has_the_setting(package):
    thing = package.Thing()
    assert [package.AT_IMPORT, package.plain(), thing.method(), thing.told, package.Thing.made()] == [SET] * 5
    assert [found() for found in package.FOUND.values()] == [SET] * 2
    assert package.run(package.plain) == (SET, SET, SET)
    assert dtype() is USUAL


def test_an_error_ends_it_too(package):
    with pytest.raises(ValueError, match="as asked"):
        package.fail()
    assert dtype() is USUAL


def test_a_model_that_is_called_has_the_usual_default_and_a_layer_in_it_the_setting(package):
    model = Model(package.Layer())
    assert package.run(model) == (SET, (USUAL, (SET, SET), USUAL), SET)
    assert model() == (USUAL, (SET, SET), USUAL)


def test_a_hook_has_the_setting(package):
    seen, linear = [], nn.Linear(2, 2)
    package.hooked(linear, seen)
    linear(torch.ones(1, 2))
    assert seen == [SET]
    assert dtype() is USUAL


def test_a_generator_has_the_setting_while_it_runs_and_its_user_has_not(package):
    steps = package.steps()
    assert (next(steps), dtype()) == (SET, USUAL)
    assert (steps.send(3), dtype()) == ((3, SET), USUAL)
    assert (steps.throw(ValueError()), dtype()) == (SET, USUAL)
    with pytest.raises(StopIteration) as ended:
        next(steps)
    assert (ended.value.value, dtype()) == (SET, USUAL)
    with package.around() as found:
        assert (found, dtype()) == (SET, USUAL)


def test_a_default_that_somebody_set_holds(package):
    assert package.its_own(Model(lambda call: call())) == (torch.float16,) * 3
    with ambient.default_dtype(torch.float64):
        assert package.plain() is torch.float64


def test_no_wrapped_code_is_kept_on_the_disk(package):
    assert [path.name for path in Path(package.__path__[0]).iterdir()] == ["__init__.py"]


def test_a_package_that_is_there_already_cannot_have_a_setting(package):
    with (
        pytest.raises(AssertionError, match="under_test has been imported without it"),
        ambient.held("under_test", ambient.SETTINGS["meta"]),
    ):
        pass


def test_a_mark_with_a_name_that_is_no_setting_is_an_error(request):
    request.node.add_marker(pytest.mark.not_under("int8", reason="a mistake"))
    with pytest.raises(AssertionError, match=r"is marked not_under .*int8"):
        ambient.leave_out([request.node])


def test_a_mode_that_the_package_ended_stays_ended_in_what_is_called_back():
    border = ambient.Border("under_test", ambient.SETTINGS["inference"])
    back = border.entered(lambda: torch.is_inference_mode_enabled())

    def ending():
        with torch.inference_mode(False), border.crossed(inwards=False):
            return back()

    assert back()
    assert not border.entered(ending)()
    assert back()

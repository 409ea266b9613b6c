import pytest

from w8a8 import errors
from w8a8.errors import W8A8Error, closest


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SchemeError, ValueError),
        (errors.NonFiniteError, ValueError),
        (errors.PatternError, ValueError),
        (errors.ModelError, ValueError),
        (errors.CalibrationError, ValueError),
        (errors.KernelError, RuntimeError),
        (errors.CheckpointError, OSError),
        (errors.TextError, OSError),
        (errors.HubError, OSError),
    ],
)
def test_every_error_is_a_w8a8_error_and_the_builtin_it_resembles(kind, builtin):
    assert issubclass(kind, W8A8Error)
    assert issubclass(kind, builtin)
    assert str(kind("what happened")) == "what happened"


def test_explain_adds_the_places_under_the_message():
    error = errors.SchemeError("bad")
    error.add_note("while quantising a.b")
    assert error.explain() == "bad\n  while quantising a.b"


def test_closest_names_the_nearest_first():
    assert closest("lm_heda", ["lm_head", "q_proj"]) == "closest: lm_head"


def test_closest_falls_back_to_the_first_known_names():
    assert closest("xyz", ["aaaa", "bbbb", "cccc", "dddd"]) == "known: aaaa, bbbb, cccc, ..."
    assert closest("xyz", []) == "there are none"

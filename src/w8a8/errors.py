"""The family of errors: every user's mistake is a `W8A8Error`.

Each is also the built-in error it resembles (`ValueError`, `OSError`, ...), so that code which does not
know this package still catches it.  A message has four parts: what was asked, what was found, where, and
the way out.  The function that finds the fault raises with its numbers; whoever walks a model or a
directory adds the place (`noted`).  Our own mistakes are bare `assert`s and are not in here.
"""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class W8A8Error(Exception):
    """A mistake that the user can mend.  `explain` gives the message with its notes."""

    if sys.version_info < (3, 11):  # pragma: no cover - add_note came with 3.11

        def add_note(self, note: str) -> None:
            self.__notes__ = [*getattr(self, "__notes__", ()), note]

    __str__ = Exception.__str__  # OSError's would look for the number of an error

    def explain(self) -> str:
        """The message and the places that were added on the way up, one per line."""
        return "\n  ".join([str(self), *getattr(self, "__notes__", ())])


class SchemeError(W8A8Error, ValueError):
    """A request that makes no sense, does not fit the tensor, or cannot run the way it was asked to."""


class NonFiniteError(W8A8Error, ValueError):
    """A NaN or an infinity where a scale has to be computed."""


class WeightError(W8A8Error, TypeError, AttributeError):
    """The weight of a quantised layer was used as if it were a float tensor."""


class PatternError(W8A8Error, ValueError):
    """A name or glob that matches no linear layer of the model."""


class KernelError(W8A8Error, RuntimeError):
    """The kernel that was asked for cannot run here, or not on this input."""


class ModelError(W8A8Error, ValueError):
    """A model that cannot be used the way it was asked to."""


class CalibrationError(W8A8Error, ValueError):
    """Calibration data that cannot be used, or that does not reach what was to be measured."""


class CheckpointError(W8A8Error, OSError):
    """A directory that is missing, torn, untruthful, in the way, or in a format unknown here."""


class HubError(W8A8Error, OSError):
    """A repository of the hub that could not be pushed to."""


class FormatError(CheckpointError):
    """A directory in a format that is not run here, though it may be in order: other programs may read it."""


class ElsewhereError(W8A8Error, RuntimeError):
    """Another process of the same job failed; that one tells why, and this one ends without a word of its own."""


class TextError(W8A8Error, OSError):
    """A text that is missing, unreadable or too short for what was asked."""


class OutputError(W8A8Error, OSError):
    """A file that cannot be written: its place is taken or not there, or the disk has no room."""


class ReportError(W8A8Error, ValueError):
    """Records that no page can be made from, or a page that cannot be made here."""


class ServingError(W8A8Error, OSError):
    """A server that cannot be started: its place is taken, or memory does not do."""


OTHERS_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError),
)
"""What code of others raises over what it was not made for: whatever it stumbles on."""


@contextlib.contextmanager
def noted(place: str, kind: type[W8A8Error] = W8A8Error) -> Iterator[None]:
    """A user's mistake that is found in a `with` block says where."""
    try:
        yield
    except kind as error:
        error.add_note(place)
        raise


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """`", closest: a, b"` for an unknown name, or the first known ones where nothing is close."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.3)
    if near:
        return "closest: " + ", ".join(near)
    if not known:
        return "there are none"
    return "known: " + few(known, limit)


def few(names: Iterable[str], most: int = 3, *, counted: bool = False) -> str:
    """The first of many names: `"a, b, c, ..."`, or `counted`, `"a, b, c, ... (12)"`."""
    names = list(names)
    rest = "" if len(names) <= most else f", ... ({len(names)})" if counted else ", ..."
    return ", ".join(names[:most]) + rest

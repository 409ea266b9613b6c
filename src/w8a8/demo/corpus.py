"""English text that is on every machine: the docstrings of the Python standard library.

Calibrating or scoring a model needs text, and a package that must work offline cannot fetch any.  The
interpreter that runs it ships about 1.5 MB of technical English in its own sources.  This module reads them
with `ast` and imports none: an import has side effects, and under `-OO` what is imported has no docstrings.

    held-out text   docstrings of the modules in `HELD_OUT`    scores models; nothing is ever fitted to it
    training text   docstrings of all other modules            trains the demo model, calibrates

Nothing that a held-out docstring says is said in the training text: a docstring is left out of it that equals
a held-out one up to case and white space, or has `SHARED_WORDS` words in a row in common with one
(`asyncio.locks` repeats much of `threading`).  The training side gives way, so that the held-out text depends
on its modules alone.

The price: the text is that of *this* Python.  From one minor version to the next some per cent of it changes,
so perplexities compare within a version only.  A text in the package would be the same everywhere, and would
have to be found, licensed and carried; a famous one, most models have seen in training.
"""

import ast
import functools
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from w8a8.errors import TextError

HELD_OUT = (
    "argparse",
    "configparser",
    "inspect",
    "random",
    "shutil",
    "statistics",
    "subprocess",
    "textwrap",
    "threading",
)
"""Modules whose docstrings are the evaluation text: wordy, and single files in Python 3.10 to 3.13."""

SEPARATOR = "\n\n\n"
"""What stands between two docstrings, and nowhere inside one: two blank lines."""

MIN_CHARS = 40
"""Shorter docstrings say nothing ("See base class.")."""

SHARED_WORDS = 12
"""As many words in a row in common with a held-out docstring, and a docstring is no training text."""

_SKIPPED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages"),  # not the standard library
        *("test", "tests", "idle_test", "lib2to3", "__pycache__"),  # left out by many distributions
        *("encodings", "pydoc_data"),  # generated tables: slow to parse, and next to no text
    }
)

_HOLDERS = (ast.stmt, ast.excepthandler, ast.match_case)
"""The nodes that a definition can be in; an expression holds none, and most nodes are expressions."""


def training_text() -> str:
    """Everything the standard library's docstrings say outside the modules in `HELD_OUT`.

    Returns:
        About 1.5 million characters: docstrings in the order of their files and lines, joined by `SEPARATOR`.

    Raises:
        TextError: The sources of the standard library are not installed.
    """
    root = _stdlib()
    held_out = _held_out_docstrings(root)
    keys = {_key(docstring) for docstring in held_out}
    shared = {run for docstring in held_out for run in _word_runs(docstring)}
    others = _docstrings(root, (path for path in _sources(root) if _module(path, root) not in HELD_OUT))
    kept = [text for text in others if _key(text) not in keys and shared.isdisjoint(_word_runs(text))]
    if not kept:
        raise TextError(
            f"asked for the docstrings of the Python standard library; found no docstring outside "
            f"{', '.join(HELD_OUT)}, in {root}. {_WAY_OUT}"
        )
    return SEPARATOR.join(kept)


def held_out_text() -> str:
    """What the docstrings of the modules in `HELD_OUT` say; the text that models are scored on.

    Returns:
        About 120 thousand characters: docstrings in the order of `HELD_OUT` and of their lines, joined by
        `SEPARATOR`.

    Raises:
        TextError: The sources of the standard library, or of one of these modules, are not installed.

    Example:
        >>> held_out_text().startswith("Command-line parsing library")
        True
    """
    return SEPARATOR.join(_held_out_docstrings(_stdlib()))


_WAY_OUT = (
    "A Python from python.org, a Linux distribution, conda, pyenv or uv has these sources; an embeddable, "
    "frozen or stripped one does not. Run under one that has them, or give a text of your own."
)


def _stdlib() -> Path:
    """The folder of the standard library; asked anew at each call, as an environment may change it."""
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _held_out_docstrings(root: Path) -> tuple[str, ...]:
    """The docstrings of all `HELD_OUT` modules, each module of which must have some."""
    found = {name: _docstrings(root, _module_sources(root, name)) for name in HELD_OUT}
    missing = [name for name, docstrings in found.items() if not docstrings]
    if missing:
        raise TextError(
            f"asked for the docstrings of {len(HELD_OUT)} modules of the Python standard library; found no "
            f"source with docstrings of {len(missing)} of them ({', '.join(missing)}), in {root}. {_WAY_OUT}"
        )
    return tuple(_distinct(docstring for docstrings in found.values() for docstring in docstrings))


def _sources(root: Path) -> list[Path]:
    """All Python files of the library, in an order that no file system or path flavour changes."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _module_sources(root: Path, name: str) -> list[Path]:
    """The files of one top-level module, be it a file or a package."""
    single = root / f"{name}.py"
    return ([single] if single.is_file() else []) + _sources(root / name)


def _module(path: Path, root: Path) -> str:
    """The top-level module that a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def _docstrings(root: Path, paths: Iterable[Path]) -> list[str]:
    """The distinct docstrings of these files that are long enough to say something."""
    return _distinct(text for path in paths for text in _docstrings_of(path) if len(text) >= MIN_CHARS)


def _docstrings_of(path: Path) -> Iterator[str]:
    """The docstrings of one file, outermost first and down the page; none if it does not parse."""
    try:
        with warnings.catch_warnings():  # the library's own invalid escapes are no business of our caller
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files in odd encodings
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDERS)]
        pending += reversed(children)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                yield _trimmed(docstring)


def _trimmed(docstring: str) -> str:
    """Without the indentation of its source, white space at line ends, and superfluous blank lines."""
    lines = "\n".join(line.rstrip() for line in inspect.cleandoc(docstring).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _distinct(docstrings: Iterable[str]) -> list[str]:
    """The first of each set of docstrings that say the same."""
    first: dict[str, str] = {}
    for docstring in docstrings:
        first.setdefault(_key(docstring), docstring)
    return list(first.values())


def _key(docstring: str) -> str:
    """What two docstrings have in common if they say the same."""
    return " ".join(docstring.casefold().split())


def _word_runs(docstring: str) -> Iterator[tuple[str, ...]]:
    """All runs of `SHARED_WORDS` words in a docstring."""
    words = _key(docstring).split()
    return (tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1))

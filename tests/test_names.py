"""Names that hold: what docstrings put in backticks is there, and the public names are one list."""

import ast
import builtins
import importlib
import keyword
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import w8a8
from tests.floors import FLOORS, SOURCE

FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# whose attributes a docstring may name bare
OTHERS = (
    builtins,
    torch,
    torch.nn,
    torch.Tensor,
    transformers,
    transformers.PreTrainedModel,
    transformers.pytorch_utils,
)
# of programs and libraries that are not imported here, and of the files and models of others
ELSEWHERE = {
    *("torchrun", "regex", "SentenceTransformer", "get_tensor", "match_targets"),
    *("marlin_padded_nk", "cutlass_scaled_mm", "cutlass_scaled_mm_azp", "_custom_ops.py", "packed_modules_mapping"),
    *("lm_head", "wo", "mlp.experts", "block_sparse_moe.experts", "tie_word_embeddings"),
    *("xor", "no"),  # of processors, and of a front matter
}


def in_code(tree: ast.Module) -> Iterator[str]:
    """Every name that a file's code has: defined, used, an argument, or a word in a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield from [*name.split("."), *([other] if other else [])]
            case ast.Constant(value=str(name)) if name.isidentifier():
                yield name


def defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


WORDS = {path: set(in_code(tree)) for path, tree in TREES.items()}
DEFINED = {name for tree in TREES.values() for name in defined(tree)}
MODULES = {path.stem for path in FILES} | {path.parent.name for path in FILES}


def quoted(path: Path) -> set[str]:
    """What a file's docstrings put in single backticks and could be a name."""
    texts = [ast.get_docstring(node) or "" for node in ast.walk(TREES[path]) if isinstance(node, DOCUMENTED)]
    return {name for text in texts for name in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", text)}


def resolved(dotted: str) -> Any:
    """What a name that starts with w8a8 stands for."""
    found: Any = w8a8
    for part in dotted.split(".")[1:]:
        if not hasattr(found, part) and isinstance(found, ModuleType):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def known(name: str, path: Path) -> bool:
    first, *more = name.split(".")
    if first == "w8a8":
        try:
            return resolved(name) is not None
        except (ImportError, AttributeError):
            return False
    if first in WORDS[path] | set(keyword.kwlist) | sys.stdlib_module_names or name in ELSEWHERE:
        return True
    if first in MODULES | DEFINED:
        return all(part in MODULES | DEFINED | WORDS[path] for part in more)
    return first == "nn" or any(hasattr(other, first) for other in OTHERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_docstrings_name_is_there(path):
    assert sorted(name for name in quoted(path) if not known(name, path)) == []


def test_a_name_that_is_gone_is_seen():
    path = SOURCE / "pipeline.py"
    assert known("w8a8.core.scheme.Scheme", path)
    assert not known("w8a8.scheme", path)
    assert not known("w8a8.core.scheme.Nothing", path)
    assert not known("nothing_of_ours", path)
    assert not known("fold.nothing_of_ours", path)


def test_the_public_names_are_those_that_type_checkers_see():
    listed = [
        (f"{node.module}.{alias.name}", alias)
        for node in ast.parse((SOURCE / "__init__.pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(alias.name for _, alias in listed) == w8a8.__all__
    for home, alias in listed:
        assert alias.asname == alias.name, f"{alias.name} is not handed on to type checkers"
        assert getattr(w8a8, alias.name) is resolved(home), home


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS) - {"__main__", "_version"}))
def test_every_room_is_an_attribute_of_the_package(room):
    assert isinstance(getattr(w8a8, room), ModuleType)

"""Imports point down: every module may import from layers below its own, and from nowhere else."""

import ast
from pathlib import Path

from tests.floors import FLOORS, INSIDE, PAGE, SOURCE, redrawn

RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}


def layer_of(module: str) -> str:
    return module.removeprefix("w8a8.").split(".")[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and layer of everything that a file imports from this package, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "w8a8":
                found += [(node.lineno, alias.name) for alias in node.names if alias.name != "__version__"]
            elif node.module.startswith("w8a8."):
                found.append((node.lineno, layer_of(node.module)))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, layer_of(a.name)) for a in node.names if a.name.startswith("w8a8.")]
    return found


def files() -> list[tuple[Path, str]]:
    return [
        (path, layer_of(".".join(path.relative_to(SOURCE).with_suffix("").parts)))
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    ]


def test_every_module_has_a_layer():
    assert {layer for _, layer in files()} == set(RANK)


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for path, layer in files()
        for line, imported in imports(path)
        if imported != layer and RANK[imported] >= RANK[layer]
    ]
    assert wrong == []


def test_imports_within_a_folder_point_back():
    wrong = []
    for folder, order in INSIDE.items():
        assert {path.stem for path in (SOURCE / folder).glob("*.py")} == {*order, "__init__"}
        for path in (SOURCE / folder / f"{name}.py" for name in order):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"w8a8.{folder}."):
                    imported = str(node.module).split(".")[2]
                    if order.index(imported) >= order.index(path.stem):
                        wrong.append(f"{folder}/{path.name}:{node.lineno} imports {imported}")
    assert wrong == []


def test_the_page_shows_these_floors():
    assert redrawn(PAGE.read_text()) == PAGE.read_text()


def test_the_check_sees_an_upward_import(tmp_path):
    bad = tmp_path / "affine.py"
    bad.write_text(
        "def f():\n    from w8a8.layers.linear import QuantLinear\nfrom w8a8 import pipeline\nimport w8a8.cli.output\n"
    )
    assert [layer for _, layer in sorted(imports(bad))] == ["layers", "pipeline", "cli"]
    assert all(RANK[layer] > RANK["core"] for _, layer in imports(bad))

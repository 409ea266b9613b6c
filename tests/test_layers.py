"""Imports point down: every module may import from layers below its own, and from nowhere else."""

import ast
from pathlib import Path

import w8a8

LAYERS = [
    {"errors", "forking"},
    {"scheme", "report", "sources", "saving"},
    {"affine", "packed", "places", "kinds"},
    {"functional", "tokens", "row_sample", "straight_through"},
    {"kernels"},
    {"weight"},
    {"buffers"},
    {"linear"},
    {"following"},
    {"reading"},
    {"usage"},
    {"experts", "ties"},
    {"obstacles", "roles"},
    {"convert", "coverage"},
    {"dataflow", "checkpoint", "corpus"},
    {"evaluation"},
    {"calibration"},
    {"smoothing"},
    {"pipeline", "experiment", "streaming", "hf"},
    {"generation", "diagnosis", "analysis", "speed", "outputs"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# within a folder, in the order in which its files may import one another
INSIDE = {
    "dataflow": ["tracing", "products", "commuting", "groups", "observing"],
    "calibration": ["summaries", "observers", "reservoir", "sampling", "sources", "model_inputs", "data", "calibrate"],
    "smoothing": ["fold", "alpha", "gate", "contest", "report", "smoother", "smooth", "outliers"],
    "checkpoint": [
        "headers",
        "matcher",
        "expressions",
        "layout",
        "names",
        "describe",
        "files",
        "beside",
        "skeleton",
        "reader",
        "verify",
        "vllm",
        "writer",
        "rehearsal",
    ],
    "evaluation": ["intervals", "text", "scores", "stored", "compare", "harness"],
    "streaming": [
        "plan",
        "journal",
        "resources",
        "source",
        "shard",
        "team",
        "run",
        "blocks",
        "contents",
        "activations",
        "request",
        "measured",
        "forecast",
        "calibrated",
    ],
    "report": ["records", "numbers", "png", "markup", "plots", "layers", "sections", "page", "collect"],
    "analysis": ["replay", "sample", "measure", "errors", "layers", "smoothed", "remedy", "knapsack", "budget"],
}
SOURCE = Path(w8a8.__file__).parent
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


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


def test_the_check_sees_an_upward_import(tmp_path):
    bad = tmp_path / "affine.py"
    bad.write_text(
        "def f():\n    from w8a8.linear import QuantLinear\nfrom w8a8 import pipeline\nimport w8a8.cli.output\n"
    )
    assert [layer for _, layer in sorted(imports(bad))] == ["linear", "pipeline", "cli"]
    assert all(RANK[layer] > RANK["affine"] for _, layer in imports(bad))

"""The floors of the package: which room stands on which, and in a room, which file on which.

    python -m tests.floors      draws them into docs/design.md

test_layers.py holds every import to it: a file may import what stands before it, in its room or on a lower floor.
"""

import ast
from pathlib import Path

import w8a8

SOURCE = Path(w8a8.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "design.md"
BEGIN, END = "<!-- floors: python -m tests.floors -->\n", "<!-- end of floors -->"

# the rooms, from the ground up
FLOORS = [
    {"errors", "forking", "defaults", "_version"},
    {"core"},
    {"kernels", "functional", "records"},
    {"layers", "report"},
    {"model"},
    {"decoding"},
    {"dataflow", "checkpoint"},
    {"calibration"},
    {"evaluation"},
    {"smoothing", "streaming", "hf", "fusing"},
    {"pipeline", "blockwise"},
    {"analysis", "directories"},
    {"jobs", "demo"},
    {"serving"},
    {"embedding"},
    {"cli"},
    {"__main__"},
]
# in a room, the order in which its files may import one another
INSIDE = {
    "core": ["scheme", "plain", "progress", "affine", "packed", "tokens", "row_sample"],
    "kernels": ["request", "reference", "torch_cpu", "compiled", "native", "fused", "cached", "each", "select", "ops"],
    "records": ["coverage", "smoothing", "layers", "streaming"],
    "layers": ["saving", "straight_through", "weight", "weights", "buffers", "embedding", "linear"],
    "model": [
        "pretrained",
        "kinds",
        "inputs",
        "sources",
        "places",
        "following",
        "reading",
        "usage",
        "experts",
        "ties",
        "obstacles",
        "roles",
        "selection",
        "swapping",
        "tables",
        "choice",
        "coverage",
    ],
    "dataflow": ["tracing", "products", "commuting", "groups", "observing"],
    "calibration": ["summaries", "observers", "reservoir", "sampling", "sources", "data", "calibrate"],
    "smoothing": ["fold", "alpha", "way", "gate", "contest", "smoother", "smooth", "outliers"],
    "checkpoint": [
        "headers",
        "matcher",
        "expressions",
        "layout",
        "names",
        "describe",
        "files",
        "beside",
        "architecture",
        "directory",
        "embedder",
        "skeleton",
        "reader",
        "opening",
        "verify",
        "vllm",
        "card",
        "about",
        "hub",
        "writer",
        "rehearsal",
    ],
    "decoding": ["likeness", "handed", "attention", "stores", "layers", "caches", "models"],
    "evaluation": [
        "intervals",
        "text",
        "scores",
        "stored",
        "compare",
        "harness",
        "outputs",
        "judged",
        "encoders",
        "summary",
        "samples",
        "speed",
        "generation",
    ],
    "streaming": ["plan", "journal", "resources", "source", "shard", "team", "job", "pieces"],
    "blockwise": ["blocks", "contents", "activations", "request", "forecast", "calibrated"],
    "report": ["records", "numbers", "png", "markup", "plots", "layers", "sections", "page", "collect"],
    "analysis": [
        "answers",
        "replay",
        "sample",
        "measure",
        "errors",
        "layers",
        "smoothed",
        "remedy",
        "knapsack",
        "budget",
        "study",
    ],
    "fusing": ["capture", "steps", "plan", "matching", "families", "blocks", "models"],
    "hf": ["arriving", "quantizer", "enabling"],
    "jobs": [
        "watching",
        "diagnosis",
        "measuring",
        "inspection",
        "comparison",
        "encoders",
        "request",
        "outcome",
        "page",
        "quantization",
    ],
    "cli": [
        "output",
        "app",
        "compare",
        "sensitivity",
        "ways",
        "bench",
        "evaluate",
        "inspect",
        "quantize",
        "run",
        "serve",
        "embed",
        "commands",
    ],
    "demo": ["corpus", "run"],
    "embedding": ["texts", "vectors", "pooled", "job"],
    "serving": [
        "mistakes",
        "fields",
        "front",
        "batching",
        "encoders",
        "texts",
        "answers",
        "places",
        "packed",
        "sampling",
        "engine",
        "suits",
        "stops",
        "asked",
        "writing",
        "start",
    ],
}


def said(path: Path) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(doc.split("\n\n")[0].split())
    return first.removesuffix(".")


def drawn() -> str:
    """The floors as a page shows them."""
    lines = []
    for number, rooms in enumerate(FLOORS, 1):
        for room in sorted(rooms - {"__main__"}):
            folder = (SOURCE / room).is_dir()
            path = SOURCE / (f"{room}/__init__.py" if folder else f"{room}.py")
            lines.append(f"{number:2}  {room}{'/' * folder}  {said(path)}")
            lines += [f"      {name}  {said(SOURCE / room / f'{name}.py')}" for name in INSIDE.get(room, [])]
    return "```\n" + "\n".join(lines) + "\n```\n"


def redrawn(page: str) -> str:
    """The page with today's floors between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + drawn() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text()))

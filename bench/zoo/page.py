"""docs/models.md, from the results alone."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from zoo.build import types
from zoo.known import FAILS
from zoo.trials import COLUMNS, FLOAT, IN_MEMORY, NONE, REFUSED, UNTRIED, YES, failures, tried

_HEAD = """# Models

Made by `make models` (bench/models.py) from bench/results/models.json; nothing here is written by hand. Every model
type of transformers {transformers} that can be built here is made small and random from its configuration class, by
rule (two layers, widths of some dozens; norms, biases and running statistics moved off their neutral values), called
with inputs that its float model takes, and put through everything this package does: {tried} model types, of which
{passing} ({percent}) pass every column that applies. {unreached} further types have not been reached yet, and the rows
were made by {sources} states of this package: `make models` goes on.

What a column means:

- **integers**: the share of the parameters of matrices, lookup tables left out, that are int8. The rest stays float for
  a reason that `result.coverage` tells: the output head by default, convolutions, routers.
- **integers = simulation**: the whole output of `quantize` is that of `simulate`, bit for bit.
- **saved and loaded**, **`enable`**: the model that `load`, and transformers after `w8a8.enable()`, make of the
  directory gives the same output, bit for bit.
- **streamed = memory**: the directory of `quantize_directory` is that of `save`, byte by byte. "in memory": the
  class converts what its files hold while it loads them, so the command `quantize` goes through memory by itself.
- **rehearsal**: the trial that the command makes before it quantises in memory passes, or cannot be made of this model,
  which is no reason to stop.
- **generates**: `generate` writes the same tokens in integers and simulated.
- **smooths**: how many groups `smooth_(alpha="searched")` folds, of those that it sees; "refused" with a reason is a
  pass.
- **bfloat16**: integers equal the simulation and the loaded model once more, on the bfloat16 model.

"-" does not apply; "float" is a failure that the float model shares, told below in transformers' words; **no** is a
failure of ours, told below too.

"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    models = result["models"]
    rows = {name: row for name, row in models.items() if tried(row)}
    passing = [name for name, row in rows.items() if not failures(row)]
    head = _HEAD.format(
        transformers=result["machine"]["transformers"],
        tried=len(rows),
        passing=len(passing),
        unreached=len(types().keys() - models.keys()),
        sources=len({row.get("source") for row in models.values()}),
        percent=f"{100 * len(passing) / max(1, len(rows)):.1f} %",
    )
    return "\n".join([head + _table(rows), "", _failing(rows), _told(rows), _untried(models)])


def _table(rows: Mapping[str, Any]) -> str:
    titles = ["model type", "class", "integers", *COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, row in rows.items():
        share = f"{100 * row['share']:.0f} %" if "share" in row else NONE
        failed = failures(row)
        cells = [_cell(row.get(column, NONE), column in failed or "died" in failed) for column in COLUMNS]
        lines.append(f"| {name} | {row['cls']} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: str, failed: bool) -> str:
    if failed:
        return "**no**"
    if value.startswith(YES):
        return re.sub(r" groups$", "", value.removeprefix("yes, "))
    return value.partition(":")[0]


def _failing(rows: Mapping[str, Any]) -> str:
    lines = ["## What fails", ""]
    for name, row in rows.items():
        cells = [f"  - {COLUMNS.get(column, column)}: {_plain(text)}" for column, text in failures(row).items()]
        if cells:
            lines += [f"- **{name}**: {FAILS.get(name, 'not looked into yet')}", *cells]
    return "\n".join([*lines, ""] if len(lines) > 2 else [*lines, "Nothing.", ""])


def _told(rows: Mapping[str, Any]) -> str:
    """Failures of the float model, and refusals, each reason once."""
    sections = []
    for title, start in (
        ("What the float model does not do either", FLOAT),
        ("What smoothing refuses", REFUSED),
        ("What is not streamed", IN_MEMORY),
    ):
        found: dict[str, list[str]] = {}
        for name, row in rows.items():
            for column, heading in COLUMNS.items():
                value = row.get(column, NONE)
                if value.startswith(start) and column not in failures(row):
                    reason = _general(value.removeprefix(start))
                    found.setdefault(f"{heading}: {reason}" if start == FLOAT else reason, []).append(name)
        if found:
            lines = [f"- {_plain(reason)}: {', '.join(names)}" for reason, names in sorted(found.items())]
            sections += [f"## {title}", "", *lines, ""]
    return "\n".join(sections)


def _general(reason: str) -> str:
    """A reason without the names and numbers of one model, so that it stands once."""
    reason = re.sub(r" in \w+ \(.*?\)", "", reason)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", reason)


def _untried(models: Mapping[str, Any]) -> str:
    """Model types without a row: by reason."""
    found: dict[str, list[str]] = {}
    for name, row in models.items():
        if not tried(row):
            why = next(key for key in UNTRIED if key in row)
            found.setdefault(f"{_TITLES[why]}: {_general(row[why])}", []).append(name)
    lines = [f"- {_plain(reason)}: {', '.join(names)}" for reason, names in sorted(found.items())]
    counted = Counter(next(k for k in UNTRIED if k in row) for row in models.values() if not tried(row))
    counts = ", ".join(f"{count} {_TITLES[why]}" for why, count in sorted(counted.items()))
    return "\n".join(["## What was not tried", "", f"{counts or 'Nothing'}.", "", *lines, ""])


_TITLES = {"not_built": "not built", "not_run": "not run", "nothing": "nothing to quantise"}


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([*_<>|`\[\]])", r"\\\1", text)

"""What `w8a8 inspect --pairs` prints."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from w8a8.cli.output import print_json, print_line, print_table
from w8a8.errors import few

if TYPE_CHECKING:
    from w8a8.dataflow import Dataflow

_FEW = 6


def show_pairs(directory: Path, found: "Dataflow", *, as_json: bool) -> None:
    """Print what could be folded into what, and why the rest cannot."""
    if as_json:
        print_json({"directory": directory, **found.to_dict()})
        return
    groups = [
        (
            group.source.module,
            group.source.kind,
            f"{int(group.scalable.sum())} of {group.source.channels}",
            few((reader.module for reader in group.readers), _FEW, counted=True),
        )
        for group in found.groups
    ]
    print_table(f"{directory}: can be folded", ("source", "kind", "channels", "read by", "layers"), _by_layer(groups))
    refused = [(r.source.module, r.source.kind, few(r.readers, _FEW, counted=True), r.reason) for r in found.refused]
    print_table("Cannot be folded", ("source", "kind", "read by", "why", "layers"), _by_layer(refused))
    if found.unread:
        print_line(f"Not reached by this forward: {few(found.unread, _FEW, counted=True)}")


def _by_layer(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in the numbers of layers only, as one row with * and their count."""
    counts = Counter(tuple(re.sub(r"\.\d+(?=[.,;]|$)", ".*", cell) for cell in row) for row in rows)
    return [(*row, str(count)) for row, count in counts.items()]

"""The page that `quantize --report` writes: what the command has, as records."""

import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.cli.output import plain
from w8a8.errors import ReportError


@dataclass(frozen=True)
class Page:
    """Records that a page is made of."""

    records: dict[str, Any]

    def write(self, path: Path) -> None:
        """One self-contained HTML file."""
        from w8a8.report import write_report

        write_report(path, self.records)


def check_drawing() -> None:
    """Raise `ReportError` before anything long where the page could not be drawn."""
    if importlib.util.find_spec("vl_convert") is None:
        raise ReportError("the plots of a page are drawn by vl-convert: pip install 'w8a8[report]'")


def page_of(told: Mapping[str, Any], source: str, output: Path, seed: int, **parts: Any) -> Page:
    """The page about a result.

    Args:
        told: What the command tells as JSON.
        source: The float model.
        output: The directory of the quantised one.
        seed: Of the drawing of calibration data.
        parts: More parts of the records, by their names.
    """
    from w8a8.checkpoint.files import CONFIG, resolve, tensor_files
    from w8a8.diagnosis import diagnose
    from w8a8.report import collect

    found = diagnose()
    before, after = tensor_files(resolve(source)), tensor_files(output)
    comparison = told.get("evaluation")
    records = collect(
        model=source,
        scheme=told["scheme"],
        bytes_before=sum(path.stat().st_size for path in before),
        bytes_after=sum(path.stat().st_size for path in after),
        coverage=plain(told["coverage"]),
        smooth=plain(told["smooth"]),
        comparison=None if comparison is None else plain(comparison),
        reproduce={
            "command": shlex.join(["w8a8", *sys.argv[1:]]),
            "seed": seed,
            "versions": {name: str(version) for name, version in found.versions.items()},
            "hashes": {f"config.json of {output.name}": hashlib.sha256((output / CONFIG).read_bytes()).hexdigest()},
            "machine": {name: str(value) for name, value in found.machine.items()},
        },
        **parts,
    )
    return Page(records)

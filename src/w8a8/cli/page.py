"""The page that `quantize --report` writes: what the command has, as records."""

import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.cli.app import content_of, open_named
from w8a8.cli.output import plain, progress
from w8a8.cli.ways import Job
from w8a8.errors import ReportError

_DRAWN = 6  # layers whose weight and input are drawn


@dataclass(frozen=True)
class Page:
    """Records that a page is made of."""

    records: dict[str, Any]

    def write(self, path: Path) -> None:
        """One self-contained HTML file."""
        from w8a8.report import write_report

        write_report(path, self.records)


def check_page(path: Path) -> None:
    """Raise `ReportError` before anything long where the page could not be drawn or written."""
    if not path.absolute().parent.is_dir():
        raise ReportError(f"the page cannot be written to {path}: there is no directory {path.absolute().parent}")
    if importlib.util.find_spec("vl_convert") is None:
        raise ReportError("the plots of a page are drawn by vl-convert: pip install 'w8a8[report]'")


@dataclass(frozen=True)
class Layers:
    """What was measured of the layers, and what would help the worst."""

    sensitivity: Any
    remedies: Any


def layers_of(job: Job, text: str) -> Layers:
    """Measure the layers of the float model under the job's scheme, on windows of a text."""
    from w8a8 import convert
    from w8a8.analysis import remedies, sensitivity
    from w8a8.evaluation import encode

    opened = open_named(job.model, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    ids = encode(opened.tokenizer, content_of(text))
    patterns = convert.with_head(opened.model, job.selection["include"], job.selection["head"])
    choice = {"include": patterns, "exclude": job.selection["exclude"]}
    with progress("measuring layers") as step:
        found = sensitivity(opened.model, ids, job.scheme, **choice, seed=job.drawn["seed"], progress=step)
    return Layers(found, remedies(opened.model, ids, found, job.scheme, **choice))


def page_of(told: Mapping[str, Any], source: str, output: Path, seed: int, found: Layers | None) -> Page:
    """The page about a result.

    Args:
        told: What the command tells as JSON.
        source: The float model.
        output: The directory of the quantised one.
        seed: Of the drawing of calibration data.
        found: What was measured of the layers.
    """
    from w8a8.checkpoint.files import CONFIG, resolve, tensor_files
    from w8a8.diagnosis import diagnose
    from w8a8.report import collect

    here = diagnose()
    parts: dict[str, Any] = {}
    if found is not None:
        parts |= {**found.sensitivity.records(), "remedies": [asdict(remedy) for remedy in found.remedies]}
        worst = {layer.name for layer in found.sensitivity.worst(_DRAWN)}  # a drawing each: the page must stay small
        parts["histograms"] = [drawn for drawn in parts["histograms"] if drawn["layer"] in worst]
    if told.get("budget") is not None:
        parts["budget"] = told["budget"]["record"]
    before, after = tensor_files(resolve(source)), tensor_files(output)
    records = collect(
        model=source,
        scheme=told["scheme"],
        bytes_before=sum(path.stat().st_size for path in before),
        bytes_after=sum(path.stat().st_size for path in after),
        coverage=plain(told["coverage"]),
        smooth=plain(told["smooth"]),
        comparison=told.get("evaluation"),
        reproduce={
            "command": shlex.join(["w8a8", *sys.argv[1:]]),
            "seed": seed,
            "versions": {name: str(version) for name, version in here.versions.items()},
            "hashes": {f"config.json of {output.name}": hashlib.sha256((output / CONFIG).read_bytes()).hexdigest()},
            "machine": {name: str(value) for name, value in here.machine.items()},
        },
        **parts,
    )
    return Page(records)

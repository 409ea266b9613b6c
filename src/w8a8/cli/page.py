"""The page that `quantize --report` writes: what the command has, as records."""

import hashlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
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
    from w8a8.report.page import check_place

    check_place(path)
    if importlib.util.find_spec("vl_convert") is None:
        raise ReportError("the plots of a page are drawn by vl-convert: pip install 'w8a8[report]'")


@dataclass(frozen=True)
class Layers:
    """What was measured of the layers, what would help the worst, and a sentence on what model and data it is of."""

    sensitivity: Any
    remedies: Any
    measured_on: str


def layers_of(job: Job, told: Mapping[str, Any], text: str) -> Layers:
    """Measure the layers of the float model, smoothed as it was, under the schemes that were saved.

    Args:
        job: What was asked for.
        told: What the job told of its work.
        text: The file that windows are drawn from.
    """
    from w8a8.analysis import remedies, sensitivity
    from w8a8.analysis.errors import channel_absmax
    from w8a8.evaluation import encode
    from w8a8.model.choice import Choice
    from w8a8.model.selection import assign, with_head
    from w8a8.model.swapping import swap, swapped

    opened = open_named(job.model, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    ids = encode(opened.tokenizer, content_of(text))
    data = job.calibration(opened.model, opened.tokenizer)
    include = with_head(opened.model, job.selection["include"], job.selection["head"])
    patterns = {"include": include, "exclude": job.selection["exclude"]}
    choice = Choice.of(opened.model, job.scheme, **patterns)
    seed = job.drawn["seed"]
    before, folded = None, _folded(told)
    _, schemes = assign(choice.selection, _saved_schemes(job, told))
    if folded:
        with swapped(opened.model, choice.experts):
            before = channel_absmax(opened.model, ids, seed=seed)
        _smooth_again(opened.model, data, told["smooth"], folded, choice.outside)
    swap(opened.model, choice.experts)
    given = {**patterns, "calibration": data, "observer": job.treatment["observer"]}
    with progress("measuring layers") as step:
        found = sensitivity(opened.model, ids, schemes, **given, seed=seed, before_smoothing=before, progress=step)
    with progress("measuring remedies") as step:
        made = remedies(opened.model, ids, found, schemes, **given, progress=step)
    model = f"the float model with {len(folded)} groups smoothed, as it was quantised" if folded else "the float model"
    words = f"Measured in {model}, on {found.windows} windows of {found.seq_len} tokens of {Path(text).name}"
    if any(scheme.static for scheme in schemes.values()):
        words += f"; static ranges by {job.treatment['observer']} on {data.description}, as they were saved"
    return Layers(found, made, words + ".")


def _saved_schemes(job: Job, told: Mapping[str, Any]) -> Any:
    """The job's scheme, or under a budget each layer's own."""
    from w8a8.analysis.budget import FLOAT

    if told.get("budget") is None:
        return job.scheme
    return {name: None if scheme == FLOAT else scheme for name, scheme in told["budget"]["schemes"].items()}


def _folded(told: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[float, float]]:
    """The alpha and the error of the groups that were smoothed, by source and readers."""
    groups = [] if told["smooth"] is None else told["smooth"]["groups"]
    return {
        (group["source"], *group["readers"]): (group["alpha"], group["error_after"])
        for group in groups
        if group["alpha"] is not None
    }


def _smooth_again(
    model: Any,
    data: Any,
    told: Mapping[str, Any],
    folded: Mapping[tuple[str, ...], tuple[float, float]],
    chosen: Iterable[str],
) -> None:
    """Fold into a float model what was folded before it was quantised, in place.

    Raises:
        ReportError: it is not what was folded before.
    """
    from w8a8.core.scheme import Scheme
    from w8a8.smoothing.smoother import Smoother
    from w8a8.smoothing.way import Smoothing

    def key(group: Any) -> tuple[str, ...]:
        return (group.source.module, *dict.fromkeys(reader.module for reader in group.readers))

    smoother = Smoother.of(model, data, dict.fromkeys(chosen, Scheme.of(told["scheme"])))
    smoother.smooth(Smoothing.of(told["kept"] or told["alpha"]), [g for g in smoother.groups if key(g) in folded])
    again = {(report.source, *report.readers): report for report in smoother.reports}
    for name, (alpha, error) in folded.items():
        report = again.get(name)
        new, measured = (None, None) if report is None else (report.alpha, report.error_after)
        if new != alpha or measured is None or not math.isclose(measured, error, rel_tol=1e-3):
            raise ReportError(
                f"{name[0]} was smoothed with alpha {alpha} and error {error:.3e}, and smoothing it again for the page "
                f"gave {new} and {measured}: has {data.description} or the model changed since?  The checkpoint "
                "is whole, only the page is missing; leave out --eval-text for a page without layers"
            )


def page_of(told: Mapping[str, Any], source: str, output: Path, seed: int, found: Layers | None) -> Page:
    """The page about a result.

    Args:
        told: What the command tells as JSON.
        source: The float model.
        output: The directory of the quantised one.
        seed: Of the drawing of calibration data.
        found: What was measured of the layers.
    """
    from w8a8.checkpoint.directory import Directory
    from w8a8.jobs.diagnosis import diagnose
    from w8a8.report import collect

    here = diagnose()
    parts: dict[str, Any] = {}
    if found is not None:
        parts |= {**found.sensitivity.records(), "remedies": [asdict(remedy) for remedy in found.remedies]}
        worst = {layer.name for layer in found.sensitivity.worst(_DRAWN)}  # a drawing each: the page must stay small
        parts["measured_on"] = found.measured_on
        parts["histograms"] = [drawn for drawn in parts["histograms"] if drawn["layer"] in worst]
    if told.get("budget") is not None:
        parts["budget"] = told["budget"]["record"]
    before, after = Directory.of(source), Directory.of(output)
    records = collect(
        model=source,
        scheme=told["scheme"],
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        coverage=plain(told["coverage"]),
        smooth=plain(told["smooth"]),
        comparison=told.get("evaluation"),
        reproduce={
            "command": shlex.join(["w8a8", *sys.argv[1:]]),
            "seed": seed,
            "versions": {name: str(version) for name, version in here.versions.items()},
            "hashes": {f"config.json of {output.name}": hashlib.sha256(after.config_file.read_bytes()).hexdigest()},
            "machine": {name: str(value) for name, value in here.machine.items()},
        },
        **parts,
    )
    return Page(records)

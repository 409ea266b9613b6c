"""The page about a saved model: what was done and measured of it, as records that `w8a8.report` draws."""

import hashlib
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from w8a8.analysis import remedies, sensitivity
from w8a8.analysis.errors import channel_absmax
from w8a8.calibration.data import Calibration
from w8a8.calibration.sources import content_of
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import open_model
from w8a8.core.plain import plain
from w8a8.core.scheme import Scheme
from w8a8.dataflow import Group
from w8a8.errors import ReportError
from w8a8.evaluation import encode
from w8a8.jobs.diagnosis import diagnose
from w8a8.jobs.outcome import Made, MeasuredLayers
from w8a8.jobs.watching import Watcher
from w8a8.model.choice import Choice
from w8a8.model.selection import assign, with_head
from w8a8.model.swapping import swap, swapped
from w8a8.records.smoothing import GroupReport, SmoothReport
from w8a8.report import collect
from w8a8.report.page import check_place
from w8a8.smoothing.smoother import Smoother
from w8a8.smoothing.way import Smoothing

_DRAWN = 6  # layers whose weight and input are drawn


def check_page(path: Path) -> None:
    """Raise `ReportError` before anything long where the page could not be drawn or written."""
    check_place(path)
    if importlib.util.find_spec("vl_convert") is None:
        raise ReportError("the plots of a page are drawn by vl-convert: pip install 'w8a8[report]'")


def measure_layers(made: Made, text: str, watcher: Watcher | None = None) -> MeasuredLayers:
    """Measure the layers of the float model, smoothed as it was, under the schemes that were saved.

    Args:
        made: What was done to the model, which is opened again.
        text: The file or hub data set that windows are drawn from.
        watcher: Told how it goes.

    Raises:
        ReportError: the float model cannot be smoothed again as it was.
        Others: as `w8a8.sensitivity` and `w8a8.remedies`.
    """
    job, watcher = made.job, watcher or Watcher()
    opened = open_model(job.named)
    model, ids = opened.model, encode(opened.tokenizer, content_of(text), opened.behind)
    data = job.calibrate_on(model, opened.tokenizer)
    include = with_head(model, job.include, job.head)
    choice = Choice.of(model, job.wanted, include, job.exclude)
    _, schemes = assign(choice.selection, job.wanted if made.allocation is None else made.allocation.schemes)
    before, folded = None, 0 if made.smooth is None else len(made.smooth.smoothed)
    if made.smooth is not None and folded:
        assert data is not None, "smoothed on it"
        with swapped(model, choice.experts):
            before = channel_absmax(model, ids, seed=job.seed)
        _smooth_again(model, data, made.smooth, choice.outside)
    swap(model, choice.experts)
    given: dict[str, Any] = {"include": include, "exclude": job.exclude, "calibration": data, "observer": job.observer}
    with watcher.stage("measuring layers") as step:
        found = sensitivity(model, ids, schemes, **given, seed=job.seed, before_smoothing=before, progress=step)
    with watcher.stage("measuring remedies") as step:
        helpful = remedies(model, ids, found, schemes, **given, progress=step)
    what = f"the float model with {folded} groups smoothed, as it was quantised" if folded else "the float model"
    words = f"Measured in {what}, on {found.windows} windows of {found.seq_len} tokens of {Path(text).name}"
    words += f"; KL is {found.measure}"
    if any(scheme.static for scheme in schemes.values()):
        words += f"; static ranges by {job.observer} on {made.calibrated_on}, as they were saved"
    return MeasuredLayers(found, helpful, words + ".")


def _smooth_again(model: nn.Module, data: Calibration, done: SmoothReport, chosen: Iterable[str]) -> None:
    """Fold into a float model what was folded before, in place; `ReportError` where that comes out otherwise."""

    def key(group: Group) -> tuple[str, ...]:
        return (group.source.module, *dict.fromkeys(reader.module for reader in group.readers))

    folded = {(was.source, *was.readers): was for was in done.smoothed}
    smoother = Smoother.of(model, data, dict.fromkeys(chosen, Scheme.of(done.scheme)))
    smoother.smooth(Smoothing.of(done.kept or done.alpha), [g for g in smoother.groups if key(g) in folded])
    again = {(report.source, *report.readers): report for report in smoother.reports}
    for name, was in folded.items():
        now = again.get(name, GroupReport(was.source, was.readers))
        assert was.error_after is not None, "of what was folded it was measured"
        close = now.error_after is not None and math.isclose(now.error_after, was.error_after, rel_tol=1e-3)
        if now.alpha != was.alpha or not close:
            raise ReportError(
                f"{was.source} was smoothed with alpha {was.alpha} and error {was.error_after:.3e}, and smoothing it "
                f"again for the page gave {now.alpha} and {now.error_after}: has {data.description} or the model "
                "changed since?  The checkpoint is whole, only the page is missing; leave out --eval-text for a page "
                "without layers"
            )


def page_records(made: Made) -> dict[str, object]:
    """The records of a page about a saved model, for `w8a8.report.write_report` or a JSON file.

    Args:
        made: What was done, and what was measured of it: `dataclasses.replace(made, compared=..., layers=...)` where
            that came later.
    """
    here, output, layers, compared = diagnose(), made.job.output, made.layers, made.compared
    parts: dict[str, Any] = {}
    if layers is not None:
        parts |= {**layers.sensitivity.records(), "remedies": [asdict(remedy) for remedy in layers.remedies]}
        worst = {layer.name for layer in layers.sensitivity.worst(_DRAWN)}  # a drawing each: the page must stay small
        parts["measured_on"] = layers.measured_on
        parts["histograms"] = [drawn for drawn in parts["histograms"] if drawn["layer"] in worst]
    if made.allocation is not None:
        parts["budget"] = made.allocation.record()
    before, after = made.job.named.directory, Directory.of(output)
    return collect(
        model=made.job.model,
        scheme=made.scheme.name,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        coverage=plain(made.coverage.to_dict()),
        smooth=None if made.smooth is None else plain(made.smooth),
        comparison=None if compared is None else plain(compared.both),
        reproduce={
            "command": made.job.command or f"quantize_to({made.job!r})",
            "seed": made.job.seed,
            "versions": here.versions,
            "hashes": {f"config.json of {output.name}": hashlib.sha256(after.config_file.read_bytes()).hexdigest()},
            "machine": here.machine,
        },
        **parts,
    )

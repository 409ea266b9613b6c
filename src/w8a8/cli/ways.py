"""What `quantize` prints of its work: before it, and as each part of it is done."""

import math
from typing import TYPE_CHECKING

from w8a8.cli.app import show_coverage
from w8a8.cli.compare import show_compared, sizes
from w8a8.cli.output import Watching, print_line, print_note, print_table
from w8a8.cli.sensitivity import show_sensitivity
from w8a8.records.streaming import Prediction

if TYPE_CHECKING:
    from w8a8.jobs.outcome import Made
    from w8a8.jobs.request import Job
    from w8a8.streaming.plan import Plan


class WatchingJob(Watching):
    """And on standard output what streaming will take, and what came out."""

    def __init__(self, job: "Job") -> None:
        super().__init__()
        self.job = job

    def planned(self, plan: "Plan", prediction: Prediction) -> None:
        """A table, and where the usual contest of smoothing is not held, that."""
        if self.job.calibration is not None and self.job.smooth in (None, "auto"):
            print_note("smoothing: searched group by group; the contest of auto takes the whole model, see --no-stream")
        _show_prediction(plan, prediction)

    def made(self, made: "Made") -> None:
        """What was done; and where it is compared with nothing, the worst weights."""
        _show(made)
        if not self.job.dry_run and self.job.eval_text is None:
            _show_weights(made)
            print_line(f"{sizes(str(self.job.output), self.job.model)}; what it lost: {_how_to_see(made)}")

    def compared(self, made: "Made") -> None:
        """The comparison; and where it has no layers, the worst weights."""
        assert made.compared is not None, "it was just made"
        show_compared(str(self.job.output), self.job.model, made.compared)
        if made.compared.why_not is not None:
            _show_weights(made)

    def drawn(self, made: "Made") -> None:
        """The layers that are on the page, and where that is."""
        if made.layers is not None:
            show_sensitivity(self.job.model, made.layers.sensitivity)
        print_line(f"The page is {self.job.report}.")


def _how_to_see(made: "Made") -> str:
    from w8a8.model.kinds import READS_TEXT, way_out

    if made.kind not in READS_TEXT:
        return way_out(made.kind)
    return f"w8a8 eval {made.job.output} --text FILE --against {made.job.model}"


def _show(made: "Made") -> None:
    from w8a8.core.scheme import AUTO, Scheme
    from w8a8.model.kinds import ENCODERS

    show_coverage(made.coverage)
    if made.job.scheme == AUTO and made.kind in ENCODERS:
        print_line(f"Scheme: {made.job.wanted.name}, which is usual for {made.kind.value}; --scheme names another.")
    for finding in made.findings:
        print_line(f"  {finding}")
    for name, other in made.untied.items():
        print_line(f"{name} was tied to {other} and is now an int8 copy of its own.")
    if made.smooth is not None:
        print_line(str(made.smooth))
    if made.calibrated_on is not None and any(Scheme.of(m.scheme or "").static for m in made.coverage.quantized):
        print_line(f"Activation scales by {made.job.observer} on {made.calibrated_on}.")
    if made.job.dry_run:
        print_line("Nothing was written.")
        return
    if made.allocation is not None:
        print_line(str(made.allocation))
    if made.streamed is not None and made.streamed.resumed:
        print_line(f"Gone on with: {made.streamed.resumed} of {made.streamed.shards} files were there already.")
    print_line(f"Saved in {made.job.output}.")


def _show_weights(made: "Made") -> None:
    """The layers whose weights lost most: all that is known of layers without data."""
    from w8a8.core.row_sample import ROWS
    from w8a8.model.kinds import PREDICTS_TOKENS

    print_table(
        "The worst layers by weights alone" + ("; by outputs: --eval-text FILE" * (made.kind in PREDICTS_TOKENS)),
        ("layer", "scheme", f"weight dB, at most {ROWS} rows"),
        [
            (m.name, m.scheme or "", "exact" if m.weight_sqnr_db == math.inf else f"{m.weight_sqnr_db:.1f}")
            for m in made.coverage.worst_weights()
        ],
    )


def _show_prediction(plan: "Plan", found: Prediction) -> None:
    minutes = f"{found.seconds / 60:.1f} min" if found.seconds > 60 else f"{found.seconds:.1f} s"
    rows = [
        ("memory at the peak", f"{found.peak_bytes / 1e9:.2f} GB", f"{found.memory_bytes / 1e9:.2f} GB available"),
        ("disk", f"{found.output_bytes / 1e9:.3f} GB", f"{found.free_bytes / 1e9:.2f} GB free"),
        ("time, at least", minutes, f"{found.source_bytes / 1e9:.3f} GB to read, {len(plan.shards)} files to write"),
    ]
    print_table(f"What {plan.source.path} will take", ("", "predicted", "here"), rows)

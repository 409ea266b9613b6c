"""What `quantize` prints of its work: before it, at its end, and of the weights that lost most."""

import contextlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from w8a8.cli.app import show_coverage
from w8a8.cli.output import print_line, print_note, print_table, progress
from w8a8.core.progress import Progress
from w8a8.jobs.watching import Watcher

if TYPE_CHECKING:
    from w8a8.jobs.quantization import Made
    from w8a8.jobs.request import Job


class Watching(Watcher):
    """Bars and notes on standard error."""

    def stage(self, label: str) -> contextlib.AbstractContextManager[Progress]:
        return progress(label)

    def note(self, text: str) -> None:
        print_note(text)


class WatchingJob(Watching):
    """And on standard output, unless that is for JSON, what streaming will take."""

    def __init__(self, job: "Job", *, quiet: bool) -> None:
        self.job = job
        self.quiet = quiet

    def planned(self, plan: Any, prediction: Any) -> None:
        """A table, and where the usual contest of smoothing is not held, that."""
        if self.quiet:
            return
        if self.job.calibration is not None and self.job.smooth in (None, "auto"):
            print_note("smoothing: searched group by group; the contest of auto takes the whole model, see --no-stream")
        _show_prediction(plan, prediction)


def show(made: "Made") -> None:
    """What was done, for people."""
    from w8a8.core.scheme import Scheme

    show_coverage(made.coverage)
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


def show_weights(worst: Iterable[Any], *, more: bool) -> None:
    """The layers whose weights lost most, of `Coverage.worst_weights`: all that is known of layers without data.

    Args:
        worst: The layers.
        more: Whether their outputs could be measured.
    """
    from w8a8.core.row_sample import ROWS

    print_table(
        "The worst layers by weights alone" + ("; by outputs: --eval-text FILE" if more else ""),
        ("layer", "scheme", f"weight dB, at most {ROWS} rows"),
        [(m.name, m.scheme, "exact" if m.weight_sqnr_db == math.inf else f"{m.weight_sqnr_db:.1f}") for m in worst],
    )


def _show_prediction(plan: Any, found: Any) -> None:
    minutes = f"{found.seconds / 60:.1f} min" if found.seconds > 60 else f"{found.seconds:.1f} s"
    rows = [
        ("memory at the peak", f"{found.peak_bytes / 1e9:.2f} GB", f"{found.memory_bytes / 1e9:.2f} GB available"),
        ("disk", f"{found.output_bytes / 1e9:.3f} GB", f"{found.free_bytes / 1e9:.2f} GB free"),
        ("time, at least", minutes, f"{found.source_bytes / 1e9:.3f} GB to read, {len(plan.shards)} files to write"),
    ]
    print_table(f"What {plan.source.path} will take", ("", "predicted", "here"), rows)

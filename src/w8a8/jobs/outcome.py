"""What came out of a job that quantises: one frozen value, and JSON at the edge."""

from dataclasses import dataclass

from w8a8.analysis import Allocation
from w8a8.checkpoint.vllm import Finding
from w8a8.core.scheme import Scheme
from w8a8.jobs.comparison import Compared
from w8a8.jobs.request import Job
from w8a8.model.kinds import Kind, kind_of
from w8a8.records.coverage import Coverage
from w8a8.records.layers import Remedy, Sensitivity
from w8a8.records.smoothing import SmoothReport
from w8a8.records.streaming import Streamed


@dataclass(frozen=True)
class MeasuredLayers:
    """What was measured of the layers, what would help the worst, and a sentence on what model and data it is of."""

    sensitivity: Sensitivity
    remedies: tuple[Remedy, ...]
    measured_on: str


@dataclass(frozen=True)
class Made:
    """What a job did, or with `dry_run` would do.

    scheme: Of the new layers; where they differ, the one that most of them have.
    coverage, untied: As in `w8a8.Result`.
    smooth: What smoothing did; None where there was none.
    calibrated_on: The data, in words; None where there was none.
    findings: What vLLM will make of the result.
    allocation: What the search came to; None where there was none.
    streamed: How the job from files to files went; None where the work was done in memory.
    notes: What the watcher was told.
    compared: With the float model; None where no text was given.
    layers: What was measured for the page; None where nothing was.
    pushed: The address of the repository on the hub; None where it was not pushed.
    """

    job: Job
    scheme: Scheme
    coverage: Coverage
    untied: dict[str, str]
    smooth: SmoothReport | None
    calibrated_on: str | None
    findings: tuple[Finding, ...]
    allocation: Allocation | None = None
    streamed: Streamed | None = None
    notes: tuple[str, ...] = ()
    compared: Compared | None = None
    layers: MeasuredLayers | None = None
    pushed: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks for all that share the job."""
        return self.streamed is None or self.streamed.first

    @property
    def kind(self) -> Kind:
        """What kind of model it is."""
        return kind_of(*self.job.named.directory.architecture)

    def to_dict(self) -> dict[str, object]:
        """What `w8a8 quantize --json` tells."""
        found: dict[str, object] = {
            "output": self.job.output,
            "scheme": self.scheme.name,
            "untied": self.untied,
            "calibration": self.calibrated_on,
            "smooth": None if self.smooth is None else self.smooth.to_dict(),
            "coverage": self.coverage.to_dict(),
            "worst_weights": list(self.coverage.worst_weights()),
            "vllm": list(self.findings),
        }
        if (done := self.streamed) is not None:
            found |= {"prediction": done.prediction, "shards": done.shards, "resumed": done.resumed}
        else:
            chosen = self.allocation
            found["budget"] = None if chosen is None else {**chosen.to_dict(), "record": chosen.record()}
        if self.compared is not None:
            found["evaluation"] = self.compared.to_dict()
        return found if self.pushed is None else found | {"pushed": self.pushed}

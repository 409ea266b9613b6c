"""A model quantised to a directory: in memory, from files to files, or block by block, whichever the request takes."""

import os
from dataclasses import dataclass, field
from typing import Any

from w8a8 import analysis, pipeline
from w8a8.analysis import Allocation, Budget
from w8a8.calibration.data import Calibration
from w8a8.calibration.sources import content_of
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import OpenedModel, open_model, open_tokenizer
from w8a8.checkpoint.reader import tell_unwanted
from w8a8.checkpoint.rehearsal import rehearse
from w8a8.checkpoint.skeleton import check_counts, empty_model
from w8a8.checkpoint.vllm import Finding, foresee
from w8a8.checkpoint.writer import check_target, save
from w8a8.core.scheme import Scheme
from w8a8.directories import quantize_directory
from w8a8.errors import SchemeError
from w8a8.evaluation import encode
from w8a8.jobs.request import Job, Way
from w8a8.jobs.watching import Watcher
from w8a8.model.choice import Choice
from w8a8.model.coverage import Coverage
from w8a8.model.selection import with_head
from w8a8.model.swapping import swap
from w8a8.report.smoothed import SmoothReport
from w8a8.streaming.job import Streamed
from w8a8.streaming.plan import Plan, UnplacedError
from w8a8.streaming.resources import Prediction


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

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks for all that share the job."""
        return self.streamed is None or self.streamed.first

    def to_dict(self) -> dict[str, Any]:
        """What `w8a8 quantize --json` tells, but for what it measures afterwards."""
        found: dict[str, Any] = {
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
            return found | {"prediction": done.prediction, "shards": done.shards, "resumed": done.resumed}
        chosen = self.allocation
        return found | {"budget": None if chosen is None else {**chosen.to_dict(), "record": chosen.record()}}


def quantize_to(job: Job, watcher: Watcher | None = None) -> Made:
    """Quantise a model to a directory that transformers and vLLM load: what `w8a8 quantize` does.

    Args:
        job: What is asked for.
        watcher: Told how it goes; by default nobody.

    Raises:
        SchemeError: the job does not go the way that it would take: shared by processes, or a dry run, in memory; vLLM
            would refuse the result, and that is the target; the budget leaves nothing to quantise.
        Others: as `w8a8.quantize`, `w8a8.quantize_directory` and `w8a8.save`; nothing is written then.

    Example:
        >>> made = quantize_to(Job("opt-125m", Path("opt-125m-w8a8")))  # doctest: +SKIP
        >>> print(made.coverage)  # doctest: +SKIP
    """
    work = _Work(job, watcher or Watcher())
    if job.way is Way.BLOCKS:
        return work.by_blocks()
    streamed = work.from_files() if job.way is Way.FILES else None
    return work.in_memory() if streamed is None else streamed


@dataclass
class _Work:
    """A job on its way, with what was said of it so far."""

    job: Job
    watcher: Watcher
    notes: list[str] = field(default_factory=list)
    findings: tuple[Finding, ...] = ()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.watcher.note(text)

    def in_memory(self) -> Made:
        """Load the model, quantise and save it."""
        job = self.job
        if _shared():
            raise SchemeError("torchrun shares the work of streaming, and this is done in memory; start one process")
        if job.dry_run:
            raise SchemeError("--dry-run shows what streaming will take, and this is done in memory; leave it out")
        check_target(job.output, overwrite=job.overwrite)
        opened = open_model(job.model, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
        check_target(job.output, overwrite=job.overwrite, source=opened.directory)
        data = job.calibrate_on(opened.model, opened.tokenizer)
        # before all that takes long
        not_rehearsed = rehearse(opened.model, Scheme.of(job.scheme), job.output, opened.tokenizer)
        if not_rehearsed is not None:
            self.note(f"saving was not rehearsed: {not_rehearsed}; what is written is looked at as always")
        smooth, chosen = (None, None) if job.search is None else self._searched(opened, data)
        schemes = job.scheme if chosen is None else chosen.schemes
        choice = Choice.of(opened.model, schemes, job.include, job.exclude, head=job.head)
        self.findings = foresee(choice)
        job.check_target(self.findings)
        with self.watcher.stage("quantising") as step:
            result = pipeline.carry_out(
                choice,
                calibration=data,
                observer=job.observer,
                smooth=job.smooth if chosen is None else "none",  # that is done
                progress=step,
            )
        save(opened.model, job.output, beside=opened.directory, covered=result.coverage, overwrite=job.overwrite)
        return Made(
            job,
            result.scheme,
            result.coverage,
            result.untied,
            smooth or result.smooth,
            None if data is None else data.description,
            self.findings,
            allocation=chosen,
            notes=tuple(self.notes),
        )

    def _searched(self, opened: OpenedModel, data: Calibration | None) -> tuple[SmoothReport | None, Allocation]:
        """Smooth the model where that is asked for; what was done, and a scheme for each layer of what it then is.

        Its experts then have layers of their own.
        """
        job, search, model = self.job, self.job.search, opened.model
        assert search is not None, "asked for"
        wanted = Budget.of(search.limit)
        ids = encode(opened.tokenizer, content_of(search.text))
        include = with_head(model, job.include, job.head)
        options = [Scheme.of(option) for option in search.options]
        choice = Choice.of(model, options[0], include, job.exclude)
        with self.watcher.stage("smoothing") as step:
            smooth, _ = pipeline.smooth_first(model, choice.outside, options[0], data, job.smooth, step)
        swap(model, choice.experts)
        with self.watcher.stage("measuring") as step:
            allocation = analysis.allocate(
                model,
                ids,
                wanted,
                options=options,
                include=include,
                exclude=job.exclude,
                seed=job.seed,
                calibration=data,
                observer=job.observer,
                progress=step,
            )
        if not any(allocation.schemes.values()):
            raise SchemeError(
                f"--budget {search.limit} leaves every layer float, {allocation.float_bytes:,} bytes in all: there "
                "is nothing to quantise; give a tighter budget"
            )
        return smooth, allocation

    def from_files(self) -> Made | None:
        """Quantise from files to files; None where the model has to be loaded for it."""
        try:
            return self._streamed("quantising", None, source=self.job.model, shard_bytes=self.job.shard_bytes)
        except UnplacedError as error:
            if self.job.stream or _shared() or self.job.dry_run:
                raise
            self.note(f"not streamed, but in memory: {error}")
            return None

    def by_blocks(self) -> Made:
        """Quantise block by block with calibration data, from files to files."""
        directory = Directory.of(self.job.model)
        check_counts(directory)
        data = self.job.calibrate_on(empty_model(directory), open_tokenizer(directory))
        return self._streamed("calibrating", data, source=directory, observer=self.job.observer, smooth=self.job.smooth)

    def _streamed(self, stage: str, data: Calibration | None, **more: Any) -> Made:
        job = self.job
        with self.watcher.stage(stage) as step:
            done = quantize_directory(
                output=job.output,
                scheme=job.scheme,
                calibration=data,
                include=job.include,
                exclude=job.exclude,
                head=job.head,
                overwrite=job.overwrite,
                dry_run=job.dry_run,
                before=self._planned,
                progress=step,
                **more,
            )
        return Made(
            job,
            done.scheme,
            done.coverage,
            done.untied,
            done.smooth,
            None if data is None else data.description,
            self.findings,
            streamed=done,
            notes=tuple(self.notes),
        )

    def _planned(self, plan: Plan, prediction: Prediction) -> None:
        self.findings = plan.findings
        self.job.check_target(plan.findings)
        tell_unwanted(plan.model, plan.unwanted)
        self.watcher.planned(plan, prediction)


def _shared() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

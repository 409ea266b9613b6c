"""A model quantised to a directory: in memory, from files to files, or block by block, whichever the request takes."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from w8a8 import analysis, pipeline
from w8a8.analysis import Allocation, Budget, budget, layers
from w8a8.calibration.data import Calibration
from w8a8.calibration.sources import content_of
from w8a8.checkpoint.about import add_measured
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.hub import check_push, push_to_hub
from w8a8.checkpoint.opening import OpenedModel, open_model, open_tokenizer
from w8a8.checkpoint.reader import tell_unwanted
from w8a8.checkpoint.rehearsal import rehearse
from w8a8.checkpoint.skeleton import check_counts, empty_model
from w8a8.checkpoint.vllm import Finding, foresee
from w8a8.checkpoint.writer import check_target, save
from w8a8.core.scheme import Scheme
from w8a8.directories import quantize_directory
from w8a8.errors import SchemeError, noted
from w8a8.evaluation import encode
from w8a8.evaluation.summary import summary
from w8a8.jobs import comparison
from w8a8.jobs.outcome import Made
from w8a8.jobs.page import check_page, measure_layers, page_records
from w8a8.jobs.request import Job, Way
from w8a8.jobs.watching import Watcher
from w8a8.model.choice import Choice
from w8a8.model.kinds import READS_TEXT, Asked
from w8a8.model.selection import with_head
from w8a8.model.swapping import swap
from w8a8.records.smoothing import SmoothReport
from w8a8.records.streaming import Prediction, Streamed
from w8a8.report import write_report
from w8a8.streaming.plan import Plan, UnplacedError


def quantize_to(job: Job, watcher: Watcher | None = None) -> Made:
    """Quantise a model to a directory that transformers and vLLM load: what `w8a8 quantize` does.

    Args:
        job: What is asked for.
        watcher: Told how it goes; by default nobody.

    Raises:
        SchemeError: the job does not go the way that it would take: shared by processes, or a dry run, in memory; vLLM
            would refuse the result, and that is the target; the budget leaves nothing to quantise.
        ModelError: the model is not of a kind that what is asked beside quantising can be asked of.
        Others: as `w8a8.quantize`, `w8a8.quantize_directory` and `w8a8.save`; nothing is written then.  As
            `compare_models`, `measure_layers`, `w8a8.report.write_report` and `w8a8.push_to_hub`; where that comes
            after the work, a note says that the directory is whole.

    Example:
        >>> made = quantize_to(Job("opt-125m", Path("opt-125m-w8a8")))  # doctest: +SKIP
        >>> print(made.coverage)  # doctest: +SKIP
    """
    _check(job)
    work = _Work(job, watcher or Watcher())
    made = work.by_blocks() if job.way is Way.BLOCKS else work.from_files() if job.way is Way.FILES else None
    made = made or work.in_memory()
    if not made.first:
        return made
    work.watcher.made(made)
    if job.dry_run:
        return made
    with noted(f"{job.output} is whole all the same" + (", and not pushed" if job.push_to_hub else "")):
        made = _looked_at(made, work.watcher)
    if job.push_to_hub is None:
        return made
    return replace(made, pushed=push_to_hub(job.output, job.push_to_hub, private=job.private or None))


def _check(job: Job) -> None:
    """Raise a `W8A8Error` before the work where what is asked beside it cannot be done."""
    if job.push_to_hub is not None:
        check_push(job.push_to_hub)
    if job.report is not None:
        check_page(job.report)
    if job.calibration is not None:
        Asked("calibration on a text (--calib)", READS_TEXT).check(*job.named.directory.architecture)
    if job.search is not None:
        budget.ASKED.check(*job.named.directory.architecture)
    if job.eval_text is not None:
        comparison.check_text(job.named.directory, job.eval_text)
        if job.report is not None:
            layers.ASKED.check(*job.named.directory.architecture)


def _looked_at(made: Made, watcher: Watcher) -> Made:
    """Compare the result with the float model, also in its card, and draw its page, where that is asked for."""
    job = made.job
    if job.eval_text is not None:
        pair = comparison.ModelPair(replace(job.named, name=job.output), job.model, job.eval_text)
        compared = comparison.compare_models(pair, watcher)
        made = replace(made, compared=compared)
        add_measured(job.output, summary(compared.both, Path(job.eval_text).name))
        watcher.compared(made)
    if job.report is not None:
        if job.eval_text is not None:
            made = replace(made, layers=measure_layers(made, job.eval_text, watcher))
        write_report(job.report, page_records(made))
        watcher.drawn(made)
    return made


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
        opened = open_model(job.named)
        check_target(job.output, overwrite=job.overwrite, source=opened.directory)
        data = job.calibrate_on(opened.model, opened.tokenizer)
        # before all that takes long
        not_rehearsed = rehearse(opened.model, job.wanted, job.output, opened.tokenizer)
        if not_rehearsed is not None:
            self.note(f"saving was not rehearsed: {not_rehearsed}; what is written is looked at as always")
        smooth, chosen = (None, None) if job.search is None else self._searched(opened, data)
        schemes = job.wanted if chosen is None else chosen.schemes
        choice = Choice.of(opened.model, schemes, job.include, job.exclude, head=job.head, embeddings=job.embeddings)
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
        return self._made(replace(result, smooth=smooth or result.smooth), data, allocation=chosen)

    def _searched(self, opened: OpenedModel, data: Calibration | None) -> tuple[SmoothReport | None, Allocation]:
        """Smooth the model where that is asked for; what was done, and a scheme for each layer of what it then is.

        Its experts then have layers of their own.
        """
        job, search, model = self.job, self.job.search, opened.model
        assert search is not None, "asked for"
        wanted = Budget.of(search.limit)
        ids = encode(opened.tokenizer, content_of(search.text), opened.behind)
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
                embeddings=job.embeddings,
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
                scheme=job.wanted,
                calibration=data,
                include=job.include,
                exclude=job.exclude,
                head=job.head,
                embeddings=job.embeddings,
                overwrite=job.overwrite,
                dry_run=job.dry_run,
                before=self._planned,
                progress=step,
                **more,
            )
        return self._made(done, data, streamed=done)

    def _made(self, done: pipeline.Result | Streamed, data: Calibration | None, **more: Any) -> Made:
        described = None if data is None else data.description
        told = done.scheme, done.coverage, done.untied, done.smooth, described, self.findings
        return Made(self.job, *told, notes=tuple(self.notes), **more)

    def _planned(self, plan: Plan, prediction: Prediction) -> None:
        self.findings = plan.findings
        self.job.check_target(plan.findings)
        tell_unwanted(type(plan.choice.model).__name__, plan.unwanted)
        self.watcher.planned(plan, prediction)


def _shared() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

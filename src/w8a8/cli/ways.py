"""The three ways in which `quantize` does its work: in memory, from files to files, and block by block.

Each tells what it did on standard output, unless the job is quiet, and returns it for JSON.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.cli.app import default_length, open_named, quiet_transformers, show_coverage
from w8a8.cli.output import print_line, print_note, print_table, progress
from w8a8.errors import SchemeError


@dataclass(frozen=True)
class Job:
    """What was asked for.

    selection: include, exclude and head, as `w8a8.quantize` takes them.
    drawn: samples, length and seed of the calibration data.
    treatment: observer and smooth.
    budget: limit, text, options and seed, or None: every layer has the scheme.
    """

    model: str
    output: Path
    scheme: Any
    selection: dict[str, Any]
    calib: str | None
    drawn: dict[str, Any]
    treatment: dict[str, Any]
    budget: dict[str, Any] | None
    target: str | None
    force: bool
    dtype: str
    trust_remote_code: bool
    dry_run: bool
    quiet: bool

    def calibration(self, model: Any, tokenizer: Any) -> Any:
        """The calibration data, always the same; None where none was given.

        Args:
            model: For the length of its context; it may be empty.
            tokenizer: Of the texts.
        """
        from w8a8.calibration.data import Calibration

        if self.calib is None:
            return None
        length = self.drawn["length"] or min(default_length(model), 512)
        return Calibration.of(self.calib, tokenizer, **{**self.drawn, "length": length})

    def check_target(self, found: Iterable[Any]) -> None:
        """Raise `SchemeError` where the result is to be for vLLM and would be refused."""
        refused = [finding for finding in found if finding.refused]
        if self.target is not None and refused:
            raise SchemeError("\n  ".join(map(str, refused)))

    def running(self, found: list[Any], step: Any) -> dict[str, Any]:
        """What every job from files to files is told beside its own."""
        return {
            **self.selection,
            "overwrite": self.force,
            "dry_run": self.dry_run,
            "before": self.before(found),
            "progress": step,
        }

    def before(self, found: list[Any]) -> Callable[[Any, Any], None]:
        """What is done when the plan is made and nothing is written: `found` gets what vLLM would say."""

        from w8a8.checkpoint.reader import tell_unwanted

        def look(plan: Any, prediction: Any) -> None:
            found.extend(plan.findings)
            self.check_target(plan.findings)
            tell_unwanted(plan.model, plan.unwanted)
            if not self.quiet:
                _show_prediction(plan, prediction)

        return look


def in_memory(job: Job) -> dict[str, Any]:
    """Load the model, quantise and save it."""
    from w8a8.checkpoint.rehearsal import rehearse
    from w8a8.checkpoint.vllm import foresee
    from w8a8.checkpoint.writer import check_target, save
    from w8a8.model.choice import Choice
    from w8a8.pipeline import carry_out

    check_target(job.output, overwrite=job.force)
    opened = open_named(job.model, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    check_target(job.output, overwrite=job.force, source=opened.directory)
    data = job.calibration(opened.model, opened.tokenizer)
    not_rehearsed = rehearse(opened.model, job.scheme, job.output, opened.tokenizer)  # before all that takes long
    if not_rehearsed is not None:
        print_note(f"saving was not rehearsed: {not_rehearsed}; what is written is looked at as always")
    chosen, smooth, treatment = None, None, job.treatment
    if job.budget is not None:
        smooth, chosen = _allocated(job, opened, data)
        treatment = {**treatment, "smooth": "none"}  # it is done
    schemes = job.scheme if chosen is None else chosen.schemes
    choice = Choice.of(opened.model, schemes, **job.selection)
    foreseen = foresee(choice)
    job.check_target(foreseen)
    with progress("quantising") as step:
        result = carry_out(choice, calibration=data, **treatment, progress=step)
    save(opened.model, job.output, beside=opened.directory, covered=result.coverage, overwrite=job.force)
    told = _told(job, result, foreseen, smooth or result.smooth, data)
    if not job.quiet:
        if chosen is not None:
            print_line(str(chosen))
        print_line(f"Saved in {job.output}.")
    return told | {"budget": None if chosen is None else {**chosen.to_dict(), "record": chosen.record()}}


def _allocated(job: Job, opened: Any, data: Any) -> tuple[Any, Any]:
    """Smooth the model where that is asked for; what was done, and a scheme for each layer of what it then is.

    Its experts then have layers of their own.
    """
    from w8a8.analysis import Budget, allocate
    from w8a8.cli.app import content_of
    from w8a8.core.scheme import Scheme
    from w8a8.evaluation import encode
    from w8a8.model.choice import Choice
    from w8a8.model.selection import with_head
    from w8a8.model.swapping import swap
    from w8a8.pipeline import smooth_first

    assert job.budget is not None, "asked for"
    wanted = Budget.of(job.budget["limit"])
    ids = encode(opened.tokenizer, content_of(job.budget["text"]))
    include = with_head(opened.model, job.selection["include"], job.selection["head"])
    patterns = {"include": include, "exclude": job.selection["exclude"]}
    options = [Scheme.of(option) for option in job.budget["options"]]
    choice = Choice.of(opened.model, options[0], **patterns)
    with progress("smoothing") as step:
        smooth, _ = smooth_first(opened.model, choice.outside, options[0], data, job.treatment["smooth"], step)
    swap(opened.model, choice.experts)
    with progress("measuring") as step:
        allocation = allocate(
            opened.model,
            ids,
            wanted,
            options=options,
            **patterns,
            seed=job.budget["seed"],
            calibration=data,
            observer=job.treatment["observer"],
            progress=step,
        )
    if not any(allocation.schemes.values()):
        raise SchemeError(
            f"--budget {job.budget['limit']} leaves every layer float, {allocation.float_bytes:,} bytes in all: there "
            "is nothing to quantise; give a tighter budget"
        )
    return smooth, allocation


def streamed(job: Job, shard_bytes: int, *, forced: bool) -> dict[str, Any] | None:
    """Quantise from files to files; None where the model has to be loaded for it.

    Empty in the processes that share a job and do not speak.
    """
    from w8a8.directories import quantize_directory
    from w8a8.streaming.plan import UnplacedError

    found: list[Any] = []
    quiet_transformers()
    try:
        with progress("quantising") as step:
            done = quantize_directory(
                job.model, job.output, job.scheme, shard_bytes=shard_bytes, **job.running(found, step)
            )
    except UnplacedError as error:
        if forced or job.dry_run:
            raise
        print_note(f"not streamed, but in memory: {error}")
        return None
    return _streamed(job, done, found, None) if done.first else {}


def by_blocks(job: Job) -> dict[str, Any]:
    """Quantise block by block with calibration data, from files to files."""
    from w8a8.checkpoint.directory import Directory
    from w8a8.checkpoint.opening import open_tokenizer
    from w8a8.checkpoint.skeleton import check_counts, empty_model
    from w8a8.directories import quantize_directory

    found: list[Any] = []
    quiet_transformers()
    directory = Directory.of(job.model)
    check_counts(directory)
    data = job.calibration(empty_model(directory), open_tokenizer(directory))
    if job.treatment["smooth"] in (None, "auto") and not job.quiet:
        print_note("smoothing: searched group by group; the contest of auto takes the whole model, see --no-stream")
    with progress("calibrating") as step:
        done = quantize_directory(
            directory, job.output, job.scheme, calibration=data, **job.treatment, **job.running(found, step)
        )
    return _streamed(job, done, found, data)


def _streamed(job: Job, done: Any, found: list[Any], data: Any) -> dict[str, Any]:
    told = _told(job, done, found, done.smooth, data)
    if not job.quiet and job.dry_run:
        print_line("Nothing was written.")
    elif not job.quiet:
        if done.resumed:
            print_line(f"Gone on with: {done.resumed} of {done.shards} files were there already.")
        print_line(f"Saved in {job.output}.")
    return told | {"prediction": done.prediction, "shards": done.shards, "resumed": done.resumed}


def _told(job: Job, result: Any, found: Iterable[Any], smooth: Any, data: Any) -> dict[str, Any]:
    from w8a8.core.scheme import Scheme

    if not job.quiet:
        show_coverage(result.coverage)
        for finding in found:
            print_line(f"  {finding}")
        for name, other in result.untied.items():
            print_line(f"{name} was tied to {other} and is now an int8 copy of its own.")
        if smooth is not None:
            print_line(str(smooth))
        if data is not None and any(Scheme.of(module.scheme).static for module in result.coverage.quantized):
            print_line(f"Activation scales by {job.treatment['observer']} on {data.description}.")
    return {
        "output": job.output,
        "scheme": result.scheme.name,
        "untied": result.untied,
        "calibration": None if data is None else data.description,
        "smooth": None if smooth is None else smooth.to_dict(),
        "coverage": result.coverage.to_dict(),
        "worst_weights": list(result.coverage.worst_weights()),
        "vllm": list(found),
    }


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
    print_table(f"What {plan.source} will take", ("", "predicted", "here"), rows)

"""A directory of a float model quantised into another, without the model in memory: one call, with data or without.

Without data a piece of a tensor at a time (`streaming.pieces`), with data block by block (`blockwise.calibrated`); the
life-cycle of the job is the same (`streaming.job`).  What calibration and smoothing need is imported where there is
data.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8.checkpoint.directory import Directory
from w8a8.core.progress import Progress
from w8a8.core.scheme import AUTO, Scheme
from w8a8.errors import SchemeError
from w8a8.model.kinds import kind_of, usual_scheme
from w8a8.model.roles import Embeddings, Head
from w8a8.records.streaming import Prediction, Streamed
from w8a8.streaming.job import Work, options, run
from w8a8.streaming.pieces import Pieces
from w8a8.streaming.plan import SHARD_BYTES, Plan, make_plan

if TYPE_CHECKING:
    from w8a8.calibration.observers import Observer
    from w8a8.smoothing.way import Smoothing


def quantize_directory(
    source: str | Path | Directory,
    output: str | Path,
    scheme: Scheme | str = AUTO,
    *,
    calibration: object = None,
    observer: "str | Callable[[], Observer]" = "absmax",
    smooth: "Smoothing | str | float | None" = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    head: Head | str = Head.FLOAT,
    embeddings: Embeddings | str = Embeddings.FLOAT,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    before: Callable[[Plan, Prediction], None] | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Quantise a model from files to files, without ever holding more of it than a block, or without data a piece.

    Killed at any time, the same call goes on.  Under `torchrun` the processes share the work without data; the
    directories must be common to them.

    Args:
        source: The directory or hub id of a float model; or one that is open.
        output: Where to.  Its parent must be on the disk that is to hold the result.
        scheme: A scheme that integers can run, or a weight-only one; "auto" is what is usual for the model.
        calibration: As for `w8a8.quantize`, but no loop: for static scales, for smoothing, or for both.
        observer: As for `w8a8.quantize`.
        smooth: With data "searched" (also for None and "auto", whose contest takes the whole model), an alpha, or
            "none"; without data nothing is smoothed.
        include, exclude, head, embeddings: As for `w8a8.quantize`.
        shard_bytes: Of a file of the result, by default 1 GiB; with data each block is a file.
        overwrite: Replace a checkpoint that is there already, at the end; throw away an unfinished result of another
            request.
        dry_run: Stop before the first byte is written.
        before: Called with the plan and what the job will take, by the first process.
        progress: Called after each tensor, or with data after each block.

    Raises:
        CheckpointError: the source is torn or cannot be placed; the target exists; memory or disk will not do; the
            disk became full (the same call goes on); an unfinished result of another request is in the way; several
            processes are to share a job with data.
        SchemeError: there is nothing to do with the data, or no data for what is asked; as `w8a8.quantize`.
        ModelError: with data: the model has no blocks that are called one after another, or a fold cannot be kept; as
            `w8a8.quantize`.
        CalibrationError, PatternError, NonFiniteError: as `w8a8.quantize`.
    """
    usual = scheme == AUTO  # of none does it depend what is refused: both that are usual are dynamic
    wanted, request = Scheme.of("w8a8" if usual else scheme), None
    asked: dict[str, Any] = {"include": include, "exclude": exclude, "head": Head.of(head).value}
    asked["embeddings"] = Embeddings.of(embeddings).value
    if calibration is None:
        wanted.check_without_data()
        if smooth is not None and smooth != "none":
            from w8a8.smoothing.way import Smoothing

            Smoothing.asked(smooth, calibrated=False)
    elif shard_bytes is not None:
        raise SchemeError(f"shard_bytes={shard_bytes} was given with calibration data: then each block is a file")
    else:
        from w8a8.blockwise.calibrated import Blocks
        from w8a8.blockwise.request import request_of
        from w8a8.calibration.data import Calibration

        request = request_of(wanted, Calibration.of(calibration), observer, smooth)
    if usual:
        source = Directory.of(source)
        wanted = usual_scheme({kind_of(*source.architecture)})
        request = None if request is None else replace(request, scheme=wanted)
    size = SHARD_BYTES if shard_bytes is None else shard_bytes

    def work_on(directory: Directory) -> Work:
        plan = make_plan(directory, wanted, **asked, shard_bytes=size)
        decides = options(**asked)
        return Pieces(plan, decides | options(shard_bytes=size)) if request is None else Blocks(plan, request, decides)

    return run(source, output, work_on, overwrite=overwrite, dry_run=dry_run, before=before, progress=progress)

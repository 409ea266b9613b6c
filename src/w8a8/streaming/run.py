"""The job: plan, predict, write what is missing of the shards, and give the directory its name.

The result is made in `.NAME.partial` beside its place, with a journal (`journal`), and renamed when config.json,
index and the other files of a model are there too: nothing that has the name is incomplete.  Killed at any time, the
same call goes on; the bytes of the result depend on the source and the request alone, not on how often it was killed
or how many processes shared the shards.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w8a8._version import __version__
from w8a8.checkpoint.beside import companions, copy_companions
from w8a8.checkpoint.files import CONFIG, INDEX, resolve, tensor_files
from w8a8.checkpoint.headers import read_header
from w8a8.checkpoint.verify import verify_structure
from w8a8.checkpoint.writer import check_target, replace_directory
from w8a8.core.progress import Progress
from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError, W8A8Error
from w8a8.model.coverage import Coverage
from w8a8.streaming.journal import Journal, disk_error, locked, write_whole
from w8a8.streaming.plan import Plan, Shard, make_plan
from w8a8.streaming.resources import Prediction, predict
from w8a8.streaming.shard import write_shard
from w8a8.streaming.source import sampled_digest
from w8a8.streaming.team import Team, team

SHARD_BYTES = 1 << 30
"""Of a file of the result, and so what a kill loses at most for each process."""


@dataclass(frozen=True)
class Streamed:
    """What `quantize_directory` did, or would do.

    resumed: How many shards an earlier run had finished.
    first: Whether this process is the one that speaks for all that share the job.
    """

    output: Path
    scheme: Scheme
    coverage: Coverage
    untied: dict[str, str]
    prediction: Prediction
    shards: int
    resumed: int
    first: bool


def quantize_directory(
    source: str | Path,
    output: str | Path,
    scheme: Scheme | str = "w8a8",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    head: str = "float",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    dry_run: bool = False,
    before: Callable[[Plan, Prediction], None] | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Quantise a model from files to files, without ever holding it.

    Under `torchrun` the processes share the shards; the directories must be common to them.

    Args:
        source: The directory or hub id of a float model.
        output: Where to.  Its parent must be on the disk that is to hold the result.
        scheme: A scheme that integers can run, or a weight-only one, without static activations.
        include, exclude, head: As for `w8a8.quantize`.
        shard_bytes: Of a file of the result.
        overwrite: Replace a checkpoint that is there already, at the end; throw away an unfinished result of another
            request.
        dry_run: Stop before the first byte is written.
        before: Called with the plan and what the job will take, by the first process.
        progress: Called after each tensor.

    Raises:
        CheckpointError: the source is torn or cannot be placed; the target exists; memory or disk will not do; the
            disk became full (the same call goes on); an unfinished result of another request is in the way.
        SchemeError, PatternError, ModelError, NonFiniteError: as `w8a8.quantize`.
    """
    scheme, target = Scheme.of(scheme), Path(output).absolute()
    with team() as us:
        directory = us.first_then_others(lambda: resolve(source))
        check = _only_first(us, lambda: check_target(target, overwrite=overwrite, source=directory))
        us.together(check)
        plan = us.together(
            lambda: make_plan(directory, scheme, include=include, exclude=exclude, head=head, shard_bytes=shard_bytes)
        )
        partial = target.with_name(f".{target.name}.partial")
        known = fingerprint(plan, {"include": include, "exclude": exclude, "head": head, "shard_bytes": shard_bytes})
        if dry_run:
            prediction = us.together(lambda: _predicted(plan, target, us, before, 0))
            return _told(plan, target, us, prediction, 0)
        with locked(partial, us.rank):
            journal = us.first_then_others(lambda: Journal(partial, known, us.rank, restart=overwrite))
            finished = [shard for shard in plan.shards if journal.done(shard.file)]
            done = sum(step.bytes for shard in finished for step in shard.steps)
            try:
                prediction = us.together(lambda: _predicted(plan, target, us, before, done))
            except W8A8Error:
                if not finished:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            us.together(lambda: _write(plan, us, journal, partial, {shard.file for shard in finished}, progress))
            lost = us.together(journal.weight_sqnr_db)
            us.together(_only_first(us, lambda: complete(plan, partial, target, journal)))
        plan = replace(plan, coverage=plan.coverage.with_weight_sqnr(lost))
        return _told(plan, target, us, prediction, len(finished))


def _write(
    plan: Plan, us: Team, journal: Journal, partial: Path, finished: set[str], progress: Progress | None
) -> None:
    """This process's share of the shards that are missing."""
    mine = [shard for i, shard in enumerate(s for s in plan.shards if s.file not in finished) if i % us.size == us.rank]
    total, done = sum(len(shard.steps) for shard in mine), 0
    for shard in mine:

        def told(step: Any) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total, step.name)

        written = write_shard(shard, partial, told)
        journal.record(shard.file, {shard.file: written.digest}, written.weight_sqnr_db)


def complete(plan: Plan, partial: Path, target: Path, journal: Journal) -> None:
    """Write what is beside the weights, look at the whole, and give it its name."""
    try:
        copy_companions(plan.source, partial)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise disk_error(error, partial) from error
    write_whole(partial / CONFIG, json.dumps(plan.config, indent=2, sort_keys=True) + "\n")
    if len(plan.shards) > 1:
        write_whole(partial / INDEX, json.dumps(_index(plan.shards), indent=2, sort_keys=True) + "\n")
    verify_structure(partial)
    journal.clear()
    for path in partial.glob(".*"):  # what was growing when it was killed, and what passes between blocks
        path.unlink()
    replace_directory(target, partial)


def _index(shards: Sequence[Shard]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(step.bytes for shard in shards for step in shard.steps)},
        "weight_map": {name: shard.file for shard in shards for name, _, _ in shard.outputs},
    }


def _predicted(
    plan: Plan, target: Path, us: Team, before: Callable[[Plan, Prediction], None] | None, finished: int
) -> Prediction:
    found = predict(plan, target, processes=us.size, here=us.local, finished_bytes=finished)
    if us.rank == 0 and before is not None:
        before(plan, found)
    found.check(target)
    return found


def fingerprint(plan: Plan, request: dict[str, Any]) -> dict[str, str]:
    """What decides the bytes of the result."""
    found = {"version of w8a8": __version__, "scheme": str(plan.scheme)}
    for name, value in request.items():  # the command gives lists, Python's defaults are tuples
        found[f"option {name}"] = str(list(value) if isinstance(value, tuple) else value)
    for path in (plan.source / CONFIG, *companions(plan.source)):
        found[f"source {path.relative_to(plan.source)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(tensor_files(plan.source)):
        status, entries = path.stat(), read_header(path)
        header = str(sorted(entries.items())).encode(errors="surrogatepass")
        found[f"source {path.name}"] = (
            f"{status.st_size} bytes, modified {status.st_mtime_ns}, "
            f"tensors {hashlib.sha256(header).hexdigest()[:16]}, "
            f"values {sampled_digest(path, [*entries.values()])[:16]}"
        )
    return found


def _told(plan: Plan, target: Path, us: Team, prediction: Prediction, resumed: int) -> Streamed:
    shards = len(plan.shards)
    return Streamed(target, plan.scheme, plan.coverage, plan.untied, prediction, shards, resumed, us.rank == 0)


def _only_first(us: Team, step: Callable[[], None]) -> Callable[[], None]:
    return step if us.rank == 0 else lambda: None

"""The life-cycle of a job from files to files, in whichever way the shards are made.

    begin      the processes that share it, the source, the target, the plan
    go on      `.NAME.partial` beside the target, locked, with a journal (`journal`) of the shards that are whole
    predict    what the rest will take, before its first byte
    make       what is missing of the shards (`Work`): `pieces`, or `w8a8.blockwise`, which reads calibration data
    finish     config.json, index and the other files of a model, a look at the whole, and its name

Nothing that has the name is incomplete.  Killed at any time, the same call goes on; the bytes of the result depend on
the source and the request alone, not on how often it was killed or how many processes shared the shards.
"""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import torch

from w8a8._version import __version__
from w8a8.checkpoint.about import card_of
from w8a8.checkpoint.beside import README, companions, copy_companions
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import CONFIG, INDEX
from w8a8.checkpoint.verify import verify_structure
from w8a8.checkpoint.writer import check_target, replace_directory
from w8a8.core.progress import Progress
from w8a8.errors import CheckpointError, W8A8Error
from w8a8.records.coverage import Coverage
from w8a8.records.smoothing import SmoothReport
from w8a8.records.streaming import Prediction, Streamed
from w8a8.streaming.journal import Journal, disk_error, locked, write_whole
from w8a8.streaming.plan import Plan
from w8a8.streaming.source import sampled_digest
from w8a8.streaming.team import Team, team


class Work(ABC):
    """A way to make the shards of a plan.

    plan: What becomes of every tensor.
    decides: What else decides the bytes of the result, by names that a user understands.
    finished: The files of the shards that an earlier run made; none before `go_on`, and in a dry run.
    journal: Of the job, from `go_on` on.
    """

    journal: Journal

    def __init__(self, plan: Plan, decides: Mapping[str, str]) -> None:
        self.plan = plan
        self.decides = decides
        self.finished: Set[str] = frozenset()

    def go_on(self, journal: Journal) -> None:
        """Take up what an earlier run left."""
        self.journal = journal
        # each is read again, and hashed, once
        self.finished = {shard.file for shard in self.plan.shards if journal.done(shard.file)}

    @abstractmethod
    def predict(self, target: Path, us: Team) -> Prediction:
        """What the rest will take."""

    @abstractmethod
    def make(self, us: Team, progress: Progress | None) -> SmoothReport | None:
        """This process's share of what is missing, each shard recorded; what smoothing did, where it was asked for."""


def run(
    source: str | Path | Directory,
    output: str | Path,
    work_on: Callable[[Directory], Work],
    *,
    overwrite: bool,
    dry_run: bool,
    before: Callable[[Plan, Prediction], None] | None,
    progress: Progress | None,
) -> Streamed:
    """Do a job, or go on with it: `quantize_directory`, of which `work_on` plans the work, from the source."""
    target = Path(output).absolute()
    with torch.inference_mode(False), team() as us:  # what is made of files has no part in a mode of its caller
        directory = us.first_then_others(lambda: Directory.of(source))
        us.together(_only_first(us, lambda: check_target(target, overwrite=overwrite, source=directory.path)))
        partial = target.with_name(f".{target.name}.partial")
        work = us.together(lambda: work_on(directory))
        plan = work.plan
        known = us.together(lambda: fingerprint(plan, work.decides))

        def predicted() -> Prediction:
            found = work.predict(target, us)
            if us.rank == 0 and before is not None:
                before(plan, found)
            found.check(target)
            return found

        def told(prediction: Prediction, coverage: Coverage, smooth: SmoothReport | None) -> Streamed:
            counts, untied = (len(plan.shards), len(work.finished)), plan.choice.copied
            return Streamed(target, plan.scheme, coverage, untied, smooth, prediction, *counts, us.rank == 0)

        if dry_run:
            return told(us.together(predicted), plan.coverage, None)
        with locked(partial, us.rank):
            journal = us.first_then_others(lambda: Journal(partial, known, us.rank, restart=overwrite))
            work.go_on(journal)
            try:
                prediction = us.together(predicted)
            except W8A8Error:
                if not work.finished:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            smooth = us.together(lambda: work.make(us, progress))
            lost = us.together(journal.weight_sqnr_db)
            covered = plan.coverage.with_weight_sqnr(lost)
            us.together(_only_first(us, lambda: complete(plan, covered, partial, target, journal)))
        return told(prediction, covered, smooth)


def complete(plan: Plan, covered: Coverage, partial: Path, target: Path, journal: Journal) -> None:
    """Write what is beside the weights, look at the whole, and give it its name."""
    try:
        copy_companions(plan.source.path, partial)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise disk_error(error, partial) from error
    write_whole(partial / CONFIG, json.dumps(plan.config, indent=2, sort_keys=True) + "\n")
    if len(plan.shards) > 1:
        places = {name: shard.file for shard in plan.shards for name, _, _ in shard.outputs}
        index = {"metadata": {"total_size": sum(step.bytes for step in plan.steps)}, "weight_map": places}
        write_whole(partial / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    written = Directory.of(partial)
    verify_structure(written)
    conv1d = any(step.transposed for step in plan.steps)
    card = card_of(partial, written, covered, plan.findings, conv1d=conv1d, source=plan.source)
    write_whole(partial / README, card)
    journal.clear()
    for path in partial.glob(".*"):  # what was growing when it was killed, and what passes between blocks
        path.unlink()
    replace_directory(target, partial)


def fingerprint(plan: Plan, decides: Mapping[str, str]) -> dict[str, str]:
    """What decides the bytes of the result: the version, the scheme, the source, and what the work adds."""
    found = {"version of w8a8": __version__, "scheme": str(plan.scheme), **decides}
    for path in (plan.source.config_file, *companions(plan.source.path)):
        found[f"source {path.relative_to(plan.source.path)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path, entries in plan.source.files.items():
        status = path.stat()
        header = str(sorted(entries.items())).encode(errors="surrogatepass")
        found[f"source {path.name}"] = (
            f"{status.st_size} bytes, modified {status.st_mtime_ns}, "
            f"tensors {hashlib.sha256(header).hexdigest()[:16]}, "
            f"values {sampled_digest(path, [*entries.values()])[:16]}"
        )
    return found


def options(**given: object) -> dict[str, str]:
    """Options of a call as a fingerprint has them: patterns in a tuple or a list are the same."""
    # the command gives lists, Python's defaults are tuples
    return {f"option {name}": str(list(v) if isinstance(v, tuple) else v) for name, v in given.items()}


def _only_first(us: Team, step: Callable[[], None]) -> Callable[[], None]:
    return step if us.rank == 0 else lambda: None

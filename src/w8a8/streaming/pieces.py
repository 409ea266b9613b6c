"""Without data: the shards are made a piece of a tensor at a time, and shared among the processes of the job."""

from itertools import count
from pathlib import Path

from w8a8.core.progress import Progress, tell
from w8a8.records.streaming import Prediction
from w8a8.streaming.job import Work
from w8a8.streaming.plan import Step
from w8a8.streaming.resources import predict
from w8a8.streaming.shard import write_shard
from w8a8.streaming.team import Team


class Pieces(Work):
    """Every shard on its own (`shard`)."""

    def predict(self, target: Path, us: Team) -> Prediction:
        done = sum(step.bytes for shard in self.plan.shards if shard.file in self.finished for step in shard.steps)
        return predict(self.plan, target, processes=us.size, here=us.local, finished_bytes=done)

    def make(self, us: Team, progress: Progress | None) -> None:
        missing = [shard for shard in self.plan.shards if shard.file not in self.finished]
        mine = missing[us.rank :: us.size]
        total, done = sum(len(shard.steps) for shard in mine), count(1)

        def told(step: Step) -> None:
            tell(progress, next(done), total, step.name)

        for shard in mine:
            written = write_shard(shard, self.journal.partial, told)
            self.journal.record(shard.file, {shard.file: written.digest}, written.weight_sqnr_db)

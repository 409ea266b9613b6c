"""What a job from files to files takes, and what it came to."""

from dataclasses import dataclass
from pathlib import Path

from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError
from w8a8.records.coverage import Coverage
from w8a8.records.smoothing import SmoothReport


@dataclass(frozen=True)
class Prediction:
    """What the job will take, and what there is.  Bytes, and seconds.

    write_seconds: Of `seconds`, what one byte of output takes.
    """

    peak_bytes: int
    memory_bytes: int
    output_bytes: int
    free_bytes: int
    source_bytes: int
    seconds: float
    write_seconds: float = 0.0

    def check(self, target: Path) -> None:
        """Raise `CheckpointError` where memory or disk will not do."""
        if self.output_bytes > self.free_bytes:
            raise CheckpointError(
                f"{target} will take {self.output_bytes / 1e9:.2f} GB, and {self.free_bytes / 1e9:.2f} GB are free "
                "there; make room, or choose another disk"
            )
        if self.peak_bytes > self.memory_bytes:
            raise CheckpointError(
                f"the job will take {self.peak_bytes / 1e9:.2f} GB of memory, and {self.memory_bytes / 1e9:.2f} GB are "
                "available; close other programs, or take fewer processes"
            )


@dataclass(frozen=True)
class Streamed:
    """What a job did, or would do.

    smooth: What smoothing did to the blocks; None where nothing was smoothed.
    shards, resumed: Files of weights, and how many an earlier run had finished.
    first: Whether this process is the one that speaks for all that share the job.
    """

    output: Path
    scheme: Scheme
    coverage: Coverage
    untied: dict[str, str]
    smooth: SmoothReport | None
    prediction: Prediction
    shards: int
    resumed: int
    first: bool

"""What passes from block to block, kept on the disk: a safetensors file of one tensor per batch.

A file is written while the block before it runs, batch by batch, so only one batch is in memory; reading maps it, and
what of it stays in memory is the page cache's decision.  It is also what a job that was killed goes on from, which is
why it is written however small it is.  The alternative, to keep activations in memory below a bound, saves the writing
and makes a kill cost everything.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from w8a8.blockwise.blocks import State
from w8a8.errors import ModelError
from w8a8.streaming.shard import ShardWriter


def state_bytes(states: Sequence[State]) -> int:
    """What one file takes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in states)


class Recorder(ShardWriter):
    """Writes one file.  `take` as a calibration's `record`, then `finish`."""

    def __init__(self, path: Path, states: Sequence[State]) -> None:
        self._states = list(states)
        super().__init__(path, [(_name(i), dtype, shape) for i, (dtype, shape) in enumerate(states)])

    def take(self, batch: int, values: Tensor) -> None:
        """Take in what left the block on a batch; each batch once.

        Raises:
            ModelError: the block changes the shape or the dtype of what it is given.
            CheckpointError: the disk is full.
        """
        found = (values.dtype, tuple(values.shape))
        if found != self._states[batch]:
            raise ModelError(
                f"a block made {found} of {self._states[batch]}: blocks that change shape or dtype cannot be walked "
                "one by one; quantise the model in memory: leave out --stream"
            )
        self.put(_name(batch), values.detach().contiguous())


class Reader:
    """Reads one file."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt", device="cpu")

    def __call__(self, batch: int) -> Tensor:
        """What entered the block on a batch; a mapping of the file."""
        values: Tensor = self._file.get_tensor(_name(batch))
        return values


def _name(batch: int) -> str:
    return f"batch.{batch}"

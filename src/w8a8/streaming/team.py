"""The processes that share a job: `torchrun` starts them, torch.distributed lets them wait for one another.

Alone, all of it does nothing.  A step that fails in one process fails in all, so that none waits for ever.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from w8a8.errors import CheckpointError, ElsewhereError, W8A8Error

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process's number, and how many there are, here (`local`) and in all."""

    rank: int = 0
    size: int = 1
    local: int = 1

    def together(self, step: Callable[[], T]) -> T:
        """Run a step in every process, and go on when all have ended well.

        Raises:
            W8A8Error: the step's own, in the first process that has one.
            ElsewhereError: in the others, so that a machine prints one message.
            CheckpointError: in the first process of every other machine, with the same message.
        """
        failed: W8A8Error | None = None
        result: T | None = None
        try:
            result = step()
        except W8A8Error as error:
            failed = error
        if self.size > 1:
            messages: list[str | None] = [None] * self.size
            dist.all_gather_object(messages, None if failed is None else failed.explain())
            first = next((i for i, message in enumerate(messages) if message is not None), self.rank)
            if first != self.rank:
                here = first // self.local == self.rank // self.local
                kind = ElsewhereError if here or self.rank % self.local else CheckpointError
                raise kind(f"process {first} failed: {messages[first]}") from failed
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]

    def first_then_others(self, step: Callable[[], T]) -> T:
        """Run a step in process 0, and when it has ended well in the others."""
        if self.rank == 0:
            result = self.together(step)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(step)


def processes() -> int:
    """How many share the job: those that torchrun started, or one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def team() -> Iterator[Team]:
    """The processes that torchrun started, or this one alone."""
    if processes() == 1:
        yield Team()
        return
    ours = not dist.is_initialized()
    if ours:
        with _stdout_to_stderr():  # gloo greets there with torch 2.8, in the middle of --json
            dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        if ours:
            dist.destroy_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What C++ code writes on standard output goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)

"""Who is told how a job goes.  Nothing heavy is imported for it, so that a command can have its own at once."""

import contextlib
from typing import TYPE_CHECKING, Any

from w8a8.core.progress import Progress

if TYPE_CHECKING:
    from w8a8.records.streaming import Prediction
    from w8a8.streaming.plan import Plan


class Watcher:
    """Who is told how a job goes; this one is told and says nothing."""

    def stage(self, label: str) -> contextlib.AbstractContextManager[Progress]:
        """A part of the work, for as long as it takes; what it gives is called after each step of it."""
        return contextlib.nullcontext(lambda done, total, name: None)

    def note(self, text: str) -> None:
        """What a user should know; the result has it among its notes."""

    def planned(self, plan: "Plan", prediction: "Prediction") -> None:
        """What becomes of which file, and what that will take, before its first byte is written."""

    def made(self, made: Any) -> None:
        """The directory is whole, or would be after a dry run; a `w8a8.Made` says what it is."""

    def compared(self, made: Any) -> None:
        """It was compared with the float model."""

    def drawn(self, made: Any) -> None:
        """Its page is written."""

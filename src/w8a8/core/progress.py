"""How long work tells where it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, name) after each step of a long walk."""


def tell(progress: Progress | None, done: int, total: int, name: str) -> None:
    """Where there is somebody to be told."""
    if progress is not None:
        progress(done, total, name)

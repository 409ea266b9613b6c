"""How long work tells where it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, name) after each step of a long walk."""

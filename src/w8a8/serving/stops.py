"""Texts that end an answer: found across the pieces in which it comes, and not part of it."""

from collections.abc import Callable, Sequence


class Stops:
    """A queue's entrance that hands texts on until one of some texts has come.

    The end of what came is held back as long as it may be the beginning of one.

    Args:
        stop: Called once when one has come; None is put then, as at the end.
    """

    def __init__(self, stops: Sequence[str], put: Callable[[object], None], stop: Callable[[], None]) -> None:
        self._stops, self._put, self._stop = stops, put, stop
        self._held = ""
        self.stopped = False

    def put_nowait(self, item: object) -> None:
        """A text; or something else, which goes on behind what is held back: None, an error, a call of a tool."""
        if self.stopped:
            return
        if not self._stops or type(item) is not str:  # what is tagged (reasoning) is no answer
            if self._held:
                self._put(self._held)
                self._held = ""
            self._put(item)
            return
        text = self._held + item
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            if min(found):
                self._put(text[: min(found)])
            self.stopped, self._held = True, ""
            self._stop()
            self._put(None)
            return
        keep = max(_begins(text, stop) for stop in self._stops)
        if len(text) > keep:
            self._put(text[: len(text) - keep])
        self._held = text[len(text) - keep :]


def _begins(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of another."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)

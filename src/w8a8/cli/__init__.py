"""The command `w8a8`.

One call into the library per command; torch is imported inside commands, so that `--help` is instant.  A
user's mistake (`W8A8Error`) is one message and exit code 2; anything else keeps its traceback.  A process that is told
to end (SIGTERM, SIGHUP) leaves nothing half done, as one that is interrupted (SIGINT), and then ends by that signal.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from w8a8.errors import ElsewhereError, W8A8Error


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Have signals that end the process raise first, so that what is on its way is undone; then it ends by them.

    Whoever waits for the process sees what it would see otherwise: a shell 128 and the number.  A signal that is
    ignored, as under nohup, or that somebody handles stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one only
        yield
        return
    process, told = os.getpid(), list[int]()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child of fork, which has nothing to undo
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        told.append(number)
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    mine = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if told:
            signal.raise_signal(told[0])


@_ending_cleanly()
def main() -> None:
    from w8a8.cli.commands import app

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is told, and not at the interpreter's end
    except W8A8Error as error:
        if not isinstance(error, ElsewhereError):
            sys.stderr.write(f"w8a8: {error.explain()}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write(
            f"w8a8: {error.filename or 'the output'} cannot be written, the disk is full; make room, and repeat\n"
        )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it goes nowhere
        sys.exit(2)

"""The command `w8a8`.

One call into the library per command; torch is imported inside commands, so that `--help` is instant.  A
user's mistake (`W8A8Error`) is one message and exit code 2; anything else keeps its traceback.
"""

import errno
import os
import sys

from w8a8.errors import ElsewhereError, W8A8Error


def main() -> None:
    """Run the command line."""
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

"""The command `w8a8`.

One call into the library per command; torch is imported inside commands, so that `--help` is instant.  A
user's mistake (`W8A8Error`) is one message and exit code 2; anything else keeps its traceback.
"""

import sys

from w8a8.errors import ElsewhereError, W8A8Error


def main() -> None:
    """Run the command line."""
    from w8a8.cli.commands import app

    try:
        app()
    except W8A8Error as error:
        if not isinstance(error, ElsewhereError):
            sys.stderr.write(f"w8a8: {error.explain()}\n")
        sys.exit(2)

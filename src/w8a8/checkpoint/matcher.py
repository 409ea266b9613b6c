"""The program that matches a checkpoint's regular expressions, in a process of its own (`w8a8.checkpoint.expressions`).

Standard library only: it is run by its path, without the packages of its environment, and so starts in a few
milliseconds.  It reads {"expressions": [...], "names": [...]} and answers with a line of JSON for each expression: a
"1" or a "0" for each name, or {"error": why it is none}.
"""

import json
import re
import signal
import sys
from typing import TextIO


def answer(question: TextIO, out: TextIO) -> None:
    """One line for each expression, as soon as it is known."""
    asked = json.load(question)
    for expression in asked["expressions"]:
        told: str | dict[str, str]
        try:
            match = re.compile(expression).match
            told = "".join("1" if match(name) else "0" for name in asked["names"])
        except (re.error, RecursionError, OverflowError) as error:
            told = {"error": str(error)}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    if hasattr(signal, "alarm"):
        signal.alarm(int(sys.argv[1]))  # ends even inside of `re`, and even when nobody waits any more
    answer(sys.stdin, sys.stdout)

"""Regular expressions from other people's files, matched without giving them this process.

`(a|aa)+$` takes Python's `re` a time that doubles with every character or two of a name, `re.compile` alone can take
a second for 1,000 characters, and neither can be interrupted from another thread.
So one process without packages (`w8a8.checkpoint.matcher`, 25 ms) compiles and matches all expressions of a directory
with all names, by the `re` that compressed-tensors has them matched with, and is killed when its time is over.

Not taken: the package `regex` with its timeout.  It came back after 52 s where 0.2 s were allowed, took 8 GB for
`((a{1000}){1000}){100}`, and reads braces otherwise.  A library of linear time knows no lookahead, which files use.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from w8a8.errors import CheckpointError

MAX_LENGTH = 1000
"""Characters of an expression."""
MAX_EXPRESSIONS = 1000
"""Of one directory."""
LIMIT_S = 10
"""Seconds for all of them with all names; 20 expressions and 50,000 names take half a second."""
_PROGRAM = Path(__file__).with_name("matcher.py")
_WAY_OUT = "name the layers themselves in its quantization_config, or write it without repetitions inside repetitions"


def matching(expressions: Sequence[str], names: Sequence[str], where: str) -> dict[str, set[str]]:
    """Which names each expression matches, from their start on (`re.match`).

    Args:
        expressions: Without "re:".
        where: The file that the expressions are from, for messages.

    Raises:
        CheckpointError: too many, one is no expression or too long, or their time is over.
    """
    if not expressions:
        return {}
    if len(expressions) > MAX_EXPRESSIONS:
        raise CheckpointError(
            f"{where}: {len(expressions)} regular expressions in quantization_config, the limit is {MAX_EXPRESSIONS}; "
            "name the layers themselves"
        )
    for expression in expressions:
        check_length(expression, where)
    question = json.dumps({"expressions": list(expressions), "names": list(names)}).encode()
    python = sys.executable or "python3"  # a program that embeds Python may have none
    command = [python, "-I", "-S", "-W", "ignore", str(_PROGRAM), str(LIMIT_S + 1)]
    why = f"took more than {LIMIT_S} s with {len(names)} module names"
    try:
        run = subprocess.run(command, input=question, capture_output=True, timeout=LIMIT_S)
        lines = run.stdout.split(b"\n")[:-1]
        last = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if run.returncode:
            why = f"cannot be matched: {last or f'the process was ended by signal {-run.returncode}'}"
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").split(b"\n")[:-1]  # the last one may be torn
    except OSError as error:
        raise CheckpointError(
            f"{where}: its regular expressions are matched by a process of its own, and {python!r} cannot be "
            f"started: {error.strerror}; run it under a Python interpreter, or name the layers themselves"
        ) from error
    found = {}
    for expression, line in zip(expressions, lines, strict=False):
        told = json.loads(line)
        if isinstance(told, dict):
            raise CheckpointError(f"{where}: {_shown(expression)} is not a regular expression: {told['error']}")
        found[expression] = {name for name, hit in zip(names, told, strict=True) if hit == "1"}
    if len(found) < len(expressions):
        raise CheckpointError(f"{where}: {_shown(expressions[len(found)])} {why}; {_WAY_OUT}")
    return found


def check_length(expression: str, where: str) -> None:
    """Raise `CheckpointError` where an expression has more than `MAX_LENGTH` characters."""
    if len(expression) > MAX_LENGTH:
        raise CheckpointError(
            f"{where}: {_shown(expression)} has {len(expression):,} characters, the limit is {MAX_LENGTH:,}; {_WAY_OUT}"
        )


def _shown(expression: str) -> str:
    return repr(f"re:{expression if len(expression) <= 80 else expression[:80] + '...'}")

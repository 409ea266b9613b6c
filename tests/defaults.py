"""The suite, once under each thing that a process may set for all of PyTorch.

    python -m tests.defaults [SETTING ...] [-- WHAT PYTEST IS GIVEN ...]

What a process sets is its own business and changes nothing that the package returns, holds or writes: every tensor that
is made names its dtype and its device.  tests/test_defaults.py compares a few large jobs under each setting; here every
test runs, with its own right values, while each call of the package finds the setting (tests/ambient.py says how).
A test of which that is not true is marked `not_under`, with the reason.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.ambient import SETTINGS, VARIABLE

ROOT = Path(__file__).parents[1]
_PARALLEL = ["--numprocesses=logical", "--maxprocesses=4", "--dist=worksteal"]


def run(setting: str, given: list[str]) -> bool:
    """Whether the tests pass under a setting; pytest tells it as they run, and a line says how long they took."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", VARIABLE: setting},
        check=False,
    )
    good = done.returncode == 0
    sys.stdout.write(f"{setting}: {'passed' if good else 'FAILED'} ({time.perf_counter() - began:.0f} s)\n")
    sys.stdout.flush()
    return good


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, given = arguments[:cut] or list(SETTINGS), arguments[cut + 1 :] or ["-m", "not slow", *_PARALLEL]
    unknown = [name for name in chosen if name not in SETTINGS]
    if unknown:
        sys.exit(f"there is no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    good = [run(name, given) for name in chosen]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tests that depend on the kernel, once for each way in which "auto" may be answered on some machine.

    python -m tests.preferences

The tests run with what this machine prefers, and of an order that no machine at hand has nobody would know: one
processor once had another first kernel, and with it fifteen failures and a hang.  So the tests that are marked
`kernels` run again, each time in a process of its own, with the environment variables that make this machine another
one: the native kernel in each instruction set that is here, torch_cpu first, the reference first, nothing compiled, and
nothing but the reference.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from w8a8.kernels import available, compiled, native

ROOT = Path(__file__).parents[1]
LIMIT_S = 900  # on busy cores; a single test that hangs is ended sooner
# without the native kernel a warning says once that another runs, and the tests take warnings for errors
_NOT_BUILT = ["-W", "ignore:kernel 'native' cannot run:UserWarning"]
# oneDNN then saturates, on x86, and torch_cpu finds itself unavailable
_NO_INT8 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def preferences() -> list[dict[str, str]]:
    """The environments, each of them one machine."""
    found: list[dict[str, str]] = []
    if native.unavailable_because() is None:
        found += [{"W8A8_ISA": name} for name, reason in compiled.instruction_sets().items() if reason is None]
    if available()["torch_cpu"] is None:
        found.append({"W8A8_KERNEL": "torch_cpu"})
    return [*found, {"W8A8_KERNEL": "reference"}, {"W8A8_NATIVE": "0"}, {"W8A8_NATIVE": "0", **_NO_INT8}]


def marked() -> list[str]:
    """The files that have tests for this, so that no other is imported."""
    return [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.kernels" in path.read_text()]


def run(preference: dict[str, str]) -> bool:
    """Whether the tests pass; one line is printed, and all that pytest says where they do not."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "kernels and not once",
        "-p",
        "no:cacheprovider",
        *_NOT_BUILT,
        *marked(),
    ]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **preference},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        good, told = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        good, told = False, f"{error.stdout or ''}\nnot finished after {LIMIT_S} s"
    name = " ".join(f"{key}={value}" for key, value in preference.items())
    said = "passed" if good else f"FAILED\n{told}"
    sys.stdout.write(f"{name}: {said} ({time.perf_counter() - began:.0f} s)\n")
    sys.stdout.flush()
    return good


def main() -> int:
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        return 0 if all(list(pool.map(run, preferences()))) else 1


if __name__ == "__main__":
    sys.exit(main())

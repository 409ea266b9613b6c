"""The tests that depend on the kernel, once for each way in which "auto" may be answered on some machine.

    python -m tests.preferences          those that are not slow
    python -m tests.preferences --slow   the slow ones

The tests run with what this machine prefers, and of an order that no machine at hand has nobody would know: one
processor once had another first kernel, and with it fifteen failures and a hang.  So the tests that are marked
`kernels` run again, each time in a process of its own, with the environment variables that make this machine another
one: the native kernel in each instruction set that is here but is not chosen, torch_cpu first, the reference first,
nothing compiled, and nothing but the reference.  An instruction set makes the same numbers in another way: for these
the tests of kernels and layers run; where another kernel is first, all that are marked.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 900  # on busy cores; a single test that hangs is ended sooner
# without the native kernel a warning says once that another runs, and the tests take warnings for errors
_NOT_BUILT = ["-W", "ignore:kernel 'native' cannot run:UserWarning"]
# what takes long to import and is not the package's is imported once, and each process of tests is a fork of that;
# libgomp looks at its start
os.environ["OMP_NUM_THREADS"] = "1"
_PROCESSES = multiprocessing.get_context("forkserver")
_MODELS = ("bert", "gpt2", "llama", "mixtral", "nemotron_h", "opt", "phimoe", "qwen2_moe", "qwen3_moe")
_PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "sentence_transformers",
        *(f"transformers.models.{name}.modeling_{name}" for name in _MODELS),
    ]
)
# oneDNN then saturates, on x86, and torch_cpu finds itself unavailable
_NO_INT8 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def preferences() -> list[dict[str, str]]:
    """The environments, each of them one machine."""
    from w8a8.kernels import (
        available,
        compiled,
        native,
    )  # not in the processes that run the tests, before they are told

    found: list[dict[str, str]] = []
    if native.unavailable_because() is None:
        sets = [name for name, reason in compiled.instruction_sets().items() if reason is None]
        found += [{"W8A8_ISA": name} for name in sets if name != compiled.instruction_set()]
    if available()["torch_cpu"] is None:
        found.append({"W8A8_KERNEL": "torch_cpu"})
    return [*found, {"W8A8_KERNEL": "reference"}, {"W8A8_NATIVE": "0"}, {"W8A8_NATIVE": "0", **_NO_INT8}]


def marked(preference: dict[str, str]) -> list[str]:
    """The files that have tests for this, so that no other is imported."""
    rooms = ["kernels", "layers"] if "W8A8_ISA" in preference else ["**"]
    paths = sorted({path for room in rooms for path in ROOT.glob(f"tests/{room}/test_*.py")})
    return [str(path) for path in paths if "pytest.mark.kernels" in path.read_text()]


def run(preference: dict[str, str], which: str) -> bool:
    """Whether the tests that are `which` pass; one line is printed, and all that pytest says where they do not."""
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile() as told:
        process = _PROCESSES.Process(target=_tests, args=(preference, which, told.name))
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        # an instruction set may have no slow tests of its own
        good = process.exitcode == 0 or (which == "slow" and process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED)
        said = "passed" if good else f"FAILED\n{Path(told.name).read_text()}\nexit code {process.exitcode}"
    name = " ".join(f"{key}={value}" for key, value in preference.items())
    sys.stdout.write(f"{name}: {said} ({time.perf_counter() - began:.0f} s)\n")
    sys.stdout.flush()
    return good


def _tests(preference: dict[str, str], which: str, told: str) -> None:
    """Run them in this process, which has imported nothing of the package; what is said goes to a file."""
    os.environ |= preference
    os.chdir(ROOT)
    with open(told, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # pytest's own asserts are woven in as modules are imported, and some have been
    options = ["-m", f"kernels and not once and {which}", "-p", "no:cacheprovider", "--assert=plain", *_NOT_BUILT]
    sys.exit(pytest.main([*options, *marked(preference)]))


def main() -> int:
    which = "slow" if sys.argv[1:] == ["--slow"] else "not slow"
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        return 0 if all(list(pool.map(lambda preference: run(preference, which), preferences()))) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The paths of AArch64 on any machine: the driver of tests/native, cross-compiled, on processors that qemu plays."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ambient import SETTINGS

ROOT = Path(__file__).parents[2]
TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
}  # Debian's packages
MISSING = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"AArch64 is not tried here: Debian's {MISSING} are not installed"),
    pytest.mark.not_under(*SETTINGS, reason="the driver is a program without PyTorch"),
]


@pytest.fixture(scope="module")
def driver():
    program = ROOT / "build/native/driver_arm"
    command = ["make", "-C", ROOT / "tests/native", Path("../..") / program.relative_to(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert made.returncode == 0, made.stderr
    return program


def run(driver, cpu, cases, isa=""):
    """The lines that the driver prints, which fails at the first number that is not equal."""
    command = ["qemu-aarch64-static", "-cpu", cpu, driver, str(cases)]
    environment = {**os.environ, "W8A8_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("cpu", "paths"),
    [
        ("max", ["portable", "neon_dot", "neon_i8mm"]),
        ("cortex-a76", ["portable", "neon_dot"]),
        ("cortex-a53", ["portable"]),
    ],
)
def test_every_path_of_the_processor_is_equal_and_the_best_is_chosen(driver, cpu, paths):
    lines = run(driver, cpu, 40)
    assert lines[0] == f"chosen: {paths[-1]}"
    assert [line.split()[0] for line in lines if "quotients equal" in line] == paths
    assert lines[-1] == "forked child: equal"


def test_a_path_is_forced_where_the_processor_has_it(driver):
    assert run(driver, "max", 0, "neon_dot")[0] == "chosen: neon_dot"
    assert run(driver, "max", 0, "portable")[0] == "chosen: portable"
    assert run(driver, "cortex-a76", 0, "neon_i8mm")[0] == "chosen: neon_dot"

"""The C++ kernels without Python: tests/native, with the product on matrix tiles over a model of the instructions."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ambient import SETTINGS
from w8a8.kernels import compiled

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="it takes g++ and make"),
    pytest.mark.not_under(*SETTINGS, reason="the driver is a program without PyTorch"),
]


@pytest.fixture(scope="module")
def driver():
    command = ["make", "-C", ROOT / "tests/native", "../../build/native/driver"]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert made.returncode == 0, made.stderr
    return ROOT / "build/native/driver"


@pytest.mark.slow  # and `make -C tests/native check`, which CI calls
def test_every_path_equals_naive_loops_tiles_too(driver):
    environment = {name: value for name, value in os.environ.items() if name != "W8A8_ISA"}
    done = subprocess.run([driver, "90"], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    equal = [line.split()[0] for line in lines if "quotients equal" in line]
    here = [name for name, reason in compiled.instruction_sets().items() if reason is None]
    assert equal == here + ["amx_model"] * (platform.machine() == "x86_64")
    assert lines[-1] == "forked child: equal"

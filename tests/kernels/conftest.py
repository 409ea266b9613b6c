import itertools

import pytest
import torch

from tests.conftest import needs
from w8a8.kernels import KERNELS, compiled

HERE = [pytest.param(name, marks=[needs(name), *[pytest.mark.once] * (name != "native")]) for name in KERNELS]
"""Every kernel by name; what cannot run on this machine skips and says why.

Where a test names its kernel nothing depends on what is preferred, but for the instruction set of native."""


@pytest.fixture
def every_isa():
    """Run something in each instruction set that is here, with one thread and with three."""
    forced = compiled.instruction_set()

    def run(function):
        found = []
        sets = [name for name, reason in compiled.instruction_sets().items() if reason is None]
        for name, threads in itertools.product(sets, (1, 3)):
            compiled.use_instruction_set(name)
            torch.set_num_threads(threads)
            found.append(function())
        return found

    yield run
    compiled.use_instruction_set(None if compiled.choices()[0].instruction_set == forced else forced)

import pytest

from tests.conftest import needs
from w8a8.kernels import KERNELS

HERE = [pytest.param(name, marks=[needs(name), *[pytest.mark.once] * (name != "native")]) for name in KERNELS]
"""Every kernel by name; what cannot run on this machine skips and says why.

Where a test names its kernel nothing depends on what is preferred, but for the instruction set of native."""

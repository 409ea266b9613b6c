import pytest

from tests.conftest import needs
from w8a8.kernels import KERNELS

HERE = [pytest.param(name, marks=needs(name)) for name in KERNELS]
"""Every kernel by name; what cannot run on this machine skips and says why."""

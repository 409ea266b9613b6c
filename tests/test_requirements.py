"""What pyproject.toml allows at the least is what constraints-oldest.txt installs, and so what was run."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
ROOT = Path(__file__).parents[1]
TOOLS = ("bench", "docs", "test")
"""Extras of which only a part is pinned: nothing of w8a8 rests on an old version of the rest."""


def parsed(lines):
    found = [Requirement(line) for line in lines]
    assert all(not requirement.marker for requirement in found)
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {extra: parsed(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
NEEDED = [
    *parsed(PROJECT["dependencies"]),
    *(requirement for extra, found in EXTRAS.items() if extra not in TOOLS for requirement in found),
]


def pins(file):
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    found = {}
    for requirement in parsed(line for line in lines if line):
        (pin,) = requirement.specifier
        assert pin.operator == "==", f"{file}: {requirement}"
        found[requirement.name.replace("_", "-")] = Version(pin.version)
    return found


def lower_bound(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">=", f"pyproject.toml: {requirement}"
    return Version(bound.version)


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_what_is_needed_is_run_at_its_lower_bound(requirement):
    assert pins("constraints-oldest.txt")[requirement.name] == lower_bound(requirement)


def test_compressed_tensors_is_compared_with_at_its_lower_bound():
    (peer,) = [requirement for requirement in EXTRAS["test"] if requirement.name == "compressed-tensors"]
    assert pins("constraints-oldest.txt")[peer.name] == lower_bound(peer)


def test_ci_runs_nothing_older():
    newer = pins("constraints.txt")
    assert all(newer[name] >= version for name, version in pins("constraints-oldest.txt").items() if name in newer)

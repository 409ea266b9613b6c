"""On what and when a figure was measured."""

import datetime
from importlib.metadata import distributions
from typing import Any

from w8a8.diagnosis import diagnose


def describe_machine() -> dict[str, Any]:
    """Versions, processor, threads and date, for a result file."""
    found = diagnose()
    machine = {what: value.partition(" /")[0] for what, value in found.machine.items()}  # no paths
    return {"date": datetime.date.today().isoformat(), **found.versions, **machine}


def versions(*peers: str) -> dict[str, str]:
    """The versions of those packages that are installed, for a result file."""
    installed = {distribution.name: distribution.version for distribution in distributions()}
    return {name: installed[name] for name in peers if name in installed}

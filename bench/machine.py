"""On what and when a figure was measured."""

import datetime
from typing import Any

from w8a8.diagnosis import diagnose


def describe_machine() -> dict[str, Any]:
    """Versions, processor, threads and date, for a result file."""
    found = diagnose()
    machine = {what: value.partition(" /")[0] for what, value in found.machine.items()}  # no paths
    return {"date": datetime.date.today().isoformat(), **found.versions, **machine}

"""On what and when a figure was measured, and where it is kept.

Results lie in bench/results/MACHINE/, so that a run on one machine leaves those of the others where they are.
"""

import datetime
import json
import re
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@cache
def describe_machine() -> dict[str, Any]:
    """Versions, processor, threads and date, for a result file."""
    from w8a8.jobs.diagnosis import diagnose  # not where a peer runs a script of ours, which may have no w8a8

    found = diagnose()
    machine = {what: value.partition(" /")[0] for what, value in found.machine.items()}  # no paths
    return {"date": datetime.date.today().isoformat(), **found.versions, **machine}


def versions(*peers: str) -> dict[str, str]:
    """The versions of those packages that are installed, for a result file."""
    installed = {re.sub(r"[-_.]+", "-", each.name).lower(): each.version for each in distributions()}
    return {name: installed[name] for name in peers if name in installed}


def name_of(machine: dict[str, Any]) -> str:
    """A machine's folder: its processor, and the best instruction set that the native kernel has there."""
    processor = re.sub(r"\(\w+\)| processor", "", machine["processor"].lower())
    best = machine["native kernel runs"].split()[0].rstrip(",")
    return re.sub(r"[^a-z0-9]+", "-", f"{processor} {best}").strip("-")


def kept(script: str) -> dict[str, Any]:
    """What a script measured on this machine before, or nothing."""
    path = RESULTS / name_of(describe_machine()) / f"{script}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def keep(script: str, result: dict[str, Any], path: Path | None = None) -> None:
    """Write what a script measured on this machine, to its folder or where it is asked for."""
    path = path or RESULTS / name_of(result["machine"]) / f"{script}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def results_of(script: str) -> list[dict[str, Any]]:
    """What a script measured, on every machine, the newest first.

    Raises:
        SystemExit: nowhere yet.
    """
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{script}.json"))]
    if not found:
        raise SystemExit(f"there are no results of bench/{script}.py; run it first")
    return sorted(found, key=lambda result: str(result["machine"]["date"]), reverse=True)

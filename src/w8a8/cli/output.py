"""What commands print: tables on a terminal, JSON where asked, progress on standard error."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from w8a8.core.plain import plain
from w8a8.core.progress import Progress
from w8a8.jobs.watching import Watcher
from w8a8.records.layers import LayerErrors


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; columns after the first that look like numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        cells = [row[i] for row in rows if row[i]]
        numbers = bool(cells) and all(cell[0].isdigit() or cell[0] in "-+" for cell in cells)
        table.add_column(column, justify="right" if i and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def print_line(text: str = "") -> None:
    """Plain text on standard output."""
    sys.stdout.write(text + "\n")


def print_note(text: str) -> None:
    """Plain text on standard error: what a user should know and a program should not read."""
    sys.stderr.write(text + "\n")


@contextlib.contextmanager
def progress(label: str, *, lines: bool = False) -> Iterator[Progress]:
    """A bar on standard error where that is a terminal; elsewhere silence, or a line for each step."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: print_note(f"{label}: {what} ({done}/{total})") if lines else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=f"{label}: {what}")


def quiet_transformers() -> None:
    """Its bars would run through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Watching(Watcher):
    """Bars and notes on standard error."""

    def __init__(self) -> None:
        quiet_transformers()

    def stage(self, label: str) -> contextlib.AbstractContextManager[Progress]:
        return progress(label)

    def note(self, text: str) -> None:
        print_note(text)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


ERRORS = {
    "weight dB": ("weight_sqnr_db", 1),
    "input dB": ("input_sqnr_db", 1),
    "output dB": ("output_sqnr_db", 1),
    "outliers": ("outlier_ratio", 1),
    "saturated": ("saturated_share", 4),
    "dead": ("dead_share", 3),
}
"""What `error_cells` tells of a layer: under each heading a field, and its digits."""


def error_cells(layer: LayerErrors) -> tuple[str, ...]:
    """A cell under each heading of `ERRORS`, empty for what has no value."""
    found = ((getattr(layer, field), digits) for field, digits in ERRORS.values())
    return tuple("" if value is None else f"{value:.{digits}f}" for value, digits in found)

"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.app import app
from w8a8.cli.output import print_line


@app.command()
def report(
    records: Annotated[
        Path, typer.Argument(metavar="RESULT.json", help="Records, as `w8a8.report.collect` makes them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.", show_default=False)],
) -> None:
    """Make one self-contained page from the records of a quantised model."""
    from w8a8.report import read_records, write_report

    write_report(output, read_records(records))
    print_line(f"Wrote {output}, {output.stat().st_size / 1e6:.2f} MB.")

"""The page: one HTML file with its styles, its script and its records inside.

A content policy forbids everything that the page does not carry: styles and the one script are allowed by their
hashes, pictures as data, and nothing may be fetched.  A name that got through the escaping could therefore still not
run.  Tables are written as HTML, so that the page reads without its script, which only sorts and filters.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from w8a8._version import __version__
from w8a8.errors import ReportError
from w8a8.report.markup import embedded, text
from w8a8.report.records import check
from w8a8.report.sections import headline, sections


def report(records: Mapping[str, object]) -> str:
    """A page from records.

    Args:
        records: As `w8a8.report.records` describes them: what JSON can hold.  Not modified.

    Returns:
        One HTML document that needs nothing else, in UTF-8.

    Raises:
        ReportError: the records do not follow the schema, or vl-convert, which draws the plots, is not installed.
    """
    read = check(records)
    style, script = (files("w8a8.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{read.headline.model} in {read.headline.scheme}"
    parts = sections(read)
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in parts)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{text(heading)}</h2>{content}</section>'
        for name, heading, content in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{style}</style></head><body>"
        f'<header><h1>{text(title)}</h1><button id="theme" class="button" type="button">Light or dark</button></header>'
        f'<main>{headline(read)}<nav aria-label="Sections">{links}</nav>{body}</main>'
        f'<footer><button id="save" class="button" type="button">Save the records</button> '
        f"Made by w8a8 {text(__version__)} from records of schema {read.schema}.</footer>"
        f'<div id="tip" role="tooltip" hidden></div>'
        f'<script type="application/json" id="records">{embedded(records)}</script><script>{script}</script>'
        "</body></html>\n"
    )


def write_report(path: str | Path, records: Mapping[str, object]) -> None:
    """Write the page of some records; a file that is there is replaced, at once or not at all.

    Raises:
        ReportError: as `report`, or the file cannot be written.
    """
    page = report(records)
    path = Path(path)
    part = _part(path)
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ReportError(f"the page cannot be written to {path}: {error}") from error


def check_place(path: Path) -> None:
    """Raise `ReportError` where a page could not be written to a path; leaves nothing there.

    Asked by writing: permissions do not tell of what is mounted read-only, nor of /proc.
    """
    if not path.absolute().parent.is_dir():
        raise ReportError(
            f"the page cannot be written to {path}: there is no directory {path.absolute().parent}; make it first"
        )
    if path.is_dir():
        raise ReportError(f"the page cannot be written to {path}: it is a directory; name a file in it")
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ReportError(f"the page cannot be written to {path}: {error}; choose another place") from error


def _part(path: Path) -> Path:
    """What a page is called until it is whole."""
    return path.with_name(path.name + ".part")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

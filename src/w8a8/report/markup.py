"""HTML from values: everything that comes from a model or a file is escaped here, and nowhere else.

Text goes through `html.escape`; data for a script element through `embedded`, which leaves nothing that could end the
element or that a parser of scripts treats specially.
"""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from w8a8.report.numbers import ABSENT


@dataclass(frozen=True)
class Column:
    """A column of a table.

    title: Its heading.
    shown: How a value reads; None is shown as a dash whatever this is.
    about: A line that explains the heading, empty where it needs none.
    """

    title: str
    shown: Callable[[Any], str] = str
    about: str = ""


Columns: TypeAlias = Sequence[Column | str]
"""Of a table; a heading alone where values read as they are."""


def text(value: object) -> str:
    """Escaped for an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def embedded(value: object) -> str:
    """JSON that can stand in a script element: no `<`, `>`, `&`, U+2028 or U+2029 is left as itself.

    Raises:
        ValueError: a number is not finite.
    """
    document = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        document = document.replace(character, f"\\u{ord(character):04x}")
    return document


def table(columns: Columns, rows: Sequence[Sequence[object]], *, caption: str, key: str | None = None) -> str:
    """A table; the first cell of a row is its heading.

    Args:
        columns: As many as each row has values.
        rows: Strings, numbers and None.
        caption: What it holds; read aloud, and shown where `key` is None.
        key: An id; its headings are then buttons that sort, and numbers carry their full value.
    """
    whole = [Column(each) if isinstance(each, str) else each for each in columns]
    heads, numeric = [], []
    for place, column in enumerate(whole):
        numbers = [row[place] for row in rows if row[place] is not None]
        numeric.append(bool(place and numbers and all(isinstance(v, int | float) for v in numbers)))
        right = ' class="n"' if numeric[-1] else ""
        about = f' title="{text(column.about)}"' if column.about else ""
        name = text(column.title)
        if key is not None:
            name = f'<button type="button" data-column="{place}">{name}<span aria-hidden="true"></span></button>'
        sort = "" if key is None else ' aria-sort="none"'
        heads.append(f'<th scope="col"{right}{about}{sort}>{name}</th>')
    body = "".join(
        "<tr>"
        + "".join(_cell(c, v, n, i == 0, key) for i, (c, v, n) in enumerate(zip(whole, row, numeric, strict=True)))
        + "</tr>"
        for row in rows
    )
    named = "" if key is None else f' id="{text(key)}"'
    hidden = "" if key is None else ' class="unseen"'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table{named}><caption{hidden}>{text(caption)}</caption>"
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def figure(title: str, drawing: str, note: str, data: str) -> str:
    """A plot with its heading, a line that says how to read it, and its table."""
    about = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<figure><figcaption>{text(title)}</figcaption>{drawing}{about}{folded('Table: ' + title, data)}</figure>"


def drawing(svg: str, title: str) -> str:
    """An SVG that scales with its column and has a name."""
    return svg.replace("<svg ", f'<svg role="group" aria-label="{text(title)}" ', 1)


def _cell(column: Column, value: object, numeric: bool, heading: bool, key: str | None) -> str:
    number = isinstance(value, int | float)
    shown = ABSENT if value is None else text(column.shown(value))
    if heading:
        return f'<th scope="row">{shown.replace(".", ".<wbr>")}</th>'  # a module's name breaks at its dots
    data = f' data-v="{value!r}"' if number and key is not None else ""
    kind = ' class="n"' if number or numeric else ""
    return f"<td{kind}{data}>{shown}</td>"

"""The texts of a file, one after another, never all of them.

    FILE.txt                    a text a line
    FILE.jsonl, FILE.tsv        the "text" of each object, or the column of that name

The file is read twice: first to count it and to find what cannot be read, before a model is opened, then to be
embedded.  So it has to be a file, and one that nobody writes to.  A line that is blank is a text too: a row of the
result is a line of the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w8a8.core.plain import Json
from w8a8.errors import TextError, closest
from w8a8.evaluation.judged import readable, rows_of

_COLUMN = "text"


@dataclass(frozen=True)
class Line:
    """A text, and the number of the line that it ends on."""

    number: int
    text: str


def each_text(path: Path) -> Iterator[Line]:
    """The texts in their order.

    Raises:
        TextError: the file cannot be read, is of another kind, or a line of it is no text.
    """
    with readable(path, "texts to embed"):
        if not path.is_file():
            raise TextError(f"{path} was given as texts to embed, and is no file; it is read twice, so a pipe is none")
        if path.suffix != ".txt":
            for number, row in rows_of(path):
                yield Line(number, _text(path, number, row))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield Line(number, line.removesuffix("\n"))


def count_texts(path: Path) -> int:
    """How many there are, all of them readable.

    Raises:
        TextError: as `each_text`; there is none.
    """
    found = sum(1 for _ in each_text(path))
    if not found:
        raise TextError(f"{path} was given as texts to embed, and holds none: give a text a line")
    return found


def pieces(lines: Iterator[Line], *, most: int, characters: int) -> Iterator[list[Line]]:
    """Runs of texts, each of at most so many texts, and of so many characters unless one text has more."""
    found: list[Line] = []
    size = 0
    for line in lines:
        if found and (len(found) == most or size + len(line.text) > characters):
            yield found
            found, size = [], 0
        found.append(line)
        size += len(line.text)
    if found:
        yield found


def _text(path: Path, number: int, row: Json) -> str:
    if _COLUMN not in row:
        raise TextError(f'{path}, line {number} has no "{_COLUMN}", {closest(_COLUMN, map(str, row))}: name it so')
    value = row[_COLUMN]
    if not isinstance(value, str):
        raise TextError(f"{path}, line {number}: {_COLUMN} is {value!r}, expected a text")
    return value

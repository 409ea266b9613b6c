"""Data that encoders are judged on, read from files: texts, pairs with scores, texts with labels, and what to find.

    FILE.txt                    texts, one a line
    FILE.jsonl, FILE.tsv        an object a line, or a first line that names the columns:
                                  sentence1, sentence2, score     how alike two texts are (the layout of STS)
                                  text, label                     what a classifier is to say
                                  text                            texts
    FOLDER                      the layout of BEIR: corpus.jsonl, queries.jsonl, qrels/test.tsv

Everything is read, and what does not fit is an error with its line, before a model is opened.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from w8a8.core.plain import Json
from w8a8.errors import TextError, closest

_PAIR = ("sentence1", "sentence2", "score")
_LABELLED = ("text", "label")
_QRELS = ("qrels/test.tsv", "qrels/dev.tsv", "qrels.tsv")


@dataclass(frozen=True)
class Texts:
    """Nothing is known of them, so two models are compared on them."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class ScoredPairs:
    """How alike, or how relevant to one another, two texts are by a person."""

    pairs: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Labelled:
    """Texts, each with the label that it has: a name, or the number of one."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Retrieval:
    """Texts to find among others.

    corpus, queries: By their ids.
    relevant: For each query the documents that answer it, and how well, from 1 on.
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, float]]


_Row = TypeVar("_Row")

Judged: TypeAlias = Texts | ScoredPairs | Labelled | Retrieval


def read_judged(path: Path) -> Judged:
    """What a file or a folder holds.

    Raises:
        TextError: it is not there, has none of these layouts, or a line does not fit.
    """
    with readable(path, "data to judge a model on"):
        if path.is_dir():
            return _retrieval(path)
        if path.suffix == ".txt":
            return Texts(_some(path, [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]))
        rows = list(rows_of(path))
    columns = _some(path, rows)[0][1].keys()
    if columns >= set(_PAIR):
        first, second, scores = (_column(path, rows, name) for name in _PAIR)
        found = tuple(_number(path, line, score) for (line, _), score in zip(rows, scores, strict=True))
        return ScoredPairs(tuple(zip(first, second, strict=True)), found)
    if columns >= set(_LABELLED):
        texts, labels = (_column(path, rows, name) for name in _LABELLED)
        return Labelled(texts, labels)
    if "text" in columns:
        return Texts(_column(path, rows, "text"))
    raise TextError(
        f"{path} has the columns {', '.join(columns)}: give {', '.join(_PAIR)}, or {', '.join(_LABELLED)}, or text"
    )


@contextmanager
def readable(path: Path, given_as: str) -> Iterator[None]:
    """A `TextError` where what a `with` block reads cannot be read."""
    try:
        yield
    except TextError:  # an OSError too
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TextError(f"{path} was given as {given_as}, and cannot be read: {error}") from error


def rows_of(path: Path) -> Iterator[tuple[int, Json]]:
    """Each line's number, and what it holds by the names of its columns."""
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
            for row in reader:
                yield reader.line_num, row
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    else:
        raise TextError(
            f"{path} ends in {path.suffix!r}: known are .txt (a text a line), .jsonl and .tsv, or a folder with "
            "corpus.jsonl, queries.jsonl and qrels/test.tsv"
        )


def _object(path: Path, number: int, line: str) -> Json:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TextError(f"{path}, line {number} holds a {type(found).__name__}, expected an object")
    return found


def _column(path: Path, rows: Sequence[tuple[int, Json]], name: str) -> tuple[str, ...]:
    found = []
    for number, row in rows:
        value = row.get(name)
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise TextError(f"{path}, line {number}: {name} is {value!r}, expected a text or a number")
        found.append(str(value))
    return tuple(found)


def _number(path: Path, line: int, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise TextError(f"{path}, line {line}: the score is {value!r}, expected a number")
    return number


def _some(path: Path, rows: Sequence[_Row]) -> tuple[_Row, ...]:
    if not rows:
        raise TextError(f"{path} is empty: there is nothing in it to judge a model on")
    return tuple(rows)


def _retrieval(folder: Path) -> Retrieval:
    corpus, queries = (_documents(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    qrels = next((folder / name for name in _QRELS if (folder / name).is_file()), None)
    if qrels is None:
        raise TextError(f"{folder} has none of {', '.join(_QRELS)}: which document answers which query is not told")
    relevant: dict[str, dict[str, float]] = {}
    for number, row in rows_of(qrels):
        query, document, score = (row.get(name) for name in ("query-id", "corpus-id", "score"))
        if query is None or document is None or score is None:
            raise TextError(f"{qrels}, line {number}: expected the columns query-id, corpus-id and score")
        for name, known, where in ((query, queries, "queries.jsonl"), (document, corpus, "corpus.jsonl")):
            if name not in known:
                raise TextError(f"{qrels}, line {number}: {name!r} is not in {where} ({closest(name, known)})")
        if _number(qrels, number, score) > 0:
            relevant.setdefault(query, {})[document] = float(score)
    if not relevant or len(corpus) < 2:
        raise TextError(f"{folder} has {len(corpus)} documents and {len(relevant)} queries with an answer among them")
    return Retrieval(corpus, {name: queries[name] for name in relevant}, relevant)


def _documents(path: Path) -> dict[str, str]:
    """Texts by their ids, each with its title before it."""
    found: dict[str, str] = {}
    for number, row in rows_of(path):
        name, text, title = row.get("_id"), row.get("text"), row.get("title") or ""
        if not isinstance(name, str) or not isinstance(text, str) or not isinstance(title, str) or name in found:
            raise TextError(f"{path}, line {number}: expected an _id of its own, and a text")
        found[name] = f"{title} {text}".strip()
    return dict(_some(path, list(found.items())))

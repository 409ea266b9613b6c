"""The records that a page is made from: the schema, and its check.

A file of records is one JSON object with `"schema": 1`.  Each part below is a dataclass, its fields are the keys, a
field with a default may be left out, and `X | None` may be null: nothing that was not measured has to be invented.
An unknown key is an error that names the closest known one, because a misspelt part would silently leave the page.

Units: bytes; nats for losses and divergences; dB for SQNR (10 log10 of signal power over error power); shares and
cosines as plain ratios.  Lists of channels hold absmax per input channel, or per run of neighbouring channels where
there are more than `MAX_COLUMNS`: their largest.

What the package tells of a module, a group or a layer anyway is here by its own dataclass (`w8a8.records`).

JSON Schema with a validator was the alternative: a dependency, a second description of the same types, and messages
that speak of the schema and not of the file.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from w8a8.errors import ReportError, closest, noted
from w8a8.records.coverage import ModuleCoverage, Totals
from w8a8.records.layers import MAX_COLUMNS, Channels, Choice, Histogram, Rankings, Remedy
from w8a8.records.smoothing import GroupReport

SCHEMA = 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; the ends are None where there was one window."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Headline:
    """What a reader wants first.

    Bytes are of the weights; perplexities are per token; tokens per second are of reading the text that was scored,
    with floats in these dtypes.  Of a model that predicts no tokens: how far its outputs are from the float model's, as
    `w8a8.evaluation.outputs` has it.
    """

    model: str
    scheme: str
    verdict: str
    bytes_before: int | None = None
    bytes_after: int | None = None
    tok_per_s_before: float | None = None
    tok_per_s_after: float | None = None
    dtype_before: str | None = None
    dtype_after: str | None = None
    perplexity_float: Interval | None = None
    perplexity_quantized: Interval | None = None
    bits_per_byte_float: Interval | None = None
    bits_per_byte_quantized: Interval | None = None
    kl_mean_nats: Interval | None = None
    kl_p99_nats: Interval | None = None
    top1_agreement: Interval | None = None
    output_error: Interval | None = None
    output_cosine: Interval | None = None
    output_cosine_p1: Interval | None = None
    same_label: Interval | None = None


@dataclass(frozen=True)
class Covered:
    """`Coverage.to_dict()`: totals of "quantized", "float" and "all", and every module."""

    totals: dict[str, Totals]
    modules: list[ModuleCoverage]


@dataclass(frozen=True)
class Layer:
    """What was measured of one linear layer, as `w8a8.records.layers.LayerSensitivity` has it, and less if need be."""

    name: str
    kind: str
    block: int | None = None
    shape: list[int] | None = None
    scheme: str | None = None
    weight_sqnr_db: float | None = None
    input_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    cosine: float | None = None
    saturated_share: float | None = None
    dead_share: float | None = None
    outlier_ratio: float | None = None
    kl_alone: float | None = None
    kl_spared: float | None = None


@dataclass(frozen=True)
class Smoothing:
    """Alpha per group, in the order of the forward; `kept` won the contest."""

    groups: list[GroupReport]
    kept: str | None = None


@dataclass(frozen=True)
class Budget:
    """The choices that were found; `chosen` is an index into `points`."""

    points: list[Choice]
    chosen: int | None = None
    constraint: str | None = None


@dataclass(frozen=True)
class Reproduce:
    """What it takes to get the same numbers again."""

    command: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Records:
    """Everything a page can show.  Only the headline must be there.

    measured_on: A sentence on the model and the data that layers, channels, histograms and remedies were measured on.
    """

    headline: Headline
    schema: int = SCHEMA
    coverage: Covered | None = None
    measured_on: str | None = None
    layers: list[Layer] = field(default_factory=list)
    rankings: Rankings | None = None
    channels: list[Channels] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    smoothing: Smoothing | None = None
    budget: Budget | None = None
    remedies: list[Remedy] = field(default_factory=list)
    reproduce: Reproduce = field(default_factory=Reproduce)


def read_records(path: Path) -> dict[str, Any]:
    """The records in a JSON file; `ReportError` where it is missing, no JSON, or does not follow the schema."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path} cannot be read as a JSON file of records: {error}") from error
    with noted(f"in {path}"):
        check(records)
    return dict(records)


def check(records: object) -> Records:
    """Records as dataclasses.

    Args:
        records: What JSON gives.  Not modified.

    Raises:
        ReportError: another schema; a key that is unknown or missing; a value of another type, not finite, or that
            contradicts another (edges and counts, more columns than a heat map has).  The place is named.
    """
    if not isinstance(records, dict) or records.get("schema") != SCHEMA:
        found = records.get("schema") if isinstance(records, dict) else type(records).__name__
        raise ReportError(
            f'records need "schema": {SCHEMA}, found {found!r}; '
            "a page is made from what `w8a8.report.collect` returns, by the version of w8a8 that wrote it"
        )
    read = _dataclass(Records, records, "records")
    for i, histogram in enumerate(read.histograms):
        where = f"records.histograms[{i}]"
        if len(histogram.edges) != len(histogram.counts) + 1:
            raise ReportError(
                f"{where} has {len(histogram.edges)} edges and {len(histogram.counts)} counts; n bins have n + 1 edges"
            )
        if any(a >= b for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)):
            raise ReportError(f"{where}.edges do not ascend; sort the bins and drop empty ones")
        if histogram.scale <= 0:
            raise ReportError(f"{where}.scale is {histogram.scale}; a grid's scale is positive")
    for i, row in enumerate(read.channels):
        columns = {len(row.before), len(row.before if row.after is None else row.after)}
        if len(columns) > 1 or not 1 <= max(columns) <= MAX_COLUMNS:
            raise ReportError(
                f"records.channels[{i}] has {len(row.before)} values before and "
                f"{len(row.after or [])} after; they are as many, 1..{MAX_COLUMNS}: `binned` makes them so"
            )
    if read.budget is not None and read.budget.chosen is not None:
        points = len(read.budget.points)
        if not 0 <= read.budget.chosen < points:
            raise ReportError(f"records.budget.chosen is {read.budget.chosen}; it counts the {points} points from 0")
    return read


def _dataclass(kind: type[_T], value: object, where: str) -> _T:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    hints = typing.get_type_hints(kind)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise ReportError(f"{where} has the unknown key {unknown[0]!r}; {closest(str(unknown[0]), hints)}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ReportError(f"{where} has no {f.name!r}; found {', '.join(map(repr, value)) or 'nothing'}")
    return kind(**{key: _value(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _value(hint: Any, value: object, where: str) -> Any:
    """A value as its annotation wants it: a dataclass, a list, a tuple, a dict, a union with None, or a plain type."""
    if isinstance(hint, types.UnionType):
        (inner,) = [option for option in typing.get_args(hint) if option is not types.NoneType]
        return None if value is None else _value(inner, value, where)
    sequence = typing.get_origin(hint)
    if sequence in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(where, "a list", value)
        inner = typing.get_args(hint)[0]
        return sequence(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        inner = typing.get_args(hint)[1]
        return {str(key): _value(inner, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)  # type: ignore[arg-type]
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, "a number", value)
        if not math.isfinite(value):
            raise ReportError(f"{where} is {value}, which JSON has not; write null for what was not measured")
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise _wrong(where, {int: "a whole number", str: "a text"}[hint], value)
    return value


def _wrong(where: str, wanted: str, value: object) -> ReportError:
    return ReportError(f"{where} should be {wanted}, found {type(value).__name__} {value!r:.60}")

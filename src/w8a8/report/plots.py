"""Plots as SVG, drawn when the page is made.

Vega-Lite specifications, turned into SVG by vl-convert, which holds Vega and needs neither a browser nor a network: the
page carries shapes and no library, so its content policy can forbid every script but the page's own.  What it costs
is interaction beyond reading a mark's label; docs/design.md has the sizes of the alternatives.

Colours are CSS variables, so one drawing serves the light and the dark theme.  Series differ in shape as well as in
colour.  Every mark carries its data as its label.  Figures are drawn for a column of 400 CSS pixels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from w8a8.errors import ReportError
from w8a8.records.layers import Histogram
from w8a8.records.smoothing import GroupReport
from w8a8.report.records import Budget, Layer

Spec: TypeAlias = dict[str, object]
"""Of Vega-Lite, or a part of one."""

WIDTH, HEIGHT = 340, 210
_SERIES = 8
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_GRID_TICKS = 33  # codes drawn of a grid: more of them run together
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": "var(--line)"},
    "axis": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 12,  # the browser's font is wider than the one that was measured
    },
    "legend": {
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "labelLimit": 110,
        "symbolSize": 60,
        "title": None,
        "orient": "bottom",
        "columns": 3,
        "columnPadding": 22,
    },
}


def svg(spec: Spec) -> str:
    """Draw one specification; `ReportError` where vl-convert is not installed."""
    try:
        import vl_convert
    except ImportError as error:
        raise ReportError(
            f"a page's plots are drawn by vl-convert, which cannot be imported: {error}; pip install 'w8a8[report]'"
        ) from error
    schema = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
    drawn: str = vl_convert.vegalite_to_svg(json.dumps(schema | spec))
    return drawn


def by_depth(layers: Sequence[Layer], measure: str, title: str, kinds: Sequence[str]) -> str:
    """A measure of every layer over depth, one series per kind; what stands outside the blocks comes last.

    `kinds` are of all layers, the drawn and the others, so that a kind looks alike in every plot.
    """
    beyond = 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)
    rows = [
        {
            "depth": beyond if layer.block is None else layer.block,
            "value": getattr(layer, measure),
            "kind": layer.kind,
            "label": f"{layer.name}: {getattr(layer, measure):.4g}",
        }
        for layer in layers
    ]
    x = _x("depth", "block", scale={"nice": False, "padding": 8}, whole=True)
    return _chart(**_marks(rows, _POINT, x=x, y=_y("value", title), **_series(kinds)))


def against(layers: Sequence[Layer], kinds: Sequence[str]) -> str:
    """KL of a layer alone against what sparing it saves, on logarithmic axes; both must be positive."""
    rows = [
        {
            "alone": layer.kl_alone,
            "spared": layer.kl_spared,
            "kind": layer.kind,
            "label": f"{layer.name}: alone {layer.kl_alone:.3e}, spared {layer.kl_spared:.3e}",
        }
        for layer in layers
    ]
    axis, marks = {"type": "log", "nice": False, "padding": 8}, _logarithmic([x.kl_alone for x in layers])
    x = _x("alone", "KL with this layer alone quantised, nats", scale=axis) | {"axis": marks}
    y = _y("spared", "KL saved by sparing it, nats", scale=axis, axis=_logarithmic([x.kl_spared for x in layers]))
    return _chart(**_marks(rows, _POINT, x=x, y=y, **_series(kinds)))


def histogram(found: Histogram) -> str:
    """Counts per bin on a logarithmic axis that has a zero; the grid is drawn as its codes and its two ends."""
    bins = [
        {"left": left, "right": right, "count": count, "label": f"{left:.4g} to {right:.4g}: {count:,}"}
        for left, right, count in zip(found.edges, found.edges[1:], found.counts, strict=False)
    ]
    top = max(1, *found.counts)
    codes, every = shown_codes(found)
    ticks = [{"value": (q - found.zero_point) * found.scale, "label": f"code {q}"} for q in codes]
    value = {"field": "value", "type": "quantitative"}
    x = _x("left", f"value; ticks: every {'' if every == 1 else f'{every}th'} code; dashed: the ends of the grid")
    scale = {"type": "symlog", "domain": [0, top], "nice": False}
    y = _y("count", "count", scale=scale, axis={"values": _decades(1, top)})
    bar = {"type": "bar", "orient": "vertical", "color": "var(--s0)", "binSpacing": 0, "stroke": None}
    tick = {"type": "tick", "color": "var(--s1)", "size": 10, "thickness": 1.5, "opacity": 1, "yOffset": -5}
    rule = {"type": "rule", "color": "var(--s1)", "strokeDash": [5, 4], "strokeWidth": 1.5, "opacity": 1}
    return _chart(
        layer=[
            _marks(bins, bar, x=x, x2={"field": "right"}, y=y, y2={"datum": 0}),
            _marks(ticks, tick, x=value, y={"value": HEIGHT}),
            _marks([ticks[0], ticks[-1]], rule, x=value),
        ]
    )


def shown_codes(found: Histogram) -> tuple[list[int], int]:
    """The codes of a grid that are drawn, its ends among them, and their distance: a power of two."""
    low = -found.qmax if found.qmin is None else found.qmin
    every = 1 << max(0, math.ceil(math.log2(max(1, found.qmax - low) / (_GRID_TICKS - 1))))
    inner = [q for q in range(low, found.qmax + 1) if q % every == 0]
    return sorted({low, *inner, found.qmax}), every


def alphas(groups: Sequence[GroupReport]) -> str:
    """Alpha of every group in the order of the forward; groups that were left alone lie at the bottom, as squares."""
    rows = [
        {
            "place": place,
            "alpha": group.alpha or 0.0,
            "kind": "left alone" if group.alpha is None else "smoothed",
            "label": f"{group.source}: " + ("left alone" if group.alpha is None else f"alpha {group.alpha:.2f}"),
        }
        for place, group in enumerate(groups)
    ]
    y = _y("alpha", "alpha", scale={"domain": [0, 1]})
    return _chart(**_marks(rows, _POINT, x=_place(), y=y, **_series(["smoothed", "left alone"])))


def smoothing_errors(groups: Sequence[GroupReport]) -> str:
    """The error of every group before and after, joined by a line; `groups` have both errors, above zero."""
    pairs = [
        {"place": place, "before": group.error_before, "after": group.error_after} for place, group in enumerate(groups)
    ]
    ends = [
        {"place": place, "error": error, "when": when, "label": f"{group.source}, {when}: {error:.3e}"}
        for place, group in enumerate(groups)
        for when, error in (("before", group.error_before), ("after", group.error_after))
    ]
    title, scale = "relative output error", {"type": "log", "nice": False, "padding": 8}
    axis = _logarithmic([e for g in groups for e in (g.error_before, g.error_after)])
    between, x = {"type": "rule", "color": "var(--muted)", "aria": False}, _place()
    lines = _y("before", title, scale=scale, axis=axis)
    points = _y("error", title, scale=scale, axis=axis)
    return _chart(
        layer=[
            _marks(pairs, between, label=False, x=x, y=lines, y2={"field": "after"}),
            _marks(ends, _POINT, x=x, y=points, **_series(["before", "after"], field="when")),
        ]
    )


def costs(budget: Budget) -> str:
    """KL against bytes: predicted as a line with circles, measured as squares, and a dashed line at what was chosen."""
    rows = [
        {"mb": point.bytes / 1e6, "kl": kl, "kind": kind, "label": f"{point.bytes / 1e6:.2f} MB, {kind}: {kl:.4g} nats"}
        for point in budget.points
        for kind, kl in (("predicted", point.predicted_kl_nats), ("measured", point.measured_kl_nats))
        if kl is not None
    ]
    x = _x("mb", "weights, MB", scale={"zero": False, "nice": False, "padding": 8})
    y = _y("kl", "KL, nats")
    line = {"type": "line", "color": "var(--s0)", "strokeWidth": 1, "aria": False}
    layers = [
        _marks([row for row in rows if row["kind"] == "predicted"], line, label=False, x=x, y=y),
        _marks(rows, _POINT, x=x, y=y, **_series(["predicted", "measured"])),
    ]
    if budget.chosen is not None:
        size = budget.points[budget.chosen].bytes / 1e6
        rule = {"type": "rule", "color": "var(--ink)", "strokeDash": [5, 4]}
        at = [{"mb": size, "label": f"chosen: {size:.2f} MB"}]
        layers.append(_marks(at, rule, x={"field": "mb", "type": "quantitative"}))
    return _chart(layer=layers)


_POINT = {"type": "point", "filled": True, "size": 45, "opacity": 0.9}


def _chart(**body: object) -> str:
    return svg({"width": WIDTH, "height": HEIGHT, "config": _CONFIG, **body})


def _marks(
    rows: Sequence[Mapping[str, object]], mark: Mapping[str, object], *, label: bool = True, **encoding: object
) -> Spec:
    """A mark for each row, which tells its label."""
    told = {"description": {"field": "label"}} if label else {}
    return {"data": {"values": rows}, "mark": mark, "encoding": encoding | told}


def _x(field: str, title: str, *, scale: Spec | None = None, whole: bool = False) -> Spec:
    axis = {"tickCount": 6} | ({"tickMinStep": 1, "format": "d"} if whole else {})
    return {"field": field, "type": "quantitative", "title": title, "scale": scale or {}, "axis": axis}


def _y(field: str, title: str, **more: object) -> Spec:
    usual = {"scale": {"zero": False}, "axis": {"tickCount": 5}}
    return {"field": field, "type": "quantitative", "title": title, **usual, **more}


def _place() -> Spec:
    return _x("place", "group, in the order of the forward", scale={"nice": False, "padding": 8}, whole=True)


def _logarithmic(found: Sequence[float | None]) -> Spec:
    """An axis with a line per decade, or where there is hardly one, at 1, 2 and 5."""
    values = [value for value in found if value is not None]
    low, high = min(values), max(values)
    marks = _decades(low, high)
    if len(marks) < 2:
        marks = [step * 10.0**power for power in _powers(low, high) for step in (1, 2, 5)]
    return {"values": marks, "format": ".0e"}


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in _powers(low, high) if low <= 10.0**power <= high]


def _powers(low: float, high: float) -> range:
    return range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)


def _series(names: Sequence[str], *, field: str = "kind") -> dict[str, Any]:
    """Colour and shape of a series by its place among the names; the ninth has the first's colour and another shape."""
    distinct = list(dict.fromkeys(names))
    colours = [f"var(--s{i % _SERIES})" for i in range(len(distinct))]
    shapes = [_SHAPES[(i + i // _SERIES) % len(_SHAPES)] for i in range(len(distinct))]
    one = {"field": field, "type": "nominal", "legend": {}}
    return {
        "color": {**one, "scale": {"domain": distinct, "range": colours}},
        "shape": {**one, "scale": {"domain": distinct, "range": shapes}},
    }

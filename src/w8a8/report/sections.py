"""The sections of the page, each from its part of the records; a part that is absent leaves its section out.

A plot leaves out what was not measured, and says how many that are; its table has all.
"""

import math
from collections.abc import Callable, Sequence

from w8a8.report import plots, png
from w8a8.report.markup import ABSENT, Column, drawing, figure, folded, interval, table, text
from w8a8.report.records import Channels, Headline, Histogram, Interval, Layer, Records, Remedy

_WORST = 10  # layers that are named as the worst
_LEVELS = 255  # of a heat map's colours

Section = tuple[str, str, str]  # its id, its heading, its HTML


def headline(records: Records) -> str:
    """Verdict and tiles; a tile whose numbers are absent is left out."""
    found = records.headline
    tiles = [(name, value, small) for name, value, small in _tiles(found) if value != ABSENT]
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(small)}</small>' if small else ''}</dd></div>"
        for name, value, small in tiles
    )
    return f'<p class="verdict">{text(found.verdict)}</p><dl class="tiles">{cells}</dl>'


def sections(records: Records) -> list[Section]:
    """Those that have something to show, in the order of the page."""
    made = [
        ("worst", "Worst layers and what helps", _worst(records)),
        ("coverage", "Coverage", _coverage(records)),
        ("plots", "Where the error is", _sensitivity(records)),
        ("per-layer", "Every layer", _layers(records)),
        ("channels", "Input channels over depth", _channels(records)),
        ("histograms", "Values and their grids", _histograms(records)),
        ("smoothing", "Smoothing", _smoothing(records)),
        ("budget", "Cost against budget", _budget(records)),
        ("reproduce", "How to reproduce it", _reproduce(records)),
    ]
    return [section for section in made if section[2]]


def _tiles(h: Headline) -> list[tuple[str, str, str]]:
    size = speed = ratio = ABSENT
    shrunk = faster = ""
    if h.bytes_before is not None and h.bytes_after is not None:
        size, shrunk = f"{_mb(h.bytes_before)} → {_mb(h.bytes_after)}", _times(h.bytes_before, h.bytes_after, "smaller")
    if h.tok_per_s_before is not None and h.tok_per_s_after is not None:
        speed = f"{_rate(h.tok_per_s_before)} → {_rate(h.tok_per_s_after)} tokens/s"
        faster = _times(h.tok_per_s_after, h.tok_per_s_before, "as fast")
        if h.dtype_before is not None and h.dtype_after is not None:
            faster += f", floats in {h.dtype_before} → {h.dtype_after}"
    if h.perplexity_float is not None and h.perplexity_quantized is not None:
        ratio = f"{100 * (h.perplexity_quantized.mean / h.perplexity_float.mean - 1):+.3f} % in the mean"
    return [
        ("Scheme", h.scheme, ""),
        ("Weights", size, shrunk),
        ("Speed of reading", speed, faster),
        ("Perplexity, float", *_split(h.perplexity_float, 4)),
        ("Perplexity, quantised", *_split(h.perplexity_quantized, 4, ratio)),
        ("Bits per byte, float", *_split(h.bits_per_byte_float, 4)),
        ("Bits per byte, quantised", *_split(h.bits_per_byte_quantized, 4)),
        ("KL(float || quantised), mean, nats", *_split(h.kl_mean_nats, 6)),
        ("KL, 99th percentile, nats", *_split(h.kl_p99_nats, 5)),
        ("Same most likely token", *_split(h.top1_agreement, 2, factor=100, unit=" %")),
    ]


def _split(
    value: Interval | None, digits: int, more: str = ABSENT, *, factor: float = 1, unit: str = ""
) -> tuple[str, str]:
    """A tile's number, and under it its interval and what else there is to say."""
    if value is None:
        return ABSENT, ""
    whole = interval(value, digits, factor=factor, unit=unit)
    mean, _, ends = whole.partition(" (")
    return mean, ", ".join(part for part in (f"95 %: {ends[:-1]}" if ends else "", more) if part not in ("", ABSENT))


def _worst(records: Records) -> str:
    """By each ranking, or by output SQNR where there is none, with the best remedy beside each, and all below."""
    helped: dict[str, list[Remedy]] = {}
    for r in records.remedies:
        helped.setdefault(r.layer, []).append(r)
    if records.rankings is not None:
        ranks = {
            "rank, quantised alone": records.rankings.kl_alone,
            "rank, spared": records.rankings.kl_spared,
        }
        note = "Two rankings: by the KL of quantising a layer alone, and by the KL saved by leaving it alone in float."
    else:
        measured = [layer for layer in records.layers if layer.output_sqnr_db is not None]
        ranks = {"rank, output SQNR": [x.name for x in sorted(measured, key=lambda x: x.output_sqnr_db or 0.0)]}
        note = "Ranked by output SQNR, the lowest first: effects on the final KL were not measured."
    names = list(dict.fromkeys(name for order in zip(*_first(ranks), strict=False) for name in order))
    names += [name for name in helped if name not in names]
    if not names:
        return ""
    by_name = {layer.name: layer for layer in records.layers}
    places = [{name: place for place, name in enumerate(order, start=1)} for order in ranks.values()]
    rows = [
        [
            name,
            *(place.get(name) for place in places),
            *_measures(by_name.get(name)),
            _best(helped.get(name, [])),
        ]
        for name in names
    ]
    columns = [
        Column("layer"),
        *(Column(title) for title in ranks),
        Column("output SQNR, dB", _fixed(1)),
        Column("KL alone, nats", _scientific),
        Column("KL spared, nats", _scientific),
        Column("best remedy, and its measured gain"),
    ]
    if records.measured_on is not None:
        note = f"{note} {records.measured_on}"
    if helped and len(helped) < len(names):
        note = f"{note} Remedies were tried for {len(helped)} of these layers."
    return f"<p>{text(note)}</p>{_disagreement(records)}" + (
        table(columns, rows, caption="The worst layers") + _remedies(records)
    )


def _best(tried: Sequence[Remedy]) -> str | None:
    """The remedy of the largest gain."""
    measured = [r for r in tried if r.gain_kl_nats is not None]
    if not measured:
        return f"{tried[0].remedy}: gain not measured" if tried else None
    best = max(measured, key=lambda r: r.gain_kl_nats or 0.0)
    gain = best.gain_kl_nats or 0.0
    return f"{best.remedy}: KL falls by {gain:.2e} nats" if gain > 0 else "nothing that was tried"


def _remedies(records: Records) -> str:
    """All that was tried, behind a line that opens it."""
    if not records.remedies:
        return ""
    title = "Every remedy that was tried"
    columns = [Column("layer"), Column("remedy"), Column("KL falls by, nats", _scientific), Column("how, or why not")]
    rows = [[r.layer, r.remedy, r.gain_kl_nats, r.note] for r in records.remedies]
    return folded(title, table(columns, rows, caption=title))


def _first(ranks: dict[str, list[str]]) -> list[list[str]]:
    return [order[:_WORST] for order in ranks.values()]


def _measures(layer: Layer | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if layer is None else (layer.output_sqnr_db, layer.kl_alone, layer.kl_spared)


def _disagreement(records: Records) -> str:
    if records.rankings is None:
        return ""
    apart = records.rankings.disagree
    if not apart:
        return "<p>The two rankings agree.</p>"
    shown = ", ".join(apart[:_WORST]) + (f" and {len(apart) - _WORST} more" if len(apart) > _WORST else "")
    return f"<p>The two rankings do not agree on {text(shown)}.</p>"


def _coverage(records: Records) -> str:
    if records.coverage is None:
        return ""
    every = records.coverage.totals.get("all")
    parameters, macs = (None, None) if every is None else (every.parameters, every.macs)
    totals = [
        [name, t.modules, t.parameters, _part(t.parameters, parameters), t.bytes, t.macs,
         _part(t.macs, macs)]
        for name, t in records.coverage.totals.items()
    ]  # fmt: skip
    columns = ("", "modules", "parameters", "of all", "bytes in memory", "multiply-adds per token", "of all")
    shown = [Column(name or "part", _percent if name == "of all" else _grouped) for name in columns]
    shown[0] = Column("part")
    left: dict[str, list[str]] = {}
    for module in records.coverage.modules:
        if module.reason is not None:
            left.setdefault(module.reason, []).append(module.name)
    reasons = [[why, len(names), ", ".join(names)] for why, names in left.items()]
    modules = [
        [m.name, m.kind, " x ".join(map(str, m.shape)), m.parameters, m.scheme or "float", m.weight_sqnr_db, m.reason]
        for m in records.coverage.modules
    ]
    return (
        table(shown, totals, caption="What is quantised and what stayed float")
        + folded(
            f"Why modules stayed float ({sum(len(names) for names in left.values())})",
            table([Column("why"), Column("modules"), Column("names")], reasons, caption="Reasons"),
        )
        + folded(
            f"All {len(modules)} modules",
            table(
                [Column("module"), Column("class"), Column("shape"), Column("parameters", _grouped), Column("scheme"),
                 Column("weight SQNR, dB", _fixed(1)), Column("why float")],
                modules,
                caption="Every module that holds parameters",
            ),
        )
    )  # fmt: skip


def _sensitivity(records: Records) -> str:
    figures = []
    kinds = [layer.kind for layer in records.layers]
    for measure, title in (
        ("output_sqnr_db", "Output SQNR, dB"),
        ("weight_sqnr_db", "Weight SQNR, dB"),
        ("input_sqnr_db", "Input SQNR, dB"),
    ):
        having = [layer for layer in records.layers if getattr(layer, measure) is not None]
        if having:
            note = _without(len(records.layers) - len(having), "layers") + _outside(having)
            svg = drawing(plots.by_depth(having, measure, title, kinds), f"{title} by depth and kind")
            figures.append(figure(f"{title} by depth and kind", svg, note, _values(having, measure, title)))
    positive = [layer for layer in records.layers if (layer.kl_alone or 0) > 0 and (layer.kl_spared or 0) > 0]
    if positive:
        title = "Two views of each layer's damage"
        note = "On a rising diagonal the two rankings agree. " + _without(
            len(records.layers) - len(positive), "layers, with an effect that is absent or not above zero,"
        )
        data = table(
            [Column("layer"), Column("KL alone, nats", _scientific), Column("KL spared, nats", _scientific)],
            [[x.name, x.kl_alone, x.kl_spared] for x in records.layers],
            caption=title,
        )
        figures.append(figure(title, drawing(plots.against(positive, kinds), title), note, data))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _values(layers: Sequence[Layer], measure: str, title: str) -> str:
    columns = [Column("layer"), Column("kind"), Column("block"), Column(title, _fixed(2))]
    return table(columns, [[x.name, x.kind, x.block, getattr(x, measure)] for x in layers], caption=title)


LAYER_COLUMNS = (
    ("layer", "name", str, ""),
    ("kind", "kind", str, "the last part of the name"),
    ("block", "block", str, "depth"),
    ("shape", "shape", str, "out x in"),
    ("scheme", "scheme", str, ""),
    ("weight dB", "weight_sqnr_db", lambda v: f"{v:.1f}", "SQNR of the weight"),
    ("input dB", "input_sqnr_db", lambda v: f"{v:.1f}", "SQNR of the input"),
    ("output dB", "output_sqnr_db", lambda v: f"{v:.1f}", "SQNR of the output"),
    ("cosine", "cosine", lambda v: f"{v:.6f}", "of the output and the float output"),
    ("saturated", "saturated_share", lambda v: _percent(v), "share of input codes at an end of the grid"),
    ("dead", "dead_share", lambda v: _percent(v), "share of input channels that are always zero"),
    ("outliers", "outlier_ratio", lambda v: f"{v:.1f}", "largest over median absmax of the input channels"),
    ("KL alone", "kl_alone", lambda v: _scientific(v), "nats, with this layer alone quantised"),
    ("KL spared", "kl_spared", lambda v: _scientific(v), "nats saved by leaving this layer alone in float"),
)  # heading, field of Layer, how it reads, explanation


def _layers(records: Records) -> str:
    if not records.layers:
        return ""
    used = [c for c in LAYER_COLUMNS if any(getattr(layer, c[1]) is not None for layer in records.layers)]
    columns = [Column(title, shown, about) for title, _, shown, about in used]
    rows = [
        [_shape(layer.shape) if name == "shape" else getattr(layer, name) for _, name, _, _ in used]
        for layer in records.layers
    ]
    kinds = "".join(f"<option>{text(kind)}</option>" for kind in dict.fromkeys(layer.kind for layer in records.layers))
    count = len(rows)
    meanings = "".join(f"<li>{text(title)}: {text(about)}</li>" for title, _, _, about in used if about)
    return (
        '<form><label>Name contains<input id="filter-name" type="search" autocomplete="off"></label>'
        f'<label>Kind<select id="filter-kind"><option value="">all</option>{kinds}</select></label>'
        '<button class="button" type="reset">Show all</button>'
        f'<output id="shown" for="filter-name filter-kind">{count} of {count} layers</output></form>'
        + table(columns, rows, caption="Every layer; its headings sort", key="layers")
        + folded("What the columns mean", f"<ul>{meanings}</ul>")
    )


def _channels(records: Records) -> str:
    if not records.channels:
        return ""
    kinds: dict[str, list[Channels]] = {}
    known = {layer.name: layer.kind for layer in records.layers}
    for row in records.channels:
        kinds.setdefault(known.get(row.layer, row.layer.rpartition(".")[2]), []).append(row)
    values = [v for row in records.channels for v in (*row.before, *(row.after or ())) if v > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    pictures: dict[str, tuple[list[str], list[Channels]]] = {}  # kinds that read one tensor are one picture
    for kind, rows in kinds.items():
        pictures.setdefault(repr([(row.before, row.after) for row in rows]), ([], rows))[0].append(kind)
    figures = "".join(_heat(", ".join(names), rows, low, high) for names, rows in pictures.values())
    bar = png.data_uri([list(range(_LEVELS + 1))])
    return (
        "<p>Largest magnitude of each input channel, where there are more than "
        "128 channels, of each run of neighbours. One logarithmic scale for all.</p>"
        f'<div class="scale"><span>{low:.2g}</span><img alt="dark is small, bright is large" src="{bar}">'
        f'<span>{high:.3g}</span></div><div class="plots">{figures}</div>'
    )


def _heat(kind: str, rows: Sequence[Channels], low: float, high: float) -> str:
    """Kinds of one width make one picture; a row without `after` is drawn as it was."""
    width = max(len(row.before) for row in rows)
    span = math.log(high / low) or 1.0

    def indices(values: Sequence[float]) -> list[int]:
        found = [round(_LEVELS * math.log(max(v, low) / low) / span) for v in values]
        return found + [0] * (width - len(found))

    parts = [("before", [indices(row.before) for row in rows])]
    if any(row.after is not None for row in rows):
        parts.append(("after", [indices(row.after or row.before) for row in rows]))
    pictures = "".join(
        f'<span>{when}</span><img alt="{text(kind)}, {when} smoothing: {len(rows)} layers by {width} channels" '
        f'src="{png.data_uri(pixels)}">'
        for when, pixels in parts
    )
    data = table(
        [
            Column("layer"),
            *(Column(f"{what} {when}", _three) for when in ("before", "after") for what in ("max", "median")),
        ],
        [[row.layer, *_ends(row.before), *_ends(row.after)] for row in rows],
        caption=f"Input channels of {kind}; every value is in the records",
    )
    note = f"{len(rows)} rows, the first layer at the top; {width} columns."
    return figure(f"Input of {kind}", f'<div class="heat">{pictures}</div>', note, data)


def _ends(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if values is None else (max(values), sorted(values)[len(values) // 2])


def _histograms(records: Records) -> str:
    figures = "".join(_histogram(found) for found in records.histograms)
    return f'<div class="plots">{figures}</div>' if figures else ""


def _histogram(found: Histogram) -> str:
    title = f"{found.layer}, {found.what}"
    low = -found.qmax if found.qmin is None else found.qmin
    note = f"Codes {low} to {found.qmax}, scale {found.scale:.4g}, zero point {found.zero_point}."
    bins = zip(found.edges, found.edges[1:], found.counts, strict=False)
    data = table(
        [Column("from", _signed), Column("to", _signed), Column("count", _grouped)],
        [list(row) for row in bins],
        caption=f"{found.what} values",
    )
    return figure(title, drawing(plots.histogram(found), title), note, data)


def _smoothing(records: Records) -> str:
    if records.smoothing is None or not records.smoothing.groups:
        return ""
    groups = records.smoothing.groups
    columns = [
        Column("source"),
        Column("readers"),
        Column("alpha", _fixed(2)),
        Column("error before", _scientific),
        Column("error after", _scientific),
        Column("why not"),
    ]
    data = table(
        columns,
        [[g.source, ", ".join(g.readers), g.alpha, g.error_before, g.error_after, g.reason] for g in groups],
        caption="Smoothing groups",
    )
    figures = figure("Alpha per group", drawing(plots.alphas(groups), "Alpha per group"), "", data)
    both = [g for g in groups if (g.error_before or 0) > 0 and (g.error_after or 0) > 0]
    if both:
        note = _without(len(groups) - len(both), "groups")
        title = "Error per group, before and after"
        figures += figure(title, drawing(plots.smoothing_errors(both), title), note, data)
    kept = records.smoothing.kept
    won = "" if kept is None else f"<p>Kept for the whole model: {text(kept)}.</p>"
    return f'{won}<div class="plots">{figures}</div>'


def _budget(records: Records) -> str:
    budget = records.budget
    if budget is None or not budget.points:
        return ""
    rows = [
        [f"{i}, chosen" if i == budget.chosen else str(i), p.bytes, p.predicted_kl_nats, p.measured_kl_nats]
        for i, p in enumerate(budget.points)
    ]
    columns = [
        Column("point"),
        Column("bytes", _grouped),
        Column("predicted KL, nats", _scientific),
        Column("measured KL, nats", _scientific),
    ]
    title = "KL against bytes"
    asked = "" if budget.constraint is None else f"<p>Asked for: {text(budget.constraint)}.</p>"
    note = "Predicted: the sum of the layers' costs. The dashed line is what was chosen."
    shown = figure(title, drawing(plots.costs(budget), title), note, table(columns, rows, caption=title))
    return f'{asked}<div class="plots">{shown}</div>'


def _reproduce(records: Records) -> str:
    r = records.reproduce
    command = "" if r.command is None else f"<pre>{text(r.command)}</pre>"
    rows = [["seed", str(r.seed)]] if r.seed is not None else []
    for part in (r.versions, r.hashes, r.machine):
        rows += [[name, value] for name, value in part.items()]
    facts = table([Column("what"), Column("found")], rows, caption="Versions, hashes, seed and machine") if rows else ""
    return command + facts


def _outside(layers: Sequence[Layer]) -> str:
    count = sum(layer.block is None for layer in layers)
    return f" {count} outside the blocks at the right end." if count else ""


def _without(count: int, what: str) -> str:
    return f"{count} {what} not drawn." if count else ""


def _shape(shape: list[int] | None) -> str | None:
    return None if shape is None else " x ".join(map(str, shape))


def _part(part: int, whole: int | None) -> float | None:
    return part / whole if whole else None


def _mb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _times(more: float, less: float, what: str) -> str:
    return f"{more / less:.2f} times {what}" if less else ""


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:.4g}"


def _scientific(value: float) -> str:
    return f"{value:.2e}"


def _grouped(value: int) -> str:
    return f"{value:,}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"

"""The sections about single layers: the worst and what helps, where the error is, every layer, channels, histograms."""

import math
from collections.abc import Sequence

from w8a8.records.layers import Channels, Histogram, Remedy
from w8a8.report import plots, png
from w8a8.report.markup import Column, Columns, drawing, figure, folded, table, text
from w8a8.report.numbers import by, fixed, grouped, percent, scientific, significant, without
from w8a8.report.records import Records

_WORST = 10  # layers that are named as the worst
_LEVELS = 255  # of a heat map's colours


def worst(records: Records) -> str:
    """The worst by each ranking, or by output SQNR where there is none, the best remedy beside each, and all below."""
    helped: dict[str, list[Remedy]] = {}
    for r in records.remedies:
        helped.setdefault(r.layer, []).append(r)
    if records.rankings is not None:
        ranks = {"rank, quantised alone": records.rankings.kl_alone, "rank, spared": records.rankings.kl_spared}
        note = "Two rankings: by the KL of quantising a layer alone, and by the KL saved by leaving it alone in float."
    else:
        measured = [layer for layer in records.layers if layer.output_sqnr_db is not None]
        ranks = {"rank, output SQNR": [x.name for x in sorted(measured, key=lambda x: x.output_sqnr_db or 0.0)]}
        note = "Ranked by output SQNR, the lowest first: effects on the final KL were not measured."
    first = zip(*(order[:_WORST] for order in ranks.values()), strict=False)
    names = list(dict.fromkeys([*(name for order in first for name in order), *helped]))
    if not names:
        return ""
    by_name = {layer.name: layer for layer in records.layers}
    places = [{name: place for place, name in enumerate(order, start=1)} for order in ranks.values()]
    rows = [
        [
            *(name, *(place.get(name) for place in places)),
            *(getattr(by_name.get(name), measure, None) for measure in ("output_sqnr_db", "kl_alone", "kl_spared")),
            _best(helped.get(name, [])),
        ]
        for name in names
    ]
    columns: Columns = [
        "layer",
        *ranks,
        Column("output SQNR, dB", fixed(1)),
        Column("KL alone, nats", scientific),
        Column("KL spared, nats", scientific),
        "best remedy, and its measured gain",
    ]
    if records.measured_on is not None:
        note = f"{note} {records.measured_on}"
    if helped and len(helped) < len(names):
        note = f"{note} Remedies were tried for {len(helped)} of these layers."
    return f"<p>{text(note)}</p>{_disagreement(records)}" + (
        table(columns, rows, caption="The worst layers") + _remedies(records)
    )


def _best(tried: Sequence[Remedy]) -> str | None:
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
    columns: Columns = ["layer", "remedy", Column("KL falls by, nats", scientific), "how, or why not"]
    rows = [[r.layer, r.remedy, r.gain_kl_nats, r.note] for r in records.remedies]
    return folded(title, table(columns, rows, caption=title))


def _disagreement(records: Records) -> str:
    if records.rankings is None:
        return ""
    apart = records.rankings.disagree
    if not apart:
        return "<p>The two rankings agree.</p>"
    shown = ", ".join(apart[:_WORST]) + (f" and {len(apart) - _WORST} more" if len(apart) > _WORST else "")
    return f"<p>The two rankings do not agree on {text(shown)}.</p>"


def by_depth(records: Records) -> str:
    """Plots of the layers' SQNRs over depth, and of their two effects on the KL against one another."""
    figures = []
    kinds = [layer.kind for layer in records.layers]
    for measure, title in (
        ("output_sqnr_db", "Output SQNR, dB"),
        ("weight_sqnr_db", "Weight SQNR, dB"),
        ("input_sqnr_db", "Input SQNR, dB"),
    ):
        having = [layer for layer in records.layers if getattr(layer, measure) is not None]
        if having:
            note = without(len(records.layers) - len(having), "layers")
            if outside := sum(layer.block is None for layer in having):
                note += f" {outside} outside the blocks at the right end."
            svg = drawing(plots.by_depth(having, measure, title, kinds), f"{title} by depth and kind")
            values = [[x.name, x.kind, x.block, getattr(x, measure)] for x in having]
            data = table(["layer", "kind", "block", Column(title, fixed(2))], values, caption=title)
            figures.append(figure(f"{title} by depth and kind", svg, note, data))
    positive = [layer for layer in records.layers if (layer.kl_alone or 0) > 0 and (layer.kl_spared or 0) > 0]
    if positive:
        title = "Two views of each layer's damage"
        note = "On a rising diagonal the two rankings agree. " + without(
            len(records.layers) - len(positive), "layers, with an effect that is absent or not above zero,"
        )
        data = table(
            ["layer", Column("KL alone, nats", scientific), Column("KL spared, nats", scientific)],
            [[x.name, x.kl_alone, x.kl_spared] for x in records.layers],
            caption=title,
        )
        figures.append(figure(title, drawing(plots.against(positive, kinds), title), note, data))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


LAYER_COLUMNS = (
    ("layer", "name", str, ""),
    ("kind", "kind", str, "the last part of the name"),
    ("block", "block", str, "depth"),
    ("shape", "shape", by, "out x in"),
    ("scheme", "scheme", str, ""),
    ("weight dB", "weight_sqnr_db", fixed(1), "SQNR of the weight"),
    ("input dB", "input_sqnr_db", fixed(1), "SQNR of the input"),
    ("output dB", "output_sqnr_db", fixed(1), "SQNR of the output"),
    ("cosine", "cosine", fixed(6), "of the output and the float output"),
    ("saturated", "saturated_share", percent, "share of input codes at an end of the grid"),
    ("dead", "dead_share", percent, "share of input channels that are always zero"),
    ("outliers", "outlier_ratio", fixed(1), "largest over median absmax of the input channels"),
    ("KL alone", "kl_alone", scientific, "nats, with this layer alone quantised"),
    ("KL spared", "kl_spared", scientific, "nats saved by leaving this layer alone in float"),
)  # heading, field of Layer, how it reads, explanation


def every(records: Records) -> str:
    """The table of all layers, which sorts and filters."""
    if not records.layers:
        return ""
    used = [c for c in LAYER_COLUMNS if any(getattr(layer, c[1]) is not None for layer in records.layers)]
    columns = [Column(title, shown, about) for title, _, shown, about in used]
    rows = [[getattr(layer, name) for _, name, _, _ in used] for layer in records.layers]
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


def channels(records: Records) -> str:
    """Heat maps of the inputs' channels, a row per layer."""
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
            "layer",
            *(Column(f"{what} {when}", "{:.3g}".format) for when in ("before", "after") for what in ("max", "median")),
        ],
        [[row.layer, *_ends(row.before), *_ends(row.after)] for row in rows],
        caption=f"Input channels of {kind}; every value is in the records",
    )
    note = f"{len(rows)} rows, the first layer at the top; {width} columns."
    return figure(f"Input of {kind}", f'<div class="heat">{pictures}</div>', note, data)


def _ends(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if values is None else (max(values), sorted(values)[len(values) // 2])


def histograms(records: Records) -> str:
    """Values of weights and inputs, and the grids that round them."""
    figures = "".join(_histogram(found) for found in records.histograms)
    return f'<div class="plots">{figures}</div>' if figures else ""


def _histogram(found: Histogram) -> str:
    title = f"{found.layer}, {found.what}"
    low = -found.qmax if found.qmin is None else found.qmin
    note = f"Codes {low} to {found.qmax}, scale {found.scale:.4g}, zero point {found.zero_point}."
    bins = zip(found.edges, found.edges[1:], found.counts, strict=False)
    data = table(
        [Column("from", significant), Column("to", significant), Column("count", grouped)],
        [list(row) for row in bins],
        caption=f"{found.what} values",
    )
    return figure(title, drawing(plots.histogram(found), title), note, data)

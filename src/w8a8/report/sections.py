"""The sections of the page, each from its part of the records; a part that is absent leaves its section out.

A plot leaves out what was not measured, and says how many that are; its table has all.
"""

from w8a8.records.coverage import Coverage
from w8a8.report import layers, plots
from w8a8.report.markup import Column, Columns, drawing, figure, folded, table, text
from w8a8.report.numbers import ABSENT, by, fixed, grouped, megabytes, percent, rate, scientific, times, without
from w8a8.report.records import Headline, Interval, Records

Section = tuple[str, str, str]  # its id, its heading, its HTML


def headline(records: Records) -> str:
    """Verdict and tiles; a tile whose numbers are absent is left out."""
    found = records.headline
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(small)}</small>' if small else ''}</dd></div>"
        for name, value, small in _tiles(found)
        if value != ABSENT
    )
    return f'<p class="verdict">{text(found.verdict)}</p><dl class="tiles">{cells}</dl>'


def sections(records: Records) -> list[Section]:
    """Those that have something to show, in the order of the page."""
    made = [
        ("worst", "Worst layers and what helps", layers.worst(records)),
        ("coverage", "Coverage", _coverage(records)),
        ("plots", "Where the error is", layers.by_depth(records)),
        ("per-layer", "Every layer", layers.every(records)),
        ("channels", "Input channels over depth", layers.channels(records)),
        ("histograms", "Values and their grids", layers.histograms(records)),
        ("smoothing", "Smoothing", _smoothing(records)),
        ("budget", "Cost against budget", _budget(records)),
        ("reproduce", "How to reproduce it", _reproduce(records)),
    ]
    return [section for section in made if section[2]]


def _tiles(h: Headline) -> list[tuple[str, str, str]]:
    size = speed = ABSENT
    shrunk = faster = ratio = ""
    if h.bytes_before is not None and h.bytes_after is not None:
        size = f"{megabytes(h.bytes_before)} → {megabytes(h.bytes_after)}"
        shrunk = times(h.bytes_before, h.bytes_after, "smaller")
    if h.tok_per_s_before is not None and h.tok_per_s_after is not None:
        speed = f"{rate(h.tok_per_s_before)} → {rate(h.tok_per_s_after)} tokens/s"
        faster = times(h.tok_per_s_after, h.tok_per_s_before, "as fast")
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
        ("||model - float|| / ||float||", *_split(h.output_error, 5)),
        ("Cosine of a row with the float one", *_split(h.output_cosine, 6)),
        ("Cosine of 99 % of the rows at least", *_split(h.output_cosine_p1, 6)),
        ("Same label", *_split(h.same_label, 2, factor=100, unit=" %")),
    ]


def _split(
    value: Interval | None, digits: int, more: str = "", *, factor: float = 1, unit: str = ""
) -> tuple[str, str]:
    """A tile's number, and under it its interval and what else there is to say."""
    if value is None:
        return ABSENT, ""
    small = [more] if more else []
    if value.low is not None and value.high is not None:
        small.insert(0, f"95 %: {value.low * factor:.{digits}f} to {value.high * factor:.{digits}f}")
    return f"{value.mean * factor:.{digits}f}{unit}", ", ".join(small)


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
    columns = ("modules", "parameters", "of all", "bytes in memory", "multiply-adds per token", "of all")
    shown: Columns = ["part", *(Column(name, percent if name == "of all" else grouped) for name in columns)]
    left = Coverage(tuple(records.coverage.modules)).left_by_reason()
    reasons = [[why, len(stayed), ", ".join(m.name for m in stayed)] for why, stayed in left.items()]
    modules = [
        [m.name, m.kind, by(m.shape), m.parameters, m.scheme or "float", m.weight_sqnr_db, m.reason]
        for m in records.coverage.modules
    ]
    return (
        table(shown, totals, caption="What is quantised and what stayed float")
        + folded(
            f"Why modules stayed float ({sum(map(len, left.values()))})",
            table(["why", "modules", "names"], reasons, caption="Reasons"),
        )
        + folded(
            f"All {len(modules)} modules",
            table(
                ["module", "class", "shape", Column("parameters", grouped), "scheme",
                 Column("weight SQNR, dB", fixed(1)), "why float"],
                modules,
                caption="Every module that holds parameters",
            ),
        )
    )  # fmt: skip


def _smoothing(records: Records) -> str:
    if records.smoothing is None or not records.smoothing.groups:
        return ""
    groups = records.smoothing.groups
    columns: Columns = [
        *("source", "readers", Column("alpha", fixed(2)), Column("error before", scientific)),
        *(Column("error after", scientific), "why not"),
    ]
    data = table(
        columns,
        [[g.source, ", ".join(g.readers), g.alpha, g.error_before, g.error_after, g.reason] for g in groups],
        caption="Smoothing groups",
    )
    figures = figure("Alpha per group", drawing(plots.alphas(groups), "Alpha per group"), "", data)
    both = [g for g in groups if (g.error_before or 0) > 0 and (g.error_after or 0) > 0]
    if both:
        note = without(len(groups) - len(both), "groups")
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
    columns: Columns = [
        *("point", Column("bytes", grouped), Column("predicted KL, nats", scientific)),
        Column("measured KL, nats", scientific),
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
    facts = table(["what", "found"], rows, caption="Versions, hashes, seed and machine") if rows else ""
    return command + facts


def _part(part: int, whole: int | None) -> float | None:
    return part / whole if whole else None

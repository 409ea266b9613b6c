"""The commands that look and show: `inspect`, `schemes`, `doctor` and `report`."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w8a8.cli.app import Json, Model, TrustRemoteCode, app, show_coverage
from w8a8.cli.output import print_json, print_line, print_table, quiet_transformers
from w8a8.core.plain import plain
from w8a8.errors import ModelError, few

if TYPE_CHECKING:
    from w8a8.dataflow import Dataflow
    from w8a8.fusing.models import Fusions

_FEW = 6


@app.command()
def inspect(
    model: Model,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help="Instead: load the weights, run a few random tokens, and show which layers could take over a "
            "scale from which norm or layer, and for the others why not.",
        ),
    ] = False,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="Instead: load the weights, run a forward of random tokens with what lies between the integer layers "
            "fused, and show what that was, and what was not and why.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what of a model is quantised, or would be, and what is not and why.

    Reads no weights without --pairs and --fused.
    """
    from w8a8.checkpoint.opening import NamedModel
    from w8a8.jobs.inspection import fuse_model, inspect_model, observe_model

    quiet_transformers()
    named = NamedModel(model, trust_remote_code=trust_remote_code)
    if pairs and fused:
        raise ModelError("--pairs and --fused each show something instead of the layers: ask for one at a time")
    if fused:
        _show_fused(named.directory.path, fuse_model(named), as_json=as_json)
        return
    if pairs:
        _show_pairs(named.directory.path, observe_model(named), as_json=as_json)
        return
    found = inspect_model(named)
    if as_json:
        print_json(found.to_dict())
        return
    show_coverage(found.coverage)
    for finding in found.vllm:
        print_line(f"  {finding}")
    rows = [
        (m.name, m.kind, "x".join(map(str, m.shape)), f"{m.parameters:,}", m.scheme or "float", m.reason or "")
        for m in found.coverage.modules
    ]
    print_table(str(found.directory), ("module", "kind", "shape", "parameters", "scheme", "why float"), rows)


def _show_pairs(directory: Path, found: "Dataflow", *, as_json: bool) -> None:
    """What could be folded into what, and why the rest cannot."""
    if as_json:
        print_json({"directory": directory, **found.to_dict()})
        return
    groups = [
        (
            group.source.module,
            group.source.kind,
            f"{int(group.scalable.sum())} of {group.source.channels}",
            few((reader.module for reader in group.readers), _FEW, counted=True),
        )
        for group in found.groups
    ]
    print_table(f"{directory}: can be folded", ("source", "kind", "channels", "read by", "layers"), _by_layer(groups))
    refused = [(r.source.module, r.source.kind, few(r.readers, _FEW, counted=True), r.reason) for r in found.refused]
    print_table("Cannot be folded", ("source", "kind", "read by", "why", "layers"), _by_layer(refused))
    if found.unread:
        print_line(f"Not reached by this forward: {few(found.unread, _FEW, counted=True)}")


def _show_fused(directory: Path, found: "Fusions", *, as_json: bool) -> None:
    """What runs in fewer passes, and why the rest does not."""
    if as_json:
        print_json({"directory": directory, **plain(found)})
        return
    print_line(f"{directory}: {found.line}" + "".join(f", {name or 'the model'} as one graph" for name in found.whole))
    rows = [(str(times), what, "yes") for what, times in found.fused.items()]
    rows += [(str(times), what, "no") for what, times in found.left.items()]
    if rows:
        print_table("In the graphs", ("times", "what", "fused"), rows)
    if found.refused:
        refused = [(name or "the model", why) for name, why in found.refused.items()]
        print_table("Runs as it is", ("module", "why", "modules"), _by_layer(refused))


def _by_layer(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in the numbers of layers only, as one row with * and their count."""
    counts = Counter(tuple(re.sub(r"\.\d+(?=[.,;]|$)", ".*", cell) for cell in row) for row in rows)
    return [(*row, str(count)) for row, count in counts.items()]


@app.command()
def schemes(as_json: Json = False) -> None:
    """List the presets: what shares a scale, and whether integers run it."""
    from w8a8.core.scheme import PRESETS

    if as_json:
        print_json(
            {
                name: {
                    "description": str(p.scheme),
                    "about": p.about,
                    "not_executable_because": p.scheme.not_executable_because,
                }
                for name, p in PRESETS.items()
            }
        )
        return
    rows = [
        (
            name,
            str(p.scheme.weights),
            str(p.scheme.activations or "float"),
            "yes" if p.scheme.integer_executable else "no",
            p.about,
        )
        for name, p in PRESETS.items()
    ]
    print_table("Presets", ("name", "weights", "activations", "runs in integers", "for"), rows)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has: versions, processor, kernels and why one is missing."""
    from w8a8.jobs.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    print_table("Machine", ("what", "found"), [*found.versions.items(), *found.machine.items()])
    rows = [(k.name, "yes" if k.available else "no", k.reason or k.about) for k in found.kernels]
    print_table("Kernels, in order of preference", ("kernel", "here", "why"), rows)


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

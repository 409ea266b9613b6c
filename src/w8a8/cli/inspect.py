"""The commands that look: `inspect`, `schemes` and `doctor`."""

from typing import Annotated

import typer

from w8a8.cli.app import Json, Model, TrustRemoteCode, app, show_coverage
from w8a8.cli.output import print_json, print_line, print_table, quiet_transformers
from w8a8.cli.pairs import show_pairs


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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what of a model is quantised, or would be, and what is not and why.  Reads no weights without --pairs."""
    from w8a8.checkpoint.opening import NamedModel
    from w8a8.jobs.inspection import inspect_model, observe_model

    quiet_transformers()
    named = NamedModel(model, trust_remote_code=trust_remote_code)
    if pairs:
        show_pairs(named.directory.path, observe_model(named), as_json=as_json)
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

"""The commands that look: `inspect`, `schemes` and `doctor`."""

from typing import Annotated, Any

import typer

from w8a8.cli.app import Json, Model, TrustRemoteCode, app, open_named, show_coverage
from w8a8.cli.output import print_json, print_line, print_table
from w8a8.cli.pairs import show_pairs
from w8a8.errors import SchemeError


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
    if pairs:
        show_pairs(open_named(model, trust_remote_code=trust_remote_code), as_json=as_json)
        return
    from w8a8.checkpoint.directory import Directory
    from w8a8.checkpoint.skeleton import empty_layers
    from w8a8.checkpoint.vllm import foresee_as_it_is
    from w8a8.model.coverage import coverage

    directory = Directory.of(model, trust_remote_code=trust_remote_code)
    quantization = directory.quantization
    try:
        built, packed = empty_layers(directory)
    except SchemeError:  # one that cannot run can still be shown
        built, packed = empty_layers(directory, simulated=True)
    reasons = _what_would_be(built) if quantization is None else {}
    found = coverage(built, reasons)
    foreseen = () if quantization is None else foresee_as_it_is(built, packed)
    if as_json:
        schemes = [] if quantization is None else [group.scheme for group in quantization.groups]
        print_json(
            {
                "directory": directory.path,
                "quantized": quantization is not None,
                "schemes": schemes,
                "vllm": foreseen,
                **found.to_dict(),
            }
        )
        return
    show_coverage(found)
    for finding in foreseen:
        print_line(f"  {finding}")
    rows = [
        (m.name, m.kind, "x".join(map(str, m.shape)), f"{m.parameters:,}", m.scheme or "float", m.reason or "")
        for m in found.modules
    ]
    print_table(str(directory.path), ("module", "kind", "shape", "parameters", "scheme", "why float"), rows)


def _what_would_be(model: Any) -> dict[str, str]:
    """What `quantize` without options says of each module of a float model; of stacked experts as one."""
    from w8a8.model.choice import Choice

    choice = Choice.of(model, "w8a8")
    chosen = [*choice.schemes, *choice.taken]
    return choice.selection.reasons | dict.fromkeys(chosen, "float now; `w8a8 quantize` takes it")


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

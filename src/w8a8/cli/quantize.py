"""The command `quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.app import Dtype, Exclude, Include, Json, Model, app, default_length, open_named, show_coverage
from w8a8.cli.output import print_json, print_line, progress
from w8a8.errors import SchemeError


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.", show_default=False)],
    scheme: Annotated[str, typer.Option("--scheme", help="A preset; `w8a8 schemes` lists them.")] = "w8a8",
    include: Include = ["*"],  # noqa: B006 - typer wants a list, and copies it
    exclude: Exclude = [],  # noqa: B006
    head: Annotated[str, typer.Option("--head", help="The output head: float, which vLLM reads, or int8.")] = "float",
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="FILE",
            help="Calibration data, for static schemes and smoothing: .txt or .jsonl, or a hub data set.",
        ),
    ] = None,
    calib_samples: Annotated[int, typer.Option("--calib-samples", min=1, help="Windows drawn from it.")] = 128,
    calib_length: Annotated[
        int | None,
        typer.Option("--calib-length", min=1, help="Tokens in a window; by default the model's context, at most 512."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawing.")] = 0,
    observer: Annotated[
        str, typer.Option("--observer", help="How a static scale is chosen: absmax, minmax, percentile, mse.")
    ] = "absmax",
    smooth: Annotated[
        str | None,
        typer.Option(
            "--smooth",
            metavar="auto|searched|ALPHA|none",
            help="Scale activations into weights: alpha searched per group, one alpha in 0..1, the best of these for "
            "the whole model (auto), or not.  By default auto with --calib, else none.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Quantise a model and save it as a compressed-tensors directory."""
    from w8a8 import pipeline
    from w8a8.calibration.calibrate import Calibration
    from w8a8.calibration.observers import observer_of
    from w8a8.checkpoint.writer import check_target, save
    from w8a8.scheme import Scheme

    wanted = Scheme.of(scheme)
    observer_of(observer)
    if wanted.static and calib is None:
        raise SchemeError(
            f"--scheme {scheme} has static activation scales, which are measured on calibration data: "
            "give --calib FILE, or take a dynamic scheme; `w8a8 schemes` lists them"
        )
    check_target(output, overwrite=force)
    opened = open_named(model, dtype=dtype)
    data = None
    if calib is not None:
        length = calib_length or min(default_length(opened.model), 512)
        data = Calibration.of(calib, opened.tokenizer, samples=calib_samples, length=length, seed=seed)
    with progress("quantising") as step:
        result = pipeline.quantize(
            opened.model,
            wanted,
            include=include,
            exclude=exclude,
            head=head,
            calibration=data,
            observer=observer,
            smooth=_alpha(smooth),
            progress=step,
        )
    save(opened.model, output, opened.tokenizer, overwrite=force)
    if as_json:
        print_json(
            {
                "output": output,
                "scheme": result.scheme.name,
                "untied": result.untied,
                "calibration": None if data is None else data.description,
                "smooth": None if result.smooth is None else result.smooth.to_dict(),
                "coverage": result.coverage.to_dict(),
            }
        )
        return
    show_coverage(result.coverage)
    for name, other in result.untied.items():
        print_line(f"{name} was tied to {other} and is now an int8 copy of its own.")
    if result.smooth is not None:
        print_line(str(result.smooth))
    if data is not None and wanted.static:
        print_line(f"Activation scales by {observer} on {data.description}.")
    print_line(f"Saved in {output}.")


def _alpha(smooth: str | None) -> str | float | None:
    """The option --smooth as `pipeline.quantize` takes it, which also refuses other words."""
    try:
        return smooth if smooth is None else float(smooth)
    except ValueError:
        return smooth

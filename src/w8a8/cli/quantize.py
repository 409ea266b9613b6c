"""The command `quantize`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from w8a8.cli.app import (
    Dtype,
    Exclude,
    Include,
    Json,
    Model,
    app,
    content_of,
    default_length,
    open_named,
    quiet_transformers,
    show_coverage,
)
from w8a8.cli.output import print_json, print_line, print_note, print_table, progress
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
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE|PERCENT",
            help="Choose a scheme or float for each layer: 12MB of tensors in all, or 0.5% of perplexity lost. Costs "
            "are measured on --text.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="For --budget.")] = None,
    option: Annotated[
        list[str], typer.Option("--option", help="For --budget: a preset to choose, repeatable; float always is one.")
    ] = ["w8a8", "w8a8-asym"],  # noqa: B006
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="From files to files, never the whole model in memory; resumes where it was stopped. By default "
            "wherever no calibration is asked for.",
            show_default=False,
        ),
    ] = None,
    max_shard_gb: Annotated[float, typer.Option("--max-shard-gb", min=0.0001, help="Of a file, when streaming.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what streaming will take, and stop.")] = False,
    target: Annotated[
        str | None, typer.Option("--target", metavar="vllm", help="Stop where vLLM would refuse the result.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Quantise a model and save it as a compressed-tensors directory."""
    from w8a8 import pipeline
    from w8a8.calibration.calibrate import Calibration
    from w8a8.calibration.observers import observer_of
    from w8a8.checkpoint.rehearsal import rehearse
    from w8a8.checkpoint.writer import check_target, save
    from w8a8.scheme import Scheme

    wanted = Scheme.of(scheme)
    if target not in (None, "vllm"):
        raise SchemeError(f"--target {target} is unknown; use vllm, or leave it out")
    observer_of(observer)
    if wanted.static and calib is None:
        raise SchemeError(
            f"--scheme {scheme} has static activation scales, which are measured on calibration data: "
            "give --calib FILE, or take a dynamic scheme; `w8a8 schemes` lists them"
        )
    if budget is not None and (text is None or calib is not None or smooth not in (None, "none") or stream):
        raise SchemeError(
            "--budget measures float weights on --text FILE: give that, and leave out --calib, --smooth and --stream"
        )
    if text is not None and budget is None:
        raise SchemeError("--text is what --budget measures on, and no budget was given; --calib is calibration data")
    check_target(output, overwrite=force)
    data_free = calib is None and smooth in (None, "none") and dtype == "auto" and budget is None
    if stream and not data_free:
        raise SchemeError("--stream is for quantising without calibration, smoothing and --dtype; leave it out")
    if stream is not False and data_free:
        options = {"include": include, "exclude": exclude, "head": head, "shard_bytes": int(max_shard_gb * 1e9)}
        if _streamed(
            model,
            output,
            wanted,
            options,
            target=target,
            forced=bool(stream),
            force=force,
            dry_run=dry_run,
            as_json=as_json,
        ):
            return
    if dry_run:
        raise SchemeError("--dry-run shows what streaming will take, and this is done in memory; leave it out")
    opened = open_named(model, dtype=dtype)
    chosen: Any = None
    if budget is not None and text is not None:
        chosen = _allocated(opened, text, budget, option, include, exclude, head, seed)
    schemes = wanted if chosen is None else chosen.schemes
    foreseen = pipeline.foresee(opened.model, schemes, include=include, exclude=exclude, head=head)
    _check_target(foreseen, target)
    rehearse(opened.model, wanted, output, opened.tokenizer)
    data = None
    if calib is not None:
        length = calib_length or min(default_length(opened.model), 512)
        data = Calibration.of(calib, opened.tokenizer, samples=calib_samples, length=length, seed=seed)
    with progress("quantising") as step:
        result = pipeline.quantize(
            opened.model,
            schemes,
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
                "budget": None if chosen is None else chosen.to_dict(),
                "untied": result.untied,
                "calibration": None if data is None else data.description,
                "smooth": None if result.smooth is None else result.smooth.to_dict(),
                "coverage": result.coverage.to_dict(),
                "vllm": foreseen,
            }
        )
        return
    _show_result(result, foreseen)
    if chosen is not None:
        print_line(str(chosen))
    if result.smooth is not None:
        print_line(str(result.smooth))
    if data is not None and wanted.static:
        print_line(f"Activation scales by {observer} on {data.description}.")
    print_line(f"Saved in {output}.")


def _allocated(
    opened: Any,
    text: str,
    budget: str,
    options: list[str],
    include: list[str],
    exclude: list[str],
    head: str,
    seed: int,
) -> Any:
    """A scheme for each layer."""
    from w8a8 import convert
    from w8a8.analysis import Budget, allocate
    from w8a8.evaluation import encode

    wanted = Budget.of(budget)
    ids = encode(opened.tokenizer, content_of(text))
    patterns = convert.with_head(opened.model, include, head)
    with progress("measuring") as step:
        return allocate(
            opened.model, ids, wanted, options=options, include=patterns, exclude=exclude, seed=seed, progress=step
        )


def _streamed(
    model: str,
    output: Path,
    scheme: Any,
    options: dict[str, Any],
    *,
    target: str | None,
    forced: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Quantise from files to files and tell; False where the model has to be loaded for it."""
    from w8a8.streaming import quantize_directory
    from w8a8.streaming.plan import UnplacedError

    found: list[Any] = []

    def before(plan: Any, prediction: Any) -> None:
        found.extend(plan.findings)
        _check_target(plan.findings, target)
        if not as_json:
            _show_prediction(plan, prediction)

    quiet_transformers()
    try:
        with progress("quantising") as step:
            done = quantize_directory(
                model,
                output,
                scheme,
                **options,
                overwrite=force,
                dry_run=dry_run,
                before=before,
                progress=step,
            )
    except UnplacedError as error:
        if forced or dry_run:
            raise
        print_note(f"not streamed, but in memory: {error}")
        return False
    if not done.first:
        return True
    if as_json:
        print_json(
            {
                "output": output,
                "scheme": done.scheme.name,
                "untied": done.untied,
                "calibration": None,
                "smooth": None,
                "coverage": done.coverage.to_dict(),
                "vllm": found,
                "prediction": done.prediction,
                "shards": done.shards,
                "resumed": done.resumed,
            }
        )
        return True
    _show_result(done, found)
    if dry_run:
        print_line("Nothing was written.")
        return True
    if done.resumed:
        print_line(f"Gone on with: {done.resumed} of {done.shards} files were there already.")
    print_line(f"Saved in {output}.")
    return True


def _show_prediction(plan: Any, found: Any) -> None:
    minutes = f"{found.seconds / 60:.1f} min" if found.seconds > 60 else f"{found.seconds:.1f} s"
    rows = [
        ("memory at the peak", f"{found.peak_bytes / 1e9:.2f} GB", f"{found.memory_bytes / 1e9:.2f} GB available"),
        ("disk", f"{found.output_bytes / 1e9:.3f} GB", f"{found.free_bytes / 1e9:.2f} GB free"),
        ("time, at least", minutes, f"{found.source_bytes / 1e9:.3f} GB to read, {len(plan.shards)} files to write"),
    ]
    print_table(f"What {plan.source} will take", ("", "predicted", "here"), rows)


def _check_target(found: Iterable[Any], target: str | None) -> None:
    refused = [finding for finding in found if finding.refused]
    if target is not None and refused:
        raise SchemeError("\n  ".join(map(str, refused)))


def _show_result(result: Any, found: Iterable[Any]) -> None:
    show_coverage(result.coverage)
    for finding in found:
        print_line(f"  {finding}")
    for name, other in result.untied.items():
        print_line(f"{name} was tied to {other} and is now an int8 copy of its own.")


def _alpha(smooth: str | None) -> str | float | None:
    """The option --smooth as `pipeline.quantize` takes it, which also refuses other words."""
    try:
        return smooth if smooth is None else float(smooth)
    except ValueError:
        return smooth

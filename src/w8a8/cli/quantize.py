"""The command `quantize`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.app import DrawingSeed, Dtype, Exclude, Include, Json, Model, Preset, TrustRemoteCode, app
from w8a8.cli.output import Watching, print_json, print_line
from w8a8.cli.ways import WatchingJob
from w8a8.errors import SchemeError


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.", show_default=False)],
    scheme: Preset = "auto",
    include: Include = ["*"],  # noqa: B006 - typer wants a list, and copies it
    exclude: Exclude = [],  # noqa: B006
    head: Annotated[str, typer.Option("--head", help="The output head: float, which vLLM reads, or int8.")] = "float",
    embeddings: Annotated[
        str, typer.Option("--embeddings", help="The lookup tables: float, which vLLM reads, or int8, by rows.")
    ] = "float",
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
    seed: DrawingSeed = 0,
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
            help="Choose a scheme or float for each layer: 12MB of tensors in all, or 0.5% of perplexity (of an "
            "encoder: of its measure) lost. Costs are measured on --text, after smoothing where that is asked for.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="For --budget.")] = None,
    option: Annotated[
        list[str],
        typer.Option(
            "--option",
            help="For --budget: a preset to choose, repeatable; float always is one. Smoothing is for the first.",
        ),
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
    eval_text: Annotated[
        str | None,
        typer.Option("--eval-text", metavar="FILE", help="Score the result against the float model on this text."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="A page about the result, in one file; with --eval-text the layers are measured for it.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="vllm", help="Stop where vLLM would refuse the result.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the result to this repository of the hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantise a model and save it as a compressed-tensors directory."""
    from w8a8.jobs.quantization import quantize_to
    from w8a8.jobs.request import BudgetSearch, CalibrationText, Job

    if budget is not None and text is None:
        raise SchemeError("--budget measures a model in memory on --text FILE: give that, and leave out --stream")
    if text is not None and budget is None:
        raise SchemeError("--text is what --budget measures on, and no budget was given; --calib is calibration data")
    job = Job(
        model=model,
        output=output,
        scheme=scheme,
        include=include,
        exclude=exclude,
        head=head,
        embeddings=embeddings,
        calibration=None if calib is None else CalibrationText(calib, calib_samples, calib_length),
        observer=observer,
        smooth=smooth,
        seed=seed,
        search=None if budget is None or text is None else BudgetSearch(budget, text, option),
        stream=stream,
        shard_bytes=int(max_shard_gb * 1e9),
        target=target,
        overwrite=force,
        dry_run=dry_run,
        eval_text=eval_text,
        report=report,
        command=shlex.join(["w8a8", *sys.argv[1:]]),
        push_to_hub=push_to_hub,
        private=private,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    made = quantize_to(job, Watching() if as_json else WatchingJob(job))
    if as_json and made.first:  # else another process of torchrun speaks
        print_json(made.to_dict())
    elif made.pushed is not None:
        print_line(f"Pushed to {made.pushed}.")

"""The command `quantize`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from w8a8.cli.app import (
    DrawingSeed,
    Dtype,
    Exclude,
    Include,
    Json,
    Model,
    Preset,
    TrustRemoteCode,
    app,
    check_kind_of,
    next_tokens,
    quiet_transformers,
)
from w8a8.cli.compare import show_compared, sizes
from w8a8.cli.output import print_json, print_line
from w8a8.cli.sensitivity import show_sensitivity
from w8a8.cli.ways import WatchingJob, show, show_weights
from w8a8.errors import SchemeError, W8A8Error

if TYPE_CHECKING:
    from w8a8.jobs.quantization import Made


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.", show_default=False)],
    scheme: Preset = "w8a8",
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
            help="Choose a scheme or float for each layer: 12MB of tensors in all, or 0.5% of perplexity lost. Costs "
            "are measured on --text, after smoothing where that is asked for.",
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
    from w8a8.checkpoint.hub import check_push
    from w8a8.checkpoint.hub import push_to_hub as push
    from w8a8.jobs.page import check_page
    from w8a8.jobs.quantization import quantize_to
    from w8a8.jobs.request import BudgetSearch, CalibrationText, Job

    if push_to_hub is not None:
        check_push(push_to_hub)
    elif private:
        raise SchemeError("--private is of a new repository on the hub: give --push-to-hub OWNER/NAME, or leave it out")
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
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if report is not None:
        check_page(report)
    _check_kind(model, calib, budget, eval_text, report, trust_remote_code=trust_remote_code)
    quiet_transformers()
    watcher = WatchingJob(job, quiet=as_json)
    made = quantize_to(job, watcher)
    if not made.first:  # another process of torchrun speaks
        return
    told = made.to_dict()
    if not as_json:
        show(made)
    if not dry_run:
        try:
            _look(made, told, eval_text, report, watcher)
        except W8A8Error as error:
            error.add_note(f"{output} is whole all the same" + (", and not pushed" if push_to_hub is not None else ""))
            raise
        if push_to_hub is not None:
            told["pushed"] = push(output, push_to_hub, private=private or None)
            if not as_json:
                print_line(f"Pushed to {told['pushed']}.")
    if as_json:
        print_json(told)


def _check_kind(
    model: str,
    calib: str | None,
    budget: str | None,
    eval_text: str | None,
    report: Path | None,
    *,
    trust_remote_code: bool,
) -> None:
    """Raise a `W8A8Error` where a model is not of the kind that something beside quantising is for."""
    from w8a8.jobs.comparison import check_text
    from w8a8.model.kinds import READS_TEXT

    trust = {"trust_remote_code": trust_remote_code}
    if calib is not None:
        check_kind_of(model, ("calibration on a text (--calib)", READS_TEXT), **trust)
    if budget is not None:
        check_kind_of(model, next_tokens("--budget, which is spent on perplexity,"), **trust)
    if eval_text is not None:
        check_text(model, eval_text, **trust)
        if report is not None:
            check_kind_of(model, next_tokens("a page about measured layers (--eval-text, --report)"), **trust)


def _look(made: "Made", told: dict[str, Any], eval_text: str | None, report: Path | None, watcher: WatchingJob) -> None:
    """What comes after the work: the comparison, which `told` gets too, else the worst weights, and the page."""
    from w8a8.checkpoint.about import add_measured
    from w8a8.evaluation.summary import summary
    from w8a8.jobs.comparison import ModelPair, compare_models
    from w8a8.jobs.page import measure_layers, page_records
    from w8a8.model.kinds import PREDICTS_TOKENS, READS_TEXT, way_out
    from w8a8.report import write_report

    job, quiet, seen = made.job, watcher.quiet, False
    output, model = str(job.output), job.model
    kind = check_kind_of(model, None, trust_remote_code=job.trust_remote_code)
    compared: Any = None
    if eval_text is not None:
        pair = ModelPair(output, model, eval_text, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
        compared = compare_models(pair, watcher)
        told["evaluation"], seen = compared.to_dict(), compared.why_not is None
        add_measured(job.output, summary(compared.both, Path(eval_text).name))
        if not quiet:
            show_compared(output, model, compared)
    if not quiet and not seen:
        show_weights(made.coverage.worst_weights(), more=kind in PREDICTS_TOKENS)
    if not quiet and eval_text is None:
        asked = f"w8a8 eval {output} --text FILE --against {model}" if kind in READS_TEXT else way_out(kind)
        print_line(f"{sizes(output, model)}; what it lost: {asked}")
    if report is not None:
        found = None if eval_text is None else measure_layers(made, eval_text, watcher)
        both, command = None if compared is None else compared.both, shlex.join(["w8a8", *sys.argv[1:]])
        write_report(report, page_records(made, comparison=both, layers=found, command=command))
        if found is not None and not quiet:
            show_sensitivity(model, found.sensitivity)
        if not quiet:
            print_line(f"The page is {report}.")

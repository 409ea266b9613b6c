"""The command `quantize`."""

import os
from pathlib import Path
from typing import Annotated, Any

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
)
from w8a8.cli.compare import DEFAULT_WINDOWS, check_text, compare_named, compare_outputs_named, sizes
from w8a8.cli.output import print_json, print_line
from w8a8.cli.page import check_page, layers_of, page_of
from w8a8.cli.sensitivity import show_sensitivity
from w8a8.cli.ways import Job, by_blocks, in_memory, show_weights, streamed
from w8a8.errors import SchemeError, W8A8Error


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
    from w8a8.calibration.observers import observer_of
    from w8a8.checkpoint.hub import check_push
    from w8a8.checkpoint.hub import push_to_hub as push
    from w8a8.core.scheme import Scheme

    wanted = Scheme.of(scheme)
    if push_to_hub is not None:
        check_push(push_to_hub)
    elif private:
        raise SchemeError("--private is of a new repository on the hub: give --push-to-hub OWNER/NAME, or leave it out")
    if target not in (None, "vllm"):
        raise SchemeError(f"--target {target} is unknown; use vllm, or leave it out")
    observer_of(observer)
    if wanted.static and calib is None:
        raise SchemeError(
            f"--scheme {scheme} has static activation scales, which are measured on calibration data: "
            "give --calib FILE, or take a dynamic scheme; `w8a8 schemes` lists them"
        )
    if budget is not None and (text is None or stream):
        raise SchemeError("--budget measures a model in memory on --text FILE: give that, and leave out --stream")
    if text is not None and budget is None:
        raise SchemeError("--text is what --budget measures on, and no budget was given; --calib is calibration data")
    if report is not None:
        check_page(report)
    _check_kind(model, calib, budget, eval_text, report, trust_remote_code=trust_remote_code)
    data_free = calib is None and smooth in (None, "none") and dtype == "auto" and not trust_remote_code
    data_free = data_free and budget is None
    if stream and not data_free and (calib is None or dtype != "auto" or trust_remote_code):
        raise SchemeError(
            "--stream goes from files to files: smoothing takes --calib FILE, --dtype is that of the files, and remote "
            "code is for models in memory; give the one, leave out the other, or leave out --stream"
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # started by torchrun
    job = Job(
        model=model,
        output=output,
        scheme=wanted,
        selection={"include": include, "exclude": exclude, "head": head},
        calib=calib,
        drawn={"samples": calib_samples, "length": calib_length, "seed": seed},
        treatment={"observer": observer, "smooth": smooth},
        budget=None if budget is None else {"limit": budget, "text": text, "options": option, "seed": seed},
        target=target,
        force=force,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        quiet=as_json,
    )
    told: dict[str, Any] | None = None
    if stream and not data_free:
        told = by_blocks(job)
    elif stream is not False and data_free:
        told = streamed(job, int(max_shard_gb * 1e9), forced=bool(stream) or several)
    if told is None:
        if several:
            raise SchemeError("torchrun shares the work of streaming, and this is done in memory; start one process")
        if dry_run:
            raise SchemeError("--dry-run shows what streaming will take, and this is done in memory; leave it out")
        told = in_memory(job)
    if not told:  # another process of torchrun speaks
        return
    if not dry_run:
        try:
            _look(job, told, eval_text, report)
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


def _look(job: Job, told: dict[str, Any], eval_text: str | None, report: Path | None) -> None:
    """What comes after the work: the comparison, which `told` gets too, else the worst weights, and the page."""
    from w8a8.checkpoint.about import add_measured
    from w8a8.evaluation.summary import summary
    from w8a8.model.kinds import PREDICTS_TOKENS, READS_TEXT, way_out

    output, model, seen = str(job.output), job.model, False
    kind = check_kind_of(model, None, trust_remote_code=job.trust_remote_code)
    if eval_text is not None:
        places = {"dtype": job.dtype, "device": "cpu", "trust_remote_code": job.trust_remote_code}
        compare = compare_named if kind in PREDICTS_TOKENS else compare_outputs_named
        compared: Any = compare(output, model, eval_text, dict(DEFAULT_WINDOWS), places)
        told["evaluation"], seen = compared.told(), compared.why_not is None
        add_measured(job.output, summary(compared.both, Path(eval_text).name))
        if not job.quiet:
            compared.show(output, model)
    if not job.quiet and not seen:
        show_weights(told["worst_weights"], more=kind in PREDICTS_TOKENS)
    if not job.quiet and eval_text is None:
        asked = f"w8a8 eval {output} --text FILE --against {model}" if kind in READS_TEXT else way_out(kind)
        print_line(f"{sizes(output, model)}; what it lost: {asked}")
    if report is not None:
        found = None if eval_text is None else layers_of(job, told, eval_text)
        page_of(told, model, job.output, job.drawn["seed"], found).write(report)
        if found is not None and not job.quiet:
            show_sensitivity(model, found.sensitivity)
        if not job.quiet:
            print_line(f"The page is {report}.")

"""The commands, in the order in which a user meets them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from w8a8 import __version__
from w8a8.cli.output import megabytes, percent, plain, print_json, print_line, print_table, progress
from w8a8.cli.pairs import show_pairs
from w8a8.errors import SchemeError, TextError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn the linear layers of language models into 8-bit integer layers, see what it costs, run the result.",
    epilog="MODEL is a local directory or a Hugging Face hub id, float or quantised.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory or a hub id, float or quantised.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Text = Annotated[Path, typer.Option("--text", help="The text to score, UTF-8.", show_default=False)]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", min=2, help="Tokens in a window; by default the model's context, at most 2048."),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Score only the first so many tokens.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the float tensors: auto (the file's), float32, bfloat16, float16.")
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, ...")]
Include = Annotated[
    list[str],
    typer.Option("--include", help="Layers to quantise: exact name or glob, repeatable.  'lm_head' only by its name."),
]
Exclude = Annotated[list[str], typer.Option("--exclude", help="Layers to leave: exact name or glob, repeatable.")]

Head = Annotated[
    str, typer.Option("--head", help="The output head: float, or int8 at run time whatever the file holds.")
]

_SCORING = (
    "Perplexity: the text is tokenised without special tokens and cut into windows of --seq-len tokens that do not "
    "overlap (--stride makes them overlap); the first token of a window is not scored, nor is one that an earlier "
    "window scored; every scored token weighs the same.  Intervals are 95 %, over windows."
)


def _version(value: bool) -> None:
    if value:
        print_line(f"w8a8 {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


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
            metavar="auto|ALPHA|none",
            help="Scale activations into weights: alpha searched per group, one alpha in 0..1, or not.  "
            "By default auto with --calib, else none.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Quantise a model and save it as a compressed-tensors directory."""
    from w8a8 import pipeline
    from w8a8.calibrate import Calibration
    from w8a8.checkpoint.writer import check_target, save
    from w8a8.observers import observer_of
    from w8a8.scheme import Scheme

    wanted = Scheme.of(scheme)
    observer_of(observer)
    if wanted.static and calib is None:
        raise SchemeError(
            f"--scheme {scheme} has static activation scales, which are measured on calibration data: "
            "give --calib FILE, or take a dynamic scheme; `w8a8 schemes` lists them"
        )
    check_target(output, overwrite=force)
    opened = _open(model, dtype=dtype)
    data = None
    if calib is not None:
        length = calib_length or min(_default_length(opened.model), 512)
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
    _show_coverage(result.coverage)
    for name, other in result.untied.items():
        print_line(f"{name} was tied to {other} and is now an int8 copy of its own.")
    if result.smooth is not None:
        print_line(str(result.smooth))
    if data is not None and wanted.static:
        print_line(f"Activation scales by {observer} on {data.description}.")
    print_line(f"Saved in {output}.")


@app.command("eval", epilog=_SCORING)
def evaluate(
    model: Model,
    text: Text,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL2", help="A reference to compare with, token by token.")
    ] = None,
    seq_len: SeqLen = None,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="Distance of the windows' starts.")] = None,
    max_tokens: MaxTokens = None,
    head: Head = "float",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on a text, alone or against another model."""
    from w8a8 import evaluate as scoring

    content = _read(text)
    opened = _open(model, dtype=dtype, device=device, head=head)
    ids = scoring.encode(opened.tokenizer, content)[:max_tokens]
    length = seq_len or _default_length(opened.model)
    if against is None:
        with progress("scoring") as step:
            alone = scoring.perplexity(opened.model, ids, seq_len=length, stride=stride, progress=step)
        if as_json:
            print_json({"model": model, **plain(alone)})
            return
        print_table(f"{model}: {_windows(alone)}", ("measure", "value", "95 % interval"), _evaluation_rows("", alone))
        return
    reference = _open(against, dtype=dtype, device=device)
    with progress("comparing") as step:
        both = scoring.compare(opened.model, reference.model, ids, seq_len=length, stride=stride, progress=step)
    if as_json:
        print_json({"model_name": model, "reference_name": against, **plain(both)})
        return
    rows = [
        *_evaluation_rows("model ", both.model),
        *_evaluation_rows("reference ", both.reference),
        ("perplexity, model / reference", *_estimate(both.perplexity_ratio, 5)),
        ("KL(reference || model), nats", *_estimate(both.kl_nats, 6)),
        ("same most likely token", *_estimate(both.top1_agreement, 4)),
    ]
    print_table(f"{model} against {against}: {_windows(both.model)}", ("measure", "value", "95 % interval"), rows)


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
    as_json: Json = False,
) -> None:
    """Show what of a model is quantised, or would be, and what is not and why.  Reads no weights without --pairs."""
    if pairs:
        show_pairs(_open(model), as_json=as_json)
        return
    from w8a8.checkpoint.files import read_quantization, resolve
    from w8a8.checkpoint.reader import empty_model
    from w8a8.convert import select
    from w8a8.coverage import coverage

    directory = resolve(model)
    quantization = read_quantization(directory)
    options = {} if quantization is None else {"simulated": True}  # a scheme that cannot run can still be shown
    built = empty_model(directory, quantization, **options)
    if quantization is None:
        selection = select(built)
        reasons = dict.fromkeys(selection.chosen, "float now; `w8a8 quantize` takes it") | selection.reasons
    else:
        reasons = {}
    found = coverage(built, reasons)
    if as_json:
        schemes = [] if quantization is None else [group.scheme for group in quantization.groups]
        print_json(
            {"directory": directory, "quantized": quantization is not None, "schemes": schemes, **found.to_dict()}
        )
        return
    _show_coverage(found)
    rows = [
        (m.name, m.kind, "x".join(map(str, m.shape)), f"{m.parameters:,}", m.scheme or "float", m.reason or "")
        for m in found.modules
    ]
    print_table(str(directory), ("module", "kind", "shape", "parameters", "scheme", "why float"), rows)


@app.command(epilog=_SCORING)
def study(
    model: Model,
    text: Text,
    seq_len: SeqLen = None,
    max_tokens: MaxTokens = 8192,
    bits: Annotated[list[int], typer.Option("--bits", help="Width of both operands, repeatable.")] = [8, 6, 4],  # noqa: B006
    include: Include = ["*"],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Simulate every granularity of weights and activations: perplexity and mean SQNR of each."""
    from w8a8 import evaluate as scoring
    from w8a8 import experiment

    content = _read(text)
    opened = _open(model, dtype=dtype, device=device)
    ids = scoring.encode(opened.tokenizer, content)[:max_tokens]
    length = seq_len or _default_length(opened.model)
    with progress("studying") as step:
        result = experiment.study(
            opened.model, ids, seq_len=length, bits=bits, include=include, exclude=exclude, progress=step
        )
    if as_json:
        print_json({"model": model, **plain(result), "best_executable": plain(result.best_executable)})
        return
    rows = [
        (
            str(cell.bits),
            str(cell.scheme.weights).split(" ", 1)[1],
            str(cell.scheme.activations).split(" ", 1)[1],
            f"{cell.perplexity:.4f}",
            f"{cell.sqnr_db:.2f}",
            "yes" if cell.executable else "",
        )
        for cell in result.cells
    ]
    print_table(
        f"{model}: float perplexity {result.float_model.perplexity.mean:.4f}, {_windows(result.float_model)}",
        ("bits", "weights", "activations", "perplexity", "mean SQNR dB", "runs in integers"),
        rows,
    )
    best = result.best_executable
    print_line(f"Best that runs in integers: {best.scheme}, perplexity {best.perplexity:.4f}.")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How far to go on.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    head: Head = "float",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Let a model go on from a prompt."""
    from w8a8.generation import continue_text

    opened = _open(model, dtype=dtype, device=device, head=head)
    result = continue_text(opened, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        print_json(result)
        return
    print_line(prompt + result.text)


@app.command()
def schemes(as_json: Json = False) -> None:
    """List the presets: what shares a scale, and whether integers run it."""
    from w8a8.scheme import PRESETS

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
    from w8a8.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    print_table("Machine", ("what", "found"), [*found.versions.items(), *found.machine.items()])
    rows = [(k.name, "yes" if k.available else "no", k.reason or k.about) for k in found.kernels]
    print_table("Kernels, in order of preference", ("kernel", "here", "why"), rows)


@app.command()
def demo(
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> None:
    """Quantise the small model that is shipped with the package, run it in integers, and show what it lost."""
    from w8a8.demo import run_demo

    _quiet_transformers()
    with progress("demo") as step:
        report = run_demo(max_tokens=max_tokens, progress=step)
    if as_json:
        print_json(report)
        return
    rows = [
        (
            row.scheme,
            "" if row.simulated_perplexity is None else f"{row.simulated_perplexity:.4f}",
            f"{row.perplexity:.4f}",
            f"{100 * (row.perplexity / report.float_perplexity - 1):+.3f} %",
            f"{100 * row.top1_agreement:.2f} %",
            megabytes(row.bytes),
            f"{row.decode_tok_per_s:.0f}",
        )
        for row in report.rows
    ]
    print_table(
        f"{report.parameters:,} parameters, {report.tokens:,} tokens of held-out docstrings, {report.threads} threads",
        (
            "scheme",
            "simulated perplexity",
            "perplexity",
            "change",
            "same top token",
            "weights on disk",
            "decode tokens/s",
        ),
        rows,
    )
    print_line(report.coverage)
    print_line(f"\nw8a8 goes on from {report.prompt!r}:\n{report.sample}")


def _open(model: str, *, dtype: str = "auto", device: str = "cpu", head: str = "float") -> Any:
    from w8a8.pipeline import open_model

    _quiet_transformers()
    return open_model(model, dtype=dtype, device=device, head=head)


def _alpha(smooth: str | None) -> str | float | None:
    """The option --smooth as `pipeline.quantize` takes it, which also refuses other words."""
    try:
        return smooth if smooth is None else float(smooth)
    except ValueError:
        return smooth


def _quiet_transformers() -> None:
    """Its bars would run through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"--text {path} cannot be read as UTF-8 text: {error}") from error


def _default_length(model: Any) -> int:
    from w8a8.evaluate import context_length

    return min(context_length(model) or 2048, 2048)


def _show_coverage(found: Any) -> None:
    totals = found.totals()
    rows = [
        (
            name,
            str(part.modules),
            f"{part.parameters:,}",
            percent(part.parameters, totals["all"].parameters),
            megabytes(part.bytes),
            f"{part.macs:,}",
            percent(part.macs, totals["all"].macs),
        )
        for name, part in totals.items()
    ]
    print_table("Coverage", ("", "modules", "parameters", "", "bytes", "multiply-adds per token", ""), rows)
    for reason, modules in found.left_by_reason().items():
        names = ", ".join(m.name for m in modules[:3])
        shown = names + (f", ... ({len(modules)})" if len(modules) > 3 else "")
        print_line(f"  float: {shown}: {reason}")


def _windows(e: Any) -> str:
    return f"{e.tokens:,} tokens in {e.windows} windows of {e.seq_len}, {e.stride} apart"


def _evaluation_rows(prefix: str, e: Any) -> list[tuple[str, str, str]]:
    return [
        (f"{prefix}perplexity", *_estimate(e.perplexity, 4)),
        (f"{prefix}loss, nats per token", *_estimate(e.loss_nats, 5)),
    ]


def _estimate(e: Any, digits: int) -> tuple[str, str]:
    return f"{e.mean:.{digits}f}", f"{e.low:.{digits}f} .. {e.high:.{digits}f}"

"""The commands that score: `eval` and `study`."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from w8a8.cli.app import (
    SCORING,
    Device,
    Dtype,
    Exclude,
    Head,
    Include,
    Json,
    MaxTokens,
    Model,
    SeqLen,
    TrustRemoteCode,
    app,
    content_of,
    default_length,
    open_named,
)
from w8a8.cli.output import megabytes, plain, print_json, print_line, print_table, progress
from w8a8.errors import ModelError, SchemeError

DEFAULT_WINDOWS = {"seq_len": None, "stride": None, "max_tokens": None, "seed": 0}
"""How a text is scored where nothing is said."""


@app.command("eval", epilog=SCORING)
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="The text to score: UTF-8, .jsonl, or a hub data set."),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL2", help="A reference to compare with, token by token.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Instead: tasks of lm-evaluation-harness.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before a question.")] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A directory of task definitions of your own.")
    ] = None,
    seq_len: SeqLen = None,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="Distance of the windows' starts.")] = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Score the reference first and keep its predictions, so that the two models are never in memory "
            "together. Chosen where they do not fit.",
        ),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="A file for the reference's predictions: made, or used again.")
    ] = None,
    head: Head = "float",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on a text, alone or against another model, or run tasks of the harness."""
    from w8a8 import evaluation as scoring

    if tasks is not None:
        opened = open_named(model, dtype=dtype, device=device, head=head, trust_remote_code=trust_remote_code)
        _show_tasks(model, opened, tasks.split(","), limit, num_fewshot, include_path, as_json=as_json)
        return
    if text is None:
        raise SchemeError("give --text FILE to score, or --tasks A,B to ask")
    options = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens, "seed": seed}
    if against is not None:
        places = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        both = compare_named(model, against, text, options, places, head=head, one_at_a_time=one_at_a_time, cache=cache)
        show_comparison(model, against, both, as_json=as_json)
        return
    content = content_of(text)
    opened = open_named(model, dtype=dtype, device=device, head=head, trust_remote_code=trust_remote_code)
    encoded = scoring.encode(opened.tokenizer, content).first(max_tokens)
    length = seq_len or default_length(opened.model)
    with progress("scoring") as step:
        alone = scoring.perplexity(opened.model, encoded, seq_len=length, stride=stride, seed=seed, progress=step)
    if as_json:
        print_json({"model": model, **plain(alone)})
        return
    print_table(f"{model}: {_windows(alone)}", ("measure", "value", "95 % interval"), _evaluation_rows("", alone))


def compare_named(
    model: str,
    against: str,
    text: str,
    options: dict[str, Any],
    places: dict[str, Any],
    *,
    head: str = "float",
    one_at_a_time: bool = False,
    cache: Path | None = None,
) -> Any:
    """Score a model against a reference, both in memory where they fit, else one after the other."""
    from w8a8 import evaluation as scoring
    from w8a8.checkpoint.files import resolve, tensor_files
    from w8a8.streaming.resources import available_memory

    content = content_of(text)
    wider = 2 if places["dtype"] == "float32" else 1  # files of two bytes a weight, perhaps
    bytes_of = wider * sum(path.stat().st_size for name in (model, against) for path in tensor_files(resolve(name)))
    name = _fingerprint(against, places["dtype"])
    apart = one_at_a_time or cache is not None or bytes_of > 0.8 * available_memory()
    reference: Any = None
    if apart and cache is not None and cache.exists():
        reference = scoring.Reference.load(cache)
        if reference.model != name:
            raise ModelError(
                f"{cache} holds the predictions of another model than {against} in {places['dtype']}; "
                "remove it, or give another --cache"
            )
    elif apart:
        opened = open_named(against, **places)
        windows = _cut(opened, content, options)
        with progress("reference") as step:
            reference = scoring.store(opened.model, name=name, progress=step, **windows)
        if cache is not None:
            reference.save(cache)
        del opened
    opened = open_named(model, head=head, **places)
    windows = _cut(opened, content, options)
    other = reference if apart else open_named(against, **places).model
    with progress("comparing") as step:
        return scoring.compare(opened.model, other, seed=options["seed"], progress=step, **windows)


def show_comparison(model: str, against: str, both: Any, *, as_json: bool) -> None:
    """The headline: sizes, both models' figures, their difference, and what it says."""
    if as_json:
        print_json({"model_name": model, "reference_name": against, **plain(both)})
        return
    bound = "" if both.top_k is None else f", at least (top {both.top_k})"
    rows = [
        *_evaluation_rows("model ", both.model),
        *_evaluation_rows("reference ", both.reference),
        ("perplexity, model / reference", *_estimate(both.perplexity_ratio, 5)),
        (f"KL(reference || model), nats{bound}", *_estimate(both.kl_nats, 6)),
        (f"of 99 % of the tokens at most{bound}", *_estimate(both.kl_p99_nats, 6)),
        ("same most likely token", *_estimate(both.top1_agreement, 4)),
        ("weights on disk", f"{megabytes(_on_disk(model))} of {megabytes(_on_disk(against))}", ""),
        *_speed_rows(both),
    ]
    print_table(f"{model} against {against}: {_windows(both.model)}", ("measure", "value", "95 % interval"), rows)
    print_line(f"Perplexity: {both.verdict}.")


def _speed_rows(both: Any) -> list[tuple[str, str, str]]:
    speed, reference = both.model_tok_per_s, both.reference_tok_per_s
    if reference is None:
        return [("reading, tokens/s", f"{speed:.1f}", "")]
    return [("reading, tokens/s, and of the reference", f"{speed:.1f}, {reference:.1f}: {speed / reference:.2f}x", "")]


def _cut(opened: Any, content: str, options: dict[str, Any]) -> dict[str, Any]:
    from w8a8 import evaluation as scoring

    text = scoring.encode(opened.tokenizer, content).first(options["max_tokens"])
    length = options["seq_len"] or default_length(opened.model)
    return {"text": text, "seq_len": length, "stride": options["stride"]}


def _show_tasks(
    model: str,
    opened: Any,
    tasks: list[str],
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    *,
    as_json: bool,
) -> None:
    from w8a8.evaluation.harness import run_tasks

    found = run_tasks(
        opened.model, opened.tokenizer, tasks, limit=limit, num_fewshot=num_fewshot, include_path=include_path
    )
    if as_json:
        print_json({"model": model, "tasks": found})
        return
    rows = []
    for task, metrics in found.items():
        for name, value in metrics.items():
            measure, _, filtered = name.partition(",")
            if isinstance(value, float) and not measure.endswith("_stderr"):
                error = metrics.get(f"{measure}_stderr,{filtered}")
                rows.append((task, measure, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    print_table(f"{model}: lm-evaluation-harness", ("task", "measure", "value", "standard error"), rows)


def _fingerprint(model: str, dtype: str) -> str:
    """What a reference is told from another by: its config, the headers and times of its files, the dtype."""
    from w8a8.checkpoint.files import CONFIG, resolve, tensor_files

    directory = resolve(model)
    found = hashlib.sha256((directory / CONFIG).read_bytes() + dtype.encode())
    for path in sorted(tensor_files(directory)):
        status = path.stat()
        found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _on_disk(model: str) -> int:
    from w8a8.checkpoint.files import resolve, tensor_files

    return sum(path.stat().st_size for path in tensor_files(resolve(model)))


@app.command(epilog=SCORING)
def study(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="The text to score.", show_default=False)],
    seq_len: SeqLen = None,
    max_tokens: MaxTokens = 8192,
    bits: Annotated[list[int], typer.Option("--bits", help="Width of both operands, repeatable.")] = [8, 6, 4],  # noqa: B006
    include: Include = ["*"],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Simulate every granularity of weights and activations: perplexity and mean SQNR of each."""
    from w8a8 import evaluation as scoring
    from w8a8 import experiment

    opened = open_named(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = scoring.encode(opened.tokenizer, content_of(text)).first(max_tokens).ids
    length = seq_len or default_length(opened.model)
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


def _windows(e: Any) -> str:
    return f"{e.tokens:,} tokens in {e.windows} windows of {e.seq_len}, {e.stride} apart"


def _evaluation_rows(prefix: str, e: Any) -> list[tuple[str, str, str]]:
    return [
        (f"{prefix}perplexity", *_estimate(e.perplexity, 4)),
        (f"{prefix}loss, nats per token", *_estimate(e.loss_nats, 5)),
        *([(f"{prefix}bits per byte", *_estimate(e.bits_per_byte, 5))] if e.bits_per_byte is not None else []),
    ]


def _estimate(e: Any, digits: int) -> tuple[str, str]:
    return f"{e.mean:.{digits}f}", f"{e.low:.{digits}f} .. {e.high:.{digits}f}"

"""The commands that score: `eval` and `study`."""

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
    Text,
    TrustRemoteCode,
    app,
    default_length,
    open_named,
    read_text,
)
from w8a8.cli.output import plain, print_json, print_line, print_table, progress


@app.command("eval", epilog=SCORING)
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on a text, alone or against another model."""
    from w8a8 import evaluate as scoring

    content = read_text(text)
    opened = open_named(model, dtype=dtype, device=device, head=head, trust_remote_code=trust_remote_code)
    ids = scoring.encode(opened.tokenizer, content)[:max_tokens]
    length = seq_len or default_length(opened.model)
    if against is None:
        with progress("scoring") as step:
            alone = scoring.perplexity(opened.model, ids, seq_len=length, stride=stride, progress=step)
        if as_json:
            print_json({"model": model, **plain(alone)})
            return
        print_table(f"{model}: {_windows(alone)}", ("measure", "value", "95 % interval"), _evaluation_rows("", alone))
        return
    reference = open_named(against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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


@app.command(epilog=SCORING)
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Simulate every granularity of weights and activations: perplexity and mean SQNR of each."""
    from w8a8 import evaluate as scoring
    from w8a8 import experiment

    content = read_text(text)
    opened = open_named(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = scoring.encode(opened.tokenizer, content)[:max_tokens]
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
    ]


def _estimate(e: Any, digits: int) -> tuple[str, str]:
    return f"{e.mean:.{digits}f}", f"{e.low:.{digits}f} .. {e.high:.{digits}f}"

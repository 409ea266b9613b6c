"""The commands that run a model: `generate` and `demo`."""

from typing import TYPE_CHECKING, Annotated

import typer

from w8a8.cli.app import Device, Dtype, Head, Json, Kv, Model, TrustRemoteCode, app
from w8a8.cli.output import print_json, print_line, print_note, print_table, progress, quiet_transformers
from w8a8.core.plain import plain
from w8a8.records.coverage import megabytes

if TYPE_CHECKING:
    from w8a8.demo.run import DemoReport


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How far to go on.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    head: Head = "float",
    kv: Kv = "auto",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Let a model go on from a prompt."""
    from w8a8.checkpoint.opening import NamedModel, open_model
    from w8a8.evaluation.generation import ASKED, continue_text

    quiet_transformers()
    opened = open_model(NamedModel(model, dtype, device, head, trust_remote_code, kv), ASKED)
    if opened.kv_why is not None:
        print_note(f"keys and values are kept as transformers keeps them: {opened.kv_why}")
    result = continue_text(opened, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        print_json(result)
        return
    print_line(prompt + result.text)


@app.command()
def demo(
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=2, help="Score only the first so many of 37 thousand tokens.")
    ] = 8192,
    as_json: Json = False,
) -> None:
    """Quantise the small model that is shipped with the package, run it in integers, and show what it lost."""
    from w8a8.demo.run import run_demo, time_layer

    quiet_transformers()
    with progress("demo", lines=True) as step:
        report = run_demo(max_tokens=max_tokens, progress=step, show=None if as_json else _print_schemes)
    speed = time_layer()
    if as_json:
        print_json({**plain(report), "speed": speed})
        return
    _print_schemes(report)
    print_line(report.coverage)
    print_line(f"\nw8a8 goes on from {report.prompt!r}:\n{report.sample}\n")
    print_table(
        f"One layer of {speed.features} x {speed.features}, {speed.threads} threads",
        ("tokens at once", "float32, ms", "w8a8, ms", "kernel"),
        [(str(t.rows), f"{t.float_ms:.2f}", f"{t.int8_ms:.2f}", t.kernel) for t in speed.times],
    )
    print_line("Random weights and float32 inputs; the model above is too small to time.")
    if speed.note is not None:
        print_line(speed.note)


def _print_schemes(report: "DemoReport") -> None:
    rows = [
        (
            row.scheme,
            "" if row.simulated_perplexity is None else f"{row.simulated_perplexity:.4f}",
            f"{row.perplexity:.4f}",
            f"{100 * (row.perplexity / report.float_perplexity - 1):+.3f} %",
            f"{100 * row.top1_agreement:.2f} %",
            megabytes(row.bytes),
        )
        for row in report.rows
    ]
    print_table(
        f"{report.parameters:,} parameters, {report.tokens:,} tokens of held-out docstrings, {report.threads} threads",
        ("scheme", "simulated perplexity", "perplexity", "change", "same top token", "weights on disk"),
        rows,
    )

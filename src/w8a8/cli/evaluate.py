"""The commands that score: `eval` and `study`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from w8a8.cli.app import Device, Dtype, Exclude, Fuse, Head, Include, Json, Kv, Model, SeqLen, TrustRemoteCode, app
from w8a8.cli.compare import evaluation_rows, show_compared, show_judged, windows_in_words
from w8a8.cli.output import Watching, print_json, print_line, print_table
from w8a8.core.plain import plain
from w8a8.errors import SchemeError

MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Score only the first so many tokens.")]

SCORING = (
    "Perplexity: the text is tokenised without special tokens and cut into windows of --seq-len tokens that do not "
    "overlap (--stride makes them overlap); the first token of a window is not scored, nor is one that an earlier "
    "window scored; every scored token weighs the same.  Pseudo-perplexity: in windows of 128 tokens, the special "
    "tokens around, every token is masked in its turn (Salazar et al. 2020).  Intervals are 95 %, by the bootstrap "
    "over windows."
)


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
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Instead, with --against, of embedders, rerankers and classifiers: texts (.txt), pairs with scores or "
            "texts with labels (.jsonl, .tsv), or a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv.",
        ),
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
    fuse: Fuse = True,
    head: Head = "float",
    kv: Kv = "dynamic",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity on a text, alone or against another model, or run tasks of the harness.

    Of a masked language model it is the pseudo-perplexity; of a model that reads text and predicts no tokens, with
    --against, how far its outputs are from the other's.  With --data, what an encoder lost of what it is for.
    """
    from w8a8.checkpoint.opening import NamedModel
    from w8a8.evaluation.harness import run_tasks
    from w8a8.jobs.comparison import ModelPair, compare_models
    from w8a8.jobs.encoders import EncoderPair, judge_encoders
    from w8a8.jobs.measuring import score_model

    named, watching = NamedModel(model, dtype, device, head, trust_remote_code, kv), Watching()
    if tasks is not None:
        if kv != "dynamic":
            raise SchemeError(f"--kv {kv} with --tasks: most tasks call a model without a cache; give --text FILE")
        found = run_tasks(named, tasks.split(","), limit=limit, num_fewshot=num_fewshot, include_path=include_path)
        _show_tasks(model, found, as_json=as_json)
        return
    if data is not None:
        given: dict[str, object] = {"--text": text, "--seq-len": seq_len, "--stride": stride}
        given |= {"--max-tokens": max_tokens, "--one-at-a-time": one_at_a_time or None, "--cache": cache}
        others = [name for name, value in given.items() if value is not None]
        opened_so = ("head", "kv", "dtype", "device")
        others += [f"--{name}" for name in opened_so if getattr(named, name) != getattr(NamedModel, name)]
        if against is None or others:
            raise SchemeError(
                f"--data {data} compares two encoders as they are, on a CPU, and {[*others, 'no --against'][0]} was "
                "given: give --against FLOAT_MODEL, and leave out the others"
            )
        encoders = EncoderPair(model, against, data, seed=seed, fuse=fuse, trust_remote_code=trust_remote_code)
        judged = judge_encoders(encoders, watching)
        if as_json:
            print_json({"model_name": model, "reference_name": against, **judged.to_dict()})
        else:
            show_judged(model, against, judged)
            print_line(f"{model}: {judged.fused}.")
        return
    if text is None:
        raise SchemeError("give --text FILE to score, --data PATH to judge an encoder on, or --tasks A,B to ask")
    windows: dict[str, Any] = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens, "seed": seed}
    if against is not None:
        pair = ModelPair(named, against, text, one_at_a_time=one_at_a_time, cache=cache, fuse=fuse, **windows)
        both = compare_models(pair, watching)
        if as_json:
            print_json({"model_name": model, "reference_name": against, **both.to_dict()})
        else:
            show_compared(model, against, both)
        return
    alone = score_model(named, text, **windows, fuse=fuse, watcher=watching)
    if as_json:
        print_json({"model": model, **plain(alone)})
        return
    print_table(
        f"{model}: {windows_in_words(alone)}", ("measure", "value", "95 % interval"), evaluation_rows("", alone)
    )


def _show_tasks(model: str, found: dict[str, dict[str, object]], *, as_json: bool) -> None:
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
    from w8a8.checkpoint.opening import NamedModel
    from w8a8.jobs.measuring import study_model

    result = study_model(
        NamedModel(model, dtype, device, trust_remote_code=trust_remote_code),
        text,
        seq_len=seq_len,
        max_tokens=max_tokens,
        bits=bits,
        include=include,
        exclude=exclude,
        watcher=Watching(),
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
        f"{model}: float perplexity {result.float_model.perplexity.mean:.4f}, {windows_in_words(result.float_model)}",
        ("bits", "weights", "activations", "perplexity", "mean SQNR dB", "runs in integers"),
        rows,
    )
    best = result.best_executable
    print_line(f"Best that runs in integers: {best.scheme}, perplexity {best.perplexity:.4f}.")

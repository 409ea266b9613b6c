"""The command `sensitivity`: which layers matter."""

from typing import Annotated

import typer

from w8a8.cli.app import Device, DrawingSeed, Dtype, Exclude, Include, Json, Model, Preset, SeqLen, app
from w8a8.cli.output import ERRORS, Watching, error_cells, print_json, print_line, print_table
from w8a8.records.layers import Sensitivity


@app.command()
def sensitivity(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="Where windows are drawn.", show_default=False)],
    scheme: Preset = "auto",
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many windows are drawn from the text.")] = 8,
    seq_len: SeqLen = None,
    seed: DrawingSeed = 0,
    include: Include = ["*"],  # noqa: B006 - typer wants a list, and copies it
    exclude: Exclude = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure what quantising each layer of a float model does to it and to what the model tells of a text."""
    from w8a8.checkpoint.opening import NamedModel
    from w8a8.jobs.measuring import rank_layers

    found = rank_layers(
        NamedModel(model, dtype, device),
        text,
        scheme,
        include=include,
        exclude=exclude,
        windows=windows,
        seq_len=seq_len,
        seed=seed,
        watcher=Watching(),
    )
    if as_json:
        print_json({"model": model, **found.to_dict()})
        return
    show_sensitivity(model, found)


def show_sensitivity(model: str, found: Sensitivity) -> None:
    """The ten worst layers, and whether the two orders agree."""
    by_spared = {name: rank for rank, name in enumerate(found.rankings.kl_spared, start=1)}
    rows = [
        (layer.name, f"{layer.kl_alone:.2e}", f"{layer.kl_spared:.2e}", str(by_spared[layer.name]), *error_cells(layer))
        for layer in found.worst()
    ]
    counted = f"{found.tokens:,} {'texts' if found.measure.endswith('per text') else 'tokens'}"
    title = f"{model}: {counted}, {found.kl_nats:.3e} {found.measure}"
    print_table(title, ("worst first", "KL alone", "KL spared", "rank", *ERRORS), rows)
    orders = found.rankings
    agree = "" if orders.spearman is None else f", rank correlation {orders.spearman:.2f}"
    print_line(f"Of the {orders.top} worst layers {orders.overlap} are in both orders{agree}.")
    if orders.disagree:
        print_line(f"In one of the two only: {', '.join(orders.disagree)}")

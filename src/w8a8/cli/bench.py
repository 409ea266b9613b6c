"""The command `bench`: how fast a model reads and writes, beside others."""

from typing import TYPE_CHECKING, Annotated

import typer

from w8a8.cli.app import Device, Dtype, Fuse, Head, Json, Kv, Model, TrustRemoteCode, app
from w8a8.cli.output import Watching, print_json, print_line, print_table

if TYPE_CHECKING:
    from w8a8.evaluation.speed import Rate


@app.command()
def bench(
    model: Model,
    against: Annotated[
        list[str], typer.Option("--against", metavar="MODEL2", help="Another model to take turns with, repeatable.")
    ] = [],  # noqa: B006 - typer wants a list, and copies it
    scheme: Annotated[
        str, typer.Option("--scheme", help="A float model with nothing to be against is quantised so, in memory.")
    ] = "w8a8",
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help="Tokens that are read; by default 512, or what fits.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens that writing comes after; by default the prompt.")
    ] = None,
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens that are then written.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Of measuring, for each model.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random tokens.")] = 0,
    fuse: Fuse = True,
    head: Head = "float",
    kv: Kv = "auto",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure tokens per second of reading and writing, models in turn: a float model beside itself quantised.

    An encoder is timed reading: tokens, pictures or sounds.
    """
    import torch

    from w8a8.checkpoint.opening import NamedModel
    from w8a8.jobs.measuring import time_models

    found = time_models(
        NamedModel(model, dtype, device, head, trust_remote_code, kv),
        against,
        scheme=scheme,
        fuse=fuse,
        prompt=prompt,
        context=context,
        new=new,
        batch=batch,
        seconds=seconds,
        seed=seed,
        watcher=Watching(),
    )
    threads = torch.get_num_threads()
    if as_json:
        print_json({"batch": batch, "new": new, "context": context, "threads": threads, "models": found})
        return
    first = next(iter(found.values()))
    writes = first.writing is not None
    rows = [
        (
            name,
            *_cells(speed.reading, first.reading),
            *_cells(speed.writing, first.writing),
            (speed.kv if writes else speed.fused) or "",
        )
        for name, speed in found.items()
    ]
    columns = ["model", f"reading, {first.unit}/s", "quartiles", "times"]
    columns += ["writing, tokens/s", "quartiles", "times", "cache"] if writes else ["between the layers"]
    after = "" if context is None else f" after {context}"
    written = f"{new} new tokens{after}, " if writes else ""
    print_table(f"batch {batch}, {written}{first.rounds} rounds, {threads} threads", columns, rows)
    does = "reads the prompt and writes" if writes else "reads"
    print_line(f"One round: each model in turn {does}. Medians; times is beside the first.")


def _cells(rate: "Rate | None", first: "Rate | None") -> tuple[str, ...]:
    """Of all models or of none."""
    if rate is None or first is None:
        return ()
    return f"{rate.median:.1f}", f"{rate.low:.1f} .. {rate.high:.1f}", f"{rate.median / first.median:.2f}"

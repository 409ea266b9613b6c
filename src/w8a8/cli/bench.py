"""The command `bench`: how fast a model reads and writes, beside others."""

from typing import Annotated, Any

import typer

from w8a8.cli.app import Device, Dtype, Head, Json, Model, TrustRemoteCode, app, next_tokens, open_named
from w8a8.cli.output import print_json, print_line, print_table, progress
from w8a8.core.plain import plain
from w8a8.errors import SchemeError


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
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens that are then written.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Of measuring, for each model.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random tokens.")] = 0,
    head: Head = "float",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure tokens per second of reading and writing, models in turn: a float model beside itself quantised."""
    from w8a8.evaluation.speed import measure_speed

    places = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    models = _opened(model, against, scheme, head, places)
    with progress("timing") as step:
        found = measure_speed(models, prompt=prompt, new=new, batch=batch, seconds=seconds, seed=seed, progress=step)
    if as_json:
        print_json({"batch": batch, "new": new, "threads": _threads(), "models": plain(found)})
        return
    first = next(iter(found.values()))
    rows = [
        (name, *_cells(speed.reading, first.reading), *_cells(speed.writing, first.writing))
        for name, speed in found.items()
    ]
    columns = ("model", "reading, tokens/s", "quartiles", "times", "writing, tokens/s", "quartiles", "times")
    print_table(f"batch {batch}, {new} new tokens, {first.rounds} rounds, {_threads()} threads", columns, rows)
    print_line("One round: each model in turn reads the prompt and writes. Medians; times is beside the first.")


def _opened(model: str, against: list[str], scheme: str, head: str, places: dict[str, Any]) -> dict[str, Any]:
    """The models to be timed by their names; of a float one alone also what it becomes under the scheme."""
    from w8a8.checkpoint.directory import Directory
    from w8a8.core.scheme import Scheme
    from w8a8.pipeline import quantize

    wanted = Scheme.of(scheme)
    if wanted.static:
        raise SchemeError(
            f"--scheme {scheme} has static activation scales, and bench measures none: take a dynamic scheme, or save "
            "the model with `w8a8 quantize --calib FILE` and name both, the float one as --against"
        )
    found: dict[str, Any] = {}
    places = {**places, "asked": next_tokens("reading and writing tokens")}
    for name in dict.fromkeys((*against, model)):
        directory = Directory.of(name, trust_remote_code=places["trust_remote_code"])
        is_float = directory.quantization is None
        alone = is_float and not against
        found[name] = open_named(directory, head="float" if is_float else head, **places).model
        if alone:
            twin = open_named(directory, **places).model
            found[f"{name} in {wanted.name}"] = quantize(twin, wanted, head=head).model
    return found


def _cells(rate: Any, first: Any) -> tuple[str, str, str]:
    return f"{rate.median:.1f}", f"{rate.low:.1f} .. {rate.high:.1f}", f"{rate.median / first.median:.2f}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()

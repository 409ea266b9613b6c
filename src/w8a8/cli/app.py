"""The application, and what several commands have in common: options, and the table of what is quantised."""

from typing import Annotated

import typer

from w8a8._version import __version__
from w8a8.cli.output import percent, print_line, print_table
from w8a8.errors import few
from w8a8.records.coverage import Coverage, megabytes

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
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", min=2, help="Tokens in a window; by default the model's context, at most 2048."),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the float tensors: auto (the file's), float32, bfloat16, float16.")
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, ...")]
Preset = Annotated[
    str,
    typer.Option(
        "--scheme", help="A preset, see `w8a8 schemes`; auto: w8a8-asym for encoders of text and pictures, else w8a8."
    ),
]
DrawingSeed = Annotated[int, typer.Option("--seed", help="Of the drawing.")]
Include = Annotated[
    list[str],
    typer.Option("--include", help="Layers to quantise: exact name or glob, repeatable.  'lm_head' only by its name."),
]
Exclude = Annotated[list[str], typer.Option("--exclude", help="Layers to leave: exact name or glob, repeatable.")]

Head = Annotated[
    str, typer.Option("--head", help="The output head: float, or int8 at run time whatever the file holds.")
]

Kv = Annotated[
    str,
    typer.Option(
        "--kv",
        help="Keys and values: dynamic (as transformers keeps them), block (the same bits), int8; "
        "auto: block where it can be.",
    ),
]

Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Fuse what lies between the integer layers of an encoder.")
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code from MODEL where transformers has no class for it."),
]


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


def show_coverage(found: Coverage) -> None:
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
        print_line(f"  float: {few((m.name for m in modules), counted=True)}: {reason}")

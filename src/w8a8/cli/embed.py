"""The command `embed`: vectors of the texts of a file."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.app import Json, Model, TrustRemoteCode, app
from w8a8.cli.output import Watching, print_json, print_line, print_note


@app.command(
    epilog="FILE is a .txt, a text a line, or a .jsonl or .tsv with a text in each line; row N of the vectors is of "
    "line N, as `numpy.load` reads them.  The texts are never in memory together, nor are their vectors."
)
def embed(
    model: Model,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The texts: UTF-8.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.npy", help="Where the vectors go.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="NAME", help="Put this prompt of the directory before each text, as 'query'."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Padded tokens that go through the model together.")
    ] = 4096,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fuse what lies between the integer layers.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Embed the texts of a file, by a directory of sentence-transformers or a plain encoder, float or int8."""
    from w8a8.embedding.job import Embedding, embed_texts

    asked = Embedding(model, text, output, prompt, batch_tokens, fuse, overwrite, trust_remote_code)
    done = embed_texts(asked, Watching())
    if done.cut:
        print_note(f"{done.cut:,} of {done.texts:,} texts were longer than the model reads, and were cut")
    if as_json:
        print_json(done.to_dict())
        return
    print_line(
        f"{done.output}: {done.texts:,} vectors of {done.width} numbers in {done.seconds:.1f} s, "
        f"{done.texts_per_s:,.0f} texts/s, {done.tokens_per_s:,.0f} tokens/s"
    )

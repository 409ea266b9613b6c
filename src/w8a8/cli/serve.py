"""The command `serve`: a model behind an OpenAI-compatible port."""

import logging
from typing import Annotated

import typer

from w8a8.cli.app import Device, Dtype, Fuse, Head, Kv, Model, TrustRemoteCode, app
from w8a8.cli.output import Watching, print_note


@app.command(
    epilog="A language model answers /v1/chat/completions, /v1/completions and /v1/responses; an embedder "
    "/v1/embeddings, a reranker /rerank, a classifier /classify; all of them /v1/models and /health.",
)
def serve(
    model: Model,
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one, and tells which.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call it; by default the name of its directory.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=2, help="Tokens of prompt and answer; by default the model's, at most 8192."),
    ] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Texts that are written at once.")] = 64,
    batching: Annotated[
        bool, typer.Option("--batching/--no-batching", help="Write for several clients at once, where that can be.")
    ] = True,
    fuse: Fuse = True,
    kv: Kv = "auto",
    head: Head = "float",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model through an OpenAI-compatible API, W8A8 directories in integers: text, vectors, ranks or labels."""
    from w8a8.serving.start import Serving, check_installed
    from w8a8.serving.start import serve as run

    check_installed()
    log = logging.getLogger("w8a8")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    asked = Serving(
        model=model,
        host=host,
        port=port,
        name=name,
        dtype=dtype,
        device=device,
        context=context,
        clients=clients,
        batching=batching,
        fuse=fuse,
        kv=kv,
        head=head,
        trust_remote_code=trust_remote_code,
    )
    run(asked, watcher=Watching(), ready=lambda address: print_note(f"w8a8: listening at {address}"))

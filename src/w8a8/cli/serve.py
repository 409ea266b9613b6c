"""The command `serve`: transformers' server, with our integer layers in it."""

import logging

import typer

from w8a8.cli.app import Model, TrustRemoteCode, app
from w8a8.cli.output import print_note
from w8a8.errors import ModelError


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Everything after MODEL goes to `transformers serve`: --host, --port, --device, --dtype, --compile, ... "
    "(`transformers serve --help`).",
)
def serve(context: typer.Context, model: Model, trust_remote_code: TrustRemoteCode = False) -> None:
    """Serve a model through an OpenAI-compatible API: `transformers serve`, W8A8 directories in integers."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ModelError("serving needs transformers' extra packages: pip install 'w8a8[serve]'")
    import transformers
    from transformers.cli.transformers import app as transformers_app

    from w8a8 import hf, kernels
    from w8a8.checkpoint.directory import Directory
    from w8a8.kernels import compiled, native
    from w8a8.model.kinds import check_served

    directory = Directory.of(model, trust_remote_code=trust_remote_code)
    kind, config = directory.architecture  # told now, not at the first request
    check_served(kind, config)
    assert config.architectures, "by which the class was found"
    if not hasattr(transformers, config.architectures[0]):  # where the server of 5.23 looks, code of its own or not
        setattr(transformers, config.architectures[0], kind)
    hf.enable()
    log = logging.getLogger("w8a8")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    kernel = kernels.first_choice(kernels.AUTO)
    how = f"{kernel} ({compiled.instruction_set()})" if kernel == native.NATIVE.name else kernel
    what = "a float model, served as it is" if directory.quantization is None else f"quantised, kernel {how}"
    print_note(f"w8a8: {directory.path} is {what}")
    trust = ["--trust-remote-code"] if trust_remote_code else []
    transformers_app(["serve", str(directory.path), *trust, *context.args])

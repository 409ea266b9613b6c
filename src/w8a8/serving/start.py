"""A directory served: opened, warmed up, and only then behind a port.

Which server it is follows from the directory: one of sentence-transformers or a sequence classifier answers texts
(`answers`), everything else writes them (`writing`).
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
from transformers import AutoProcessor, GenerationConfig, PreTrainedTokenizerBase

from w8a8 import kernels
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import NamedModel, open_model
from w8a8.errors import ModelError, ServingError
from w8a8.fusing.models import fusions_in_words, optimize_where_possible
from w8a8.jobs.watching import Watcher
from w8a8.kernels import compiled, native
from w8a8.layers.linear import QuantLinear
from w8a8.model.kinds import Kind, check_served, context_length, kind_of
from w8a8.model.pretrained import Pretrained
from w8a8.serving.batching import Batcher
from w8a8.serving.encoders import Embedder, is_encoder, open_encoder
from w8a8.serving.engine import Engine, Ticket
from w8a8.serving.sampling import Sampling
from w8a8.serving.suits import bytes_per_token, set_packed

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Running: TypeAlias = "tuple[ASGIApp, Callable[[], None]]"
"""An application, and what ends it."""

CLIENTS = 64
"""Texts that are written at once, at the most."""

CONTEXT = 8192
"""Tokens of a text, at the most, where the model has more and nobody asks for them."""

_SHARE = 0.5
"""Of the memory that is available once the model is there, for keys and values."""

_GRACE_S = 5
"""How long answers that have begun may take when the server is stopped."""


@dataclass(frozen=True)
class Serving:
    """A directory that is to be served, and how.

    model: A directory or a hub id, float or quantised.
    host, port: Where to listen; 0 takes a free port.
    name: What clients call it, beside its path; by default the name of the directory.
    dtype, device: Of a language model, as for `NamedModel`.
    context: Tokens that a text may have, prompt and answer; by default what the model reads, at most `CONTEXT`.
    clients: Texts that are written at once.
    batching: Whether a language model writes for several at once, where it can; else one after another.
    head: "int8" quantises the output head of a quantised language model while it is loaded.
    kv: How keys and values are kept: "int8"; else as they came, and one after another as for `NamedModel`.
    fuse: Whether what lies between an encoder's integer layers is done by the native kernel (`w8a8.optimize`).
    trust_remote_code: As for `w8a8.load`.
    """

    model: str | Path | Directory
    host: str = "localhost"
    port: int = 8000
    name: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    context: int | None = None
    clients: int = CLIENTS
    batching: bool = True
    head: str = "float"
    kv: str = "auto"
    fuse: bool = True
    trust_remote_code: bool = False


def serve(
    model: "str | Path | Directory | Serving",
    *,
    watcher: Watcher | None = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve a model through an OpenAI-compatible API until the process is told to stop.

    Args:
        model: A directory or hub id with `options`, or all of it as a `Serving`.
        watcher: Told what is served, and how.
        ready: Called with the address once the port is open.
        options: As for `Serving`.

    Raises:
        ServingError: the port is taken, or there is no such host; there is no room for one text.
        ModelError: the model has no answer to texts; the packages that serving takes are not there.
        CheckpointError: the directory cannot be read.
    """
    asked = model if isinstance(model, Serving) else Serving(model, **options)
    check_installed()
    with _listening(asked.host, asked.port) as listener:  # before anything that takes long
        app, close = application(asked, watcher=watcher)
        asyncio.run(_run(app, close, listener, ready))


def check_installed() -> None:
    """Raise `ModelError` where the packages that serving takes are not there."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ModelError("serving needs transformers' extra packages: pip install 'w8a8[serve]'")


def application(asked: Serving, *, watcher: Watcher | None = None) -> Running:
    """The ASGI application that serves a model, warm, and what ends it.

    Args:
        asked: What is to be served; host and port are left to the caller.
    """
    watcher = watcher or Watcher()
    directory = Directory.of(asked.model, trust_remote_code=asked.trust_remote_code)
    encoder = is_encoder(directory)
    _check_heeded(asked, directory, encoder)
    watcher.note(f"w8a8: {directory.path} is {_how(directory)}")
    names = [asked.name or directory.path.resolve().name, str(directory.path), str(asked.model)]
    open_ = _encoder if encoder else _language
    return open_(directory, asked, list(dict.fromkeys(names)), watcher)


_OF_LANGUAGE = ("dtype", "device", "context", "clients", "batching", "head", "kv")
_OF_ENCODERS = ("fuse",)
"""Options of `Serving` that the other kind of model has no use for."""


def _check_heeded(asked: Serving, directory: Directory, encoder: bool) -> None:
    """Raise `ServingError` where something is asked for that would be ignored: what is ignored would be believed."""
    others = _OF_LANGUAGE if encoder else _OF_ENCODERS
    given = [name for name in others if getattr(asked, name) != getattr(Serving, name)]
    if given:
        kind, other = ("an encoder", "a language model") if encoder else ("a language model", "an encoder")
        raise ServingError(
            f"{', '.join(f'{name}={getattr(asked, name)!r}' for name in given)} was asked for, and is for {other}; "
            f"{directory.path} is {kind}: leave it out"
        )


def _how(directory: Directory) -> str:
    if directory.quantization is None:
        return "a float model, served as it is"
    kernel = kernels.first_choice(kernels.AUTO)
    how = f"{kernel} ({compiled.instruction_set()})" if kernel == native.NATIVE.name else kernel
    return f"quantised, kernel {how}"


def _encoder(directory: Directory, asked: Serving, names: Sequence[str], watcher: Watcher) -> Running:
    from w8a8.serving.answers import encoder_app

    encoder = open_encoder(directory)
    why = optimize_where_possible(encoder.model) if asked.fuse else "it was not asked for"
    encoder.warm_up()
    batcher = Batcher(encoder.run)
    front = encoder_app(encoder, names, batcher)
    kind = "an embedder" if isinstance(encoder, Embedder) else type(encoder.model).__name__
    watcher.note(f"w8a8: {names[0]} is {kind}; it answers {', '.join(front.posts)}")
    watcher.note(f"w8a8: {fusions_in_words(encoder.model, why)}")
    return front, batcher.close


def _language(directory: Directory, asked: Serving, names: Sequence[str], watcher: Watcher) -> Running:
    from w8a8.serving.asked import Served
    from w8a8.serving.writing import language_app

    kind, config = directory.architecture  # told now, not at the first request
    check_served(kind, config)
    try:
        processor = AutoProcessor.from_pretrained(directory.path, trust_remote_code=directory.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory.path}: transformers cannot read its tokenizer: {error}; copy it again") from error
    named = NamedModel(directory, asked.dtype, asked.device, asked.head, asked.trust_remote_code, asked.kv)
    model = open_model(named).model
    layers = sum(isinstance(module, QuantLinear) for module in model.modules())
    text_only = isinstance(processor, PreTrainedTokenizerBase)
    speech = not text_only and kind_of(kind, config) not in (Kind.CAUSAL,) and hasattr(processor, "feature_extractor")
    longest = context_length(model)
    context = asked.context or min(longest or CONTEXT, CONTEXT)
    if longest is not None and context > longest:
        raise ServingError(f"a context of {context} tokens was asked for, and {directory.path} reads {longest}")
    why = "it was not asked for" if not asked.batching else None if text_only else "it reads more than text"
    why = set_packed(model) if why is None else why
    engine = None
    if why is None:
        kept = "int8" if asked.kv == "int8" else "float"
        places = _places(model, context, asked.clients, kept)
        engine = Engine(model, places=places, tokens=context, kind=kept).start()
        warm_up(engine)
    served = Served(
        names,
        processor,
        context if text_only else None,
        int(getattr(config.get_text_config(), "vocab_size", 0)) or len(getattr(processor, "tokenizer", processor)),
        _defaults(model.generation_config),
        engine is not None,
        text_only,
    )
    watcher.note(f"w8a8: {layers} linear layers of {names[0]} run in integers" if layers else "w8a8: no integer layers")
    if engine is None:
        watcher.note(f"w8a8: writes for one client after another: {why}")
    else:
        watcher.note(f"w8a8: writes for up to {places} clients at once, {context} tokens each")
    front = language_app(model, served, engine, speech=speech)
    return front, (engine.close if engine is not None else lambda: None)


def warm_up(engine: Engine) -> None:
    """Write a few tokens for two clients, and wait for them."""
    ended: SimpleQueue[str] = SimpleQueue()
    tickets = [
        Ticket([1] * 3, 2, (), Sampling(), lambda _, ending: ended.put(ending) if ending else None) for _ in range(2)
    ]
    for ticket in tickets:
        engine.ask(ticket)
    for _ in tickets:
        ended.get()
    for ticket in tickets:
        if ticket.error is not None:
            raise ModelError(f"the model cannot write: {ticket.error}") from ticket.error


def _places(model: Pretrained, context: int, clients: int, kept: str) -> int:
    """How many texts have room in memory at once."""
    room = int(psutil.virtual_memory().available * _SHARE)
    each = bytes_per_token(model, kept) * context
    found = min(clients, room // each)
    if found < 1:
        raise ServingError(
            f"a text of {context} tokens takes {each / 1e9:.1f} GB of keys and values, and {room / 1e9:.1f} GB may be "
            "taken: serve it with a shorter --context"
        )
    return found


def _defaults(config: GenerationConfig) -> Sampling:
    """How a model chooses its tokens by its own generation_config."""
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return Sampling(
        temperature if config.do_sample else 0.0,
        config.top_k or 0,
        1.0 if config.top_p is None else float(config.top_p),
        config.min_p or 0.0,
        config.repetition_penalty or 1.0,
    )


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound and not yet open."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServingError(f"serving at {host} was asked for, which is no host here: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServingError(
            f"serving at {host}:{port} was asked for, which cannot be had: {error}; choose another with --port"
        ) from error
    return listener


async def _run(
    app: "ASGIApp", close: Callable[[], None], listener: socket.socket, ready: Callable[[str], None] | None
) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    server = uvicorn.Server(config)
    work = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not work.done():
            await asyncio.sleep(0.01)
        if server.started and ready is not None:
            host, port = listener.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await work
    finally:
        close()

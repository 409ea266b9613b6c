"""The door of the server: an ASGI application in front of another, through which passes only what was checked.

It reads the body, has it checked (`Route.check`), and only then calls the application behind, with the body that the
check gave back.  Paths that are not listed do not exist, whatever the application behind would do with them:
transformers' has one that unloads the model.  What the application answers with an error goes out in the words of
OpenAI's API, and what it raises is told so too.

A client that goes away ends its request: the application is cancelled where it waits, and whoever works for the client
finds out by `Client.left`.  The alternative, to leave both to the application, keeps a place taken until the last
token, since none asks whether anybody still waits.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w8a8.serving.fields import Body, parsed
from w8a8.serving.mistakes import RefusedError, error_body

BODY_BYTES = 32 << 20
"""The largest body that is read."""

_LOG = logging.getLogger(__name__)


@dataclass
class Client:
    """Who asks, for as long as the request takes.

    asked: What the check made of the body.
    left: Called when the client has gone away.
    gone: Whether it has.
    """

    asked: object = None
    left: list[Callable[[], object]] = field(default_factory=list)
    gone: bool = False

    def leave(self) -> None:
        """Tell everybody who works for it."""
        self.gone = True
        while self.left:
            self.left.pop()()


CLIENT: ContextVar[Client] = ContextVar("CLIENT")
"""Of the request that is being answered."""


@dataclass(frozen=True)
class Checked:
    """A request that may pass: the body that the application gets, and whatever else was found out about it."""

    body: Body
    asked: object = None


@dataclass(frozen=True)
class Route:
    """A path that exists.

    check: Of a POST with a body of JSON; it may take long.  None lets everything pass.
    methods: Of HTTP.
    """

    check: Callable[[Body], Checked] | None
    methods: tuple[str, ...] = ("POST",)


class Front:
    """The door, as an ASGI application."""

    def __init__(self, app: ASGIApp, routes: Mapping[str, Route]) -> None:
        self._app, self._routes = app, routes

    @property
    def posts(self) -> list[str]:
        return [path for path, route in self._routes.items() if "POST" in route.methods]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = Client()
        CLIENT.set(client)
        answer = _Answer(send)
        try:
            route = self._route(scope["path"], scope["method"])
            raw = await _read(receive, client)
            if client.gone:
                return
            body = raw
            if route.check is not None:
                headers = {name.lower(): value for name, value in scope["headers"]}
                told = headers.get(b"content-type")
                found = parsed(raw, None if told is None else told.decode("latin-1"))
                checked = await asyncio.to_thread(route.check, found)
                client.asked = checked.asked
                body = json.dumps(checked.body).encode()
            await self._behind(_with_length(scope, body), body, receive, answer, client)
        except RefusedError as refused:
            await answer.refuse(refused)

    def _route(self, path: str, method: str) -> Route:
        route = self._routes.get(path.rstrip("/") or "/")
        if route is None:
            raise RefusedError(
                f"there is no {path} here; there are {', '.join(sorted(self._routes))}",
                status=HTTPStatus.NOT_FOUND,
                code="unknown_url",
            )
        if method not in route.methods:
            raise RefusedError(
                f"{method} {path} was asked for; it takes {' or '.join(route.methods)}",
                status=HTTPStatus.METHOD_NOT_ALLOWED,
            )
        return route

    async def _behind(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer", client: Client) -> None:
        """Run the application behind, until it has answered or the client is gone."""
        gone = asyncio.Event()
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            if request:
                return request.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watched() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self._app(scope, replayed, answer))
        watch = asyncio.ensure_future(watched())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                client.leave()
                gone.set()
                work.cancel()
                await asyncio.wait({work})
        except asyncio.CancelledError:  # the server is stopped, and the time for answers that have begun is over
            client.leave()  # nobody waits for its end, since the loop may not run until then
            raise RefusedError(
                "the server was stopped before this was answered; ask again when it is back",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                code="stopped",
            ) from None
        finally:
            watch.cancel()
            work.cancel()
        if work.cancelled() or client.gone:
            return
        error = work.exception()
        if isinstance(error, RefusedError):
            raise error
        if isinstance(error, Exception):
            _LOG.error("a request to %s failed", scope["path"], exc_info=error)
            raise RefusedError(
                f"the server failed over this request ({type(error).__name__}); its log has more",
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        if error is not None:
            raise error


class _Answer:
    """`send`, with errors in the words of OpenAI's API."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._wrong = bytearray()
        self._begun = self._events = self._ended = False

    async def __call__(self, message: Message) -> None:
        if self._ended:  # an answer that was broken off
            return
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._status = message["status"]  # kept until its body is here
        elif self._status is None:
            self._begun = True
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                self._events = kind.startswith(b"text/event-stream")
            self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._wrong += message.get("body", b"")
            if not message.get("more_body", False):
                status, self._status = self._status, None
                await self._answer(status, _in_their_words(bytes(self._wrong), status))

    async def refuse(self, refused: RefusedError) -> None:
        """Answer with an error; where a stream of events has begun, as its last."""
        if not self._begun:
            await self._answer(refused.status, refused.body)
        elif self._events and not self._ended:
            self._ended = True
            event = f"data: {json.dumps(refused.body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _answer(self, status: int, body: Body) -> None:
        raw = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        self._begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": raw, "more_body": False})


def _in_their_words(raw: bytes, status: int) -> Body:
    """What an application says of an error, in OpenAI's words; what has them already stays."""
    try:
        told = json.loads(raw)
    except ValueError:
        return error_body(raw.decode("utf-8", "replace") or HTTPStatus(status).phrase, status)
    said = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
    if isinstance(said, dict) and "message" in said:
        return {"error": said}
    return error_body(said if isinstance(said, str) else json.dumps(said), status)


async def _read(receive: Receive, client: Client) -> bytes:
    """The body; where the client goes away before its end, it is marked as gone."""
    raw = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            client.leave()
            return b""
        raw += message.get("body", b"")
        if len(raw) > BODY_BYTES:
            raise RefusedError(
                f"the body is larger than {BODY_BYTES >> 20} MiB; send several requests",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        if not message.get("more_body", False):
            return bytes(raw)


def _with_length(scope: Scope, body: bytes) -> Scope:
    """A request that says how long its body is, and that it is JSON where it is checked; its id is ours.

    Two clients that give their requests the same id would be answered with each other's text.
    """
    ours = (b"content-length", b"transfer-encoding", b"x-request-id")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in ours]
    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}

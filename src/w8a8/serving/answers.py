"""The server of an encoder: an ASGI application whose answers are those of the APIs that clients know.

Every path has its check before it (`texts`), so that what arrives here can be computed.
"""

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path

from w8a8.serving.batching import Batcher
from w8a8.serving.encoders import Embedder, Encoder, Scorer
from w8a8.serving.front import CLIENT, Client, Front, Route
from w8a8.serving.texts import Embeddings, Labels, Ranking, check_embeddings, check_labels, check_ranking

_UNIT = 1e-3
"""How far from 1 the length of a vector may be that its model has normalised."""


def encoder_app(encoder: Encoder, names: Sequence[str], batcher: Batcher) -> Front:
    """The application that answers for an encoder.

    Args:
        encoder: The model.
        names: That clients may call it by; the first is the one that is told.
        batcher: Through which it is called.
    """
    routes: dict[str, Route] = {}
    paths: list[Path] = []

    def listen(path: str, check: Any, answer: Callable[[Any], Awaitable[Response]]) -> None:
        async def endpoint(_: Request) -> Response:
            client = CLIENT.get()
            assert isinstance(client, Client)
            return await answer(client.asked)

        routes[path] = Route(check)
        paths.append(Path(path, endpoint, methods=["POST"]))

    if isinstance(encoder, Embedder):
        listen("/v1/embeddings", check_embeddings(encoder, names), lambda asked: _embed(asked, batcher, names[0]))
    elif isinstance(encoder, Scorer) and encoder.ranks:
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            listen(path, check_ranking(encoder, names), lambda asked: _rank(asked, encoder, batcher, names[0]))
    elif isinstance(encoder, Scorer):
        listen("/classify", check_labels(encoder, names), lambda asked: _classify(asked, encoder, batcher))
    add_common(routes, paths, names)
    return Front(Starlette(routes=paths), routes)


def add_common(routes: dict[str, Route], paths: list[Path], names: Sequence[str]) -> None:
    """`GET /v1/models`, which names what is served, and `GET /health`.

    Args:
        routes, paths: That they are added to.
        names: Of the model.
    """

    async def models(_: Request) -> Response:
        return JSONResponse(listed(names))

    async def model(request: Request) -> Response:
        return JSONResponse(listed(names)["data"][0])

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    for path, endpoint in (("/v1/models", models), (f"/v1/models/{names[0]}", model), ("/health", health)):
        routes[path] = Route(None, ("GET",))
        paths.append(Path(path, endpoint, methods=["GET"]))


def listed(names: Sequence[str]) -> dict[str, Any]:
    """What is served, as OpenAI's API lists it."""
    return {"object": "list", "data": [{"id": names[0], "object": "model", "created": 0, "owned_by": "w8a8"}]}


async def _embed(asked: Embeddings, batcher: Batcher, name: str) -> Response:
    vectors = await batcher.ask(asked.items)
    data = [
        {"object": "embedding", "index": place, "embedding": _written(_cut(vector, asked.dimensions), asked.base64)}
        for place, vector in enumerate(vectors)
    ]
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": _usage(asked.items)})


def _cut(vector: Any, dimensions: int | None) -> Any:
    """The first numbers of a vector, of length 1 again where the whole was."""
    if dimensions is None or dimensions == len(vector):
        return vector
    part, length = vector[:dimensions], np.linalg.norm(vector)
    size = np.linalg.norm(part)
    return part / size if abs(length - 1) < _UNIT and size > 0 else part


def _written(vector: Any, in_base64: bool) -> Any:
    if in_base64:
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    return vector.tolist()


async def _rank(asked: Ranking, scorer: Scorer, batcher: Batcher, name: str) -> Response:
    logits = torch.stack(await batcher.ask(asked.items)).flatten()
    scores = logits if asked.raw else scorer.likely(logits)
    order = scores.argsort(descending=True, stable=True).tolist()[: asked.top]
    if asked.theirs:
        found = [{"index": place, "score": scores[place].item()} for place in order]
        for entry in found if asked.told else []:
            entry["text"] = asked.documents[entry["index"]]
        return JSONResponse(found)
    results: list[dict[str, Any]] = [{"index": place, "relevance_score": scores[place].item()} for place in order]
    for entry in results if asked.told else []:
        entry["document"] = {"text": asked.documents[entry["index"]]}
    return JSONResponse({"object": "list", "model": name, "results": results, "usage": _usage(asked.items)})


async def _classify(asked: Labels, scorer: Scorer, batcher: Batcher) -> Response:
    logits = torch.stack(await batcher.ask(asked.items))
    scores = logits if asked.raw else scorer.likely(logits)
    found = [_labelled(row, scorer.labels) for row in scores]
    return JSONResponse(found[0] if asked.single else found)


def _labelled(row: Any, labels: Sequence[str]) -> list[Mapping[str, Any]]:
    order = row.argsort(descending=True, stable=True).tolist()
    return [{"label": labels[place], "score": row[place].item()} for place in order]


def _usage(items: Sequence[Any]) -> dict[str, int]:
    tokens = sum(item.tokens for item in items)
    return {"prompt_tokens": tokens, "total_tokens": tokens}

"""The server of an encoder: an ASGI application whose answers are those of the APIs that clients know.

Every path has its check before it (`texts`), so that what arrives here can be computed.
"""

import base64
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path
from torch import Tensor

from w8a8.serving.batching import Batcher, Item
from w8a8.serving.encoders import Embedder, Encoder, Scorer
from w8a8.serving.fields import Body
from w8a8.serving.front import CLIENT, Checked, Front, Route
from w8a8.serving.texts import Embeddings, Labels, Ranking, check_embeddings, check_labels, check_ranking

_Asked = TypeVar("_Asked")

_UNIT = 1e-3
"""How far from 1 the length of a vector may be that its model has normalised."""


def encoder_app(encoder: Encoder, names: Sequence[str], batcher: Batcher) -> Front:
    """The application that answers for an encoder."""
    routes: dict[str, Route] = {}
    paths: list[Path] = []

    def listen(
        path: str,
        check: Callable[[Body], Checked],
        kind: type[_Asked],
        answer: Callable[[_Asked], Awaitable[Response]],
    ) -> None:
        async def endpoint(_: Request) -> Response:
            asked = CLIENT.get().asked
            assert isinstance(asked, kind)  # as the check made it
            return await answer(asked)

        routes[path] = Route(check)
        paths.append(Path(path, endpoint, methods=["POST"]))

    if isinstance(encoder, Embedder):
        check = partial(check_embeddings, encoder, names)
        listen("/v1/embeddings", check, Embeddings, lambda asked: _embed(asked, batcher, names[0]))
    elif isinstance(encoder, Scorer) and encoder.ranks:
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            check = partial(check_ranking, encoder, names)
            listen(path, check, Ranking, lambda asked: _rank(asked, encoder, batcher, names[0]))
    elif isinstance(encoder, Scorer):
        check = partial(check_labels, encoder, names)
        listen("/classify", check, Labels, lambda asked: _classify(asked, encoder, batcher))
    add_common(routes, paths, names)
    return Front(Starlette(routes=paths), routes)


def add_common(routes: dict[str, Route], paths: list[Path], names: Sequence[str]) -> None:
    """`GET /v1/models`, which names what is served, and `GET /health`."""
    found = {"id": names[0], "object": "model", "created": 0, "owned_by": "w8a8"}  # as OpenAI's API has it

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [found]})

    async def model(_: Request) -> Response:
        return JSONResponse(found)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    for path, endpoint in (("/v1/models", models), (f"/v1/models/{names[0]}", model), ("/health", health)):
        routes[path] = Route(None, ("GET",))
        paths.append(Path(path, endpoint, methods=["GET"]))


async def _embed(asked: Embeddings, batcher: Batcher, name: str) -> Response:
    vectors = [_cut(vector.numpy(), asked.dimensions) for vector in await batcher.ask(asked.items)]
    written = enumerate(_written(vector, asked.base64) for vector in vectors)
    data = [{"object": "embedding", "index": place, "embedding": each} for place, each in written]
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": _usage(asked.items)})


def _cut(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first numbers of a vector, of length 1 again where the whole was."""
    if dimensions is None or dimensions == len(vector):
        return vector
    part, length = vector[:dimensions], np.linalg.norm(vector)
    size = np.linalg.norm(part)
    return part / size if abs(length - 1) < _UNIT and size > 0 else part


def _written(vector: NDArray[np.float32], in_base64: bool) -> str | list[float]:
    if in_base64:
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


async def _rank(asked: Ranking, scorer: Scorer, batcher: Batcher, name: str) -> Response:
    logits = torch.stack(await batcher.ask(asked.items)).flatten()
    scores = logits if asked.raw else scorer.likely(logits)
    order = scores.argsort(descending=True, stable=True).tolist()[: asked.top]
    score = "score" if asked.theirs else "relevance_score"
    results: list[dict[str, object]] = [{"index": place, score: scores[place].item()} for place in order]
    for place, entry in zip(order, results if asked.told else (), strict=False):
        told = {"text": asked.documents[place]}
        entry.update(told if asked.theirs else {"document": told})
    if asked.theirs:
        return JSONResponse(results)
    return JSONResponse({"object": "list", "model": name, "results": results, "usage": _usage(asked.items)})


async def _classify(asked: Labels, scorer: Scorer, batcher: Batcher) -> Response:
    logits = torch.stack(await batcher.ask(asked.items))
    scores = logits if asked.raw else scorer.likely(logits)
    found = [_labelled(row, scorer.labels) for row in scores]
    return JSONResponse(found[0] if asked.single else found)


def _labelled(row: Tensor, labels: Sequence[str]) -> list[dict[str, object]]:
    order = row.argsort(descending=True, stable=True).tolist()
    return [{"label": labels[place], "score": row[place].item()} for place in order]


def _usage(items: Sequence[Item]) -> dict[str, int]:
    tokens = sum(item.tokens for item in items)
    return {"prompt_tokens": tokens, "total_tokens": tokens}

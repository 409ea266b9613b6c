"""Requests of many clients, answered in few calls of the model: a batch is measured in tokens, not in requests.

While one batch runs, what arrives waits; then the longest waiting request is taken, and with it the waiting ones whose
length is nearest to its own, as long as the padded batch stays within the budget.  There is no timer: an idle model
starts at once, and a busy one finds its next batch already there.  The alternatives, to wait some milliseconds for
more, or to count requests, make a lone client slower, or sixteen long texts a batch as large as sixteen short ones.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeAlias

from torch import Tensor

from w8a8.serving.mistakes import RefusedError

BATCH_TOKENS = 4096
"""Padded tokens of a batch.  More makes nothing faster on a CPU, whose products are as fast from some hundred rows on,
and makes everybody wait longer."""

WAITING_TOKENS = 1 << 20
"""Tokens that may wait."""


Content: TypeAlias = str | tuple[str, str] | list[int]
"""A text, a pair, or the ids of tokens."""


@dataclass(frozen=True)
class Item:
    """What the model is to be called with, for one answer.

    kind: Items of one kind may stand in a batch.
    content: What the model is called with.
    tokens: How long it is.
    """

    kind: Hashable
    content: Content
    tokens: int


Run: TypeAlias = Callable[[Hashable, Sequence[Content]], Sequence[Tensor]]
"""Called with a kind and what items of it hold; it returns an answer for each."""


@dataclass(eq=False)
class _Place:
    item: Item
    answer: "asyncio.Future[Tensor]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Items of many clients in, an answer for each out; the model is called by one thread.

    Args:
        batch_tokens: Padded tokens of a batch; an item that is longer goes alone.
        waiting_tokens: How many may wait before clients are turned away.
    """

    def __init__(self, run: Run, *, batch_tokens: int = BATCH_TOKENS, waiting_tokens: int = WAITING_TOKENS) -> None:
        self._run, self._batch_tokens, self._most = run, batch_tokens, waiting_tokens
        self._waiting: list[_Place] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="w8a8-model")

    async def ask(self, items: Sequence[Item]) -> list[Tensor]:
        """An answer for each item, in their order.

        Cancelled, what still waits of them is dropped.

        Raises:
            RefusedError: too much waits already.
            Exception: whatever `run` raised over a batch that one of them was in.
        """
        taken = sum(place.item.tokens for place in self._waiting)
        if taken and taken + sum(item.tokens for item in items) > self._most:
            raise RefusedError(
                f"{taken} tokens wait already, and {self._most} may; ask again in a second",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                code="overloaded",
            )
        places = [_Place(item) for item in items]
        self._waiting += places
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return list(await asyncio.gather(*(place.answer for place in places)))
        finally:
            for place in places:
                place.answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            call = loop.run_in_executor(self._thread, self._run, batch[0].item.kind, [p.item.content for p in batch])
            await asyncio.wait({call})
            error = call.exception()
            for number, place in enumerate(batch):
                if place.answer.done():  # its client is gone
                    continue
                if error is None:
                    place.answer.set_result(call.result()[number])
                else:
                    place.answer.set_exception(error)

    def _next(self) -> list[_Place]:
        """What runs next; empty where nothing waits."""
        self._waiting = [place for place in self._waiting if not place.answer.done()]
        if not self._waiting:
            return []
        first = self._waiting[0]
        near = sorted(
            (place for place in self._waiting if place.item.kind == first.item.kind),
            key=lambda place: abs(place.item.tokens - first.item.tokens),  # stable: of one length who came first
        )
        batch: list[_Place] = []
        longest = 0
        for place in near:
            longest = max(longest, place.item.tokens)
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                break
            batch.append(place)
        taken = set(map(id, batch))
        self._waiting = [place for place in self._waiting if id(place) not in taken]
        return batch

    def close(self) -> None:
        """Let the thread end when its batch is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

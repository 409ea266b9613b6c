"""Generation for many clients at once: one forward pass after another, each with a token of everybody's text.

A step takes one token of each sequence that is being written, and fills up with pieces of prompts that are being read,
so that a long prompt holds nobody up for longer than a step.  Whoever comes waits for a place; who is done, or whose
client has gone, gives it back at the next step.

One thread computes, another waits for its end.  A fault in a step is the end of that thread: those who were in the step
are told, those who wait keep their turn, keys and values are thrown away, and a new thread goes on.
"""

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from w8a8.errors import ModelError
from w8a8.model.pretrained import Pretrained
from w8a8.serving.packed import Piece, Step, taken
from w8a8.serving.places import Places
from w8a8.serving.sampling import Chooser, Sampling, chosen

STEP_TOKENS = 512
"""Rows of a step: some hundred rows are multiplied as fast as it goes, and more would hold up what is being written."""

Ending: TypeAlias = Literal["stop", "length", "failed"]

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request for a text.

    prompt: Token ids, at least one.
    most: Tokens to write at the most.
    ends: Tokens that end a text.
    sampling: How tokens are chosen.
    tell: Called by the computing thread with the tokens that are new, and at the end with how it ended.
    every: Whether to be told of every token, and not only at the end.
    left: Whether its client is gone.
    error: What ended it, where it failed.
    """

    prompt: Sequence[int]
    most: int
    ends: Collection[int]
    sampling: Sampling
    tell: Callable[[list[int], Ending | None], None]
    every: bool = False
    left: bool = False
    error: BaseException | None = None

    def leave(self) -> None:
        """Its client is gone: nobody is told any more, and its place is free from the next step on."""
        self.left = True


@dataclass(eq=False)
class _Sequence:
    """A ticket that has a place.

    read: Tokens whose keys and values are kept.
    written: Tokens that were chosen.
    """

    ticket: Ticket
    place: int
    chooser: Chooser
    read: int = 0
    written: list[int] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that are to be read before the next is chosen."""
        return len(self.ticket.prompt) + len(self.written) - self.read

    def next(self, count: int) -> list[int]:
        """The tokens that are read next."""
        if self.written:
            return self.written[-1:]
        return list(self.ticket.prompt[self.read : self.read + count])


class Engine:
    """Generates for many.

    Args:
        model: A causal language model that `packed` suits, with its attention set.
        kind: How keys and values are kept (`places.KINDS`).
        step_tokens: Rows of a step at the most.
    """

    def __init__(
        self, model: Pretrained, *, places: int, tokens: int, kind: str = "float", step_tokens: int = STEP_TOKENS
    ) -> None:
        self._model, self._step_tokens = model, max(step_tokens, places)
        self._store = Places(places, tokens, kind)
        self._free = list(range(places))
        self._active: list[_Sequence] = []
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.restarts = 0
        self._thread = threading.Thread(target=self._supervise, name="w8a8-engine", daemon=True)

    @property
    def tokens(self) -> int:
        return self._store.tokens

    @property
    def busy(self) -> tuple[int, int]:
        """Sequences that have a place, and tickets that wait."""
        return len(self._active), len(self._waiting)

    def start(self) -> "Engine":
        self._thread.start()
        return self

    def ask(self, ticket: Ticket) -> None:
        """Take a ticket; its answer comes through `ticket.tell`."""
        assert 0 < len(ticket.prompt) < self.tokens  # the front has checked
        assert ticket.most > 0
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the step that runs; whoever is in it is told nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _supervise(self) -> None:
        """Have the loop run, and begin it anew where it ended by a fault."""
        while not self._closed:
            with ThreadPoolExecutor(1, thread_name_prefix="w8a8-engine-loop") as thread:
                error = thread.submit(self._loop).exception()
            if error is None:
                return
            _LOG.error("w8a8: a step of generation failed; the engine starts anew", exc_info=error)
            self.restarts += 1
            self._store = self._store.emptied()
            failed, self._active = self._active, []
            self._free = list(range(self._store.count))
            for sequence in failed:
                sequence.ticket.error = error
                self._tell(sequence, [], "failed")

    def _loop(self) -> None:
        with torch.inference_mode():
            while self._admit():
                batch = self._batch()
                if batch:
                    self._step(batch)

    def _admit(self) -> bool:
        """Let go who is gone and give places to who waits; wait where nobody is there.  False at the end."""
        with self._changed:
            while True:
                for sequence in [s for s in self._active if s.ticket.left]:
                    self._release(sequence)
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
                if self._closed:
                    return False
                while self._waiting and self._free:
                    ticket = self._waiting.popleft()
                    place = min(self._free)
                    self._free.remove(place)
                    self._active.append(_Sequence(ticket, place, Chooser(ticket.sampling, list(ticket.prompt))))
                if self._active:
                    return True
                self._changed.wait()

    def _batch(self) -> list[tuple[_Sequence, int]]:
        """Who is in the next step, with how many tokens: those who need one first.

        Half of what is left is for the prompt that came first, so that it is read however many come after it; the rest
        for those that are soonest read, so that a short one does not wait for a long one.
        """
        batch = [(sequence, 1) for sequence in self._active if sequence.pending == 1]
        reading = [sequence for sequence in self._active if sequence.pending > 1]
        room = self._step_tokens - len(batch)
        if reading:
            counts = dict.fromkeys(reading, 0)
            shares = [(reading[0], (room + 1) // 2)]
            shares += [(sequence, room) for sequence in (*sorted(reading, key=lambda s: s.pending), reading[0])]
            for sequence, share in shares:
                count = min(sequence.pending - counts[sequence], share, room)
                counts[sequence] += count
                room -= count
            batch += [(sequence, count) for sequence, count in counts.items() if count]
        return batch

    def _step(self, batch: list[tuple[_Sequence, int]]) -> None:
        ids: list[int] = []
        pieces: list[Piece] = []
        for sequence, count in batch:
            pieces.append(Piece(sequence.place, len(ids), count, sequence.read))
            ids += sequence.next(count)
        ready = [
            (sequence, piece.start + piece.count - 1)
            for (sequence, count), piece in zip(batch, pieces, strict=True)
            if count == sequence.pending
        ]
        step = Step.of(self._store, pieces, self._model.device)
        logits = forward(self._model, ids, step, [row for _, row in ready])
        for sequence, count in batch:
            sequence.read += count
        tokens = chosen([sequence.chooser for sequence, _ in ready], logits.cpu())
        for (sequence, _), token in zip(ready, tokens, strict=True):
            if token is None:
                sequence.ticket.error = ModelError("the model's logits are not finite")
                self._end(sequence, [], "failed")
            else:
                self._wrote(sequence, token)

    def _wrote(self, sequence: _Sequence, token: int) -> None:
        ticket = sequence.ticket
        sequence.written.append(token)
        sequence.chooser.wrote(token)
        ending: Ending | None = None
        if token in ticket.ends:
            ending = "stop"
        elif len(sequence.written) >= ticket.most or sequence.read + 1 >= self.tokens:
            ending = "length"
        if ending is not None:
            self._end(sequence, [token] if ticket.every else sequence.written, ending)
        elif ticket.every:
            self._tell(sequence, [token], None)

    def _end(self, sequence: _Sequence, tokens: list[int], ending: Ending) -> None:
        self._tell(sequence, tokens, ending)
        with self._changed:
            self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        self._active.remove(sequence)
        self._free.append(sequence.place)

    @staticmethod
    def _tell(sequence: _Sequence, tokens: list[int], ending: Ending | None) -> None:
        if not sequence.ticket.left:
            sequence.ticket.tell(tokens, ending)


def forward(model: Pretrained, ids: Sequence[int], step: Step, rows: Sequence[int]) -> Tensor:
    """The logits of some rows of a step, (rows, vocabulary).

    Args:
        rows: Whose logits are wanted; none, for a step that only reads, still runs the model.
    """
    device = model.device
    kept = torch.tensor(list(rows) or [0], dtype=torch.long, device=device)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    with taken(step, model):
        found: Tensor = model(
            input_ids=torch.tensor([ids], dtype=torch.long, device=device),
            position_ids=step.where[:, 1].long()[None],
            use_cache=False,
            **({"logits_to_keep": kept} if keeps else {}),
        ).logits[0]
    return (found if keeps else found[kept])[: len(rows)]

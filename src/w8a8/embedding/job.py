"""The texts of a file embedded into a file: what `w8a8 embed` does.

A piece of the file is read at a time, its texts are sorted by their tokens, the longest first, and go through the model
in batches of so many padded tokens; their vectors are written in the order of the file.  The first batch of a piece is
the largest, so what does not fit fails at once.  Sorting the whole file would pad a little less (of a piece of
`PIECE` texts the batches are of nearly one length already) and would have to hold its texts or its vectors.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from w8a8.checkpoint.beside import class_around
from w8a8.checkpoint.directory import Directory
from w8a8.core.plain import plain
from w8a8.core.progress import Progress
from w8a8.defaults import usual_defaults
from w8a8.embedding.pooled import Pooled, open_pooled
from w8a8.embedding.texts import Line, count_texts, each_text, pieces
from w8a8.embedding.vectors import check_place, growing
from w8a8.errors import ModelError, TextError, closest
from w8a8.evaluation.encoders import Array
from w8a8.fusing.models import fusions_in_words, optimize_where_possible
from w8a8.jobs.watching import Watcher
from w8a8.serving.batching import BATCH_TOKENS, Item
from w8a8.serving.encoders import Embedder, open_encoder

PIECE = 4096
"""Texts that are in memory at a time."""

CHARACTERS = 1 << 22
"""Of those texts; a text that has more is a piece of its own."""


@dataclass(frozen=True)
class Embedding:
    """Texts that are to be embedded.

    model: A directory or hub id, float or quantised: of sentence-transformers, or a plain encoder, whose last states
        are averaged over the tokens of a text.
    text: A file, see `w8a8.embedding.texts`.
    output: The .npy file to write: a row of float32 for each text, in their order.
    prompt: The name of what sentence-transformers puts before a text; by default what the directory says.
    batch_tokens: Padded tokens that go through the model together.
    fuse: Whether what lies between integer layers is done by the native kernel (`w8a8.optimize`), where it can be.
    overwrite: Replace a file that is there.
    trust_remote_code: As for `w8a8.load`.
    """

    model: str | Path
    text: Path
    output: Path
    prompt: str | None = None
    batch_tokens: int = BATCH_TOKENS
    fuse: bool = True
    overwrite: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Embedded:
    """What was written, and how fast.

    texts, width: The shape of the file.
    tokens: That the model read, padding not counted.
    cut: How many texts had more tokens than the model reads, and were cut.
    seconds: From the first text to the file's name; opening the model is not in it.
    vectors: What a row is, in words.
    not_fused: Why nothing is fused; None where it is.
    """

    output: Path
    texts: int
    width: int
    tokens: int
    cut: int
    seconds: float
    vectors: str
    not_fused: str | None

    @property
    def texts_per_s(self) -> float:
        """Throughput."""
        return self.texts / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Throughput, padding not counted."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**plain(self), "texts_per_s": self.texts_per_s, "tokens_per_s": self.tokens_per_s}


def embed_texts(asked: Embedding, watcher: Watcher | None = None) -> Embedded:
    """Embed the texts of a file into a file, which is whole or not there.

    Args:
        asked: What is to be embedded, by what.
        watcher: Told how it goes; by default nobody.

    Raises:
        TextError: the file cannot be read, changed meanwhile, or has a text without a token.
        OutputError: the vectors cannot be put there, or there is no room for them.
        ModelError: the model gives no vectors, or some that are not finite; there is no such prompt;
            sentence-transformers is not there.
        CheckpointError: the directory cannot be read.

    Example:
        >>> done = embed_texts(Embedding("int8-embedder", Path("texts.txt"), Path("vectors.npy")))  # doctest: +SKIP
        >>> np.load(done.output, mmap_mode="r").shape  # doctest: +SKIP
    """
    watcher = watcher or Watcher()
    check_place(asked.output, overwrite=asked.overwrite)
    if asked.batch_tokens < 1:
        raise ModelError(f"batch_tokens={asked.batch_tokens} is out of range: at least 1; {BATCH_TOKENS} is usual")
    count = count_texts(asked.text)
    directory = Directory.of(asked.model, trust_remote_code=asked.trust_remote_code)
    encoder, vectors = _opened(directory, asked.prompt)
    not_fused = optimize_where_possible(encoder.model) if asked.fuse else "it was not asked for"
    watcher.note(f"w8a8: {asked.model}: {vectors}")
    with usual_defaults():  # sentence-transformers makes tensors without saying where
        encoder.warm_up()
        watcher.note(f"w8a8: {fusions_in_words(encoder.model, not_fused)}")
        work = _Work(asked, encoder, count)
        with watcher.stage("embedding") as step, growing(asked.output, count, encoder.width) as file:
            work.begun = time.perf_counter()
            for lines in pieces(each_text(asked.text), most=PIECE, characters=CHARACTERS):
                file.add(work.embedded(lines, step))
            if work.done != count:
                raise work.changed()
    seconds = time.perf_counter() - work.begun
    return Embedded(asked.output, count, encoder.width, work.tokens, work.cut, seconds, vectors, not_fused)


def _opened(directory: Directory, prompt: str | None) -> tuple[Embedder | Pooled, str]:
    """The encoder, and what its vectors are."""
    if class_around(directory.path) is None:
        if prompt is not None:
            raise ModelError(
                f"the prompt {prompt!r} was asked for, and {directory.path} is no directory of sentence-transformers, "
                "which has prompts; put it before the texts"
            )
        pooled = open_pooled(directory)
        kind = type(pooled.model).__name__
        return pooled, f"a plain encoder, so a vector is the mean of the last states of {kind}, not normalised"
    encoder = open_encoder(directory)
    if not isinstance(encoder, Embedder):
        raise ModelError(
            f"vectors of texts were asked for, and {directory.path} is a {type(encoder.model).__name__} of "
            "sentence-transformers, which gives scores: `w8a8 serve` answers with them"
        )
    if prompt is not None and prompt not in encoder.prompts:
        raise ModelError(
            f"the prompt {prompt!r} was asked for, and {directory.path} has none of that name, "
            f"{closest(prompt, encoder.prompts)}"
        )
    name = encoder.model.default_prompt_name if prompt is None else prompt
    return encoder, "as sentence-transformers makes them" + ("" if name is None else f", with the prompt {name!r}")


class _Work:
    """A job on its way: how far it is, and how much the model read."""

    def __init__(self, asked: Embedding, encoder: Embedder | Pooled, count: int) -> None:
        self.asked, self.encoder, self.count = asked, encoder, count
        self.done = self.tokens = self.cut = 0
        self.begun = 0.0

    def embedded(self, lines: Sequence[Line], step: Progress) -> Array:
        """(lines, width) of float32, in their order."""
        if self.done + len(lines) > self.count:
            raise self.changed()
        items = self._items([line.text for line in lines])
        found = np.empty((len(lines), self.encoder.width), np.float32)
        for places in batches([item.tokens for item in items], self.asked.batch_tokens):
            answers = self.encoder.run(items[0].kind, [items[place].content for place in places])
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer
                self._check(lines[place], items[place], found[place])
            self.done += len(places)
            rate = self.done / (time.perf_counter() - self.begun)
            step(self.done, self.count, f"{rate:,.0f} texts/s")
        return found

    def changed(self) -> TextError:
        """That the file is not what it was."""
        return TextError(
            f"{self.asked.text} had {self.count} texts when it was counted, and has another number now: it was written "
            "to meanwhile; begin again"
        )

    def _items(self, texts: Sequence[str]) -> list[Item]:
        if isinstance(self.encoder, Embedder):
            items = self.encoder.items(texts, self.asked.prompt)
        else:
            items = self.encoder.items(texts)
        window = self.encoder.window
        most = [item.tokens if window is None else min(item.tokens, window) for item in items]
        self.tokens += sum(most)
        self.cut += sum(item.tokens > read for item, read in zip(items, most, strict=True))
        return [Item(item.kind, item.content, read) for item, read in zip(items, most, strict=True)]

    def _check(self, line: Line, item: Item, answer: Array) -> None:
        if not item.tokens:
            raise TextError(
                f"{self.asked.text}, line {line.number} has no token that the model knows, so there is no vector of "
                "it; leave it out"
            )
        if not np.isfinite(answer).all():
            raise ModelError(f"{self.asked.text}, line {line.number}: the model's vector of it is not finite")


def batches(tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of texts that go through the model together, the longest first.

    Args:
        most: Padded tokens in a batch; a text that has more is alone.
    """
    order = sorted(range(len(tokens)), key=lambda place: -tokens[place])
    while order:
        count = max(1, most // max(1, tokens[order[0]]))
        yield order[:count]
        order = order[count:]

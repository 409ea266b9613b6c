"""One file of the result: pieces are read ahead, quantised, and written behind.

Three threads, each at most a few pieces ahead of the next: one reads the source, one quantises, and hashes what is
still in its cache, one writes.  All of it releases Python's lock.  Pieces are read into the same rooms again and again.
The file grows under a hidden name and takes its own when it is whole and on the disk.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from w8a8.checkpoint.headers import Told, header_of, in_order
from w8a8.core.packed import SHAPE, WORDS, pack_rows
from w8a8.core.row_sample import RowSample
from w8a8.errors import CheckpointError, noted
from w8a8.layers.weights import make_weight
from w8a8.streaming.journal import disk_error, sync_directory
from w8a8.streaming.plan import PIECE, Shard, Step
from w8a8.streaming.source import Room

_AHEAD = 2  # pieces that may wait for the disk


class ShardWriter:
    """A safetensors file that is written in pieces, in any order of tensors.

    Args:
        outputs: Name, dtype and shape of each tensor, in the order of the file.
    """

    def __init__(self, path: Path, outputs: list[Told]) -> None:
        self.path = path
        self._growing = path.with_name(f".{path.name}.growing")
        text, self._entries = header_of(outputs, path)
        self._written = dict.fromkeys(self._entries, 0)
        self._hashes = {name: hashlib.sha256() for name in self._entries}
        self._whole = hashlib.sha256(text)
        try:
            self._file: BinaryIO = self._growing.open("wb")
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            self._put(text, 0)
        except CheckpointError:
            self.abandon()
            raise

    def place(self, name: str, values: Tensor) -> tuple[memoryview, int]:
        """Where the next values of a tensor, contiguous and of its dtype, are to be put; they count from now on."""
        entry, data = self._entries[name], _memory(values)
        self._hashes[name].update(data)
        position = entry.begin + self._written[name]
        self._written[name] += len(data)
        return data, position

    def put(self, name: str, values: Tensor) -> None:
        """Write the next values of a tensor, contiguous and of its dtype."""
        self._put(*self.place(name, values))

    def finish(self) -> str:
        """Have it on the disk under its name; the digest."""
        for name, entry in self._entries.items():
            assert self._written[name] == entry.bytes, f"{name}: {self._written[name]} of {entry.bytes} bytes written"
            self._whole.update(self._hashes[name].digest())
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            self._file.close()
        self._growing.rename(self.path)
        sync_directory(self.path.parent)
        return self._whole.hexdigest()

    def abandon(self) -> None:
        """Remove what is there of it."""
        self._file.close()
        self._growing.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview, position: int) -> None:
        view, start, descriptor = memoryview(data), position, self._file.fileno()
        try:
            while view:
                count = os.pwrite(descriptor, view, position)
                view, position = view[count:], position + count
            if hasattr(os, "posix_fadvise"):  # the disk begins now, so that fsync has little left to wait for
                os.posix_fadvise(descriptor, start, len(data), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise disk_error(error, self.path) from error


Writer = TypeVar("Writer", bound=ShardWriter)


@contextlib.contextmanager
def growing(writer: Writer) -> Iterator[Writer]:
    """A file that is removed where its making fails."""
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Make a file of tensors that are in memory, those with the widest elements first; returns its digest.

    Raises:
        CheckpointError: the disk is full; nothing of the file is left.
    """
    outputs = in_order((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    with growing(ShardWriter(path, outputs)) as writer:
        for name, _, _ in outputs:
            writer.put(name, tensors[name].contiguous())
        return writer.finish()


@dataclass(frozen=True)
class Written:
    """A file that is whole: its digest, and the SQNR in dB of the weight of each layer in it that was quantised."""

    digest: str
    weight_sqnr_db: dict[str, float]


def write_shard(shard: Shard, directory: Path, told: Callable[[Step], None] | None = None) -> Written:
    """Make one file of the result.

    Raises:
        CheckpointError: the source cannot be read, or the disk is full; nothing of the file is left.
        NonFiniteError: a weight holds a NaN or an infinity; the layer is named.
    """
    samples = {step.place: RowSample(step.rows) for step in shard.steps if step.spec is not None}
    with (
        growing(ShardWriter(directory / shard.file, shard.outputs)) as writer,
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
    ):
        waiting: list[Future[None]] = []
        rooms: list[Room] = []  # free ones
        for step, last, room, values in _read_ahead(shard, reading, rooms):
            parts = [writer.place(name, part) for name, part in _made(step, values, samples.get(step.place), last=last)]
            waiting.append(writing.submit(_put_all, writer, parts, room, rooms))
            del values, parts
            while len(waiting) > (1 if step.whole else _AHEAD):
                waiting.pop(0).result()
            if last and told is not None:
                told(step)
        for future in waiting:
            future.result()
        return Written(writer.finish(), {place: sample.sqnr_db for place, sample in samples.items()})


def _put_all(writer: ShardWriter, parts: list[tuple[memoryview, int]], room: Room, rooms: list[Room]) -> None:
    """Write what a piece became, and set its room free, in which that may lie."""
    for data, position in parts:
        writer._put(data, position)
    if room.size == PIECE:
        rooms.append(room)


def _read_ahead(
    shard: Shard, reading: ThreadPoolExecutor, rooms: list[Room]
) -> Iterator[tuple[Step, bool, Room, Tensor]]:
    """Every piece of the source with its step, whether it is the step's last, and the room in which it lies."""
    jobs = [(step, *ends) for step in shard.steps for ends in (list(step.pieces()) or [(step.entry.begin,) * 2])]
    next_read: Future[tuple[Room, Tensor]] | None = None
    for i, (step, begin, end) in enumerate(jobs):
        room, values = (next_read or reading.submit(_read, step, begin, end, rooms)).result()
        following = jobs[i + 1] if i + 1 < len(jobs) else None
        next_read = None
        if following is not None and not (step.whole or following[0].whole):  # two whole tensors are too many
            next_read = reading.submit(_read, *following, rooms)
        yield step, end == step.entry.end, room, values
        del values, room


def _read(step: Step, begin: int, end: int, rooms: list[Room]) -> tuple[Room, Tensor]:
    """Bytes of the source as a tensor, (rows, K) where it is quantised, flat where it is copied, and where they lie."""
    fits = end - begin <= PIECE
    room = rooms.pop() if fits and rooms else Room(PIECE if fits else end - begin)
    data = room.read(step.entry.file, begin, end)
    if data.storage_offset() % step.entry.dtype.itemsize:  # a file may put a tensor anywhere
        data = data.clone()
    values = data.view(step.entry.dtype)
    return room, values if step.spec is None else values.view(-1, step.entry.shape[1])


def _made(step: Step, values: Tensor, sample: RowSample | None, *, last: bool) -> list[tuple[str, Tensor]]:
    """What a piece becomes, by the names of the outputs; the last one brings what there is of the whole."""
    values = values.to(step.dtype)
    if step.spec is None:
        return [(step.name, values)]
    weight = values.t() if step.transposed else values
    with noted(f"while quantising {step.name} of {step.entry.file}"):
        made = make_weight(weight, step.spec, sample).named()
    if step.in_words:
        made[WORDS] = pack_rows(made.pop("weight"))
        if last:
            shape = step.entry.shape[::-1] if step.transposed else step.entry.shape
            made[SHAPE] = torch.tensor(shape, dtype=torch.int64, device="cpu")
    return [(f"{step.name}.{key}", t.contiguous()) for key, t in made.items()]


def _memory(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return values.reshape(-1).view(torch.uint8).numpy().data

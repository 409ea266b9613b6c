"""Bytes of a file into memory, at the least price: what is in the page cache from there, the rest past it.

A model that does not fit into memory does not fit into the page cache either: reading through it costs a copy and a
page of memory for each page of the file, 0.9 s of a core per GB where the disk itself takes 0.06 (both measured).  So
a piece that is not cached is read with O_DIRECT, from one page's boundary to another, where the system and the file
system have that; elsewhere through the cache.  Whether it is cached is asked by a read of its
last byte that must not wait.
"""

import errno
import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from w8a8.checkpoint.headers import Entry
from w8a8.errors import CheckpointError

_PAGE = max(4096, mmap.PAGESIZE)
_DIRECT = getattr(os, "O_DIRECT", 0)
_SAMPLE = 4096  # bytes of a tensor
_SAMPLED = 256  # tensors of a file
_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)


class Room:
    """Memory for the bytes of a piece, used again and again."""

    def __init__(self, size: int) -> None:
        self.size = size
        # a piece begins and ends somewhere in a page
        held = torch.empty(size + 3 * _PAGE, dtype=torch.uint8, device="cpu")
        self._held = held[-held.data_ptr() % _PAGE :]

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        """Bytes `begin` to `end` of a file: uint8, a view of the room that lasts until the next read.

        Raises:
            CheckpointError: the file cannot be read, or is shorter.
        """
        assert end - begin <= self.size, f"{end - begin} bytes do not fit into {self.size}"
        try:
            head, whole = begin % _PAGE, -(-end // _PAGE) * _PAGE
            direct = _DIRECT and not _cached(path, begin, end)
            if direct and self._fill(path, _DIRECT, begin - head, whole, end - begin + head):
                return self._held[head : head + end - begin]
            if self._fill(path, 0, begin, end, end - begin):
                return self._held[: end - begin]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        raise CheckpointError(f"{path} ends before byte {end:,}: it became shorter meanwhile")

    def _fill(self, path: Path, flags: int, begin: int, end: int, needed: int) -> bool:
        """Whether at least the bytes that are needed are here; not where the file system knows no such flag."""
        try:
            with open(path, "rb", buffering=0, opener=lambda name, own: os.open(name, own | flags)) as file:
                count = 0
                while count < needed:
                    step = os.preadv(file.fileno(), [self._held[count : end - begin].numpy().data], begin + count)
                    if not step:
                        return False
                    count += step
                return True
        except OSError as error:
            if flags and error.errno == errno.EINVAL:
                return False
            raise


def sampled_digest(path: Path, entries: Sequence[Entry]) -> str:
    """The SHA-256 of what a glance shows of a file: 4 KiB out of each tensor, at a place that follows from its name.

    A page costs 0.1 ms where the file is not in the page cache, so no more than 256 tensors are looked at, evenly
    spread.  New weights in one that is looked at show, save where they differ in other places only.

    Args:
        entries: Of its header, in the order of their bytes.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for entry in entries[:: max(1, -(-len(entries) // _SAMPLED))]:
            number = int.from_bytes(hashlib.sha256(entry.name.encode(errors="surrogatepass")).digest()[:8], "little")
            place = number % (max(entry.bytes - _SAMPLE, 0) + 1)
            digest.update(os.pread(file.fileno(), min(entry.bytes, _SAMPLE), entry.begin + place))
    return digest.hexdigest()


def _cached(path: Path, begin: int, end: int) -> bool:
    """Whether the last byte is in the page cache, and so probably the others."""
    if not _AT_ONCE or begin == end:
        return False
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # the question must not fetch what it asks for
            return os.preadv(file.fileno(), [bytearray(1)], end - 1, _AT_ONCE) == 1
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):  # it would wait, or cannot say
            return False
        raise

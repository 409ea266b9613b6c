"""A .npy file that is written row by row, and is whole or not there.

What it will hold is known at the beginning, so its header is written once and nothing is ever read back; room on the
disk is looked for first.  `numpy.lib.format.open_memmap` was the alternative: a row on a full disk is then a signal
that ends the process, where a write is an error.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from w8a8.errors import OutputError
from w8a8.evaluation.encoders import Array

SUFFIX = ".npy"
_DTYPE = np.dtype("<f4")


def check_place(path: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` where a file of vectors cannot be put, before anything that takes long."""
    if path.suffix != SUFFIX:
        raise OutputError(f"{path} was named for vectors, which are NumPy's: give a name that ends in {SUFFIX}")
    if not path.parent.is_dir():
        raise OutputError(f"{path} was named for vectors, and there is no folder {path.parent}; make it")
    if path.is_dir():
        raise OutputError(f"{path} was named for vectors, and is a folder; give another name")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} was named for vectors, and is there; give another name, or --overwrite")


class Rows:
    """The file while it grows: (rows, width) of float32, in C order."""

    def __init__(self, path: Path, file: BinaryIO, width: int) -> None:
        self.width, self.written = width, 0
        self._path, self._file = path, file

    def add(self, vectors: Array) -> None:
        """The next rows, (n, width)."""
        assert vectors.shape[1:] == (self.width,)
        with _told(self._path):
            self._file.write(np.ascontiguousarray(vectors, _DTYPE).data)
        self.written += len(vectors)


@contextmanager
def growing(path: Path, rows: int, width: int) -> Iterator[Rows]:
    """A file that has its name when the block ends, and is gone where the block does not end well.

    Args:
        path: As `check_place` lets it pass; one that is there is replaced at once.
        rows: That the block will add, all of them.

    Raises:
        OutputError: there is no room, or the file cannot be written.
    """
    size, free = rows * width * _DTYPE.itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise OutputError(
            f"{rows:,} vectors of {width} numbers take {size / 1e9:.3f} GB, and {path.parent} has {free / 1e9:.3f} GB "
            "free; give a place on another disk"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shape = {"descr": np.lib.format.dtype_to_descr(_DTYPE), "fortran_order": False, "shape": (rows, width)}
    with _told(part):
        file = part.open("wb")
        np.lib.format.write_array_header_1_0(file, shape)
    made = Rows(part, file, width)
    try:
        yield made
        assert made.written == rows
        with _told(path), file:  # the disk holds all of it before it has its name
            file.flush()
            os.fsync(file.fileno())
        with _told(path):
            part.replace(path)
    finally:
        file.close()
        part.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; nothing of it is left") from error

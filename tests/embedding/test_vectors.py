"""A file of vectors is whole, or not there."""

import shutil
from collections import namedtuple

import numpy as np
import pytest

from w8a8.embedding.vectors import check_place, growing
from w8a8.errors import OutputError

VECTORS = np.arange(12, dtype=np.float64).reshape(4, 3)


def test_numpy_reads_what_was_written_in_parts(tmp_path):
    path = tmp_path / "vectors.npy"
    with growing(path, 4, 3) as file:
        file.add(VECTORS[:1])
        assert not path.exists()
        file.add(VECTORS[1:].T.copy().T)  # whatever lies how
    found = np.load(path, mmap_mode="r")
    assert found.dtype == np.float32
    assert np.array_equal(found, VECTORS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_what_stops_it_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "vectors.npy"
    path.write_bytes(b"before")

    def stopped():
        with growing(path, 4, 3) as file:
            file.add(VECTORS[:1])
            raise error

    with pytest.raises(error):
        stopped()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(47))
    with pytest.raises(OutputError, match=r"4 vectors of 3 numbers take .* free"), growing(tmp_path / "v.npy", 4, 3):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_is_told(tmp_path):
    def full(data):
        raise OSError(28, "No space left on device")

    def added():
        with growing(tmp_path / "v.npy", 4, 3) as file:
            file.add(VECTORS[:1])
            file._file = type("Full", (), {"write": staticmethod(full), "close": file._file.close})
            file.add(VECTORS[1:])

    with pytest.raises(OutputError, match="No space left"):
        added()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vectors.bin", r"ends in \.npy"),
        ("none/vectors.npy", "there is no folder"),
        ("folder.npy", "is a folder"),
        ("there.npy", "is there; .* --overwrite"),
    ],
)
def test_a_place_that_cannot_be_written_is_told(tmp_path, name, message):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "there.npy").touch()
    with pytest.raises(OutputError, match=message):
        check_place(tmp_path / name, overwrite=False)


def test_a_file_that_is_there_is_replaced_where_that_is_asked_for(tmp_path):
    (tmp_path / "there.npy").touch()
    check_place(tmp_path / "there.npy", overwrite=True)
    check_place(tmp_path / "new.npy", overwrite=False)

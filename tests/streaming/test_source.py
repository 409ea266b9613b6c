"""The bytes of a file, whichever way they come."""

import errno
import os
import subprocess
import time

import pytest
import torch

from w8a8.checkpoint.headers import header_of, read_header
from w8a8.errors import CheckpointError
from w8a8.streaming import source
from w8a8.streaming.source import Room, sampled_digest

SIZE = 50_000
CUTS = [(0, SIZE), (0, 0), (1, 2), (4095, 4097), (4096, 8192), (123, 45_678), (49_999, SIZE), (SIZE, SIZE)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=["as it comes", "cached", "direct", "neither", "no such flags"])
def way(request, monkeypatch):
    """One way for all reads."""
    if request.param == "cached":
        monkeypatch.setattr(source, "_cached", lambda *_: True)
    if request.param in ("direct", "neither"):
        monkeypatch.setattr(source, "_cached", lambda *_: False)
    if request.param == "neither":
        monkeypatch.setattr(source, "_DIRECT", 0)
    if request.param == "no such flags":
        preadv, opened = os.preadv, os.open

        def refuse_flags(descriptor, views, position, *flags):
            if flags:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return preadv(descriptor, views, position)

        def refuse_direct(path, flags):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags)

        monkeypatch.setattr(source.os, "preadv", refuse_flags)
        monkeypatch.setattr(source.os, "open", refuse_direct)
    return request.param


@pytest.mark.parametrize(("begin", "end"), CUTS)
def test_every_way_gives_the_same_bytes(file, way, begin, end):
    assert Room(SIZE).read(file, begin, end).numpy().tobytes() == file.read_bytes()[begin:end]


def test_a_room_is_used_again(file, way):
    room, held = Room(20_000), file.read_bytes()
    for begin in (0, 17, 30_000):
        assert room.read(file, begin, begin + 20_000).numpy().tobytes() == held[begin : begin + 20_000]


def test_a_file_that_is_shorter_is_told(file, way):
    with pytest.raises(CheckpointError, match="ends before byte 50,001: it became shorter meanwhile"):
        Room(SIZE + 1).read(file, 10, SIZE + 1)


def test_a_file_that_is_missing_is_told(tmp_path, way):
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        Room(10).read(tmp_path / "nothing", 0, 10)


@pytest.mark.parametrize("allowed", [1, 4096, 5000])
def test_reads_that_return_less_are_gone_on_with(file, monkeypatch, allowed):
    preadv = os.preadv
    monkeypatch.setattr(source.os, "preadv", lambda d, views, at: preadv(d, [views[0][:allowed]], at))
    monkeypatch.setattr(source, "_DIRECT", 0)
    assert Room(SIZE).read(file, 100, 20_100).numpy().tobytes() == file.read_bytes()[100:20_100]


def test_what_is_not_in_the_page_cache_is_read_past_it(file, monkeypatch):
    command = ["stat", "-f", "-c", "%T", file]
    kind = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    if not source._DIRECT or kind in ("tmpfs", "overlayfs"):
        pytest.skip(f"this file system ({kind}) has no reads past the page cache")
    seen = []
    fill = Room._fill
    monkeypatch.setattr(
        Room, "_fill", lambda self, path, flags, *ends: (seen.append(flags), fill(self, path, flags, *ends))[1]
    )
    for _ in range(50):  # the system may keep for a moment what was written just now
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        seen.clear()
        found = Room(SIZE).read(file, 5, SIZE).numpy().tobytes()
        if seen == [source._DIRECT]:
            break
        time.sleep(0.05)
    assert found == file.read_bytes()[5:]
    assert seen == [source._DIRECT]
    Room(SIZE).read(file, 5, SIZE)  # cached by now: the comparison has read it
    assert seen == [source._DIRECT, 0]


@pytest.fixture
def weights(tmp_path):
    """A file of tensors with other sizes, and its header."""
    path = tmp_path / "w.safetensors"
    told, _ = header_of([(f"t{i}", torch.int8, (size,)) for i, size in enumerate([0, 1, 4096, 4097, 40_000])], path)
    path.write_bytes(told + os.urandom(48_194))
    return path, [*read_header(path).values()]


def altered(path, begin, end):
    """The digest with other bytes there, which are then put back."""
    held = path.read_bytes()
    path.write_bytes(held[:begin] + bytes(b ^ 255 for b in held[begin:end]) + held[end:])
    try:
        return sampled_digest(path, [*read_header(path).values()])
    finally:
        path.write_bytes(held)


def test_a_glance_sees_other_weights_in_any_tensor(weights):
    path, entries = weights
    known = sampled_digest(path, entries)
    assert known == sampled_digest(path, entries)
    assert all((altered(path, e.begin, e.end) == known) == (e.bytes == 0) for e in entries)


def test_a_glance_does_not_see_what_lies_beside_its_4_kib(weights):
    path, entries = weights
    last, known = entries[-1], sampled_digest(path, entries)
    seen = [altered(path, at, at + 1) != known for at in range(last.begin, last.end, 997)]
    assert sum(seen) in (4, 5)


def test_a_glance_is_at_no_more_than_256_tensors(tmp_path, monkeypatch):
    told, entries = header_of([(f"t{i}", torch.int8, (8,)) for i in range(600)], tmp_path / "w")
    (tmp_path / "w").write_bytes(told + bytes(4800))
    reads = []
    pread = os.pread
    monkeypatch.setattr(source.os, "pread", lambda *where: reads.append(where) or pread(*where))
    sampled_digest(tmp_path / "w", [*entries.values()])
    assert [(where[2] - len(told)) // 8 for where in reads] == list(range(0, 600, 3))

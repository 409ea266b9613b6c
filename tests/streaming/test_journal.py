"""The record of what is finished: it survives a kill anywhere, and never vouches for a file that has changed."""

import errno
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from w8a8.errors import CheckpointError
from w8a8.streaming import journal
from w8a8.streaming.journal import FINGERPRINT, Journal, digest_of, locked

KNOWN = {"scheme": "w8a8", "source": "abc"}


@pytest.fixture
def partial(tmp_path):
    return tmp_path / ".out.partial"


def shard(partial, name, value=1.0):
    save_file({"a": torch.full((4, 3), value), "b": torch.zeros(2, dtype=torch.int8)}, partial / name)
    return {name: digest_of(partial / name)}


def test_what_is_recorded_is_done_for_the_next_run_and_for_other_ranks(partial):
    first = Journal(partial, KNOWN)
    assert not first.done("one")
    first.record("one", shard(partial, "one.safetensors"))
    Journal(partial, KNOWN, rank=1).record("two", shard(partial, "two.safetensors"))
    for rank in (0, 1):
        later = Journal(partial, KNOWN, rank)
        assert later.done("one")
        assert later.done("two")
        assert not later.done("three")


def test_what_layers_lost_is_told_of_all_units_and_all_ranks(partial):
    first, second = Journal(partial, KNOWN), Journal(partial, KNOWN, rank=1)
    first.record("one", shard(partial, "one.safetensors"), {"a": 41.25, "b": math.inf})
    second.record("two", shard(partial, "two.safetensors"), {"c": 1 / 3})
    first.record("three", shard(partial, "three.safetensors"))
    for each in (first, second, Journal(partial, KNOWN)):
        assert each.weight_sqnr_db() == {"a": 41.25, "b": math.inf, "c": 1 / 3}


def test_a_line_that_does_not_tell_what_layers_lost_does_not_count(partial):
    Journal(partial, KNOWN).record("one", shard(partial, "one.safetensors"))
    path = partial / "journal-0.jsonl"
    line = json.loads(path.read_text())
    del line["weight_sqnr_db"]
    path.write_text(json.dumps(line) + "\n")
    assert not Journal(partial, KNOWN).done("one")


def test_a_record_after_a_torn_line_is_not_lost(partial):
    Journal(partial, KNOWN).record("one", shard(partial, "one.safetensors"))
    path = partial / "journal-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"unit": "two", "fil')
    Journal(partial, KNOWN).record("three", shard(partial, "three.safetensors"))
    later = Journal(partial, KNOWN)
    assert (later.done("one"), later.done("two"), later.done("three")) == (True, False, True)


@pytest.mark.parametrize("position", [0, 3, 20, -1])
def test_a_file_that_has_changed_is_not_done(partial, position):
    first = Journal(partial, KNOWN)
    first.record("one", shard(partial, "one.safetensors"))
    data = bytearray((partial / "one.safetensors").read_bytes())
    data[position] ^= 1
    (partial / "one.safetensors").write_bytes(data)
    assert not Journal(partial, KNOWN).done("one")


def test_a_file_that_is_missing_or_shorter_is_not_done(partial):
    Journal(partial, KNOWN).record("one", shard(partial, "one.safetensors"))
    data = (partial / "one.safetensors").read_bytes()
    (partial / "one.safetensors").write_bytes(data[:-1])
    assert not Journal(partial, KNOWN).done("one")
    (partial / "one.safetensors").unlink()
    assert not Journal(partial, KNOWN).done("one")


def test_another_request_is_refused_and_every_difference_named(partial):
    Journal(partial, KNOWN).record("one", shard(partial, "one.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        Journal(partial, {"scheme": "w8a16", "source": "abc", "head": "int8"})
    message = str(caught.value)
    assert "scheme: was w8a8, is w8a16" in message
    assert "head: was absent, is int8" in message
    assert "source" not in message
    assert Journal(partial, KNOWN).done("one")


def test_files_without_a_fingerprint_are_removed(partial):
    partial.mkdir()
    shard(partial, "stale.safetensors")
    (partial / "lock-0").touch()
    Journal(partial, KNOWN)
    assert {path.name for path in partial.iterdir()} == {FINGERPRINT, "lock-0"}


def test_clearing_leaves_the_files_alone(partial):
    first = Journal(partial, KNOWN)
    first.record("one", shard(partial, "one.safetensors"))
    first.clear()
    assert {path.name for path in partial.iterdir()} == {"one.safetensors"}


def test_a_fingerprint_that_cannot_be_read_says_what_to_remove(partial):
    partial.mkdir()
    (partial / FINGERPRINT).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*; remove .*\.out\.partial to start again"):
        Journal(partial, KNOWN)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_under_the_record_is_a_message(partial, monkeypatch, number):
    first = Journal(partial, KNOWN)
    done = shard(partial, "one.safetensors")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal.os, "fsync", fail)
    expected = "the disk is full; make room" if number == errno.ENOSPC else "cannot be written: Input/output error"
    with pytest.raises(CheckpointError, match=expected):
        first.record("one", done)
    with pytest.raises(CheckpointError, match=expected):
        Journal(partial.with_name("other"), KNOWN)


def test_a_rank_is_taken_once(partial):
    busy = pytest.raises(CheckpointError, match="is being written by another process")
    with locked(partial, 0), locked(partial, 1), busy, locked(partial, 0):
        pass
    with locked(partial, 0):
        pass


def test_the_digest_covers_the_header_and_every_byte(tmp_path):
    digests = set()
    for name, tensors in {
        "a": {"x": torch.zeros(3), "y": torch.ones(2)},
        "b": {"x": torch.zeros(3), "z": torch.ones(2)},
        "c": {"x": torch.zeros(3), "y": torch.tensor([1.0, 2.0])},
        "d": {"x": torch.zeros(1, 3), "y": torch.ones(2)},
    }.items():
        save_file(tensors, tmp_path / name)
        digests.add(digest_of(tmp_path / name))
    assert len(digests) == 4


def test_restarting_throws_another_request_away_and_keeps_the_same_one(partial):
    Journal(partial, KNOWN).record("one", shard(partial, "one.safetensors"))
    assert Journal(partial, KNOWN, restart=True).done("one")
    other = {**KNOWN, "scheme": "w8a16"}
    assert not Journal(partial, other, restart=True).done("one")
    assert not (partial / "one.safetensors").exists()
    assert not Journal(partial, other).done("one")
    with pytest.raises(CheckpointError, match=r"scheme: was w8a16, is w8a8[\s\S]*start again \(--force\)"):
        Journal(partial, KNOWN)

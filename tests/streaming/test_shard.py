"""A file that is written in pieces is the file that a library would have written at once."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import llama
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.headers import read_header
from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError, NonFiniteError
from w8a8.kernels import native
from w8a8.streaming import plan as planning
from w8a8.streaming import shard as writing
from w8a8.streaming.journal import digest_of
from w8a8.streaming.plan import make_plan
from w8a8.streaming.shard import ShardWriter, write_shard


@pytest.fixture
def plan(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    return make_plan(Directory.of(tmp_path / "source"), Scheme.of("w8a8"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_tensors_may_come_in_any_order_and_in_parts(place):
    tensors = {"a": torch.randn(5, 3), "b": torch.randint(-9, 9, (7,), dtype=torch.int8), "c": torch.empty(0, 4)}
    writer = ShardWriter(place / "x.safetensors", [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    for name, part in [("b", tensors["b"][:2]), ("a", tensors["a"][:1]), ("b", tensors["b"][2:])]:
        writer._put(*writer.place(name, part))
    assert not (place / "x.safetensors").exists()
    writer._put(*writer.place("a", tensors["a"][1:]))
    assert writer.finish() == digest_of(place / "x.safetensors")
    assert list(place.iterdir()) == [place / "x.safetensors"]
    found = load_file(place / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("piece", [pytest.param(1, marks=pytest.mark.slow), 700, 1 << 20])
def test_the_size_of_the_pieces_does_not_show(place, plan, monkeypatch, piece):
    (whole,) = plan.shards
    once = write_shard(whole, place)
    expected = (place / whole.file).read_bytes()
    for module in (planning, writing):
        monkeypatch.setattr(module, "PIECE", piece)
    again = write_shard(whole, place)
    assert again.digest == once.digest
    assert again.weight_sqnr_db == pytest.approx(once.weight_sqnr_db, rel=1e-9)
    assert len(once.weight_sqnr_db) == sum(step.spec is not None for step in whole.steps) > 0
    assert (place / whole.file).read_bytes() == expected


def test_the_portable_arithmetic_makes_the_same_file(place, plan, monkeypatch):
    (whole,) = plan.shards
    once = write_shard(whole, place)
    monkeypatch.setattr(native, "quantize_rows", lambda *_, **__: None)
    assert write_shard(whole, place) == once


def test_each_tensor_is_told_when_it_is_done(place, plan):
    told = []
    write_shard(plan.shards[0], place, told.append)
    assert told == list(plan.shards[0].steps)


def test_tensors_that_must_be_whole_are_read_one_at_a_time(tmp_path, place, monkeypatch):
    llama().save_pretrained(tmp_path / "source")
    plan = make_plan(Directory.of(tmp_path / "source"), Scheme.of("w8a8-o1"))
    events = []
    read, made = writing._read, writing._made
    monkeypatch.setattr(writing, "_read", lambda step, *ends: (events.append(("read", step)), read(step, *ends))[1])
    monkeypatch.setattr(
        writing, "_made", lambda step, *rest, **last: (made(step, *rest, **last), events.append(("made", step)))[0]
    )
    write_shard(plan.shards[0], place)
    in_memory = set()
    for what, step in events:
        (in_memory.add if what == "read" else in_memory.discard)(step)
        assert sum(step.whole for step in in_memory) <= 1
        assert len(in_memory) <= 2
    assert any(step.whole for _, step in events)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full; make room and run the same command"), (errno.EIO, "cannot be written: Input")],
)
def test_a_disk_that_fails_leaves_no_file_and_says_why(place, plan, monkeypatch, number, message):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing.os, "fsync", fail)
    with pytest.raises(CheckpointError, match=message):
        write_shard(plan.shards[0], place)
    assert not list(place.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(writing.os, "pwrite", fail)
    with pytest.raises(CheckpointError, match=message):
        write_shard(plan.shards[0], place)


def test_a_source_that_became_shorter_is_told(place, plan):
    path = plan.steps[-1].entry.file
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(CheckpointError, match="it became shorter meanwhile"):
        write_shard(plan.shards[0], place)
    assert not list(place.iterdir())


def test_a_value_that_is_not_finite_names_the_layer(place, plan):
    step = next(step for step in plan.steps if step.spec is not None)
    with step.entry.file.open("r+b") as file:
        file.seek(read_header(step.entry.file)[step.entry.name].begin)
        file.write(torch.tensor([torch.inf]).numpy().tobytes())
    with pytest.raises(NonFiniteError, match=r"at index \(0, 0\)") as caught:
        write_shard(plan.shards[0], place)
    assert f"while quantising {step.name} of {step.entry.file}" in caught.value.explain()
    assert not list(place.iterdir())

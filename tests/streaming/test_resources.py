"""What a job will take: as much as it then takes, and no less."""

import shutil
from types import SimpleNamespace

import psutil
import pytest

from tests.conftest import gpt2, llama
from w8a8.checkpoint.directory import Directory
from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError
from w8a8.records.streaming import Prediction
from w8a8.streaming import resources
from w8a8.streaming.plan import PIECE, make_plan
from w8a8.streaming.resources import available_memory, predict

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups that are files of the test's own: set a limit, what is used, and what of it is cache."""
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_control_groups", lambda: [tmp_path / "cgroup/a/b", tmp_path / "cgroup/a"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))

    def limit(name, most, now, cache):
        group = tmp_path / "cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"anon 1\nactive_file {cache}\ninactive_file {cache}\n")

    return limit


def prediction(**changes):
    values = {"peak_bytes": 1, "memory_bytes": 2, "output_bytes": 1, "free_bytes": 2, "source_bytes": 1, "seconds": 1.0}
    return Prediction(**{**values, **changes})


def test_bytes_of_the_result_are_those_of_the_plan(source, tmp_path):
    plan = make_plan(Directory.of(source), Scheme.of("w8a8"))
    found = predict(plan, tmp_path / "out")
    weights = sum(m.parameters for m in plan.coverage.quantized)
    rows = sum(m.shape[0] for m in plan.coverage.quantized)
    floats = sum(m.parameters for m in plan.coverage.left)
    assert found.output_bytes == weights + 4 * rows + 4 * floats
    assert found.source_bytes == 4 * (weights + floats)
    assert found.seconds > 0
    assert not list(tmp_path.glob(".*"))


def test_processes_share_the_time_and_only_those_here_the_memory(source, tmp_path, monkeypatch):
    for trial in ("_reading", "_quantising", "_writing"):
        monkeypatch.setattr(resources, trial, lambda *_: 1e-9)
    plan = make_plan(Directory.of(source), Scheme.of("w8a8"))
    one = predict(plan, tmp_path / "out")
    eight = predict(plan, tmp_path / "out", processes=8, here=2)
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert eight.peak_bytes == pytest.approx(2 * one.peak_bytes, rel=0.05)


def test_what_is_finished_is_not_predicted_again(source, tmp_path):
    plan = make_plan(Directory.of(source), Scheme.of("w8a8"))
    whole = predict(plan, tmp_path / "out")
    assert predict(plan, tmp_path / "out", finished_bytes=whole.output_bytes // 2).output_bytes == (
        whole.output_bytes - whole.output_bytes // 2
    )
    assert predict(plan, tmp_path / "out", finished_bytes=whole.output_bytes).seconds == 0.0


@pytest.mark.parametrize(("make", "scheme"), [(llama, "w8a8-o1"), (gpt2, "w8a8")])
def test_a_tensor_that_must_be_seen_whole_counts_with_its_codes_twice(tmp_path, make, scheme, monkeypatch):
    monkeypatch.setattr(resources, "_PIECES", 0)
    make().save_pretrained(tmp_path / "source")
    plan = make_plan(Directory.of(tmp_path / "source"), Scheme.of(scheme))
    largest = max((step for step in plan.steps if step.whole), key=lambda step: step.entry.bytes)
    assert max(map(resources._held, plan.steps)) == largest.entry.bytes + 2 * largest.bytes


def test_other_tensors_count_by_the_piece(source):
    plan = make_plan(Directory.of(source), Scheme.of("w8a8"))
    assert {resources._held(step) for step in plan.steps} == {4 * PIECE}


def test_the_least_of_machine_and_control_groups_is_available(groups):
    assert available_memory() == 100 * GB
    groups("a", 10 * GB, 4 * GB, 0)
    assert available_memory() == 6 * GB
    groups("a/b", 5 * GB, 2 * GB, 0)
    assert available_memory() == 3 * GB
    groups("a/b", "max", 2 * GB, 0)
    assert available_memory() == 6 * GB


def test_the_cache_of_files_is_available_too(groups):
    groups("a", 10 * GB, 9 * GB, 2 * GB)
    assert available_memory() == 5 * GB


def test_too_little_disk_or_memory_is_refused_with_the_numbers(tmp_path):
    prediction().check(tmp_path)
    with pytest.raises(CheckpointError, match=r"out will take 3\.00 GB, and 2\.50 GB are free there; make room"):
        prediction(output_bytes=3 * GB, free_bytes=25 * GB // 10).check(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"will take 3\.00 GB of memory, and 2\.00 GB are available; close"):
        prediction(peak_bytes=3 * GB, memory_bytes=2 * GB).check(tmp_path)


def test_a_place_that_cannot_be_written_is_told(source, tmp_path, monkeypatch):
    plan = make_plan(Directory.of(source), Scheme.of("w8a8"))

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(resources.tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied; choose another place"):
        predict(plan, tmp_path / "out")


def test_the_trial_never_takes_more_than_a_quarter_of_what_is_free(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert resources._writing(tmp_path, 1 << 30) > 0

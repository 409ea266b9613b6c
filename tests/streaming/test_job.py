"""From files to files: whoever kills it and however many share it, the result is the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import contents, llama, mixtral
from tests.streaming.conftest import partial_of, saved, tensors
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.headers import read_header
from w8a8.core.scheme import Scheme
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError, NonFiniteError, SchemeError
from w8a8.records.streaming import Prediction
from w8a8.streaming import job, pieces
from w8a8.streaming.plan import UnplacedError, make_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TestRefusals:
    def test_a_quantised_source(self, tmp_path):
        source = saved(llama(), tmp_path / "source")
        quantize_directory(source, tmp_path / "out")
        with pytest.raises(SchemeError, match="is quantised already"):
            quantize_directory(tmp_path / "out", tmp_path / "again")

    def test_tensors_that_transformers_stacks(self, tmp_path):
        model = mixtral()
        model.save_pretrained(tmp_path / "source")  # as Mixtral's own files are: an expert a tensor
        with pytest.raises(UnplacedError, match=r"experts.*can only be quantised in memory"):
            quantize_directory(tmp_path / "source", tmp_path / "out", exclude=["*.experts.*"])
        assert not partial_of(tmp_path / "out").exists()

    def test_a_missing_tensor(self, tmp_path):
        source = saved(llama(), tmp_path / "source", shard="1GB")
        held = load_file(source / "model.safetensors")
        del held["model.norm.weight"]
        save_file(held, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.norm\.weight"):
            quantize_directory(source, tmp_path / "out")

    def test_a_tensor_of_another_shape(self, tmp_path):
        source = saved(llama(), tmp_path / "source", shard="1GB")
        held = load_file(source / "model.safetensors")
        held["model.norm.weight"] = torch.ones(7)
        save_file(held, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(7,\), config\.json says \(64,\)"):
            quantize_directory(source, tmp_path / "out")

    def test_a_weight_that_is_not_finite_names_layer_and_file_and_leaves_no_result(self, tmp_path):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
        source = saved(model, tmp_path / "source", shard="1GB")
        with pytest.raises(NonFiniteError) as caught:
            quantize_directory(source, tmp_path / "out")
        assert "model.layers.1.mlp.up_proj" in caught.value.explain()
        assert not (tmp_path / "out").exists()
        assert not list(partial_of(tmp_path / "out").glob("*.growing"))

    def test_an_existing_target(self, tmp_path):
        source = saved(llama(), tmp_path / "source")
        quantize_directory(source, tmp_path / "out")
        before = contents(tmp_path / "out")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            quantize_directory(source, tmp_path / "out", "w8a8-o1")
        assert contents(tmp_path / "out") == before
        quantize_directory(source, tmp_path / "out", "w8a8-o1", overwrite=True)
        assert contents(tmp_path / "out") != before

    @pytest.mark.parametrize(("name", "message"), [("free_bytes", "are free there"), ("memory_bytes", "GB of memory")])
    def test_what_memory_or_disk_will_not_do(self, tmp_path, monkeypatch, name, message):
        source = saved(llama(), tmp_path / "source")
        held = {"peak_bytes": 10, "memory_bytes": 100, "output_bytes": 10, "free_bytes": 100, "source_bytes": 1}
        small = Prediction(**{**held, name: 1}, seconds=1.0)
        monkeypatch.setattr("w8a8.streaming.pieces.predict", lambda *a, **k: small)
        with pytest.raises(CheckpointError, match=message):
            quantize_directory(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_predicts_the_size(tmp_path):
    source = saved(llama(), tmp_path / "source")
    done = quantize_directory(source, tmp_path / "out", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    quantize_directory(source, tmp_path / "out")
    assert done.prediction.output_bytes == sum(t.numel() * t.element_size() for t in tensors(tmp_path / "out").values())
    assert done.prediction.peak_bytes > 0
    assert done.prediction.seconds > 0


class TestResuming:
    def test_finished_shards_are_not_made_again(self, tmp_path, monkeypatch):
        source = saved(llama(), tmp_path / "source")
        whole = quantize_directory(source, tmp_path / "whole", shard_bytes=20_000)
        written = []

        def failing(shard, *rest):
            from w8a8.streaming.shard import write_shard

            if len(written) == 3:
                raise CheckpointError("pulled the plug")
            written.append(shard.file)
            return write_shard(shard, *rest)

        with monkeypatch.context() as patch:
            patch.setattr("w8a8.streaming.pieces.write_shard", failing)
            with pytest.raises(CheckpointError, match="pulled the plug"):
                quantize_directory(source, tmp_path / "out", shard_bytes=20_000)
        times = {name: (partial_of(tmp_path / "out") / name).stat().st_mtime_ns for name in written}
        done = quantize_directory(source, tmp_path / "out", shard_bytes=20_000)
        assert done.resumed == 3
        assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == times
        assert done.coverage == whole.coverage  # with what the weights lost in the files that were there
        assert len(done.coverage.worst_weights(100)) == len(done.coverage.quantized)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert not partial_of(tmp_path / "out").exists()

    def test_a_finished_shard_that_was_damaged_is_made_again(self, tmp_path, monkeypatch):
        source = saved(llama(), tmp_path / "source")
        quantize_directory(source, tmp_path / "whole", shard_bytes=20_000)
        with monkeypatch.context() as patch:
            patch.setattr("w8a8.streaming.job.complete", lambda *a: (_ for _ in ()).throw(CheckpointError("stop")))
            with pytest.raises(CheckpointError, match="stop"):
                quantize_directory(source, tmp_path / "out", shard_bytes=20_000)
        victim = sorted(partial_of(tmp_path / "out").glob("*.safetensors"))[1]
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        done = quantize_directory(source, tmp_path / "out", shard_bytes=20_000)
        assert done.resumed == done.shards - 1
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda source: {"scheme": "w8a8-o1"}, "scheme: was weights int8 channel"),
            (lambda source: {"exclude": ["*.1.*"]}, r"option exclude: was \[\], is \['\*\.1\.\*'\]"),
            (lambda source: {"shard_bytes": 30_000}, "option shard_bytes: was 20000, is 30000"),
            (lambda source: os.utime(next(source.glob("*.safetensors"))) or {}, "modified"),
            (lambda source: other_weights(source), r"values \w{16}, is \d+ bytes, .* values"),
            (lambda source: (source / "tokenizer.json").write_text("{}") and {}, "source tokenizer.json: was absent"),
        ],
    )
    def test_another_request_or_source_does_not_go_on(self, tmp_path, monkeypatch, change, told):
        source = saved(llama(), tmp_path / "source")
        with monkeypatch.context() as patch:
            patch.setattr("w8a8.streaming.job.complete", lambda *a: (_ for _ in ()).throw(CheckpointError("stop")))
            with pytest.raises(CheckpointError, match="stop"):
                quantize_directory(source, tmp_path / "out", shard_bytes=20_000)
        before = contents(partial_of(tmp_path / "out"))
        options = {"shard_bytes": 20_000, **change(source)}
        with pytest.raises(CheckpointError, match=told):
            quantize_directory(source, tmp_path / "out", **options)
        assert contents(partial_of(tmp_path / "out")) == before


def other_weights(source):
    """Change one of them in its place; size, header and time stay."""
    path = sorted(source.glob("*.safetensors"))[0]
    status, entry = path.stat(), [*read_header(path).values()][-1]
    with path.open("r+b") as file:
        file.seek(entry.begin)
        held = file.read(entry.bytes)
        file.seek(entry.begin)
        file.write(bytes(value ^ 1 for value in held))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    return {}


COMMAND = [sys.executable, "-m", "w8a8", "quantize"]
SHARDS = ["--max-shard-gb", "0.0005"]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(Path(w8a8.__file__).parents[1]), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Twenty files, which take long enough to be killed in."""
    directory = tmp_path_factory.mktemp("large")
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    return saved(model, directory / "source", dtype=torch.float32, shard="2MB")


@pytest.fixture(scope="module")
def whole(large):
    """What an undisturbed run makes of it."""
    quantize_directory(large, large.parent / "whole", shard_bytes=500_000)
    return contents(large.parent / "whole")


# The job as the command does it, slowed down so that a kill falls between any two of its writes, some 150.
SLOW = """
import sys, time
from w8a8.directories import quantize_directory
from w8a8.streaming import shard
put, begun = shard.ShardWriter._put, []
def slow(self, data, position):
    if not begun:
        begun.append(print("writing", flush=True))
    time.sleep(0.01)
    put(self, data, position)
shard.ShardWriter._put = slow
print("planning", flush=True)
quantize_directory(sys.argv[1], sys.argv[2], shard_bytes=500_000)
"""


@pytest.mark.slow
def test_killed_twenty_times_at_random_the_result_is_the_same_to_the_byte(tmp_path, large, whole):
    chance, target, kills, resumed, runs = random.Random(0), tmp_path / "out", 0, 0, 0
    while kills < 20:
        runs += 1
        begun = any(partial_of(target).glob("journal-*"))
        command = [sys.executable, "-c", SLOW, str(large), str(target)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"planning\n"
        if chance.random() < 0.8:
            process.stdout.readline()  # its first write, or its end
        time.sleep(chance.uniform(0.0, 0.4))
        if process.poll() is None:
            assert not target.exists() or not partial_of(target).exists()
            process.send_signal(signal.SIGKILL)
            kills += 1
            resumed += begun
        process.wait(timeout=60)
        process.stdout.close()
        if target.exists():  # it was faster than the kill: begin again
            assert contents(target) == whole
            shutil.rmtree(target)
        assert runs < 200
    assert resumed >= 5  # else there was seldom anything to go on with
    subprocess.run([*COMMAND, large, "-o", target, *SHARDS], check=True, env=environment(), timeout=300)
    assert contents(target) == whole


@pytest.mark.slow
def test_two_processes_of_torchrun_make_the_same_bytes(tmp_path, large, whole):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "w8a8"]
    arguments = ["quantize", large, "-o", tmp_path / "out", *SHARDS, "--json"]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, timeout=300, check=True)
    told = json.loads(done.stdout)
    assert told["shards"] == len([name for name in whole if name.endswith(".safetensors")])
    lost = [m["weight_sqnr_db"] for m in told["coverage"]["modules"] if m["reason"] is None]
    assert len(lost) == 8 * 7
    assert [m["weight_sqnr_db"] for m in told["worst_weights"]] == sorted(lost)[:10]
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_what_fails_in_one_process_of_torchrun_ends_both(tmp_path, large):
    damaged = shutil.copytree(large, tmp_path / "source")
    path = sorted(damaged.glob("*.safetensors"))[-1]
    held = load_file(path)
    name = next(name for name in held if name.endswith("proj.weight"))
    held[name][0, 0] = torch.nan
    save_file(held, path, metadata={"format": "pt"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "w8a8"]
    arguments = ["quantize", damaged, "-o", tmp_path / "out", *SHARDS]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode != 0
    assert name.removesuffix(".weight").encode() in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_gone_on_from_when_there_is_room(small_disk, large, whole, monkeypatch):
    monkeypatch.setattr(Prediction, "check", lambda self, target: None)  # as if the disk had filled up meanwhile
    with pytest.raises(CheckpointError, match="the disk is full; make room and run the same command again"):
        quantize_directory(large, small_disk / "out", shard_bytes=500_000)
    assert not (small_disk / "out").exists()
    finished = list(partial_of(small_disk / "out").glob("*.safetensors"))
    assert finished
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True, timeout=30)
    done = quantize_directory(large, small_disk / "out", shard_bytes=500_000)
    assert done.resumed == len(finished)
    assert contents(small_disk / "out") == whole


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(small_disk, large):
    with pytest.raises(CheckpointError, match=r"will take 0\.01 GB, and 0\.00 GB are free there"):
        quantize_directory(large, small_disk / "out")
    assert not list(small_disk.iterdir())


def test_two_jobs_do_not_write_one_result(tmp_path):
    import fcntl

    source = saved(llama(), tmp_path / "source")
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    with (partial / "lock-0").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being written by another process"):
            quantize_directory(source, tmp_path / "out")


def test_the_plan_is_the_same_whatever_the_number_of_processes(large):
    plan = make_plan(Directory.of(large), Scheme.of("w8a8"))
    assert plan.shards == make_plan(Directory.of(large), Scheme.of("w8a8")).shards


def test_patterns_in_a_tuple_or_a_list_are_one_request(large):
    plan = make_plan(Directory.of(large), Scheme.of("w8a8"))
    assert job.fingerprint(plan, job.options(include=("*",))) == job.fingerprint(plan, job.options(include=["*"]))
    assert job.fingerprint(plan, job.options(include=("*",))) != job.fingerprint(
        plan, job.options(include=["*", "lm_head"])
    )


def test_force_goes_on_with_the_same_request_and_throws_another_away(tmp_path, monkeypatch):
    source, target = saved(llama(), tmp_path / "source"), tmp_path / "out"
    finished, write = [], pieces.write_shard

    def stop_after_two(shard, *rest):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(shard.file)
        return write(shard, *rest)

    monkeypatch.setattr(pieces, "write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        quantize_directory(source, target, shard_bytes=20_000, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"scheme: was [\s\S]*start again \(--force\)"):
        quantize_directory(source, target, "w8a16", shard_bytes=20_000)
    assert quantize_directory(source, target, shard_bytes=20_000, overwrite=True, dry_run=True).resumed == 0
    assert quantize_directory(source, target, shard_bytes=20_000, overwrite=True).resumed == 2
    finished.clear()
    monkeypatch.setattr(pieces, "write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        quantize_directory(source, target, shard_bytes=20_000, overwrite=True)
    monkeypatch.undo()
    assert quantize_directory(source, target, "w8a16", shard_bytes=20_000, overwrite=True).resumed == 0
    quantize_directory(source, tmp_path / "fresh", "w8a16", shard_bytes=20_000)
    assert contents(target) == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_torchrun_prints_one_message_for_all_its_processes(tmp_path, large):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "w8a8"]
    arguments = ["quantize", large, "-o", tmp_path / "out", "--include", "*.nothing"]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode != 0
    assert done.stderr.count(b"w8a8: include: '*.nothing' matches none") == 1
    assert done.stderr.count(b"w8a8: ") == 1

"""A directory is opened once: each file of it is read and judged at the door, and nowhere else."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import llama, mixtral
from w8a8.checkpoint import headers
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.opening import open_model
from w8a8.checkpoint.verify import verify_values
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError

SHARDS = "20KB"


@pytest.fixture
def reads(monkeypatch):
    """How often each file was parsed, by its path: headers of safetensors files and JSON; and configs made."""
    found: Counter[object] = Counter()
    text, read_text = headers._text, Path.read_text
    from_pretrained = transformers.AutoConfig.from_pretrained

    def of_header(file, path):
        found[path] += 1
        return text(file, path)

    def of_json(path, *args, **kwargs):
        found[path] += 1
        return read_text(path, *args, **kwargs)

    def of_config(path, **kwargs):
        found["config"] += 1
        return from_pretrained(path, **kwargs)

    monkeypatch.setattr(headers, "_text", of_header)
    monkeypatch.setattr(Path, "read_text", of_json)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", of_config)
    return found


def parts(directory):
    """What there is to be read of a model: its config, its index and its files of weights."""
    names = ("config.json", "model.safetensors.index.json")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    return [*(directory / name for name in names), *shards]


@pytest.fixture
def sources(tmp_path):
    """A float directory and a quantised one, each of several files."""
    model = mixtral()
    model.save_pretrained(tmp_path / "float", max_shard_size=SHARDS)
    w8a8.save(w8a8.quantize(model).model, tmp_path / "int8", max_shard_size=SHARDS)
    return tmp_path


@pytest.mark.parametrize("opens", [w8a8.load, open_model], ids=lambda opens: opens.__name__)
@pytest.mark.parametrize("kind", ["int8", "float"])
def test_loading_reads_each_file_once(sources, reads, kind, opens):
    opens(sources / kind)
    assert reads == Counter(["config", *parts(sources / kind)])


def test_streaming_reads_each_file_of_the_source_once(sources, reads):
    quantize_directory(sources / "float", sources / "out", shard_bytes=20_000)
    assert {path: reads[path] for path in parts(sources / "float")} == dict.fromkeys(parts(sources / "float"), 1)
    headers_of_the_result = [path for path in reads if isinstance(path, Path) and path.parent.name == ".out.partial"]
    assert len(headers_of_the_result) > 4
    assert {reads[path] for path in headers_of_the_result if path.suffix == ".safetensors"} == {1}


def test_looking_at_what_was_saved_reads_each_file_once(sources, reads):
    model = w8a8.load(sources / "int8")
    reads.clear()
    verify_values(sources / "int8", model)
    assert reads == Counter(parts(sources / "int8"))


def test_a_directory_that_is_open_is_handed_down(sources, reads):
    directory = Directory.of(sources / "float")
    assert Directory.of(directory) is directory
    quantize_directory(directory, sources / "out", dry_run=True)
    open_model(directory)
    w8a8.load(directory)
    assert {reads[path] for path in (*parts(sources / "float"), "config")} == {1}


def test_code_is_allowed_by_whoever_allows_it_last(sources):
    directory = Directory.of(sources / "float")
    trusted = Directory.of(directory, trust_remote_code=True)
    assert (directory.trust_remote_code, trusted.trust_remote_code) == (False, True)
    assert Directory.of(trusted) is trusted


def test_a_config_that_is_changed_is_the_callers_own(sources):
    directory = Directory.of(sources / "int8")
    kind, config = directory.architecture
    config.vocab_size, config.dtype = 3, None
    again = directory.architecture
    assert (again[0], again[1].vocab_size, again[1].dtype) == (kind, 96, torch.float32)


def test_the_files_come_by_name_and_their_tensors_by_place(sources):
    directory = Directory.of(sources / "int8")
    assert list(directory.files) == sorted(directory.files) == parts(sources / "int8")[2:]
    assert directory.bytes == sum(path.stat().st_size for path in directory.files)
    places = [(entry.file, entry.begin, entry.end) for entry in directory.entries.values()]
    assert places == sorted(places)
    for name, entry in directory.entries.items():
        assert (entry.dtype, entry.shape) == ((held := load_file(entry.file)[name]).dtype, tuple(held.shape))


def test_what_needs_no_weights_opens_where_there_are_none(tmp_path):
    llama().config.save_pretrained(tmp_path)
    directory = Directory.of(tmp_path)
    assert directory.quantization is None
    with pytest.raises(CheckpointError, match="there are no weights to load"):
        _ = directory.entries


@pytest.mark.parametrize("opens", [w8a8.load, open_model, lambda path: quantize_directory(path, path / "out")])
def test_a_tensor_in_two_files_is_refused_wherever_it_is_opened(sources, opens):
    first, second = parts(sources / "float")[2:4]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{second.name}: {name} is in {first.name} too: two values for one"):
        opens(sources / "float")

"""Directories that somebody damaged, or made to do damage."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import w8a8
from tests.checkpoint.mutations import MUTATIONS, outcome
from tests.conftest import llama
from w8a8.checkpoint.files import MAX_JSON
from w8a8.checkpoint.opening import open_model
from w8a8.cli import main
from w8a8.core.scheme import PerChannel, PerToken, QuantSpec, Scheme
from w8a8.errors import CheckpointError, W8A8Error
from w8a8.layers.linear import quant_linears

TINY = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 24}
SCHEMES = {
    "symmetric": "w8a8",
    "asymmetric": Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken())),
    "float": None,
}


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def saved(request, tmp_path_factory):
    """A sharded directory, and the values in it."""
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("hostile") / "model", llama(**TINY)
    scheme = SCHEMES[request.param]
    if scheme is None:
        model.save_pretrained(path, max_shard_size="3KB")
    else:
        w8a8.save(w8a8.quantize(model, scheme).model, path, max_shard_size="2KB")
    return path, w8a8.load(path).state_dict()


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_damage_is_an_error_of_ours_or_changes_nothing(saved, mutation, seed):
    path, expected = saved
    assert outcome(path, expected, path.with_name("scratch"), mutation, random.Random(seed))


def edited(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.fixture
def directory(tmp_path):
    w8a8.save(w8a8.quantize(llama(**TINY)).model, tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**12}, r"expected shape \(.*1000000000000"),
        ({"vocab_size": 2**62}, r"expected shape|cannot be made of it"),
        ({"intermediate_size": 10**12}, r"expected shape \(.*1000000000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than the files of this model can hold"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000, more than"),
        ({"hidden_size": "64"}, "transformers cannot read it"),
        ({"architectures": "LlamaForCausalLM"}, "transformers cannot read it|expected a list of names"),
        ({"architectures": ["__name__"]}, "has none of them"),
        ({"architectures": ["AutoConfig"]}, "has none of them"),
    ],
)
def test_absurd_sizes_take_no_memory(directory, changes, message):
    edited(directory, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        w8a8.load(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_deep_json_is_an_error(directory):
    for text in ('{"a":' * 100_000, "[" * 100_000):
        (directory / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
            w8a8.load(directory)


def test_a_key_twice_is_an_error(directory):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", '{"model_type": "opt",', 1))
    with pytest.raises(CheckpointError, match="'model_type' is there twice"):
        w8a8.load(directory)


def test_a_json_file_of_absurd_size_is_not_read(directory):
    with (directory / "config.json").open("r+b") as file:
        file.truncate(MAX_JSON + 1)  # sparse
    with pytest.raises(CheckpointError, match="the limit is 104,857,600"):
        w8a8.load(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_directory_are_not_followed(directory, tmp_path, name):
    (directory / name).rename(tmp_path / name)
    (directory / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*, outside .*: it is not followed"):
        w8a8.load(directory)


def test_the_links_of_a_hub_snapshot_are_followed(directory, tmp_path):
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in directory.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert list(quant_linears(w8a8.load(snapshot)))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link to /etc/passwd"):
        w8a8.load(snapshot)


@pytest.mark.parametrize("suffix", ["bin", *(pytest.param(s, marks=pytest.mark.slow) for s in ("pt", "pth", "ckpt"))])
def test_a_pickle_is_refused_with_a_line_that_converts_it(tmp_path, suffix):
    model = llama(**TINY)
    model.save_pretrained(tmp_path / "d")
    (tmp_path / "d/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / f"d/pytorch_model.{suffix}")
    with pytest.raises(CheckpointError, match=f"pytorch_model.{suffix} is a pickle, which may hold code") as caught:
        w8a8.load(tmp_path / "d")
    code = str(caught.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "d", check=True, timeout=120)
    loaded = w8a8.load(tmp_path / "d").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("it_ran").touch()
Path({witness!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "nobodys"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(directory, tmp_path, monkeypatch):
    """A model that transformers has no class for, with code that leaves a witness."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    (directory / "own.py").write_text(CODE.format(witness=str(tmp_path / "witness")))
    edited(
        directory,
        model_type="nobodys",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    return directory, tmp_path / "witness"


def test_no_code_of_a_repository_runs_unasked(own_code, capsys, monkeypatch):
    directory, witness = own_code
    for attempt in (w8a8.load, open_model):
        with pytest.raises(CheckpointError, match=r"brings code of its own .*own\.OwnModel.*--trust-remote-code"):
            attempt(directory)
    monkeypatch.setattr(sys, "argv", ["w8a8", "inspect", str(directory)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not witness.exists()


def test_code_of_a_repository_runs_when_it_is_trusted(own_code):
    directory, witness = own_code
    model = w8a8.load(directory, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert list(quant_linears(model))
    assert witness.exists()


def test_code_beside_a_class_of_transformers_stays_unread(directory, tmp_path):
    (directory / "own.py").write_text(CODE.format(witness=str(tmp_path / "witness")))
    edited(directory, auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    assert type(w8a8.load(directory)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "witness").exists()


def test_a_damaged_generation_config_is_an_error(directory):
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(W8A8Error, match=r"generation_config\.json"):
        w8a8.load(directory)


def test_names_that_are_too_long_for_a_file_are_missing_files(directory):
    os.unlink(directory / "model.safetensors")
    index = {"weight_map": {"a": "x" * 5000 + ".safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is missing"):
        w8a8.load(directory)

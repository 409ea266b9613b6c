import json

import pytest

import w8a8
from tests.conftest import mixtral, opt
from w8a8.core.plain import plain
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError
from w8a8.jobs.inspection import inspect_model, observe_model


def test_a_quantised_directory_tells_its_schemes_and_what_vllm_says(tmp_path):
    w8a8.quantize_directory(demo_directory(), tmp_path / "out", "w8a8-asym", include=["*.0.fc1"])
    found = inspect_model(tmp_path / "out")
    assert found.quantized
    assert [scheme.name for scheme in found.schemes] == ["w8a8-asym"]
    assert [module.name for module in found.coverage.quantized] == ["model.decoder.layers.0.fc1"]
    told = json.loads(json.dumps(plain(found.to_dict())))
    assert list(told)[:4] == ["directory", "quantized", "schemes", "vllm"]
    assert told["directory"] == str(tmp_path / "out")
    assert {"modules", "totals"} <= told.keys()


def test_of_a_float_one_it_tells_what_would_be_without_reading_a_weight(tmp_path):
    mixtral().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = inspect_model(tmp_path)
    assert (found.quantized, found.schemes, found.vllm) == (False, (), ())
    reasons = {module.name: module.reason for module in found.coverage.modules}
    assert reasons["model.layers.0.mlp.experts"] == "float now; `w8a8 quantize` takes it"
    assert "output head" in reasons["lm_head"]


def test_pairs_are_seen_in_a_forward(tmp_path):
    opt().save_pretrained(tmp_path)
    found = observe_model(tmp_path)
    assert found.groups
    with pytest.raises(CheckpointError):
        observe_model(tmp_path / "nothing")

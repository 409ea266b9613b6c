"""Models of classes that transformers does not have: registered with its Auto classes, or code beside the files."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import w8a8
from tests.conftest import contents, llama, logits
from w8a8.cli import main
from w8a8.demo.run import demo_directory
from w8a8.directories import quantize_directory
from w8a8.hf import enabled

CODE = """
from transformers import OPTConfig, OPTForCausalLM

class OwnConfig(OPTConfig):
    model_type = "own-in-its-directory"

class OwnModel(OPTForCausalLM):
    config_class = OwnConfig
"""


class RegisteredConfig(LlamaConfig):
    model_type = "registered-here"


class RegisteredModel(LlamaForCausalLM):
    config_class = RegisteredConfig


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})
    AutoConfig.register("registered-here", RegisteredConfig)
    AutoModelForCausalLM.register(RegisteredConfig, RegisteredModel)
    return RegisteredModel(RegisteredConfig(**llama().config.to_diff_dict() | {"model_type": "registered-here"})).eval()


def test_a_registered_class_is_saved_loaded_and_streamed(tmp_path, registered, tokens):
    registered.save_pretrained(tmp_path / "float")
    result = w8a8.quantize(registered)
    wanted = logits(registered, tokens)
    w8a8.save(registered, tmp_path / "saved", beside=tmp_path / "float", covered=result.coverage)
    loaded = w8a8.load(tmp_path / "saved")
    assert type(loaded) is RegisteredModel
    assert torch.equal(logits(loaded, tokens), wanted)
    with enabled():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tokens), wanted)
    quantize_directory(tmp_path / "float", tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "saved")


def test_a_class_that_nobody_registered_is_saved(tmp_path, tokens):
    model = RegisteredModel(RegisteredConfig(**llama().config.to_diff_dict() | {"model_type": "registered-here"}))
    w8a8.save(w8a8.quantize(model.eval()).model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["RegisteredModel"]


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A directory whose class is in a Python file of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "source"
    shutil.copytree(demo_directory(), directory)
    (directory / "own.py").write_text(CODE)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {"model_type": "own-in-its-directory", "architectures": ["OwnModel"], "auto_map": code}
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_the_command_quantises_a_model_with_code_of_its_own(tmp_path, with_code, monkeypatch, tokens):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["w8a8", "quantize", str(with_code), "-o", str(out), "--trust-remote-code"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert (out / "own.py").read_text() == CODE
    model = w8a8.load(with_code, trust_remote_code=True)
    wanted = logits(w8a8.quantize(model).model, tokens)
    assert torch.equal(logits(w8a8.load(out, trust_remote_code=True), tokens), wanted)

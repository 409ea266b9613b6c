"""The `save_pretrained` of a model that was quantised, in whatever way, writes what `w8a8.save` writes."""

import json
import shutil

import pytest
import torch

import w8a8
from tests.conftest import model_files
from tests.hf.conftest import IDS, opened, quantized
from w8a8 import W8A8Config
from w8a8.demo.run import demo_directory


def test_weight_only_models_are_written_in_words(source, tmp_path):
    model = opened(source, quantization_config=W8A8Config("w8a16"))
    w8a8.save(quantized(source, "w8a16"), tmp_path / "wanted")
    config = json.loads((tmp_path / "wanted/config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    model.save_pretrained(tmp_path / "loading")
    assert model_files(tmp_path / "loading") == model_files(tmp_path / "wanted")
    w8a8.load(tmp_path / "wanted").save_pretrained(tmp_path / "loaded")
    assert model_files(tmp_path / "loaded") == model_files(tmp_path / "wanted")
    w8a8.enable()
    opened(tmp_path / "wanted").save_pretrained(tmp_path / "enabled")
    assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")


def test_models_of_both_formats_come_back(tmp_path):
    model = quantized(demo_directory(), {"*.self_attn.*": "w8a8", "*": "w8a16"})
    w8a8.save(model, tmp_path / "wanted")
    w8a8.enable()
    found = opened(tmp_path / "wanted")
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    found.save_pretrained(tmp_path / "enabled")
    assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")


@pytest.mark.parametrize("options", [{}, {"head": "int8"}], ids=str)
def test_save_pretrained_writes_what_save_writes(source, tmp_path, options):
    if options and "mixtral" in str(source):
        pytest.skip("one is enough")
    model = opened(source, quantization_config=W8A8Config(**options))
    w8a8.save(quantized(source, **options), tmp_path / "wanted")
    model.save_pretrained(tmp_path / "loading")
    assert model_files(tmp_path / "loading") == model_files(tmp_path / "wanted")
    w8a8.save(model, tmp_path / "ours")
    assert model_files(tmp_path / "ours") == model_files(tmp_path / "wanted")
    w8a8.enable()
    opened(tmp_path / "wanted").save_pretrained(tmp_path / "enabled")
    assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")


def test_after_quantize_and_load_save_pretrained_writes_it_too(source, tmp_path):
    model = quantized(source)
    w8a8.save(model, tmp_path / "wanted")
    model.save_pretrained(tmp_path / "quantized")
    assert model_files(tmp_path / "quantized") == model_files(tmp_path / "wanted")
    w8a8.load(tmp_path / "wanted").save_pretrained(tmp_path / "loaded")
    assert model_files(tmp_path / "loaded") == model_files(tmp_path / "wanted")


def test_dense_models_need_no_option(tmp_path):
    model = opened(demo_directory(), quantization_config=W8A8Config())
    model.save_pretrained(tmp_path / "plain")
    w8a8.save(model, tmp_path / "wanted")
    assert model_files(tmp_path / "plain") == model_files(tmp_path / "wanted")
    shutil.rmtree(tmp_path / "plain")
    w8a8.enable()
    opened(tmp_path / "wanted").save_pretrained(tmp_path / "plain")
    assert model_files(tmp_path / "plain") == model_files(tmp_path / "wanted")

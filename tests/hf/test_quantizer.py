"""A model is quantised while transformers loads it, each weight to what `w8a8.quantize` makes of it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import llama, mixtral, nemotron_h, opt, qwen3_moe
from tests.hf.conftest import IDS, opened, quantized
from w8a8 import W8A8Config
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, ModelError, PatternError, SchemeError
from w8a8.layers.linear import quant_linears
from w8a8.model.experts import holds_experts


@pytest.mark.parametrize("include", [["*.q_proj"], ["*.q_proj", "*.experts.1.*"]], ids=str)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, nemotron_h], ids=lambda make: make.__name__)
def test_experts_are_taken_as_quantize_takes_them(tmp_path, make, include):
    make().save_pretrained(tmp_path / "source")
    model = opened(tmp_path / "source", quantization_config=W8A8Config(include=include))
    wanted = quantized(tmp_path / "source", include=include)
    assert [type(m) for m in model.modules()] == [type(m) for m in wanted.modules()]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)


def test_experts_that_lie_stacked_in_the_files_stay_float(tmp_path):
    mixtral().save_pretrained(tmp_path / "source", save_original_format=False)
    model = opened(tmp_path / "source", quantization_config=W8A8Config())
    wanted = quantized(tmp_path / "source", exclude=["*.experts.*"])
    assert not holds_experts(model)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16"])
def test_the_model_is_that_of_quantize(source, scheme):
    model = opened(source, quantization_config=W8A8Config(scheme))
    wanted = quantized(source, scheme)
    found, held = model.state_dict(), wanted.state_dict()
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) and found[name].dtype == held[name].dtype for name in held)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    lost = [{name: layer.weight_sqnr_db for name, layer in quant_linears(m)} for m in (model, wanted)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_another_dtype_it_is_what_quantize_makes_of_the_model_in_that_dtype(dtype):
    model = opened(demo_directory(), dtype=dtype, quantization_config=W8A8Config())
    assert torch.equal(model(IDS).logits, quantized(demo_directory(), dtype=dtype)(IDS).logits)


def test_it_takes_how_layers_are_run():
    model = opened(demo_directory(), quantization_config=W8A8Config(kernel="reference", strict=True, head="int8"))
    assert {(layer.kernel, layer.strict) for _, layer in quant_linears(model)} == {("reference", True)}
    assert torch.equal(model(IDS).logits, quantized(demo_directory(), head="int8")(IDS).logits)


@pytest.mark.parametrize("options", [{"head": "int8"}, {"include": ["*fc?"], "exclude": ["*.1.*"]}], ids=str)
def test_its_options_are_those_of_quantize(options):
    model = opened(demo_directory(), quantization_config=W8A8Config(**options))
    wanted = quantized(demo_directory(), **options)
    assert [name for name, _ in quant_linears(model)] == [name for name, _ in quant_linears(wanted)]
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)


def test_what_cannot_be_done_is_told_before_anything_is_loaded():
    with pytest.raises(SchemeError, match=r"to measure them on: load the float model and call"):
        W8A8Config("w8a8-static")
    with pytest.raises(SchemeError, match="unknown scheme 'w8a9'"):
        W8A8Config("w8a9")
    with pytest.raises(ModelError, match="head='int4'"):
        W8A8Config(head="int4")
    with pytest.raises(PatternError, match=r"include='\*fc2' is a string; give a list of patterns"):
        W8A8Config(include="*fc2")
    with pytest.raises(PatternError, match=r"exclude: a pattern is a string such as .*, found 3"):
        W8A8Config(exclude=[3])
    with pytest.raises(TypeError, match="shceme"):
        W8A8Config(shceme="w8a8")
    with pytest.raises(PatternError, match="'fc9' matches none"):
        opened(demo_directory(), quantization_config=W8A8Config(include=["fc9"]))
    with pytest.raises(SchemeError, match="lm_head is tied to another layer, so the files"):
        opened(demo_directory(), quantization_config=W8A8Config(include=["*", "lm_head"]))


def test_a_weight_that_is_not_finite_is_refused(tmp_path, caplog):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # transformers' own, after a report
        opened(tmp_path / "bad", quantization_config=W8A8Config())
    assert "nan at index (3, 4)" in caplog.text
    assert "while quantising model.layers.1.mlp.up_proj" in caplog.text


def test_a_weight_that_is_not_in_the_files_is_not_made_up(tmp_path):
    shutil.copytree(demo_directory(), tmp_path / "torn")
    tensors = load_file(tmp_path / "torn" / "model.safetensors")
    del tensors["model.decoder.layers.2.fc1.weight"]
    save_file(tensors, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.decoder\.layers\.2\.fc1 is to be quantised .* not in the files"):
        opened(tmp_path / "torn", quantization_config=W8A8Config())
    left = opened(tmp_path / "torn", quantization_config=W8A8Config(exclude=["model.decoder.layers.2.fc1"]))
    assert type(left.get_submodule("model.decoder.layers.2.fc1")) is torch.nn.Linear


def test_an_opt_without_tied_head_keeps_it_float(tmp_path):
    opt(tie_word_embeddings=False).save_pretrained(tmp_path / "source")
    model = opened(tmp_path / "source", quantization_config=W8A8Config())
    assert isinstance(model.lm_head, torch.nn.Linear)
